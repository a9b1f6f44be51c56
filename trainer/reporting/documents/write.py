"""Documents of a model as Markdown: one template each, filled from the facts of the model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.reporting.documents.compute import GENERAL_PURPOSE, SYSTEMIC
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.numbers import format_metric

PAPERS = "papers"
"""Directory of the papers in an export."""


def write_papers(directory: Path, names: list[str], facts: ModelFacts) -> None:
    """Write the papers by these names into `papers/` of the directory. Errors: OSError."""
    for name in names:
        (directory / PAPERS).mkdir(exist_ok=True)
        (directory / PAPERS / f"{name}.md").write_text(render(name, facts), encoding="utf-8")


def render(name: str, facts: ModelFacts, **more: Any) -> str:
    """A document as Markdown, from the template `<name>.md.j2`. It ends with one newline.

    `name`: such as `card`. `more`: variables of that template beside those that all templates have.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trainer.reporting.documents", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "cell": cell,
        "last": last_part,
        "readable": format_metric,
        "json": json.dumps,
    }
    recorded = {key: content for key, content in facts.run.as_json().items() if content is not None}
    # `{{ run.strategy }}` is "not recorded" if the run's record lacks it, and no error.
    text = environment.get_template(f"{name}.md.j2").render(
        facts=facts,
        run=defaultdict(lambda: "not recorded", recorded),
        audit=facts.audit,
        compute=facts.compute,
        answer=facts.answer,
        GENERAL_PURPOSE=GENERAL_PURPOSE,
        SYSTEMIC=SYSTEMIC,
        **more,
    )
    # A section that has nothing to say leaves its blank lines behind.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def number(value: Any, form: str = ".4g") -> str:
    """A number as people read it; `not known` for None."""
    return "not known" if value is None else format(value, form)


def cell(value: Any) -> str:
    """A text that stays in its cell of a table, and makes no markup of its own."""
    return re.sub(r"([|<>`\[\]*_])", r"\\\1", " ".join(str(value).split()))


def last_part(value: Any) -> str:
    """The last part of a path, so that no paper shows the directories of a machine."""
    text = str(value)
    return Path(text).name if text.startswith(("/", ".", "~")) else text
