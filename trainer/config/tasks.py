"""What tasks ask of the rest of a configuration: an objective that can do them, and a metric to watch that is there."""

from __future__ import annotations

from collections.abc import Iterator

from strategies.errors import ShardtuneError
from trainer.config.run import RunConfig
from trainer.data.read.paths import expand
from trainer.evaluation.tasks import registry
from trainer.model.config import Kind
from trainer.objectives.registry import family_of


def problems(config: RunConfig) -> Iterator[str]:
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


def watch_problems(config: RunConfig, *, has_data: bool) -> Iterator[str]:
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
