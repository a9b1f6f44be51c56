"""Documents of a model as Markdown: one template each, filled from the facts of the model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.reporting.documents.compute import GENERAL_PURPOSE_FLOP, SYSTEMIC_RISK_FLOP
from trainer.reporting.documents.facts import ModelFacts
from trainer.reporting.numbers import format_metric

PAPERS_DIR_NAME = "papers"
"""Directory of the papers in an export."""


def write_papers(directory: Path, names: list[str], facts: ModelFacts) -> None:
    """Write compliance documents, such as a data sheet, into `papers/` of an export: one for each name. Raises OSError."""
    for name in names:
        (directory / PAPERS_DIR_NAME).mkdir(exist_ok=True)
        (directory / PAPERS_DIR_NAME / f"{name}.md").write_text(render_document(name, facts), encoding="utf-8")


def render_document(name: str, facts: ModelFacts, **template_variables: Any) -> str:
    """Fill the template `<name>.md.j2` of a document about a model, and return its Markdown, which ends with one newline.

    `name`: such as `card`. `template_variables`: of this template, beside those that all have.
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
        "number": format_number_or_unknown,
        "cell": escape_table_cell,
        "last": last_path_part,
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
        # FLOP of training from which the EU presumes a general-purpose model, and one with systemic risk.
        GENERAL_PURPOSE=GENERAL_PURPOSE_FLOP,
        SYSTEMIC=SYSTEMIC_RISK_FLOP,
        **template_variables,
    )
    # A section that has nothing to say leaves its blank lines behind.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def format_number_or_unknown(value: Any, number_format: str = ".4g") -> str:
    """A number as people read it; `not known` for None."""
    return "not known" if value is None else format(value, number_format)


def escape_table_cell(value: Any) -> str:
    """A value as one line of text for a cell of a Markdown table; a backslash stands before characters of markup such as `|`."""
    return re.sub(r"([|<>`\[\]*_])", r"\\\1", " ".join(str(value).split()))


def last_path_part(value: Any) -> str:
    """The last part of a path, so that no paper shows the directories of a machine; any other text as it is."""
    text = str(value)
    return Path(text).name if text.startswith(("/", ".", "~")) else text
