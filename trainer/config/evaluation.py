"""What an evaluation asks of the rest of a configuration: data, an objective that can do its tasks, a metric that is there."""

from __future__ import annotations

import re
from collections.abc import Iterator

from strategies.errors import ShardtuneError
from trainer.config.run import RunConfig
from trainer.data.read.paths import expand
from trainer.evaluation.tasks import registry
from trainer.model.config import Kind
from trainer.objectives.registry import FAMILIES, family_of

GENERATED = ("eval/bleu", "eval/rougeL")
"""Metrics of answers that are generated; more is better."""


def problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the evaluation that is asked for, one line each; reads no rows."""
    evaluation, has_data = config.evaluation, config.data.eval_path is not None or config.data.eval_share > 0
    remedy = "give data.eval_path or data.eval_share=0.05"
    for key in ("every_steps", "patience"):
        if getattr(evaluation, key) > 0 and not has_data and not evaluation.tasks:
            yield f"evaluation.{key}={getattr(evaluation, key)}: there is no evaluation data; {remedy}, or set it to 0"
    if evaluation.patience > 0 and evaluation.every_steps == 0:
        yield f"evaluation.patience={evaluation.patience}: counts evaluations; set evaluation.every_steps as well"
    if not re.fullmatch(r"eval/[\w./-]+", evaluation.watch):
        yield f"evaluation.watch={evaluation.watch}: must name an evaluation metric, such as eval/loss or eval/accuracy"
    elif (
        "loss" in (evaluation.watch.split("/")[1], evaluation.watch.rpartition("/")[2]) and evaluation.greater_is_better
    ):
        yield "evaluation.greater_is_better=true: smaller is better for a loss; set it to false, or watch another"
    elif evaluation.tasks and (found := [*_watched_task(config, has_data=has_data)]):
        yield from found
    elif _more_is_better(evaluation.watch) and not evaluation.greater_is_better:
        yield f"evaluation.watch={evaluation.watch}: a larger value is better; set evaluation.greater_is_better=true"
    yield from _tasks(config)
    yield from _generate(config, has_data=has_data)
    of_task = evaluation.watch in registry.metrics_of(evaluation.tasks)
    if (
        not of_task
        and evaluation.watch.rpartition("/")[2].startswith("f1_")
        and not family_of(config.objective).judges_labels
    ):
        yield f"evaluation.watch={evaluation.watch}: only classifiers have it; watch eval/loss or eval/accuracy"


def _more_is_better(metric: str) -> bool:
    name = metric.removeprefix("eval/").rpartition("/")[2]  # that of a named set stands before
    return f"eval/{name}" in GENERATED or any(name in family.better_when_larger for family in FAMILIES.values())


def _generate(config: RunConfig, *, has_data: bool) -> Iterator[str]:
    samples, watch = config.evaluation.generate.samples, config.evaluation.watch
    if watch in GENERATED and not samples:
        yield f"evaluation.watch={watch}: needs answers to score; set evaluation.generate.samples=100"
    if samples and not has_data:
        yield (
            f"evaluation.generate.samples={samples}: there is no evaluation data; give data.eval_path or "
            "data.eval_share=0.05, or set it to 0"
        )
    if samples and not family_of(config.objective).writes_answers:
        yield f"evaluation.generate.samples={samples}: objective={config.objective.name} writes no answers; set it to 0"
    yield from config.evaluation.generate.problems("evaluation.generate")


def _tasks(config: RunConfig) -> Iterator[str]:
    """What is wrong with the tasks, one line each; reads no rows."""
    tasks, family = config.evaluation.tasks, family_of(config.objective)
    yield from registry.problems(tasks)
    for name, task in tasks.items():
        kind = registry.KINDS.get(task.kind)
        if kind is None:
            continue
        key = f"evaluation.tasks.{name}"
        if family.kind is Kind.classifier and task.kind != "classification":
            yield (
                f"{key}.kind={task.kind}: objective={family.name} trains a head that writes nothing; evaluate its labels with "
                "kind=classification, or leave it out"
            )
        elif task.path is not None:
            try:
                expand(task.path, f"{key}.path", remote=config.data.remote)
            except ShardtuneError as error:
                yield str(error)


def _watched_task(config: RunConfig, *, has_data: bool) -> Iterator[str]:
    """What is wrong with watching this metric where there are tasks."""
    evaluation = config.evaluation
    metrics = registry.metrics_of(evaluation.tasks)
    watch = evaluation.watch
    if watch in metrics and metrics[watch] != evaluation.greater_is_better:
        better = str(metrics[watch]).lower()
        word = "larger" if metrics[watch] else "smaller"
        yield f"evaluation.watch={watch}: a {word} value is better; set evaluation.greater_is_better={better}"
    if watch not in metrics and not has_data:
        yield (
            f"evaluation.watch={watch}: there is no evaluation data, only tasks; watch one of {', '.join(metrics)}, or give "
            "data.eval_path or data.eval_share"
        )
    elif watch not in metrics and watch.count("/") > 1 and watch.split("/")[1] in {*evaluation.tasks} - {"loss"}:
        yield f"evaluation.watch={watch}: the tasks yield {', '.join(metrics)}; watch one of them"
