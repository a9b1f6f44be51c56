"""Several samples for one prompt: the row's scores are their means, and pass@k is computed over all of them.

The row stays the unit of statistics: samples of one row resemble each other, and must not narrow an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import Metric, TaskRow

if TYPE_CHECKING:
    from trainer.evaluation.generate import WrittenAnswer

PASS_PREFIX = "pass_at_"


def pass_at_k_metrics(draws: int) -> tuple[Metric, ...]:
    """pass@k (Chen et al. 2021) of tasks that are right or wrong: k of 2, 4, 8 ... up to the number of draws."""
    wanted = sorted({*(2**power for power in range(1, draws.bit_length())), draws} - {1})
    return tuple(
        Metric(
            f"{PASS_PREFIX}{k}",
            f"share of rows of which one of {k} answers is right, 0 to 1",
            ratio=(f"{PASS_PREFIX}{k}", None),
        )
        for k in wanted
    )


def texts_by_prompt(written: Sequence[WrittenAnswer], prompts: int) -> list[list[str]]:
    """The texts of each prompt, draw by draw, without white space around them."""
    found: list[list[str]] = [[] for _ in range(prompts)]
    for one in written:
        found[one.prompt].append(one.text.strip())
    return found


def row_of_draws(
    row: TaskRow, texts: list[str], scores: Sequence[dict[str, float]], metrics: Sequence[Metric] = ()
) -> TaskRow:
    """A row of one answer as it is; of several with the means of their scores, the first answer shown and all kept."""
    row.answer, row.scores = texts[0], dict(scores[0])
    if len(texts) == 1:
        return row
    row.scores = {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}
    right = sum(next(iter(each.values())) == 1.0 for each in scores)
    for metric in metrics:
        if metric.name.startswith(PASS_PREFIX):
            row.scores[metric.name] = pass_probability(int(metric.name.removeprefix(PASS_PREFIX)), right, len(texts))
    row.note = "; ".join(filter(None, [f"first of {len(texts)} draws", row.note]))
    row.items = {"answers": texts}
    return row


def pass_probability(k: int, right: int, draws: int) -> float:
    """Chance that at least one of k answers, drawn without repetition from these, is right."""
    return 1.0 - comb(draws - right, k) / comb(draws, k)
