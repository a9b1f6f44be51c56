"""Several samples for one prompt: the row's scores are their means, and pass@k is computed over all of them.

The row stays the unit of statistics: samples of one row resemble each other, and must not narrow an interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

from trainer.evaluation.tasks.base import RatioOfSums, TaskMetric, TaskRow

if TYPE_CHECKING:
    from trainer.evaluation.generate import GeneratedAnswer

PASS_PREFIX = "pass_at_"


def pass_at_k_metrics(num_samples: int) -> tuple[TaskMetric, ...]:
    """The pass@k metrics (Chen et al. 2021) of a task that samples `num_samples` answers to each row.

    For k = 2, 4, 8 ... and all samples. pass@k is the chance that one of k answers is right, so it is for tasks whose answers
    are right or wrong. Empty for one sample.
    """
    # The score of a row with the metric's name is its estimate of pass@k (`set_samples_of_row`), of which the metric is the mean.
    metrics = []
    for k in sample_counts_for_pass_at_k(num_samples):  # pass@1 is the task's own metric
        name = f"{PASS_PREFIX}{k}"
        metrics.append(
            TaskMetric(
                name, f"share of rows of which one of {k} answers is right, 0 to 1", ratio_of_sums=RatioOfSums(name)
            )
        )
    return tuple(metrics)


def sample_counts_for_pass_at_k(num_samples: int) -> list[int]:
    """The values of k for which pass@k is reported: 2, 4, 8 ... below `num_samples`, and that number; 6 -> [2, 4, 6], 1 -> []."""
    powers_of_two = [2**power for power in range(1, num_samples.bit_length())]
    return sorted({*powers_of_two, num_samples} - {1})


def texts_by_prompt(answers: Sequence[GeneratedAnswer], num_prompts: int) -> list[list[str]]:
    """Sort generated answers by their prompt: the texts of each, sample by sample, without white space around them."""
    texts: list[list[str]] = [[] for _ in range(num_prompts)]
    for answer in answers:
        texts[answer.prompt_index].append(answer.text.strip())
    return texts


def set_samples_of_row(
    row: TaskRow, answers: list[str], sample_scores: Sequence[dict[str, float]], metrics: Sequence[TaskMetric] = ()
) -> None:
    """Fill a report row, in place, from all answers that were sampled for its prompt.

    - One answer: the row has this answer and its scores.
    - Several: the row has the first answer, the mean of each score, pass@k for each such metric in `metrics`, a note that
      there are several, and all answers in `items`.

    `sample_scores`: the scores of each answer: [{"right": 1.0}, {"right": 0.0}] gives the row {"right": 0.5}.
    """
    row.answer = answers[0]
    row.scores = dict(sample_scores[0])
    if len(answers) == 1:
        return
    for name in sample_scores[0]:
        row.scores[name] = sum(scores[name] for scores in sample_scores) / len(sample_scores)
    # pass@k is only for tasks whose first score is 1 for a right answer and 0 for a wrong one.
    num_right = sum(next(iter(scores.values())) == 1.0 for scores in sample_scores)
    for metric in metrics:
        if metric.name.startswith(PASS_PREFIX):
            k = int(metric.name.removeprefix(PASS_PREFIX))
            row.scores[metric.name] = pass_probability(k, num_right, len(answers))
    samples_note = f"first of {len(answers)} draws"
    row.note = f"{samples_note}; {row.note}" if row.note else samples_note
    row.items = {"answers": answers}


def pass_probability(k: int, num_right: int, num_samples: int) -> float:
    """The unbiased estimate of pass@k from `num_samples` answers of which `num_right` are right.

    It is the chance that at least one of k of these answers, chosen without repetition, is right.
    """
    chance_all_wrong = comb(num_samples - num_right, k) / comb(num_samples, k)
    return 1.0 - chance_all_wrong
