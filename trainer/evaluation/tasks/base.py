"""The interface of an evaluation task: it reads rows, asks the model about each of them, and computes metrics over all rows.

To add a kind, write a class in a module of this folder and add its line to `registry.py`. Metrics depend on the rows alone, so
they can be computed again from a written report, and the rows can be resampled for a bootstrap interval.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from trainer.data.config import DataFormat

if TYPE_CHECKING:
    from trainer.data.document import Document, SourceRow
    from trainer.evaluation.base import DecodingConfig, TaskConfig
    from trainer.evaluation.tasks.model_interface import ModelInterface


RowKey = tuple[str, int]
"""(location of a row, how many rows before it have the same location)."""


@dataclass(slots=True)
class TaskCase:
    """One row of a task, before the model is asked."""

    location: str
    """`file:line`."""
    document: Document | None = None
    """The prompt and its reference answer; None if the kind makes its own prompts from `fields`."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Columns of the row as they were read. `Task.prepare_case` replaces them with what the kind needs later."""
    user_turn: str = ""
    """What the user asked last, of a case whose `document` is not kept. Only the report shows it."""


@dataclass(slots=True)
class TaskRow:
    """One row of a task, after the model was asked.

    Rows are written to `evaluation_rows.jsonl` with the names of these fields as keys, and reports of earlier versions are read
    back by them. The fields therefore keep their names.
    """

    where: str
    """`file:line`."""
    prompt: str
    """The prompt as text; of a long one its last characters (`model_interface.SHOWN_CHARACTERS`)."""
    answer: str
    reference: str
    scores: dict[str, float]
    """Numbers that metrics are computed from, by name. The first one sorts the rows from bad to good."""
    source: str = ""
    """Data source or group of the row, if the task reports several separately."""
    note: str = ""
    """What was wrong with the answer, if the kind can say it."""
    items: dict[str, Any] = field(default_factory=dict)
    """Inputs of metrics that are not numbers, by metric name, as JSON values."""
    question: str = ""
    """What the user asked last, without system prompt and earlier turns; empty if the prompt is all there is to show."""


class RatioOfSums(NamedTuple):
    """The names of the scores (`TaskRow.scores`) whose sums over all rows are divided to make a metric.

    RatioOfSums("right") is the mean of `right`, RatioOfSums("refused", "harmful") the share of harmful prompts that were
    refused.
    """

    numerator: str
    denominator: str | None = None
    """None: the number of rows."""


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A number computed over all rows of a task."""

    name: str
    description: str
    """What it means, with its range, for the report's page."""
    greater_is_better: bool | None = True
    """None if neither direction is better."""
    ratio_of_sums: RatioOfSums | None = None
    """The two scores whose sums it divides. Ratios are resampled fast, by a matrix product.

    None: the metric is no ratio, and `Task.weighted_metric_functions` computes it."""
    exponential: bool = False
    """Whether the metric is the exponential of its ratio, as perplexity is."""
    min_cases: int = 1
    """Below this number of cases no difference is reported, so that a single case raises no alarm."""
    in_correction_family: bool = False
    """Whether it is one of several similar metrics, such as one for each group. Their p-values are corrected together."""
    case_score: str | None = None
    """A row with this score above 0 is a case of the metric. None: the ratio's denominator, and without one every row."""

    def from_sums(self, numerator: Any, denominator: Any) -> Any:
        """The metric from summed scores: numbers, or arrays with one sum for each resample."""
        ratio = np.divide(numerator, np.maximum(denominator, 1e-300))
        if self.exponential:
            return np.exp(np.minimum(ratio, 700.0))  # above 709 float64 overflows
        return ratio


SHOWN_PROMPT_CHARACTERS = 400
"""Most characters of a prompt that `shorten_prompt` keeps."""
FORMATS_WITH_ANSWER = (DataFormat.messages, DataFormat.alpaca, DataFormat.prompt_completion, DataFormat.pair)
"""Formats with a prompt and its answer."""


