"""Converts the results of lm-evaluation-harness for each document into rows of a report, and its metrics into ours."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.evaluation.harness.compat import filter_names
from trainer.evaluation.harness.task_files import TaskFiles
from trainer.evaluation.tasks.base import RatioOfSums, TaskMetric, TaskRow
from trainer.evaluation.tasks.model_interface import SHOWN_CHARACTERS

NO_VALUE_ERRORS = (ZeroDivisionError, ValueError, IndexError)
"""What a metric of the harness raises for rows without a value, for example rows that all have the same class."""
# Names of the scores of a report's row that are parts of a metric. A score with the metric's own name is its value.
LOSS_PREFIX = "loss."
"""`loss.METRIC`: the loss of the row, the numerator of a perplexity."""
COUNT_PREFIX = "count."
"""`count.METRIC`: the words or bytes of the row, its denominator."""
HAS_VALUE_PREFIX = "rows."
"""`rows.METRIC`: 1 for a row that has a value, if others have none. The denominator of a mean over these rows."""
OF_ROW_PREFIX = "each."
"""`each.METRIC`: the metric of the row by itself, by which rows are sorted if the metric is no ratio."""


def metric_name(metric: str, filter_key: str) -> str:
    """Our name of a metric of lm-eval, for settings and files: "exact_match,strict-match" -> "exact_match_strict_match".

    `filter_key`: lm-eval's filter of the answers, such as "strict-match"; "none" adds nothing: "acc,none" -> "acc".
    """
    name = metric if filter_key == "none" else f"{metric}_{filter_key}"
    return re.sub(r"\W+", "_", name)


def declared_metrics(task_files: TaskFiles) -> tuple[TaskMetric, ...]:
    """The metrics that the YAMLs of lm-eval tasks declare, for checks of settings before any data is loaded.

    They have names and directions, and no ratios yet. A task that is written in Python declares none. `task_files`: the YAMLs
    of the tasks that are run.
    """
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

    from trainer.evaluation.harness.isolation import collect_warnings

    metrics: dict[str, TaskMetric] = {}
    for settings in task_files.single_tasks.values():
        if settings.get("class"):
            continue
        defaults = DEFAULT_METRIC_REGISTRY.get(settings.get("output_type", "generate_until"), [])
        metric_list = settings.get("metric_list") or [{"metric": name} for name in defaults]
        filters = settings.get("filter_list") or [{"name": "none"}]
        for metric_settings in metric_list:
            # The metric may be a path of a function or a hub's metric: only its last part is its name.
            metric_path = str(metric_settings["metric"])
            metric = metric_path.rpartition("/")[2].rpartition(".")[2]
            with collect_warnings():  # the registry warns of a metric that it does not know, such as a function's
                greater_is_better = metric_settings.get("higher_is_better", is_higher_better(metric))
            for filter_settings in filters:
                name = metric_name(metric, filter_settings["name"])
                metrics.setdefault(name, TaskMetric(name, "lm-eval's", greater_is_better=greater_is_better))
    return tuple(metrics.values())


@dataclass(frozen=True, slots=True)
class MetricContribution:
    """What one document contributes to a metric: scores that can be summed, or an item for a function of all items."""

    scores: dict[str, float] = field(default_factory=dict)
    """Of the report's row, by name."""
    item: Any = None
    """As JSON values; None if the contribution is in `scores`."""


