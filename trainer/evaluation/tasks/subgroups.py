"""Gaps of a classifier between groups of people: demographic parity, equalised odds, accuracy (as fairlearn defines them)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from trainer.data.fields import Refusal, shown
from trainer.evaluation.tasks.base import Case, Metric, TaskRow
from trainer.evaluation.tasks.classification import ClassificationTask
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.significance import LEVEL, max_statistic_p

MIN_ROWS = 10
"""Rows of a group below which it is told that they are few."""
SHUFFLES = 1000
"""How often groups are dealt anew, to see how large a gap is by chance."""


class Subgroups(ClassificationTask):
    """Differences between the groups with the most and the least; of several labels the one with the largest gap."""

    kind = "subgroups"
    metrics = (
        Metric(
            "demographic_parity_difference",
            "largest difference of the share with a predicted label, 0 to 1",
            False,
            min_cases=40,
        ),
        Metric(
            "equalized_odds_difference", "largest difference of hits or of false alarms, 0 to 1", False, min_cases=40
        ),
        Metric("accuracy_difference", "largest difference of accuracy, 0 to 1", False, min_cases=40),
        Metric("accuracy", "share of right labels, 0 to 1", ratio=("right", None)),
    )
    reads = '"text", "label" and "group": the group of the row, such as a gender'
    options: ClassVar[dict[str, Any]] = {**ClassificationTask.options, "positive": None, "seed": 0}
    required_package: ClassVar[str | None] = None

    def read(self, case: Case) -> None:
        group = case.fields.get("group")
        if not isinstance(group, str | int) or not str(group).strip():
            raise Refusal(
                "no_group",
                f'"group" is {shown(group)}; it must be a name ({self.key}.columns.group names another column)',
            )
        super().read(case)
        case.fields["group"] = str(group).strip()

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        rows = super().run(cases, model)
        for case, row in zip(cases, rows, strict=True):
            row.source = case.fields["group"]
        return rows

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        groups = np.array([row.source for row in rows])

        def of(name: str) -> Callable[[np.ndarray], float]:
            return lambda weights: self._gaps(rows, groups, weights)[name]

        return {name: of(name) for name in _GAP_METRICS}

    def _gaps(self, rows: Sequence[TaskRow], groups: np.ndarray, weights: np.ndarray) -> dict[str, float]:
        true, said = np.array([row.reference for row in rows]), np.array([row.answer for row in rows])
        names, number = np.unique(groups, return_inverse=True)
        size = len(names)

        def share(of: np.ndarray, among: np.ndarray) -> float:
            """The difference of the weighted share of `of` in `among` between groups that have any."""
            below = np.bincount(number, weights * among, size)
            above = np.bincount(number, weights * (of & among), size)
            rates = above[below > 0] / below[below > 0]
            return float(rates.max() - rates.min()) if len(rates) > 1 else 0.0

        every = np.ones(len(rows), bool)
        positive = self.option_values["positive"]
        labels = [str(positive)] if positive is not None else sorted({*true.tolist(), *said.tolist()})
        return {
            "demographic_parity_difference": max(share(said == label, every) for label in labels),
            "equalized_odds_difference": max(
                share(said == label, (true == label) == hit) for label in labels for hit in (True, False)
            ),
            "accuracy_difference": share(said == true, every),
        }

    def notes(self, rows: Sequence[TaskRow], spans: dict[str, tuple[float, float]]) -> Iterator[str]:
        groups, ones = np.array([row.source for row in rows]), np.ones(len(rows))
        names, counts = np.unique(groups, return_counts=True)
        yield "rows: " + ", ".join(
            f"{name} {count}" for name, count in zip(names.tolist(), counts.tolist(), strict=True)
        )
        if len(names) < 2:
            yield "there is one group alone, and so no gap"
            return
        if counts.min() < MIN_ROWS:
            yield f"a group has fewer than {MIN_ROWS} rows: its gaps say little"
        drawn = np.random.default_rng(int(self.option_values["seed"]))
        found = np.array([self._gaps(rows, groups, ones)[name] for name in _GAP_METRICS])
        dealt = [self._gaps(rows, drawn.permutation(groups), ones) for _ in range(SHUFFLES)]
        chance = np.array([[gaps[name] for name in _GAP_METRICS] for gaps in dealt])
        for name, gap, usual, p in zip(
            _GAP_METRICS, found, chance.mean(axis=0), max_statistic_p(found, chance), strict=True
        ):
            told = "beyond chance" if p < LEVEL else "no gap shown beyond chance"
            yield f"{name} {gap:.3g}: groups dealt at random give {usual:.3g} on average, p {p:.3g} for all gaps: {told}"

    def signatures(self) -> dict[str, str]:
        said = f"positive:{self.option_values['positive'] or 'the label with the largest gap'}|method:between groups"
        return dict.fromkeys(_GAP_METRICS, said)


_GAP_METRICS = ("demographic_parity_difference", "equalized_odds_difference", "accuracy_difference")
