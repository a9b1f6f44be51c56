"""Finds the checkpoint of a run that a command names: the exported one, the last, the best, or that of a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.reporting.run_record import RUN_RECORD

if TYPE_CHECKING:
    from trainer.checkpoints.config import CheckpointConfig
    from trainer.config.run import RunConfig

MAX_CHOICES = 10
"""How often a checkpoint is chosen at most, if the chosen one is deleted each time while it is read."""


def find_checkpoint(run_dir: Path, which: str, config: CheckpointConfig, *, looks: int = MAX_CHOICES) -> Path:
    """Find the checkpoint of a run that a command names: `auto`, `last`, `best` or a step; returns its directory.

    `auto` is the one that the run exported at its end, and the last one if it is not done or of an earlier version. A run that
    still trains deletes old checkpoints: if the chosen one disappears while it is verified, the choice is made again, `looks`
    times in all; not for a step. Errors: ConfigError if it is missing or damaged.
    """
    from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
    from trainer.checkpoints.manifest import checkpoint_problem
    from trainer.export.exported_checkpoint import recorded_export_step
    from trainer.reporting.status import read_json_or_empty

    checkpoints = dict(checkpoints_in(checkpoint_dirs_of(run_dir, config.fallback_dir)))
    if not checkpoints:
        raise ConfigError(
            f"run.dir={run_dir}: has no checkpoints; they are written at the end (checkpoint.save_final=true) and as "
            "checkpoint.every_steps or checkpoint.every_minutes say"
        )
    known = f"its checkpoints are {', '.join(map(str, checkpoints))}"
    if which == "best":
        step = best_step(checkpoints)
        if step not in checkpoints:
            raise ConfigError(f"checkpoint=best: {run_dir} kept none (it needs evaluation.every_steps); {known}")
    elif which in ("auto", "last"):
        step = max(checkpoints)
        exported_step = recorded_export_step(read_json_or_empty(run_dir / RUN_RECORD))
        if which == "auto" and exported_step in checkpoints:
            step = exported_step
        elif which == "auto" and exported_step is not None:
            print(
                f"note: the run chose step {exported_step} for its export, whose checkpoint is not there any more; "
                f"step {step} is taken",
                flush=True,
            )
    elif which.isdigit() and int(which) in checkpoints:
        step = int(which)
    else:
        raise ConfigError(f"checkpoint={which}: must be auto, last, best or a step; {known}")

    # Is it complete, and still there?
    path = checkpoints[step]
    problem = checkpoint_problem(path, may_be_deleted=True)
    was_deleted = problem and not path.exists()
    if was_deleted and which in ("auto", "last", "best") and looks > 1:
        print(
            f"checkpoint={which}: {path.name} was deleted meanwhile, since the run is still training; taking the next",
            flush=True,
        )
        return find_checkpoint(run_dir, which, config, looks=looks - 1)
    if problem:
        other_steps = [other for other in checkpoints if other != step]
        instead = f"checkpoint=<step> takes another one of {other_steps}" if other_steps else "there is no other"
        raise ConfigError(f"checkpoint={which}: {path} {problem}; {instead}")
    return path


def best_step(checkpoints: dict[int, Path]) -> int | None:
    """Find the best step of a run, as its newest readable checkpoint records it; None if it records none.

    `checkpoints`: directories by step. Prints a line for each newer checkpoint that cannot be read. Errors: ConfigError if
    none can.
    """
    from strategies.saving import PROGRESS_FILE
    from strategies.state import read_state_header
    from trainer.checkpoints.manifest import checkpoint_problem

    # Each checkpoint records the best step until then, so the newest one knows most.
    problems = []
    for step in sorted(checkpoints, reverse=True):
        # A run that still trains may delete it meanwhile: its files are then not waited for.
        problem = checkpoint_problem(checkpoints[step], only_file=PROGRESS_FILE, may_be_deleted=True)
        if problem is None:
            return read_state_header(checkpoints[step]).progress.best_step
        problems.append(f"{checkpoints[step].name} {problem}")
        print(f"checkpoint=best: {problems[-1]}; asking the one before it", flush=True)
    raise ConfigError(f"checkpoint=best: no checkpoint can say which is the best ({'; '.join(problems[:3])})")


def warn_if_training_did_not_help(run_dir: Path, checkpoint: Path, config: RunConfig) -> None:
    """Warn that training gained nothing, if the model was at least as good before the first step as at its best `checkpoint`.

    Goes by the watched metric. Both values come from `metrics.jsonl`; if one is missing, nothing is said.
    """
    from trainer.config.evaluation import is_greater_better
    from trainer.reporting.results import held_out_metrics_at_step

    watched_metric = config.evaluation.watched
    # The directory is called step-000200.
    best_step = int(checkpoint.name.rpartition("-")[2])
    base_value = held_out_metrics_at_step(run_dir, 0).get(watched_metric)
    best_value = held_out_metrics_at_step(run_dir, best_step).get(watched_metric)
    if base_value is None or best_value is None:
        return
    gain = best_value - base_value if is_greater_better(config) else base_value - best_value
    if gain <= 0:
        print(
            f"checkpoint=best: no evaluation was better than the one before the first step ({watched_metric} {base_value:.4f}; "
            f"step {best_step} has {best_value:.4f}): the base does at least as well",
            flush=True,
        )
