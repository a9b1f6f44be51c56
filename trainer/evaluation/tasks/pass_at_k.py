"""Several samples for one prompt: the row's scores are their means, and pass@k is computed over all of them.

The row stays the unit of statistics: samples of one row resemble each other, and must not narrow an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import Metric, TaskRow

if TYPE_CHECKING:
    from trainer.evaluation.generate import GeneratedAnswer

PASS_PREFIX = "pass_at_"


def pass_at_k_metrics(draws: int) -> tuple[Metric, ...]:
    """The pass@k metrics (Chen et al. 2021) of a task that writes `draws` answers to each row: k of 2, 4, 8 ... and `draws`.

    pass@k is the chance that one of k answers is right, so it is for tasks whose answers are right or wrong.
    """
    metrics = []
    for k in powers_up_to(draws):  # pass@1 is the task's own metric
        name = f"{PASS_PREFIX}{k}"
        metrics.append(Metric(name, f"share of rows of which one of {k} answers is right, 0 to 1", ratio=(name, None)))
    return tuple(metrics)


def powers_up_to(draws: int) -> list[int]:
    """2, 4, 8 ... below `draws`, and `draws` itself; empty for one draw."""
    powers_of_two = [2**power for power in range(1, draws.bit_length())]
    return sorted({*powers_of_two, draws} - {1})


def texts_by_prompt(written: Sequence[GeneratedAnswer], num_prompts: int) -> list[list[str]]:
    """The answers to each prompt, draw by draw, without white space around them."""
    texts: list[list[str]] = [[] for _ in range(num_prompts)]
    for answer in written:
        texts[answer.prompt_index].append(answer.text.strip())
    return texts


def row_of_draws(
    row: TaskRow, texts: list[str], scores: Sequence[dict[str, float]], metrics: Sequence[Metric] = ()
) -> TaskRow:
    """Fill in the answer and the scores of a report row, in place, from all answers to its prompt; returns the row.

    `texts` are the answers, and `scores` those of each answer, such as [{"right": 1.0}, {"right": 0.0}]. Of several answers, the
    row gets the mean scores ({"right": 0.5}) and pass@k for each k in `metrics`, shows the first answer, and keeps all of them in
    `items`.
    """
    row.answer = texts[0]
    row.scores = dict(scores[0])
    if len(texts) == 1:
        return row
    for name in scores[0]:
        row.scores[name] = sum(draw[name] for draw in scores) / len(scores)
    # The first score of these tasks is 1 for a right answer and 0 for a wrong one.
    num_right = sum(next(iter(draw.values())) == 1.0 for draw in scores)
    for metric in metrics:
        if metric.name.startswith(PASS_PREFIX):
            k = int(metric.name.removeprefix(PASS_PREFIX))
            row.scores[metric.name] = pass_probability(k, num_right, len(texts))
    draws_note = f"first of {len(texts)} draws"
    row.note = f"{draws_note}; {row.note}" if row.note else draws_note
    row.items = {"answers": texts}
    return row


def pass_probability(k: int, num_right: int, draws: int) -> float:
    """The unbiased estimate of pass@k from `draws` answers of which `num_right` are right.

    It is the chance that at least one of k of these answers, drawn without repetition, is right.
    """
    all_wrong = comb(draws - num_right, k) / comb(draws, k)
    return 1.0 - all_wrong
