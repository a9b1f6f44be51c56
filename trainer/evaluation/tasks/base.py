"""The interface of a task: rows from a file, requests to the model, scores of each row, metrics over all rows.

To add a kind: a class in a module beside this one, and its line in `registry.py`. Metrics are functions of rows alone, so that
they can be computed again from what was written down, and resampled.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trainer.data.config import DataFormat

if TYPE_CHECKING:
    from trainer.data.document import Document, Row
    from trainer.evaluation.base import TaskConfig
    from trainer.evaluation.tasks.model_interface import ModelInterface


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
class TaskRow:
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
    items: dict[str, Any] = field(default_factory=dict)
    """What metrics are made of that no numbers say, by metric, as JSON holds it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number made of all rows."""

    name: str
    description: str
    """What it is, with its range, for the page."""
    greater_is_better: bool | None = True
    """None where neither is."""
    ratio: tuple[str, str | None] | None = None
    """Scores whose sums are divided (None: by the number of rows): a mean, which is resampled fast. None: see `Task.weighted`."""
    exponential: bool = False
    """Whether it is the exponential of that ratio."""
    min_cases: int = 1
    """Cases below which no difference is told: no alarm from one case."""
    in_family: bool = False
    """Whether it is one of several like it, as those of groups, of which none may be told by chance alone."""
    case_score: str | None = None
    """Score that a row has which is a case of it; None: the lower one of the ratio, and without one every row."""

    def from_sums(self, top: Any, bottom: Any) -> Any:
        """The value of summed scores, numbers or arrays of resamples."""
        value = np.divide(top, np.maximum(bottom, 1e-300))
        return np.exp(np.minimum(value, 700.0)) if self.exponential else value


FORMATS_WITH_ANSWER = (DataFormat.messages, DataFormat.alpaca, DataFormat.prompt_completion, DataFormat.pair)
"""Formats with a prompt and its answer."""


class Task(ABC):
    """One named task. Knows its settings; holds no rows."""

    kind: ClassVar[str]
    metrics: tuple[Metric, ...]
    """The first one is what the table and the page go by; of some kinds they depend on the settings."""
    reads: ClassVar[str]
    """Its rows, in the user's words."""
    options: ClassVar[dict[str, Any]] = {}
    """What can be chosen, with what it is without a choice."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """Options that name a file of the user's: somebody else's run may not choose it (`launch/config/read_run.py`)."""
    needs_path: ClassVar[bool] = False
    """Whether its rows cannot be those of the run's evaluation documents."""
    shipped_rows: ClassVar[Path | None] = None
    """Rows that it has without a path: a JSON file with `templates`."""
    works_with_classifiers: ClassVar[bool] = False
    """Whether it can ask a classifier's head."""
    loads_own_rows: ClassVar[bool] = False
    """Whether it reads its rows itself (`cases`), not in a format of `data.path`."""
    reads_documents: ClassVar[bool] = False
    """Whether the rows of its path are documents in a format of `data.path`, although it needs a path."""
    formats: ClassVar[tuple[DataFormat, ...]] = FORMATS_WITH_ANSWER
    """Of several formats that fit a row, which are meant, the first one first."""
    split: ClassVar[str] = "evaluation"
    """Documents of the run that it asks without a path: `evaluation`, `train`, or `both`, told apart in `member`."""
    samples_documents: ClassVar[bool] = False
    """Whether of the run's documents `options.sample` are drawn."""
    required_package: ClassVar[str | None] = None
    """Package that it cannot do without."""
    pip_extra: ClassVar[str] = "evaluate"
    """The extra that brings that package."""
    supports_draws: ClassVar[bool] = False
    """Whether it scores several answers a row (`write.draws`)."""
    works_with_server: ClassVar[bool] = True
    """Whether a server that writes answers and tells likelihoods is enough for it."""
    needs_judge: bool = False
    """Whether it asks the judge of `evaluation.judge`."""
    max_resamples: ClassVar[int] = 1000
    """Resamples of a metric that is no ratio of sums, at most: each is computed anew."""
    opponent_answers: Mapping[str, str] | None = None
    """What the model that is compared with has answered, by `where`, once it was asked."""
    is_opponent: bool = False
    """Whether it asks the model that another one is compared with."""

    def __init__(self, name: str, config: TaskConfig) -> None:
        self.name, self.config = name, config
        self.option_values = {**self.options, **config.options}
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
        if self.config.write.draws > 1 and not self.supports_draws:
            yield f"{self.key}.write.draws={self.config.write.draws}: {self.kind} scores one answer a row; set it to 1"
        if self.config.path is None and self.needs_path and self.shipped_rows is None:
            yield f"{self.key}.path: not set; {self.kind} needs a file of its own, with rows of {self.reads}"

    @property
    def data_source(self) -> str | None:
        """What its rows are from, for the report: `hub:` and a data set, or a path; None: the run's evaluation documents."""
        return self.config.path  # type: ignore[no-any-return]

    def cases(self) -> list[Case]:
        """Its rows, where `own_rows`. Errors: ConfigError, DataError."""
        raise NotImplementedError

    def expand_rows(self, rows: Iterator[Row]) -> Iterator[Row]:
        """What the rows of its files hold, of kinds that name their own columns: a published file may be one row of many."""
        return rows

    @abstractmethod
    def read(self, case: Case) -> None:
        """Check a row, and keep in `case.fields` what is needed of it. Raises Refusal with the value and the constraint."""

    @abstractmethod
    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Ask the model. All ranks must call; the same rows on every rank."""

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """Metrics that are no ratio of sums, by name: what makes one of how often each row counts (float64 [rows])."""
        return {}

    def metrics_for(self, rows: Sequence[TaskRow]) -> tuple[Metric, ...]:
        """Its metrics on some rows: those of every run, and what these rows alone have, as groups."""
        return self.metrics

    def notes(self, rows: Sequence[TaskRow], spans: dict[str, tuple[float, float]]) -> Iterator[str]:
        """Sentences that belong to its numbers, one each: what was left out, what stands out. `spans` are 95 % intervals."""
        yield from ()

    def compute_metrics(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Every metric of some rows, by name; NaN where there are none."""
        if not rows:
            return {metric.name: float("nan") for metric in self.metrics}
        found: dict[str, float] = {}
        others = self.weighted_metrics(rows)
        for metric in self.metrics_for(rows):
            if metric.ratio is None:
                found[metric.name] = others[metric.name](np.ones(len(rows)))
                continue
            over, below = metric.ratio
            top = float(np.sum([row.scores.get(over, 0.0) for row in rows]))
            bottom = float(np.sum([row.scores.get(below, 0.0) for row in rows])) if below else float(len(rows))
            found[metric.name] = float(metric.from_sums(top, bottom))
        return found

    def metrics_by_source(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Every metric of some rows, and of several sources that of each, as `NAME/SOURCE`."""
        found = Task.compute_metrics(self, rows)
        sources = sorted({row.source for row in rows})
        for source in sources if len(sources) > 1 else []:
            mine = Task.compute_metrics(self, [row for row in rows if row.source == source])
            found |= {f"{name}/{source}": value for name, value in mine.items()}
        return found

    def standard_errors(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Standard errors that its kind reckons itself, by metric."""
        return {}

    def signatures(self) -> dict[str, str]:
        """What decides its numbers beside the rows, by metric: versions, tokenisers, normalisation."""
        return {}
