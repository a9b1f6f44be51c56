"""Measurements as the hub reads them: `model-index` in the card's metadata, and `.eval_results/*.yaml` of known benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.papers.known import Known

DIRECTORY = ".eval_results"


def model_index(known: Known | None, task: str) -> list[Any]:
    """huggingface_hub's EvalResult of every metric of these very weights; `task` is the hub's name of what the model does."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            task_name=row["name"].partition("/")[0],
            dataset_type=_dataset(row),
            dataset_name=_dataset(row),
            metric_type=row["name"].rpartition("/")[2],
            metric_name=row["name"],
            metric_value=row["value"],
        )
        for row in (known.measured if known is not None else [])
        if isinstance(row.get("value"), int | float)
    ]


def _dataset(row: dict[str, Any]) -> str:
    """A hub id as it is; of a file its name alone, so that no card tells the layout of a machine."""
    path = str(row.get("path") or "held-out documents of the run")
    return path.removeprefix("hub:") if path.startswith("hub:") else Path(path).name


def write_results(directory: Path, known: Known, benchmarks: dict[str, str]) -> list[Path]:
    """`.eval_results/<task>.yaml` of each task whose data is a data set of the hub; the files.

    `benchmarks`: `<owner>/<data set>[/<task there>]` by the task's name here, for data that was a local copy. The first metric
    of a task stands for it.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    written, seen = [], set()
    for row in known.measured:
        task, _, metric = row["name"].partition("/")
        named = benchmarks.get(task) or (str(row.get("path") or "") + "/").partition("hub:")[2].rstrip("/")
        if not named or task in seen:
            continue
        seen.add(task)
        parts = named.split("/")
        between = f", 95 % interval {row['low']:.4g} to {row['high']:.4g}" if "low" in row else ""
        entry = EvalResultEntry(
            dataset_id="/".join(parts[:2]),
            task_id="/".join(parts[2:]) or "default",
            value=row["value"],
            notes=f"{metric} over {row.get('rows')} rows{between}; measured by shardtune evaluate, not verified by others",
        )
        path = directory / DIRECTORY / f"{task}.yaml"
        path.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