@dataclass(slots=True)
class LoadedTasks:
    """The harness's tasks with their data, and how their metrics are computed from rows."""

    tasks: dict[str, Any]
    mean_weighted_by_rows: bool
    """Whether the mean over several tasks weighs each task by its number of rows; else all tasks weigh the same."""
    metrics: tuple[TaskMetric, ...] = field(init=False)
    aggregate_by_metric: dict[str, Callable[..., Any]] = field(init=False)
    """The harness's function that computes a metric from the values of its rows, by our name of the metric."""

    def __post_init__(self) -> None:
        """Collect the metrics of all tasks, one for each metric and filter of the answers.

        The first task that has a metric defines it.
        """
        metrics: dict[str, TaskMetric] = {}
        self.aggregate_by_metric = {}
        for task in self.tasks.values():
            higher_is_better = task.higher_is_better()
            filters = filter_names(task)
            for metric, aggregate in task.aggregation().items():
                for filter_key in filters:
                    name = metric_name(metric, filter_key)
                    self.aggregate_by_metric.setdefault(name, aggregate)
                    metrics.setdefault(name, self._task_metric(name, aggregate, higher_is_better.get(metric)))
        self.metrics = tuple(metrics.values())

    def _task_metric(self, name: str, aggregate: Any, greater_is_better: bool | None) -> TaskMetric:
        """Our description of a metric of lm-eval, from lm-eval's function that computes it of all rows (`aggregate`).

        It is a ratio of sums over rows if the function is known to compute one, since the bootstrap resamples ratios fast. The
        scores that are summed come from `contribution_of_value`: the value itself, or `loss.NAME` and `count.NAME`.

        `greater_is_better`: None if the task does not say.
        """
        from lm_eval.api import metrics

        descriptions = {
            metrics.mean: "mean over rows",
            metrics.weighted_perplexity: "exponential of the loss a word or byte",
            metrics.bits_per_byte: "bits of loss a byte",
            metrics.perplexity: "exponential of the mean loss of a row",
        }
        known_description = descriptions.get(aggregate)
        description = known_description or getattr(aggregate, "__name__", "a number made of all rows")
        # The mean of several tasks is a ratio over all rows only if tasks are weighted by their size.
        ratio = None
        if known_description is not None and (len(self.tasks) == 1 or self.mean_weighted_by_rows):
            numerator = name if aggregate is metrics.mean else f"{LOSS_PREFIX}{name}"
            denominator = None if aggregate in (metrics.mean, metrics.perplexity) else f"{COUNT_PREFIX}{name}"
            ratio = RatioOfSums(numerator, denominator)
        is_exponential = aggregate in (metrics.weighted_perplexity, metrics.perplexity)
        return TaskMetric(
            name,
            f"{description}, as lm-eval has it",
            greater_is_better=greater_is_better,
            ratio_of_sums=ratio,
            exponential=is_exponential,
        )

    def contribution_of_value(self, name: str, value: Any) -> MetricContribution:
        """What a report row keeps of one document and metric: scores to sum, or an item for lm-eval's own function.

        Examples of (name, value) -> (scores, item):

        - A number that can be summed: ("acc", True) -> ({"acc": 1.0}, None).
        - A pair of sums: ("word_perplexity", (-50.0, 12)) -> ({"loss.word_perplexity": 50.0, "count.word_perplexity": 12.0},
          None).
        - Everything else, such as a pair of labels for F1: ("f1", (1, 0)) -> ({}, [1, 0]).
        """
        from lm_eval.api import metrics

        aggregate = self.aggregate_by_metric.get(name, metrics.mean)
        is_no_ratio = any(metric.name == name and metric.ratio_of_sums is None for metric in self.metrics)
        if is_no_ratio:  # lm-eval's function computes it from the items of all rows
            return MetricContribution(item=_as_json_value(value, name))
        if aggregate is metrics.mean and _is_number(value):
            return MetricContribution(scores={name: float(value)})
        if aggregate is metrics.perplexity and _is_number(value):
            return MetricContribution(scores={f"{LOSS_PREFIX}{name}": -float(value)})
        if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
            log_likelihood, count = value  # of a document, and its number of words or bytes
            loss = -float(log_likelihood)  # nats
            if aggregate is metrics.bits_per_byte:
                loss /= math.log(2)
            return MetricContribution(scores={f"{LOSS_PREFIX}{name}": loss, f"{COUNT_PREFIX}{name}": float(count)})
        return MetricContribution(item=_as_json_value(value, name))

    def weighted_metric(self, name: str, rows: Sequence[TaskRow]) -> Callable[[np.ndarray], float]:
        """A metric that is no ratio of sums, as a function that the bootstrap calls for each resample of the rows.

        The function takes row weights, float64 [rows] of whole numbers: how often each row counts (see `_metric_of_weights`).
        """
        from lm_eval.api import metrics

        row_items = [row.items.get(name) for row in rows]
        has_item = np.array([item is not None for item in row_items])
        task_of_row = np.array([row.source for row in rows])
        return partial(
            _metric_of_weights,
            aggregate=self.aggregate_by_metric.get(name, metrics.mean),
            row_items=row_items,
            has_item=has_item,
            task_of_row=task_of_row,
            mean_weighted_by_rows=self.mean_weighted_by_rows,
        )

    def version_notes(self) -> Iterator[str]:
        """For the signature of a report: "arc_easy:version 1.0, 5-shot" for each of the first three tasks."""
        first_tasks = [*self.tasks.items()][:3]  # a group may have dozens, and the signature is read by people
        for name, task in first_tasks:
            yield f"{name}:version {task.VERSION}, {task.get_config('num_fewshot') or 0}-shot"


