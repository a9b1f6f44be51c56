"""Converts lm-evaluation-harness's results for each document into rows, and its metrics into ours."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.evaluation.harness.compat import filter_names
from trainer.evaluation.harness.task_files import TaskFiles
from trainer.evaluation.tasks.base import Metric, TaskRow
from trainer.evaluation.tasks.model_interface import SHOWN_CHARACTERS

NO_VALUE_ERRORS = (ZeroDivisionError, ValueError, IndexError)
"""What a metric raises of rows that it has no value for, as those of one class alone."""


def metric_name(metric: str, filter_key: str) -> str:
    """`exact_match_strict_match` of lm-eval's `exact_match,strict-match`; `acc` of `acc,none`."""
    whole = metric if filter_key == "none" else f"{metric}_{filter_key}"
    return re.sub(r"\W+", "_", whole)


def declared_metrics(what: TaskFiles) -> tuple[Metric, ...]:
    """The metrics that YAMLs name, without what they are made of; none of a task that is written in Python."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, is_higher_better

    from trainer.evaluation.harness.isolation import collect_warnings

    found: dict[str, Metric] = {}
    for settings in what.single_tasks.values():
        if settings.get("class"):
            continue
        plain = DEFAULT_METRIC_REGISTRY.get(settings.get("output_type", "generate_until"), [])
        asked = settings.get("metric_list") or [{"metric": name} for name in plain]
        filters = [each["name"] for each in settings.get("filter_list") or [{"name": "none"}]]
        for each in asked:
            metric = str(each["metric"]).rpartition("/")[2].rpartition(".")[2]
            with collect_warnings():
                greater = each.get("higher_is_better", is_higher_better(metric))
            for filter_key in filters:
                name = metric_name(metric, filter_key)
                found.setdefault(name, Metric(name, "lm-eval's", greater))
    return tuple(found.values())


@dataclass(slots=True)
class LoadedTasks:
    """The harness's tasks with their data, and what their metrics are made of."""

    tasks: dict[str, Any]
    by_size: bool
    metrics: tuple[Metric, ...] = field(init=False)
    aggregates: dict[str, Callable[..., Any]] = field(init=False)
    """What makes one number of the items of a metric, by our name."""

    def __post_init__(self) -> None:
        found: dict[str, Metric] = {}
        self.aggregates = {}
        for task in self.tasks.values():
            better, filters = task.higher_is_better(), filter_names(task)
            for metric, aggregate in task.aggregation().items():
                for filter_key in filters:
                    name = metric_name(metric, filter_key)
                    self.aggregates.setdefault(name, aggregate)
                    found.setdefault(name, self._metric(name, aggregate, better.get(metric)))
        self.metrics = tuple(found.values())

    def _metric(self, name: str, aggregate: Any, greater: bool | None) -> Metric:
        from lm_eval.api import metrics

        what = {
            metrics.mean: "mean over rows",
            metrics.weighted_perplexity: "exponential of the loss a word or byte",
            metrics.bits_per_byte: "bits of loss a byte",
            metrics.perplexity: "exponential of the mean loss of a row",
        }.get(aggregate)
        says = f"{what or getattr(aggregate, '__name__', 'a number made of all rows')}, as lm-eval has it"
        below = None if aggregate in (metrics.mean, metrics.perplexity) else f"count.{name}"
        over = name if aggregate is metrics.mean else f"loss.{name}"
        ratio = None if what is None or (len(self.tasks) > 1 and not self.by_size) else (over, below)
        return Metric(name, says, greater, ratio, exponential=what is not None and what.startswith("exponential"))

    def split_value(self, name: str, value: Any) -> tuple[dict[str, float], Any]:
        """(scores, item) that one document gives a metric; the item is None where scores say all."""
        from lm_eval.api import metrics

        aggregate = self.aggregates.get(name, metrics.mean)
        weighted = any(metric.name == name and metric.ratio is None for metric in self.metrics)
        if aggregate is metrics.mean and _is_number(value) and not weighted:
            return {name: float(value)}, None
        if aggregate is metrics.perplexity and _is_number(value) and not weighted:
            return {f"loss.{name}": -float(value)}, None
        if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte) and not weighted:
            loss = -float(value[0]) / (math.log(2) if aggregate is metrics.bits_per_byte else 1.0)
            return {f"loss.{name}": loss, f"count.{name}": float(value[1])}, None
        return {}, _as_json(value, name)

    def weighted_metric(self, name: str, rows: Sequence[TaskRow]) -> Callable[[np.ndarray], float]:
        """A metric that is no ratio, of how often each row counts: of several tasks the mean of theirs."""
        from lm_eval.api import metrics

        aggregate = self.aggregates.get(name, metrics.mean)
        items = [row.items.get(name) for row in rows]
        there = np.array([item is not None for item in items])
        sources = np.array([row.source for row in rows])

        def of(weights: np.ndarray) -> float:
            found, sizes = [], []
            for source in dict.fromkeys(sources.tolist()):
                mine = np.flatnonzero((sources == source) & there)
                drawn = np.repeat(mine, weights[mine].astype(int))
                if len(drawn):
                    try:
                        found.append(float(aggregate([items[place] for place in drawn])))
                    except NO_VALUE_ERRORS:
                        found.append(math.nan)
                    sizes.append(len(drawn) if self.by_size else 1)
            return float(np.average(found, weights=sizes)) if found else math.nan

        return of

    def version_notes(self) -> Iterator[str]:
        """Versions and numbers of examples, of few tasks."""
        for name, task in [*self.tasks.items()][:3]:
            yield f"{name}:version {task.VERSION}, {task.get_config('num_fewshot') or 0}-shot"


