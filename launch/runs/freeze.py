"""Writes `config.yaml` into a run directory, unless another run owns the directory or is queued for it."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from pathlib import Path

from launch.config.frozen import Composed, is_finished, same_or_refuse, to_yaml
from launch.config.trusted_values import remember_config
from launch.runs.queue import SUBMITTED, Queue, QueuedJob, read_queue, unfinished_job
from strategies.errors import ConfigError
from trainer.checkpoints.layout import places_of, published
from trainer.reporting.status import FROZEN, write_text_atomic
from trainer.session.lease import InUse, refuse_in_use
from trainer.stopping.signals import pending

QUEUE_S = 10.0
"""Seconds for which an answer of SLURM's queue is taken."""


def freeze(composed: Composed, run_dir: Path, *, another_way: bool = False) -> Path:
    """Write `config.yaml` (with its hash) atomically and return the directory.

    With `another_way` a run that is not done may continue under another strategy or micro-batch, and a message says so.
    Errors: ConfigError if the directory holds another run, one that is still running or that SLURM will start, or checkpoints
    that `run.resume=never` refuses; StorageError.
    """
    run_dir = Path(run_dir).expanduser()
    path = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir}: is a file; name a directory")
    for place in (run_dir / "logs", run_dir / "checkpoints", run_dir / "lease"):
        if place.exists() and not place.is_dir():
            raise ConfigError(
                f"{place}: is a file, where the run needs a directory; move it away, or choose another run.dir"
            )
    checkpoints = published(places_of(run_dir, composed.config.checkpoint.fallback_dir))
    if composed.config.run.resume == "never" and (checkpoints or any((run_dir / "checkpoints").glob("*"))):
        raise ConfigError(f"run.resume=never: {run_dir} has checkpoints; choose another run.dir, or run.resume=auto")
    if path.exists():
        is_done = is_finished(run_dir)
        same_or_refuse(
            composed, path, has_progress=bool(checkpoints) or is_done, may_compute_otherwise=another_way and not is_done
        )
    refuse_queued(run_dir)
    refuse_in_use(run_dir, composed.config.run.lease_s, pending)
    config = composed.config
    config.run.dir = str(run_dir)
    words = " ".join(json.dumps(word) for word in composed.overrides)
    header = f"# Frozen by shardtune; do not edit.\n# sha256: {composed.sha256}\n# overrides: {words}\n"
    write_text_atomic(path, header + to_yaml(config))
    remember_config(config)
    return run_dir


def refuse_queued(run_dir: Path) -> None:
    """Refuse a directory that a job in SLURM's queue, other than this process's, is for: it would start in it.

    A directory that was submitted before is also refused while the queue cannot be asked. Errors: InUse.
    """
    job = _queued(run_dir)
    if job is None:
        return
    state = f"it is pending: {job.why}" if job.is_pending else f"it is {job.state}"
    raise InUse(
        f"run.dir={run_dir}: job {job.id} is for this run, and would train with what is frozen now ({state}). "
        f"`shardtune stop {run_dir}` ends it; or choose another run.dir"
    )


def queued_as_asked(composed: Composed, run_dir: Path) -> QueuedJob | None:
    """The job by which SLURM will run, or runs, this very configuration in this directory; None if there is none."""
    try:
        seal = FROZEN.search((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None
    if seal is None or seal[1] != composed.sha256:
        return None
    return _queued(run_dir)


def _queued(run_dir: Path) -> QueuedJob | None:
    """The job in SLURM's queue that is for this run; None if there is none, or it is this process's.

    Errors: InUse if the queue cannot be asked and the run was submitted before.
    """
    own_job = _own_job()
    now = int(time.monotonic() // QUEUE_S)
    queue = _queue(now)
    if queue.problem is not None:
        submitted = unfinished_job(run_dir)
        # A job that still waits for a run that is done would find nothing to do.
        if submitted is None or submitted in own_job or is_finished(run_dir):
            return None
        queue = _queue(now, again=True)
        if queue.problem is not None:
            raise InUse(
                f"run.dir={run_dir}: was submitted as job {submitted}; whether it still waits or runs is not known "
                f"({queue.problem}). Try again when squeue answers; if job {submitted} is over, remove "
                f"{run_dir / SUBMITTED}; or choose another run.dir"
            )
    job = queue.find_job(run_dir, None)
    return None if job is None or job.raw_id in own_job or job.state == "COMPLETING" else job


def _own_job() -> set[str]:
    """The names of the job that this process is part of; empty outside of a job."""
    env = os.environ
    names = {env.get("SLURM_JOB_ID"), f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"}
    return {name for name in names if name is not None}


@lru_cache(maxsize=2)
def _queue(_: int, again: bool = False) -> Queue:
    """SLURM's queue, asked once for many runs, and once more if that failed; the first argument changes with time."""
    return read_queue()
