"""Results in the hub's formats: `model-index` in the card's metadata, `.eval_results/*.yaml` of known benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.reporting.documents.facts import ModelFacts

RESULTS_DIR_NAME = ".eval_results"
HUB_PATH_PREFIX = "hub:"
"""How the `path` of a task begins whose data is a data set of the hub: `hub:owner/name`."""


def model_index_entries(facts: ModelFacts, hub_task: str) -> list[Any]:
    """The results that the Hugging Face hub shows on the model's page (`model-index` in the card): one entry a metric.

    Each is an EvalResult of huggingface_hub. Only metrics that were measured on these very weights are in. `hub_task`: the
    hub's name of what the model does, such as `text-generation`.
    """
    from huggingface_hub import EvalResult

    entries = []
    for metric in facts.measured_metrics:
        if not isinstance(metric.get("value"), int | float):
            continue
        task_name = metric["name"].partition("/")[0]  # of a name such as `qa/accuracy`
        metric_type = metric["name"].rpartition("/")[2]
        dataset = _dataset_display_name(metric)
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


def _dataset_display_name(metric: dict[str, Any]) -> str:
    """What a metric was measured on, for readers of the card: a hub id as it is, of a file its name alone.

    So no card shows directories of the machine. `metric`: an entry of `ModelFacts.measured_metrics`.
    """
    path = str(metric.get("path") or "held-out documents of the run")
    return path.removeprefix(HUB_PATH_PREFIX) if path.startswith(HUB_PATH_PREFIX) else Path(path).name


def write_hub_results(directory: Path, facts: ModelFacts) -> list[Path]:
    """Write results that the hub can list under a benchmark: `.eval_results/<task>.yaml` for each task on a data set of the hub.

    `directory`: of the export. Returns the files. `facts.benchmarks` names the data set of a task that was evaluated on a
    local copy. The first metric of a task, such as `accuracy` of `qa/accuracy`, is its result; tasks on other data are passed
    over.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    file_by_task: dict[str, Path] = {}
    for metric in facts.measured_metrics:
        task, _, metric_name = metric["name"].partition("/")
        path = str(metric.get("path") or "")
        benchmark = facts.benchmarks.get(task)
        if not benchmark and path.startswith(HUB_PATH_PREFIX):
            benchmark = path.removeprefix(HUB_PATH_PREFIX)
        if not benchmark or task in file_by_task:
            continue

        # A benchmark is `owner/name`, or `owner/name/task` if the data set has several tasks.
        owner_and_name = benchmark.rstrip("/").split("/")[:2]
        task_of_data_set = benchmark.rstrip("/").split("/")[2:]
        notes = f"{metric_name} over {metric.get('rows')} rows"  # the number of rows, as the report counts them
        if "low" in metric:
            notes += f", 95 % interval {metric['low']:.4g} to {metric['high']:.4g}"
        entry = EvalResultEntry(
            dataset_id="/".join(owner_and_name),
            task_id="/".join(task_of_data_set) or "default",
            value=metric["value"],
            notes=f"{notes}; measured by shardtune evaluate, not verified by others",
        )
        file = directory / RESULTS_DIR_NAME / f"{task}.yaml"
        file.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        file_by_task[task] = file
    return [*file_by_task.values()]
