"""Gaps of a classifier between groups of people: demographic parity, equalised odds, accuracy (as fairlearn defines them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from trainer.data.fields import RowError, show_value
from trainer.evaluation.tasks.base import RatioOfSums, TaskCase, TaskMetric, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.significance import SIGNIFICANCE_LEVEL, max_statistic_p

MIN_ROWS = 10
"""A group with fewer rows than this is reported as too small."""
NUM_SHUFFLES = 1000
"""How often groups are shuffled over the rows, to see how large a gap is by chance."""


class Subgroups(ClassificationTask):
    """Differences between the groups with the highest and the lowest rate. Of several labels, the largest gap counts."""

    kind = "subgroups"
    metrics = (
        TaskMetric(
            "demographic_parity_difference",
            "largest difference of the share with a predicted label, 0 to 1",
            greater_is_better=False,
            min_cases=40,
        ),
        TaskMetric(
            "equalized_odds_difference",
            "largest difference of hits or of false alarms, 0 to 1",
            greater_is_better=False,
            min_cases=40,
        ),
        TaskMetric(
            "accuracy_difference", "largest difference of accuracy, 0 to 1", greater_is_better=False, min_cases=40
        ),
        TaskMetric("accuracy", "share of right labels, 0 to 1", ratio_of_sums=RatioOfSums("right")),
    )
    rows_description = (
        'rows with "text", "label" and "group": the group of people that a row belongs to, such as a gender'
    )
    options: ClassVar[dict[str, Any]] = {**ClassificationTask.options, "positive": None, "seed": 0}
    required_package: ClassVar[str | None] = None

    def prepare_case(self, case: TaskCase) -> None:
        """Keep the row's text, label and group of people in `case.fields`.

        Raises RowError if the row has no group, or another column cannot be used.
        """
        group = case.fields.get("group")
        if not isinstance(group, str | int) or not str(group).strip():
            raise RowError(
                "no_group",
                f'"group" is {show_value(group)}; it must be a name ({self.config_key}.columns.group names another column)',
            )
        super().prepare_case(case)
        case.fields["group"] = str(group).strip()

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Predict the label of each text, as in classification; a report row has its group of people as `source`.

        All ranks must call.
        """
        rows = super().score_cases(cases, model)
        for case, row in zip(cases, rows, strict=True):
            row.source = case.fields["group"]
        return rows

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """The gaps between groups as functions that the bootstrap calls; each takes row weights, float64 [rows]."""
        groups = np.array([row.source for row in rows])

        def gap_function(metric: str) -> Callable[[np.ndarray], float]:
            return lambda weights: self._fairness_gaps(rows, groups, weights)[metric]

        return {metric: gap_function(metric) for metric in _GAP_METRICS}

    def _fairness_gaps(self, rows: Sequence[TaskRow], groups: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        """How differently a classifier treats groups of people: gaps in demographic parity, equalised odds and accuracy.

        A gap is the highest rate of a group minus the lowest; 0 if only one group has rows that count. The rates are: the
        share of rows with a predicted label; hits among rows that have the label, and false alarms among the others; the share
        of right labels.

        `rows`: one at least. `groups`: the group of each row. `weights`: how often each row counts, float64 [rows].
        """
        true_labels = np.array([row.reference for row in rows])
        predicted_labels = np.array([row.answer for row in rows])
        group_names, group_index_of_row = np.unique(groups, return_inverse=True)

        def rate_gap(is_hit: np.ndarray, is_counted: np.ndarray) -> float:
            """Highest minus lowest weighted share of hits among the counted rows, over groups that have counted rows."""
            counted = np.bincount(group_index_of_row, weights * is_counted, len(group_names))
            hits = np.bincount(group_index_of_row, weights * (is_hit & is_counted), len(group_names))
            rates = hits[counted > 0] / counted[counted > 0]
            return float(rates.max() - rates.min()) if len(rates) > 1 else 0.0

        every_row = np.ones(len(rows), bool)
        # Without a positive label, the gap is the largest that any label has.
        positive = self.option_values["positive"]
        if positive is not None:
            labels = [str(positive)]
        else:
            labels = sorted({*true_labels.tolist(), *predicted_labels.tolist()})
        parity_gaps = []
        odds_gaps = []
        for label in labels:
            is_predicted = predicted_labels == label
            has_label = true_labels == label
            parity_gaps.append(rate_gap(is_predicted, every_row))
            # Hits among rows that have the label, and false alarms among those that do not.
            odds_gaps += [rate_gap(is_predicted, has_label), rate_gap(is_predicted, ~has_label)]
        return {
            "demographic_parity_difference": max(parity_gaps),
            "equalized_odds_difference": max(odds_gaps),
            "accuracy_difference": rate_gap(predicted_labels == true_labels, every_row),
        }

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        """Sentences for the report: the size of each group, and whether each gap is larger than chance makes it.

        A row has its group as `source`. `intervals`: not used, since even a fair classifier has gaps above 0; shuffled groups
        show how large.
        """
        groups = np.array([row.source for row in rows])
        group_names, counts = np.unique(groups, return_counts=True)
        sizes = [f"{name} {count}" for name, count in zip(group_names.tolist(), counts.tolist(), strict=True)]
        yield f"rows: {', '.join(sizes)}"
        if len(group_names) < 2:
            yield "there is one group alone, and so no gap"
            return
        if counts.min() < MIN_ROWS:
            yield f"a group has fewer than {MIN_ROWS} rows: its gaps say little"
        observed_gaps, chance_gaps = self._observed_and_chance_gaps(rows, groups)
        # The highest rate minus the lowest is above 0 even by chance.
        mean_chance_gaps = chance_gaps.mean(axis=0)
        p_values = max_statistic_p(observed_gaps, chance_gaps)
        for name, gap, chance_gap, p_value in zip(_GAP_METRICS, observed_gaps, mean_chance_gaps, p_values, strict=True):
            verdict = "beyond chance" if p_value < SIGNIFICANCE_LEVEL else "no gap shown beyond chance"
            yield (
                f"{name} {gap:.3g}: groups dealt at random give {chance_gap:.3g} on average, p {p_value:.3g} for all gaps: "
                f"{verdict}"
            )

    def _observed_and_chance_gaps(self, rows: Sequence[TaskRow], groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gaps between groups, and those after shuffling the groups over the rows, which shows what chance alone makes.

        Returns (observed [metrics], by chance [shuffles, metrics]), float64, in the order of `_GAP_METRICS`. `groups`: the
        group of each row.
        """
        rng = np.random.default_rng(int(self.option_values["seed"]))
        every_row_once = np.ones(len(rows))

        def gaps_of(row_groups: np.ndarray) -> list[float]:
            """The gaps in the order of `_GAP_METRICS`, if the rows are of these groups."""
            gaps = self._fairness_gaps(rows, row_groups, every_row_once)
            return [gaps[name] for name in _GAP_METRICS]

        chance_gaps = [gaps_of(rng.permutation(groups)) for _ in range(NUM_SHUFFLES)]
        return np.array(gaps_of(groups)), np.array(chance_gaps)

    def signatures(self) -> dict[str, str]:
        signature = (
            f"positive:{self.option_values['positive'] or 'the label with the largest gap'}|method:between groups"
        )
        return dict.fromkeys(_GAP_METRICS, signature)


_GAP_METRICS = ("demographic_parity_difference", "equalized_odds_difference", "accuracy_difference")