def task_rows(name: str, samples: Sequence[dict[str, Any]], all_tasks: LoadedTasks) -> list[TaskRow]:
    """A row for each document, out of what `lm_eval.evaluator.evaluate` logged of it under each filter."""
    found: dict[int, TaskRow] = {}
    for sample in samples:
        row = found.setdefault(sample["doc_id"], _row(name, sample, several=len(all_tasks.tasks) > 1))
        for metric in sample["metrics"]:
            ours = metric_name(metric, sample["filter"])
            scores, item = all_tasks.split_value(ours, sample[metric])
            row.scores |= scores
            if item is not None:
                row.items[ours] = item
    return [found[number] for number in sorted(found)]


def complete_scores(rows: list[TaskRow], all_tasks: LoadedTasks) -> list[TaskRow]:
    """All rows; where some have no value of a metric it is noted which have one, and the first score is the first metric's."""
    there = Counter(name for row in rows for name in row.scores if "." not in name)
    partly = {name for name, number in there.items() if number < len(rows)}
    lead = next((metric for metric in all_tasks.metrics if any(_has_metric(metric.name, row) for row in rows)), None)
    for row in rows:
        row.scores |= {f"rows.{name}": 1.0 for name in partly & row.scores.keys()}
        if lead is not None and lead.ratio is not None:
            row.scores = {lead.ratio[0]: row.scores.get(lead.ratio[0], 0.0), **row.scores}
        elif lead is not None:
            row.scores = {f"each.{lead.name}": all_tasks.weighted_metric(lead.name, [row])(np.ones(1)), **row.scores}
    return rows


def _has_metric(name: str, row: TaskRow) -> bool:
    return name in row.items or any(each in row.scores for each in (name, f"loss.{name}"))


def _row(name: str, sample: dict[str, Any], *, several: bool) -> TaskRow:
    arguments, answers = sample["arguments"], [each[0] for each in sample["resps"]]
    prompt = str(arguments[0][0])
    prompt = prompt if len(prompt) <= SHOWN_CHARACTERS else f"…{prompt[-SHOWN_CHARACTERS:]}"
    target, scores = sample["target"], dict[str, float]()
    answer, reference = "", str(target).strip()
    if isinstance(answers[0], tuple):  # likelihoods of continuations
        said = [float(each[0]) for each in answers]
        scores = {f"logprob.{number}": value for number, value in enumerate(said)}
        side = 0 if len({each[1] for each in arguments}) == 1 < len(arguments) else 1  # of several contexts, these
        answer = str(arguments[said.index(max(said))][side]).strip()
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(arguments) > 1:
            reference = str(arguments[target][side]).strip()
    elif isinstance(answers[0], str):
        kept = sample["filtered_resps"][0]
        answer = kept if isinstance(kept, str) else str(kept)
    else:
        scores = {"logprob.0": float(answers[0])}
    return TaskRow(f"{name}:{sample['doc_id']}", prompt, answer, reference, scores, name if several else "")


def lm_eval_standard_errors(
    all_tasks: LoadedTasks, metrics: Sequence[Metric], rows: Sequence[TaskRow]
) -> dict[str, float]:
    """lm-eval's own standard errors of means, by metric; of several tasks its pooled one, where rows weigh alike."""
    from lm_eval.api.metrics import mean, mean_stderr, pooled_sample_stderr

    found: dict[str, float] = {}
    for metric in metrics:
        if all_tasks.aggregates.get(metric.name, mean) is not mean:
            continue
        parts: dict[str, list[float]] = {}
        for row in rows:
            value = row.scores.get(metric.name, row.items.get(metric.name))
            if _is_number(value):
                parts.setdefault(row.source, []).append(float(value))  # type: ignore[arg-type]
        errors = {source: float(mean_stderr(values)) for source, values in parts.items() if len(values) > 1}
        if len(errors) == len(parts) == 1:
            found[metric.name] = next(iter(errors.values()))
        elif len(errors) == len(parts) > 1:
            if all_tasks.by_size:
                sizes = [len(values) for values in parts.values()]
                found[metric.name] = float(pooled_sample_stderr(list(errors.values()), sizes))
            found |= {f"{metric.name}/{source}": value for source, value in errors.items()}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)


def _as_json(value: Any, name: str) -> Any:
    """An item as JSON holds it. Raises DataError."""
    if isinstance(value, np.ndarray | np.generic):
        return _as_json(value.tolist(), name)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [_as_json(each, name) for each in value]
    if isinstance(value, dict):
        return {str(key): _as_json(each, name) for key, each in value.items()}
    raise DataError(
        f"metric {name}: its rows hold {type(value).__name__}, which no report can keep; give numbers or texts"
    )
