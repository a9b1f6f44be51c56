"""Writes the tables of learning rates in `docs/peft.md` from `trainer/optim/rates.py`.

python docs/make_rates.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer.optim.rates import (  # noqa: E402
    FACTOR_OF_ADAMW_RATE,
    RATE_BY_METHOD,
    RATE_BY_OPTIMIZER_AND_METHOD,
    RATES_BY_OBJECTIVE,
    UsualRate,
)
from trainer.tuning.table import TUNING_METHODS as CHOICES  # noqa: E402

PAGE = ROOT / "docs" / "peft.md"
BEGIN, END = "<!-- made by docs/make_rates.py from trainer/optim/rates.py -->", "<!-- end -->"
HEADER = ["| {} | default learning rate | range to search | source |", "|---|---|---|---|"]


def row(name: str, rate: UsualRate) -> str:
    """The row of one rate."""
    return f"| {name} | {short(rate.usual)} | {short(rate.low)} to {short(rate.high)} | {rate.source} |"


def short(rate: float) -> str:
    """A rate as it is typed: `2e-4`, `0.3`."""
    if rate >= 0.01:
        return f"{rate:g}"
    digits, _, exponent = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"


def typed(method: str) -> str:
    """A method as it is typed behind `tuning=`; one of `tuning=peft` has its name behind `tuning.type=`."""
    return f"`{method}`" if method in CHOICES else f"`peft`, `tuning.type={method}`"


def times_adamw(factor: float) -> str:
    """A multiple of AdamW's rate in words."""
    return "the same as with AdamW" if factor == 1 else f"{factor:g} times the rate with AdamW"


def tables() -> str:
    """The three tables: by method, by objective, by optimizer."""
    by_method = [row(typed(method), rate) for method, rate in RATE_BY_METHOD.items()]
    same: dict[int, list[str]] = {}
    for objective, rates in RATES_BY_OBJECTIVE.items():
        same.setdefault(id(rates), []).append(objective)
    by_objective = []
    for objectives in same.values():
        rates = RATES_BY_OBJECTIVE[objectives[0]]
        names = ", ".join(f"`{objective}`" for objective in objectives)
        by_objective += [row(f"{names}: full tuning", rates.full), row(f"{names}: LoRA", rates.lora)]
    by_optimizer = []
    for optimizer, (factor, source) in FACTOR_OF_ADAMW_RATE.items():
        if source:
            by_optimizer.append(f"| `{optimizer}` | {times_adamw(factor)} | | {source.partition(': ')[2] or '-'} |")
    for (optimizer, method), rate in RATE_BY_OPTIMIZER_AND_METHOD.items():
        by_optimizer.append(row(f"`{optimizer}` with {typed(method)}", rate))
    parts = [
        "With AdamW, for `objective=sft`, `pretrain` and `distillation`:",
        "\n".join([HEADER[0].format("`tuning=`"), HEADER[1], *by_method]),
        "With AdamW, for other objectives:",
        "\n".join([HEADER[0].format("`objective=`"), HEADER[1], *by_objective]),
        "With other optimizers:",
        "\n".join([HEADER[0].format("`optim=`"), HEADER[1], *by_optimizer]),
    ]
    return "\n\n".join(parts)


def page(text: str) -> str:
    """`docs/peft.md` with its tables made anew."""
    pattern = rf"({re.escape(BEGIN)}\n).*?({re.escape(END)})"
    return re.sub(pattern, lambda match: f"{match[1]}{tables()}\n{match[2]}", text, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
