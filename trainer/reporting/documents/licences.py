"""Licences of base and data as stated, and what they say against publishing the tuned model. No legal advice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

NON_COMMERCIAL_REGEX = re.compile(r"(^|[-_ ])nc($|[-_ ])|non-?commercial|research-only|academic", re.IGNORECASE)
NO_DERIVATIVES_REGEX = re.compile(r"(^|[-_ ])nd($|[-_ ])|no-?deriv", re.IGNORECASE)
SHARE_ALIKE_REGEX = re.compile(r"(^|[-_ ])sa($|[-_ ])|^(a|l)?gpl|odbl", re.IGNORECASE)
OWN_TERMS_REGEX = re.compile(r"^(llama|gemma|other|.*openrail|.*rail|deepseek|falcon|qwen|apple)", re.IGNORECASE)


def licence_conflicts(base: str | None, sources: list[Mapping[str, Any]], export_licence: str | None) -> list[str]:
    """List what the licences of base and data say against releasing the tuned model under `export_licence`, for its model card.

    `base`: licence of the base model. `sources`: of the data, each with `name` and `licence`. None means that no licence is
    stated.
    """
    licences = {"the base model": base}
    for source in sources:
        licences[f"the data of {source.get('name')}"] = source.get("licence")
    lines = []
    for origin, licence in licences.items():
        if not licence:
            lines.append(
                f"{origin} states no licence: without one nobody else may use it, nor perhaps what was made of it"
            )
            continue
        for consequence in _licence_consequences(licence, export_licence):
            lines.append(f"{origin} is under {licence}{consequence}")
    return lines


def _licence_consequences(licence: str, export_licence: str | None) -> Iterator[str]:
    """Say what a licence means for a release under `export_licence`: none to four clauses, to follow "the base is under gpl-3.0".

    `cc-by-nc-4.0` gives one: ", which allows no commercial use". The terms are recognised in the licence's name.
    """
    if NO_DERIVATIVES_REGEX.search(licence):
        yield ", which allows no derivatives; a tuned model may be one"
    if NON_COMMERCIAL_REGEX.search(licence):
        clash = ""
        if export_licence and not NON_COMMERCIAL_REGEX.search(export_licence):
            clash = f", and {export_licence} would allow that"
        yield f", which allows no commercial use{clash}"
    if SHARE_ALIKE_REGEX.search(licence):
        clash = ""
        if export_licence and export_licence.lower() != licence.lower():
            clash = f", and the tuned model is to be given under {export_licence}"
        yield f": what is derived from it must be given on under the same terms{clash}"
    if OWN_TERMS_REGEX.match(licence):
        yield ", a licence of its own terms: names, uses and duties that bind the export"
