"""Papers as Markdown: one template each, filled from what is known."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.papers.compute import GENERAL_PURPOSE, SYSTEMIC
from trainer.papers.known import Known

PAPERS = "papers"
"""Their directory in an export."""


def paper(name: str, known: Known) -> str:
    """The text of a paper, or of `measured`, the part of the card."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.papers", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "cell": cell, "last": last_part}
    recorded = defaultdict(
        lambda: "not recorded", {key: value for key, value in known.run.items() if value is not None}
    )
    facts = {"known": known, "run": recorded, "audit": known.audit, "compute": known.compute, "answer": known.answer}
    text = environment.get_template(f"{name}.md.j2").render(**facts, GENERAL_PURPOSE=GENERAL_PURPOSE, SYSTEMIC=SYSTEMIC)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write_papers(directory: Path, names: list[str], known: Known) -> None:
    """Write each into `papers/`. Errors: OSError."""
    for name in names:
        (directory / PAPERS).mkdir(exist_ok=True)
        (directory / PAPERS / f"{name}.md").write_text(paper(name, known), encoding="utf-8")


def number(value: Any, form: str = ".4g") -> str:
    """A number as people read it; what is not known says so."""
    return "not known" if value is None else format(value, form)


def cell(value: Any) -> str:
    """A text that stays in its cell of a table, and makes no markup of its own."""
    return re.sub(r"([|<>`\[\]*_])", r"\\\1", " ".join(str(value).split()))


def last_part(value: Any) -> str:
    """The last part of a path, so that no paper tells the layout of a machine."""
    text = str(value)
    return Path(text).name if text.startswith(("/", ".", "~")) else text
