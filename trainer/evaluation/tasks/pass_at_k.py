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
    powers_of_two = [2**power for power in range(1, draws.bit_length())]
    metrics = []
    for k in sorted({*powers_of_two, draws} - {1}):  # pass@1 is the task's own metric
        name = f"{PASS_PREFIX}{k}"
        metrics.append(Metric(name, f"share of rows of which one of {k} answers is right, 0 to 1", ratio=(name, None)))
    return tuple(metrics)


def texts_by_prompt(written: Sequence[WrittenAnswer], prompts: int) -> list[list[str]]:
    """The answers to each prompt, draw by draw, without white space around them."""
    texts: list[list[str]] = [[] for _ in range(prompts)]
    for answer in written:
        texts[answer.prompt].append(answer.text.strip())
    return texts


def row_of_draws(
    row: TaskRow, texts: list[str], scores: Sequence[dict[str, float]], metrics: Sequence[Metric] = ()
) -> TaskRow:
    """The row with its answer and scores filled in, `scores` being those of each answer in `texts`.

    Of several answers, the row gets the mean scores, shows the first answer, and keeps all of them.
    """
    row.answer = texts[0]
    row.scores = dict(scores[0])
    if len(texts) == 1:
        return row
    for name in scores[0]:
        row.scores[name] = sum(draw[name] for draw in scores) / len(scores)
    # The first score of these tasks is 1 for a right answer and 0 for a wrong one.
    right = sum(next(iter(draw.values())) == 1.0 for draw in scores)
    for metric in metrics:
        if metric.name.startswith(PASS_PREFIX):
            k = int(metric.name.removeprefix(PASS_PREFIX))
            row.scores[metric.name] = pass_probability(k, right, len(texts))
    row.note = "; ".join(filter(None, [f"first of {len(texts)} draws", row.note]))
    row.items = {"answers": texts}
    return row


def pass_probability(k: int, right: int, draws: int) -> float:
    """Chance that at least one of k answers, drawn without repetition from these, is right."""
    return 1.0 - comb(draws - right, k) / comb(draws, k)