def _metric_of_weights(
    weights: np.ndarray,
    aggregate: Callable[..., Any],
    row_items: list[Any],
    has_item: np.ndarray,
    task_of_row: np.ndarray,
    *,
    mean_weighted_by_rows: bool,
) -> float:
    """Compute a metric of one resample by lm-eval's function `aggregate`, which takes the items of all rows.

    Each item counts as often as its weight says. If the rows are of several tasks, it is the mean of their values. NaN if no
    row has an item, or a task's items have no value.

    `weights`: float64 [rows], whole numbers. `row_items`: what each row contributes to the metric, such as a pair of labels;
    None for a row without a value. `has_item`: which rows have one, bool [rows]. `task_of_row`: the lm-eval task of each row,
    [rows]. `mean_weighted_by_rows`: whether the mean weighs each task by its number of rows; else all tasks weigh the same.
    """
    values = []
    task_weights = []
    for task in dict.fromkeys(task_of_row.tolist()):
        row_numbers = np.flatnonzero((task_of_row == task) & has_item)
        resample = np.repeat(row_numbers, weights[row_numbers].astype(int))
        if not len(resample):
            continue
        try:
            values.append(float(aggregate([row_items[number] for number in resample])))
        except NO_VALUE_ERRORS:
            values.append(math.nan)
        task_weights.append(len(resample) if mean_weighted_by_rows else 1)
    if not values:
        return math.nan
    return float(np.average(values, weights=task_weights))


def report_rows_of_task(name: str, samples: Sequence[dict[str, Any]], all_tasks: LoadedTasks) -> list[TaskRow]:
    """Turn what lm-eval logged for one of its tasks into report rows, one for each document, sorted by its number.

    `name`: the lm-eval task; the row's `source` if there are several, so that metrics can be reported for each. `samples`:
    lm-eval's log, one entry for each document and filter of the answers; those of one document share a row. Each row gets what
    its document contributes to each metric: scores that can be summed, or an item for a function of all items.
    """
    has_several_tasks = len(all_tasks.tasks) > 1
    rows: dict[int, TaskRow] = {}  # by the document's number
    for sample in samples:
        row = rows.setdefault(sample["doc_id"], _report_row(name, sample, has_several_tasks=has_several_tasks))
        for metric in sample["metrics"]:
            our_name = metric_name(metric, sample["filter"])
            contribution = all_tasks.contribution_of_value(our_name, sample[metric])
            row.scores |= contribution.scores
            if contribution.item is not None:
                row.items[our_name] = contribution.item
    return [rows[number] for number in sorted(rows)]


def complete_scores_in_place(rows: list[TaskRow], all_tasks: LoadedTasks) -> list[TaskRow]:
    """Add to the scores of the report rows, in place, what depends on all rows; returns the same list.

    - If some rows have no value of a metric, the others get the score `rows.METRIC` = 1. Its sum, and not the number of rows,
      is what the metric's mean divides by (`Harness.metrics_for`).
    - The score of the first metric is put first, since the report sorts rows by the first score. If that metric is no ratio of
      sums, it is a new score `each.METRIC`: the metric of the row alone.
    """
    counts: Counter[str] = Counter()  # rows that have a value, by metric; names with a dot are parts of a metric
    for row in rows:
        counts.update(name for name in row.scores if "." not in name)
    incomplete_metrics = {name for name, count in counts.items() if count < len(rows)}

    first_metric = None
    for metric in all_tasks.metrics:
        if any(_has_value_of_metric(metric.name, row) for row in rows):
            first_metric = metric
            break

    for row in rows:
        for name in incomplete_metrics & row.scores.keys():
            row.scores[f"{HAS_VALUE_PREFIX}{name}"] = 1.0
        if first_metric is None:
            continue
        if first_metric.ratio_of_sums is not None:
            name = first_metric.ratio_of_sums.numerator
            row.scores = {name: row.scores.get(name, 0.0), **row.scores}
        else:
            metric_of_weights = all_tasks.weighted_metric(first_metric.name, [row])
            row_counted_once = np.ones(1)
            row.scores = {f"{OF_ROW_PREFIX}{first_metric.name}": metric_of_weights(row_counted_once), **row.scores}
    return rows


def _has_value_of_metric(name: str, row: TaskRow) -> bool:
    """Whether a row has a value of this metric, as an item, as a score, or as the loss of a perplexity."""
    return name in row.items or name in row.scores or f"{LOSS_PREFIX}{name}" in row.scores


