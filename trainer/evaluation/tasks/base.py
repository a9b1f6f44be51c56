"""What a task is: rows out of a file, what the model is asked about them, scores of each row, and metrics of all rows.

To add a kind: a class in a module beside this one, and its line in `registry.py`. Metrics are functions of rows alone, so that
they can be computed again from what was written down, and resampled.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from trainer.data.document import Document
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.asking import Asking


@dataclass(slots=True)
class Case:
    """One row of a task, before the model is asked."""

    where: str
    """`file:line`."""
    document: Document | None = None
    """What the model is told, and the answer to it."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Columns of the row that the kind reads itself."""


@dataclass(slots=True)
class Row:
    """One row of a task, after the model was asked."""

    where: str
    """`file:line`."""
    prompt: str
    """The end of what the model was told, as text."""
    answer: str
    reference: str
    scores: dict[str, float]
    """What its metrics are made of, by name; the first one orders the rows from bad to good."""
    source: str = ""
    """Where several are told apart: which."""
    note: str = ""
    """What was wrong with the answer, where its kind can say."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number made of all rows."""

    name: str
    says: str
    """What it is, with its range, for the page."""
    greater_is_better: bool = True
    ratio: tuple[str, str | None] | None = None
    """Scores whose sums are divided (None: by the number of rows): a mean, which is resampled fast. None: see `Task.weighted`."""
    exponential: bool = False
    """Whether it is the exponential of that ratio."""

    def of(self, top: Any, bottom: Any) -> Any:
        """The value of summed scores, numbers or arrays of resamples."""
        value = np.divide(top, np.maximum(bottom, 1e-300))
        return np.exp(np.minimum(value, 700.0)) if self.exponential else value


class Task(ABC):
    """One named task. Knows its settings; holds no rows."""

    kind: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    """The first one is what the table and the page go by."""
    reads: ClassVar[str]
    """Its rows, in the user's words."""
    options: ClassVar[dict[str, Any]] = {}
    """What can be chosen, with what it is without a choice."""
    needs_path: ClassVar[bool] = False
    """Whether its rows cannot be those of the run's evaluation documents."""
    needs: ClassVar[str | None] = None
    """Package of the extra `evaluate` that it cannot do without."""

    def __init__(self, name: str, config: TaskConfig) -> None:
        self.name, self.config = name, config
        self.chosen = {**self.options, **config.options}
        self.key = f"evaluation.tasks.{name}"

    def problems(self) -> Iterator[str]:
        """What is wrong with its settings, one line each, before anything is read."""
        for option in self.config.options.keys() - self.options.keys():
            near = difflib.get_close_matches(option, self.options, n=1)
            known = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.options) or 'none'}"
            yield f"{self.key}.options.{option}: {self.kind} has no such option; {known}"
        for metric in self.config.limit.keys() - {metric.name for metric in self.metrics}:
            there = ", ".join(metric.name for metric in self.metrics)
            yield f"{self.key}.limit.{metric}: {self.kind} has no such metric; it has {there}"
        if self.config.path is None and self.needs_path:
            yield f"{self.key}.path: not set; {self.kind} needs a file of its own, with rows of {self.reads}"

    @abstractmethod
    def read(self, case: Case) -> None:
        """Check a row, and keep in `case.fields` what is needed of it. Raises Refusal with the value and the constraint."""

    @abstractmethod
    def run(self, cases: Sequence[Case], asking: Asking) -> list[Row]:
        """Ask the model. All ranks must call; the same rows on every rank."""

    def weighted(self, rows: Sequence[Row]) -> dict[str, Callable[[np.ndarray], float]]:
        """Metrics that are no ratio of sums, by name: what makes one of how often each row counts (float64 [rows])."""
        return {}

    def values(self, rows: Sequence[Row]) -> dict[str, float]:
        """Every metric of some rows, by name; NaN where there are none."""
        if not rows:
            return {metric.name: float("nan") for metric in self.metrics}
        found: dict[str, float] = {}
        others = self.weighted(rows)
        for metric in self.metrics:
            if metric.ratio is None:
                found[metric.name] = others[metric.name](np.ones(len(rows)))
                continue
            over, below = metric.ratio
            top = float(np.sum([row.scores[over] for row in rows]))
            bottom = float(np.sum([row.scores[below] for row in rows])) if below else float(len(rows))
            found[metric.name] = float(metric.of(top, bottom))
        return found

    def signatures(self) -> dict[str, str]:
        """What decides its numbers beside the rows, by metric: versions, tokenisers, normalisation."""
        return {}
