"""Licences of base and data as they are stated, and what stands against giving the tuned model away. No legal advice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc($|[-_ ])|non-?commercial|research-only|academic", re.IGNORECASE)
NO_DERIVATIVES = re.compile(r"(^|[-_ ])nd($|[-_ ])|no-?deriv", re.IGNORECASE)
SHARE_ALIKE = re.compile(r"(^|[-_ ])sa($|[-_ ])|^(a|l)?gpl|odbl", re.IGNORECASE)
OWN_TERMS = re.compile(r"^(llama|gemma|other|.*openrail|.*rail|deepseek|falcon|qwen|apple)", re.IGNORECASE)


def told(base: str | None, sources: list[Mapping[str, Any]], own: str | None) -> list[str]:
    """What stands between these licences and a release under `own`, one line each; stated licences alone are read."""
    named = {"the base model": base} | {f"the data of {each.get('name')}": each.get("licence") for each in sources}
    lines = []
    for what, licence in named.items():
        if not licence:
            lines.append(
                f"{what} states no licence: without one nobody else may use it, nor perhaps what was made of it"
            )
            continue
        if NO_DERIVATIVES.search(licence):
            lines.append(f"{what} is under {licence}, which allows no derivatives; a tuned model may be one")
        if NON_COMMERCIAL.search(licence):
            against = f", and {own} would allow that" if own and not NON_COMMERCIAL.search(own) else ""
            lines.append(f"{what} is under {licence}, which allows no commercial use{against}")
        if SHARE_ALIKE.search(licence):
            other = (
                f", and the tuned model is to be given under {own}" if own and own.lower() != licence.lower() else ""
            )
            lines.append(
                f"{what} is under {licence}: what is derived from it must be given on under the same terms{other}"
            )
        if OWN_TERMS.match(licence):
            lines.append(
                f"{what} is under {licence}, a licence of its own terms: names, uses and duties that bind the export"
            )
    return lines
