"""Writes the state of runs as JSON values, for `status --json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.runs.queue import QueuedJob
from launch.runs.status import RunView, one_line
from launch.runs.status_tables import RunDetails, RunsStatus

JSON_KEY_BY_RUN_FIELD = {
    "state_reason": "why",
    "total_steps": "total",
    "seconds_per_step": "step_s",
    "last_evaluation": "evaluated",
    "attempt_began_at": "since",
    "pipeline_parts": "parts",
}
"""Fields of `RunView` that have another key in `status --json`, whose keys stay as they are for scripts."""


def status_as_dict(status: RunsStatus, damage_by_checkpoint: Mapping[Path, str] | None) -> dict[str, Any]:
    """The JSON value that `status --json` prints. Times are seconds, memory GiB, sizes bytes, speeds of all ranks together.

    `damage_by_checkpoint`: what is wrong with each damaged checkpoint; None if they were not verified.
    """
    runs = [_run_as_dict(run) for run in status.runs]
    if status.details is not None:
        runs[0] |= _details_as_dict(status.details, damage_by_checkpoint or {})
    fields: dict[str, Any] = {"directory": str(status.root), "runs": runs}
    if damage_by_checkpoint is not None:
        fields["damaged"] = {str(path): damage for path, damage in damage_by_checkpoint.items()}
    fields["other_jobs"] = [_job_as_dict(job) for job in status.jobs_without_run]
    fields["queue_problem"] = status.queue.problem
    fields["all_searched"] = not status.search_stopped_early
    return fields


def _details_as_dict(details: RunDetails, damage_by_checkpoint: Mapping[Path, str]) -> dict[str, Any]:
    """What `status --json` says of a single run beyond its entry in a list: failure, checkpoints, and starts of its jobs.

    "given_up": a rollback went back to an earlier checkpoint. "starts": what each start of a SLURM job used (`jobs.jsonl`).
    """
    checkpoints = []
    for checkpoint in details.checkpoint_list.checkpoints:
        checkpoints.append(
            {
                "path": str(checkpoint.path),
                "step": checkpoint.step,
                "age_s": checkpoint.age_s,
                "size": checkpoint.num_bytes,
                "best": checkpoint.best_metric,
                "elsewhere": checkpoint.is_in_fallback_dir,
                "given_up": checkpoint.is_given_up,
                "damage": damage_by_checkpoint.get(checkpoint.path),
            }
        )
    return {
        "failure": details.failure or None,
        "watch": details.checkpoint_list.monitored_metric,
        "checkpoints": checkpoints,
        "starts": details.start_usages,
        "checkpoints_problem": details.checkpoint_list.problem,
    }


def _run_as_dict(run: RunView) -> dict[str, Any]:
    """The entry of one run in `status --json`; its key `left_s` is `RunView.remaining_s`."""
    fields = {JSON_KEY_BY_RUN_FIELD.get(name, name): value for name, value in asdict(run).items()}
    fields |= {"directory": str(run.directory), "why": one_line(run.state_reason), "left_s": run.remaining_s}
    fields["job"] = None if run.job is None else _job_as_dict(run.job)
    return fields


def _job_as_dict(job: QueuedJob) -> dict[str, str]:
    """A job of SLURM's queue as JSON values, in squeue's words."""
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "name": job.name,
        "start": job.start_time,
        "left": job.time_left,
    }
