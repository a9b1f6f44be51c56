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
    """huggingface_hub's EvalResult of every metric of these very weights; `hub_task` is its name of what the model does."""
    from huggingface_hub import EvalResult

    entries = []
    for row in facts.measured:
        if not isinstance(row.get("value"), int | float):
            continue
        entries.append(
            EvalResult(
                task_type=hub_task,
                task_name=row["name"].partition("/")[0],
                dataset_type=_dataset(row),
                dataset_name=_dataset(row),
                metric_type=row["name"].rpartition("/")[2],
                metric_name=row["name"],
                metric_value=row["value"],
            )
        )
    return entries


def _dataset(row: dict[str, Any]) -> str:
    """A hub id as it is; of a file its name alone, so that no card shows the directories of a machine."""
    path = str(row.get("path") or "held-out documents of the run")
    return path.removeprefix(HUB) if path.startswith(HUB) else Path(path).name


def write_results(directory: Path, facts: ModelFacts) -> list[Path]:
    """Write `.eval_results/<task>.yaml` of each task whose data is a data set of the hub; return the files.

    `facts.benchmarks` names the data set of a task that was evaluated on a local copy. The first metric of a task is its
    result.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    written: dict[str, Path] = {}
    for row in facts.measured:
        task, _, metric = row["name"].partition("/")
        path = str(row.get("path") or "")
        benchmark = facts.benchmarks.get(task) or (path.removeprefix(HUB) if path.startswith(HUB) else "")
        if not benchmark or task in written:
            continue
        parts = benchmark.rstrip("/").split("/")
        interval = f", 95 % interval {row['low']:.4g} to {row['high']:.4g}" if "low" in row else ""
        entry = EvalResultEntry(
            dataset_id="/".join(parts[:2]),
            task_id="/".join(parts[2:]) or "default",
            value=row["value"],
            notes=f"{metric} over {row.get('rows')} rows{interval}; measured by shardtune evaluate, not verified by others",
        )
        file = directory / DIRECTORY / f"{task}.yaml"
        file.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        written[task] = file
    return [*written.values()]