def _report_row(task_name: str, sample: dict[str, Any], *, has_several_tasks: bool) -> TaskRow:
    """The report's row of one document of lm-eval: prompt, answer and reference, without the scores of metrics.

    What the model's responses are decides the answer:
    - (log-probability, is greedy) of each choice: the likeliest choice; scores are `logprob.0`, `logprob.1` ...
    - A generated text: that text after lm-eval's filter.
    - A number, the log-probability of a whole document: no answer, and the score `logprob.0`.

    `task_name`: the lm-eval task, which becomes the row's source if there are several. `sample`: what lm-eval logged of the
    document: its requests ("arguments"), their responses ("resps", "filtered_resps"), and the right answer ("target").
    """
    responses = [response[0] for response in sample["resps"]]  # of each request, the first of lm-eval's repeats
    # Arguments of a request are (context, continuation), or (prompt, generation settings).
    prompt = str(sample["arguments"][0][0])
    if len(prompt) > SHOWN_CHARACTERS:
        prompt = f"…{prompt[-SHOWN_CHARACTERS:]}"
    reference = str(sample["target"]).strip()
    answer = ""
    scores: dict[str, float] = {}
    if isinstance(responses[0], tuple):
        logprobs = [float(logprob) for logprob, _ in responses]
        scores = {f"logprob.{number}": logprob for number, logprob in enumerate(logprobs)}
        choices = _choice_texts(sample["arguments"])
        answer = choices[logprobs.index(max(logprobs))]
        target = sample["target"]
        is_number = isinstance(target, int) and not isinstance(target, bool)
        is_index_of_choice = is_number and len(choices) > 1 and 0 <= target < len(choices)
        if is_index_of_choice:
            reference = choices[target]
    elif isinstance(responses[0], str):
        answer = str(sample["filtered_resps"][0])
    else:
        scores = {"logprob.0": float(responses[0])}
    return TaskRow(
        where=f"{task_name}:{sample['doc_id']}",
        prompt=prompt,
        answer=answer,
        reference=reference,
        scores=scores,
        source=task_name if has_several_tasks else "",
    )


def _choice_texts(requests: Sequence[tuple[Any, Any]]) -> list[str]:
    """The choices of a multiple-choice document, from the requests that lm-eval made for it: (context, continuation) each.

    The continuations are the choices. If these are all the same, as in WinoGrande, the contexts are.
    """
    continuations = {continuation for _, continuation in requests}
    contexts_are_choices = len(continuations) == 1 and len(requests) > 1
    choices = []
    for context, continuation in requests:
        choices.append(str(context if contexts_are_choices else continuation).strip())
    return choices


def lm_eval_standard_errors(
    all_tasks: LoadedTasks, metrics: Sequence[TaskMetric], rows: Sequence[TaskRow]
) -> dict[str, float]:
    """Standard errors of the metrics that are means, by lm-eval's own functions, to compare with its published numbers.

    Of one task: {"acc": 0.012}. Of several: {"acc": 0.009, "acc/arc_easy": 0.01, "acc/arc_challenge": 0.014}, where "acc" is
    lm-eval's pooled error; it is missing if all tasks weigh the same, whatever their number of rows. A metric is left out if
    one of its tasks has only one row.
    """
    from lm_eval.api.metrics import mean, mean_stderr, pooled_sample_stderr

    standard_errors: dict[str, float] = {}
    for metric in metrics:
        if all_tasks.aggregate_by_metric.get(metric.name, mean) is not mean:
            continue
        values_by_task = _values_by_task(metric.name, rows)
        errors = {}
        for task, values in values_by_task.items():
            if len(values) > 1:
                errors[task] = float(mean_stderr(values))
        if not errors or len(errors) < len(values_by_task):  # no task has values, or one has a single row
            continue
        if len(errors) == 1:
            standard_errors[metric.name] = next(iter(errors.values()))
            continue
        if all_tasks.mean_weighted_by_rows:
            sizes = [len(values) for values in values_by_task.values()]
            standard_errors[metric.name] = float(pooled_sample_stderr(list(errors.values()), sizes))
        standard_errors |= {f"{metric.name}/{task}": error for task, error in errors.items()}
    return standard_errors


def _values_by_task(metric: str, rows: Sequence[TaskRow]) -> dict[str, list[float]]:
    """The numbers that rows have of a metric, by the lm-eval task of the row; rows without one are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.scores.get(metric, row.items.get(metric))
        if _is_number(value):
            values.setdefault(row.source, []).append(float(value))  # type: ignore[arg-type]
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def _as_json_value(value: Any, metric: str) -> Any:
    """Turn what a document contributes to a metric into JSON values, for the report. Raises DataError if JSON cannot hold it."""
    if isinstance(value, np.ndarray | np.generic):
        return _as_json_value(value.tolist(), metric)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_as_json_value(element, metric) for element in value]
    if isinstance(value, dict):
        return {str(key): _as_json_value(element, metric) for key, element in value.items()}
    raise DataError(
        f"metric {metric}: its rows hold {type(value).__name__}, which no report can keep; give numbers or texts"
    )
