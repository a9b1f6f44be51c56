"""Results in the hub's formats: `model-index` in the card's metadata, `.eval_results/*.yaml` of known benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.reporting.documents.facts import ModelFacts

DIRECTORY = ".eval_results"
HUB = "hub:"
"""In front of a task's `path` that is a data set of the hub."""


def model_index(facts: ModelFacts, hub_task: str) -> list[Any]:
    """huggingface_hub's EvalResult of every metric of these very weights, for the card's metadata.

    `hub_task`: the hub's name of what the model does, such as `text-generation`.
    """
    from huggingface_hub import EvalResult

    entries = []
    for metric in facts.measured:
        if not isinstance(metric.get("value"), int | float):
            continue
        task_name = metric["name"].partition("/")[0]
        metric_type = metric["name"].rpartition("/")[2]
        dataset = _dataset_name(metric)
        entries.append(
            EvalResult(
                task_type=hub_task,
                task_name=task_name,
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=metric_type,
                metric_name=metric["name"],
                metric_value=metric["value"],
            )
        )
    return entries


def _dataset_name(metric: dict[str, Any]) -> str:
    """What a metric was measured on: a hub id as it is, of a file its name alone, so that no card shows its directories."""
    path = str(metric.get("path") or "held-out documents of the run")
    return path.removeprefix(HUB) if path.startswith(HUB) else Path(path).name


def write_results(directory: Path, facts: ModelFacts) -> list[Path]:
    """Write `.eval_results/<task>.yaml`, in the hub's format, for each task whose data is a data set of the hub.

    Returns the files. `facts.benchmarks` names the data set of a task that was evaluated on a local copy. The first metric of a
    task, such as `accuracy` of `qa/accuracy`, is its result; tasks on other data are passed over.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    written: dict[str, Path] = {}
    for metric in facts.measured:
        task, _, metric_name = metric["name"].partition("/")
        path = str(metric.get("path") or "")
        benchmark = facts.benchmarks.get(task)
        if not benchmark and path.startswith(HUB):
            benchmark = path.removeprefix(HUB)
        if not benchmark or task in written:
            continue

        # <owner>/<name>, and perhaps the name of a task there.
        owner_and_name = benchmark.rstrip("/").split("/")[:2]
        task_there = benchmark.rstrip("/").split("/")[2:]
        notes = f"{metric_name} over {metric.get('rows')} rows"
        if "low" in metric:
            notes += f", 95 % interval {metric['low']:.4g} to {metric['high']:.4g}"
        entry = EvalResultEntry(
            dataset_id="/".join(owner_and_name),
            task_id="/".join(task_there) or "default",
            value=metric["value"],
            notes=f"{notes}; measured by shardtune evaluate, not verified by others",
        )
        file = directory / DIRECTORY / f"{task}.yaml"
        file.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        written[task] = file
    return [*written.values()]
