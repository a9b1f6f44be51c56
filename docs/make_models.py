"""Writes the table of `docs/models.md` from `tests/models/table.json`, which `python -m tests.models.sweep` makes.

python docs/make_models.py
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.sweep import TRAINS, read  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by docs/make_models.py from tests/models/table.json -->", "<!-- end -->"
CASES = {
    "full": "`tuning=full`, one process",
    "lora": "`tuning=lora`, one process",
    "fsdp2 full": "`strategy=fsdp2`",
    "zero3 full": "`strategy=zero3`",
}
"""What is counted before the table."""


def word(answer: dict[str, Any]) -> str:
    """What a cell says of one case."""
    return answer["outcome"] if answer["outcome"] in TRAINS else f"**{answer['outcome']}**"


def strategies(found: dict[str, Any]) -> str:
    """The strategies that were compared with `single`, and those that failed."""
    cases = [(case, found[case]["outcome"]) for case in found if " " in case]
    return ", ".join(case if outcome in TRAINS else f"**{case}: {outcome}**" for case, outcome in cases) or "-"


def why(found: dict[str, Any]) -> str:
    """The first sentence of what is refused."""
    reasons = [found.get("reason"), *(a.get("reason") for a in found.values() if isinstance(a, dict))]
    said = list(dict.fromkeys(reason.removeprefix("ConfigError: ") for reason in reasons if reason))
    return "; ".join(said).replace("|", "\\|")


def shared_row(found: dict[str, Any]) -> str:
    """Whether several ranks may share a row of an architecture (`parallel.sequence`), and if not, why."""
    if found["sequence"] == "proven":
        return "yes"
    return "no" if found["sequence"] == "-" else f"no: {found['sequence']}"


def outcome(found: dict[str, Any], case: str) -> str:
    """What came of an architecture in a case; of those that do not train in one process nothing else was asked."""
    if found["outcome"] != "made":
        return str(found["outcome"])
    return str(found.get(case, found["full"])["outcome"])


def rows(table: dict[str, Any]) -> list[str]:
    """The table, a line for each architecture, and before it the counts."""
    types = table["types"]
    counted = [found for found in types.values() if "variant_of" not in found]
    counts = {case: Counter(outcome(found, case) for found in counted) for case in CASES}
    versions = ", ".join(f"{name} {number}" for name, number in table["versions"].items())
    lines = [
        f"These are the counts for all {len(counted)} architectures ({versions}). Rows of variants are not counted:",
        "",
    ]
    for case, count in counts.items():
        told = ", ".join(f"{number} {name}" for name, number in count.most_common())
        trains = sum(count[name] for name in TRAINS) / len(counted)
        lines.append(f"- {CASES[case]}: {trains:.1%} train ({told})")
    num_shared = sum(found.get("sequence") == "proven" for found in counted)
    lines.append(f"- `parallel.sequence`: {num_shared} of the {counts['full']['padding-free']} padding-free ones")
    lines += [
        "",
        "| model_type | class | full | LoRA | attention | on two ranks | shared row | why not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in types.items():
        if found["outcome"] != "made":
            lines.append(f"| {name} | {found['class']} | **{found['outcome']}** | | | | {why(found)} |")
            continue
        attention = found["full"].get("attention", found["lora"].get("attention", "-"))
        cells = [
            name,
            found["class"],
            word(found["full"]),
            word(found["lora"]),
            attention,
            strategies(found),
            shared_row(found),
            why(found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(text: str) -> str:
    """The page with its table made anew."""
    made = "\n".join(rows(read()))
    return re.sub(rf"({re.escape(BEGIN)}\n).*?({END})", lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
