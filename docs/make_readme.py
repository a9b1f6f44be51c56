"""Writes the numbers of `README.md` that stand between marks, from the tables that hold them.

python docs/make_readme.py
"""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"
MODELS = ROOT / "tests" / "models" / "table.json"
PLANS = ROOT / "benchmarks" / "results" / "planning.json"
TRAINS = ("padding-free", "padded")
"""Outcomes of an architecture that trains."""


def architectures() -> str:
    """How many architectures train, and how many of them without padding."""
    table = json.loads(MODELS.read_text(encoding="utf-8"))
    counted = [found for found in table["types"].values() if "variant_of" not in found]
    made = [found for found in counted if found["outcome"] == "made"]
    version = ".".join(table["versions"]["transformers"].split(".")[:2])

    def train(case: str) -> int:
        """How many train in a case; one that fails in one process was not asked for others."""
        return sum(found.get(case, found["full"])["outcome"] in TRAINS for found in made)

    without_padding = sum(found["full"]["outcome"] == "padding-free" for found in made)
    return (
        f"- **Architectures:** transformers {version} has {len(counted)} architectures of causal models. We could make tiny "
        f"random copies of {len(made)} of them. {train('full')} copies train with the same result as in plain transformers "
        f"({without_padding} without padding), {train('lora')} with LoRA, {train('fsdp2 full')} under `fsdp2`, "
        f"{train('zero3 full')} under `zero3`. [docs/models.md](docs/models.md) lists each architecture."
    )


def plans() -> str:
    """How far plans are off published measurements of memory on one GPU."""
    rows = [row for row in json.loads(PLANS.read_text(encoding="utf-8"))["rows"] if row["strategy"] == "single"]

    like_ours = [abs(row["off_percent"]) for row in rows if row["own_kind"]]
    others = [abs(row["off_percent"]) for row in rows if not row["own_kind"]]
    return (
        f"- **Plans:** we compared planned memory with published measurements on one GPU. For {len(like_ours)} measurements of "
        f"LoRA runs whose trainer, like shardtune, never stores all logits, the plan is within {max(like_ours):.1f} % of the "
        f"measured memory. For {len(others)} measurements of other trainers or methods, the median error is "
        f"{statistics.median(others):.1f} %, and the worst {max(others):.1f} % "
        "([docs/evidence/plans.md](docs/evidence/plans.md))."
    )


SECTIONS: dict[str, Any] = {"tests/models/table.json": architectures, "benchmarks/results/planning.json": plans}
"""What makes the text of each marked place, by the file that the mark names."""


def page(text: str) -> str:
    """README with its marked places made anew."""
    for source, make in SECTIONS.items():
        begin = f"<!-- made by docs/make_readme.py from {source} -->"
        made = textwrap.fill(make(), 130, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        pattern = rf"({re.escape(begin)}\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda match, made=made: f"{match[1]}{made}\n{match[2]}", text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