class Task(ABC):
    """One named task of a configuration. It knows its settings, and is given its rows.

    A kind sets the class attributes below and overrides `prepare_case` and `score_cases`; a kind whose metrics are no ratios of
    sums also overrides `weighted_metric_functions`.
    """

    kind: ClassVar[str]
    metrics: tuple[TaskMetric, ...]
    """The first one stands for the task in tables, and sorts the rows of the page. In some kinds they depend on the settings."""
    rows_description: ClassVar[str]
    """The rows that it needs, described for the user."""
    options: ClassVar[dict[str, Any]] = {}
    """The settings of `options` that the kind has, with their defaults."""
    file_options: ClassVar[tuple[str, ...]] = ()
    """Options that name a file. They are not taken over from somebody else's run (`launch/config/read_run.py`)."""
    needs_path: ClassVar[bool] = False
    """Whether it needs a file of its own: the run's evaluation documents do not fit."""
    shipped_rows: ClassVar[Path | None] = None
    """A JSON file with `templates` that comes with shardtune, and is used if no path is set."""
    works_with_classifiers: ClassVar[bool] = False
    """Whether it can evaluate a model with a classification head."""
    loads_own_rows: ClassVar[bool] = False
    """Whether it reads its rows itself, in `load_cases`, and not in a format of `data.path`."""
    reads_documents: ClassVar[bool] = False
    """Whether the rows of its path are documents in a format of `data.path`, although it needs a path."""
    formats: ClassVar[tuple[DataFormat, ...]] = FORMATS_WITH_ANSWER
    """If several formats fit a row, the first one of these is taken."""
    split: ClassVar[str] = "evaluation"
    """Documents of the run that it uses without a path: `evaluation`, `train`, or `both` (the case's `member` says which)."""
    samples_documents: ClassVar[bool] = False
    """Whether it draws `options.sample` of the run's documents at random."""
    required_package: ClassVar[str | None] = None
    """A package that it cannot work without."""
    pip_extra: ClassVar[str] = "evaluate"
    """The pip extra that installs that package."""
    supports_draws: ClassVar[bool] = False
    """Whether it scores several answers to each row (`write.draws`)."""
    works_with_server: ClassVar[bool] = True
    """Whether it works with `evaluation.server`, which writes answers and gives likelihoods, but no losses or logits."""
    needs_judge: bool = False
    """Whether it asks the judge of `evaluation.judge`."""
    max_resamples: ClassVar[int] = 1000
    """Most resamples of a metric that is no ratio: each one is computed from scratch, which is slow."""
    opponent_answers: Mapping[RowKey, str] | None = None
    """Answers of the model that is compared with, by the keys that `row_keys` gives their rows; None until it was asked."""
    asks_opponent: bool = False
    """Whether the model that is asked now is that one. Its own opponent has no answers then, and the task compares nothing."""

    def __init__(self, name: str, config: TaskConfig) -> None:
        self.name = name
        self.config = config
        self.option_values = {**self.options, **config.options}
        self.config_key = f"evaluation.tasks.{name}"

    def problems(self) -> Iterator[str]:
        """Yield an error message for each invalid setting of the task, before any row is read. Kinds add their own."""
        # The names are checked first: the message for a misspelled option suggests the most similar one.
        for option in self.config.options.keys() - self.options.keys():
            similar = difflib.get_close_matches(option, self.options, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(self.options) or 'none'}"
            yield f"{self.config_key}.options.{option}: {self.kind} has no such option; {hint}"
        known_metrics = [metric.name for metric in self.metrics]
        for name in self.config.limit.keys() - set(known_metrics):
            yield f"{self.config_key}.limit.{name}: {self.kind} has no such metric; it has {', '.join(known_metrics)}"
        if self.decoding.draws > 1 and not self.supports_draws:
            yield f"{self.config_key}.write.draws={self.config.write.draws}: {self.kind} scores one answer a row; set it to 1"
        if self.config.path is None and self.needs_path and self.shipped_rows is None:
            yield f"{self.config_key}.path: not set; {self.kind} needs a file of its own: {self.rows_description}"

    @property
    def decoding(self) -> DecodingConfig:
        """How answers are generated (`evaluation.tasks.NAME.write`)."""
        return self.config.write

    @property
    def compares_split_documents(self) -> bool:
        """Whether it compares rows that were trained on with rows that were not, as a membership task does."""
        return self.split == "both"

    @property
    def path_of_untrained_rows(self) -> str | None:
        """The file of rows that were not trained on (`options.others`); None: the run's evaluation documents."""
        return self.option_values.get("others")

    @cached_property
    def untrained_task(self) -> Task:
        """Of a task with `compares_split_documents`: the task that reads the rows that were not trained on."""
        raise NotImplementedError

    @property
    def uses_run_documents(self) -> bool:
        """Whether it asks about documents of the run, whose data must then be read, because it has no file of its own.

        A membership task compares rows that were trained on with rows that were not, and needs a file for each.
        """
        if self.loads_own_rows:
            return False
        has_file = self.config.path is not None or self.shipped_rows is not None
        lacks_untrained_rows = self.compares_split_documents and self.path_of_untrained_rows is None
        return not has_file or lacks_untrained_rows

    @property
    def has_own_file_format(self) -> bool:
        """Whether the rows of its path are columns in a format of its own (such as BBQ's), and not training documents."""
        return self.needs_path and not self.reads_documents

    @property
    def data_source(self) -> str | None:
        """Where its rows come from, for the report: a path, or `hub:` and a data set. None: the run's evaluation documents."""
        return self.config.path  # type: ignore[no-any-return]

    def load_cases(self) -> list[TaskCase]:
        """The cases of a task that loads its rows itself (`loads_own_rows`). Raises ConfigError or DataError if it cannot."""
        raise NotImplementedError

    def expand_rows(self, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        """Turn the rows of a published file into one row per question. Some files hold all questions in a single row."""
        return rows

    @abstractmethod
    def prepare_case(self, case: TaskCase) -> None:
        """Check one row, before a model is loaded, and replace its columns with what `score_cases` needs.

        Raises RowError with the bad value and what is allowed.
        """

    @abstractmethod
    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Ask the model about every case and score its answers. Returns a report row for each case, the same on every rank.

        All ranks must call, with the same cases.
        """

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """Metrics that are no ratio of sums, by name, each as a function of row weights, float64 [rows].

        A weight says how often the row counts. The bootstrap calls the functions with the counts of each resample.
        """
        return {}

    def metrics_for(self, rows: Sequence[TaskRow]) -> tuple[TaskMetric, ...]:
        """Its metrics for these rows: `metrics` of every run, and those that depend on the rows, such as one for each group."""
        return self.metrics

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        """Sentences for the report, for example about rows that were left out. `intervals` are the 95 % intervals by metric."""
        yield from ()

    def compute_metrics(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Compute every metric of the task from its report rows, by name; NaN if there are no rows.

        A metric with a ratio divides two sums of scores. All others are computed by `weighted_metric_functions`, with each row
        counted once.
        """
        if not rows:
            return {metric.name: float("nan") for metric in self.metrics}
        values: dict[str, float] = {}
        metric_functions = self.weighted_metric_functions(rows)
        for metric in self.metrics_for(rows):
            if metric.ratio_of_sums is None:
                every_row_once = np.ones(len(rows))
                values[metric.name] = metric_functions[metric.name](every_row_once)
                continue
            numerator_score, denominator_score = metric.ratio_of_sums
            numerator = _sum_of_scores(rows, numerator_score)
            denominator = _sum_of_scores(rows, denominator_score) if denominator_score else float(len(rows))
            values[metric.name] = float(metric.from_sums(numerator, denominator))  # their ratio, or its exponential
        return values

    def metrics_by_source(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Compute every metric over all rows, and if the rows have several sources (data sets, say), also over each.

        {"acc": 0.6, "acc/arc_easy": 0.8, "acc/arc_challenge": 0.4}.
        """
        # The method of this class by name, because kinds override `compute_metrics` to call this one.
        values = Task.compute_metrics(self, rows)
        sources = sorted({row.source for row in rows})
        if len(sources) < 2:
            return values
        for source in sources:
            source_rows = [row for row in rows if row.source == source]
            for name, value in Task.compute_metrics(self, source_rows).items():
                values[f"{name}/{source}"] = value
        return values

    def standard_errors(self, rows: Sequence[TaskRow]) -> dict[str, float]:
        """Standard errors that the kind computes itself, by metric."""
        return {}

    def signature_of_all(self, signature: str) -> dict[str, str]:
        """The same signature for every metric of the task."""
        return dict.fromkeys((metric.name for metric in self.metrics), signature)

    def signatures(self) -> dict[str, str]:
        """What besides the rows decides its numbers, by metric: library versions, tokenisers, normalisation."""
        return {}


def last_user_turn(document: Document | None) -> str:
    """What the user asked last in a document: its prompt, or the last user turn before the last answer; "" for a text.

    Turns user "Hi", assistant "Hello", user "2 + 2?", assistant "4" -> "2 + 2?".
    """
    if document is None:
        return ""
    if document.prompt is not None:
        return document.prompt
    turns = document.messages or []
    roles = [turn["role"] for turn in turns]
    num_turns_before_answer = len(roles)
    if "assistant" in roles:
        num_turns_before_answer = len(roles) - 1 - roles[::-1].index("assistant")
    for turn in reversed(turns[:num_turns_before_answer]):
        if turn["role"] == "user":
            return str(turn["content"])
    return ""


def row_keys(locations: Iterable[str]) -> list[RowKey]:
    """Keys by which rows of two models are matched: the location of each, and how many rows before it have the same location.

    All rows of a JSON list that is written on one line have one location: ["a.json:1", "a.json:1"] -> [("a.json:1", 0),
    ("a.json:1", 1)].
    """
    num_by_location: Counter[str] = Counter()
    keys = []
    for location in locations:
        keys.append((location, num_by_location[location]))
        num_by_location[location] += 1
    return keys


def answers_by_key(rows: Sequence[TaskRow]) -> dict[RowKey, str]:
    """The answer of each row by its key (see `row_keys`)."""
    keys = row_keys(row.where for row in rows)
    return {key: row.answer for key, row in zip(keys, rows, strict=True)}


def other_answer_by_row_id(rows: Sequence[TaskRow], other_rows: Sequence[TaskRow]) -> dict[int, str]:
    """Match the rows of two models: the other's answer to each row, by the row's `id()`; rows not asked are missing."""
    other_answers = answers_by_key(other_rows)
    keys = row_keys(row.where for row in rows)
    return {id(row): other_answers[key] for row, key in zip(rows, keys, strict=True) if key in other_answers}


def shorten_prompt(prompt: str) -> str:
    """The last characters of a prompt, for tables of trackers and the report's list of rows that changed sides."""
    return prompt if len(prompt) <= SHOWN_PROMPT_CHARACTERS else f"…{prompt[-SHOWN_PROMPT_CHARACTERS:]}"


def documents_of(cases: Sequence[TaskCase]) -> list[Document]:
    """The documents of cases, in their order; a case without one is left out."""
    return [case.document for case in cases if case.document is not None]


def score_array(rows: Sequence[TaskRow], name: str) -> np.ndarray:
    """A score of each row, float64 [rows]; 0 for a row that does not have it."""
    return np.array([row.scores.get(name, 0.0) for row in rows], np.float64)


def _sum_of_scores(rows: Sequence[TaskRow], name: str) -> float:
    """The sum of a score over rows; a row without it counts as 0."""
    return float(np.sum(score_array(rows, name)))
