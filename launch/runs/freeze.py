"""Writes `config.yaml` into a run directory, unless another run owns the directory or is queued for it."""

from __future__ import annotations

import json
import os
import time
from functools import lru_cache
from pathlib import Path

from launch.config.frozen import ComposedConfig, config_yaml, is_finished
from launch.config.resume import settle_resumed_config
from launch.config.trusted_values import remember_config
from launch.runs.queue import SUBMITTED_FILE, JobQueue, QueuedJob, read_queue, unfinished_job_id
from strategies.errors import ConfigError
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.reporting.status import CONFIG_SHA256_REGEX, write_text_atomic
from trainer.rollout.rewards import copies
from trainer.session.lease import RunDirInUse, raise_if_run_dir_is_in_use
from trainer.stopping.signals import is_signal_pending

QUEUE_CACHE_S = 10.0
"""Seconds for which a reading of SLURM's queue is used again: hundreds of points are frozen one after another."""


def write_run_config(composed: ComposedConfig, run_dir: Path, *, may_change_strategy: bool = False) -> Path:
    """Write the run's `config.yaml` into its directory, unless another run owns the directory; returns the directory.

    Called before a run starts, is submitted or goes on. Sets `run.dir` of the configuration, and renews the run's copies of
    its reward functions. With `may_change_strategy`, a run that is not done may continue under another strategy or
    micro-batch, and a message says so.

    Raises

    - ConfigError if the directory holds another run, or checkpoints that `run.resume=never` refuses,
    - RunDirInUse if the run is still running, or SLURM will start it,
    - StorageError if a file cannot be written.
    """
    run_dir = Path(run_dir).expanduser()
    config = composed.config
    has_checkpoints = _settle_with_earlier_start(composed, run_dir, may_change_strategy=may_change_strategy)
    raise_if_queued(run_dir)
    raise_if_run_dir_is_in_use(run_dir, config.run.lease_s, is_signal_pending)
    rewards = getattr(config.objective, "rewards", {})
    if rewards:
        copies.renew_copies(rewards, run_dir, has_progress=has_checkpoints, accept=config.run.accept)

    config.run.dir = str(run_dir)
    overrides = " ".join(json.dumps(override) for override in composed.overrides)
    header = f"# Frozen by shardtune; do not edit.\n# sha256: {composed.sha256}\n# overrides: {overrides}\n"
    write_text_atomic(run_dir / "config.yaml", header + config_yaml(config))
    remember_config(config)  # the user trusts what they have just started: code in it runs without another question
    return run_dir


def _settle_with_earlier_start(composed: ComposedConfig, run_dir: Path, *, may_change_strategy: bool) -> bool:
    """Check that the directory may be this run's, and take over what an earlier start of the run resolved.

    Returns whether the run has checkpoints. Raises ConfigError if the directory holds another run, if a file is in the way
    of a directory, or for checkpoints that `run.resume=never` refuses.
    """
    _raise_if_files_in_the_way(run_dir)
    config = composed.config
    checkpoints = checkpoints_in(checkpoint_dirs_of(run_dir, config.checkpoint.fallback_dir))
    # An incomplete checkpoint counts, too: another attempt may be writing it.
    if config.run.resume == "never" and (checkpoints or any((run_dir / "checkpoints").glob("*"))):
        raise ConfigError(f"run.resume=never: {run_dir} has checkpoints; choose another run.dir, or run.resume=auto")
    config_file = run_dir / "config.yaml"
    if config_file.exists():
        is_done = is_finished(run_dir)
        settle_resumed_config(
            composed,
            config_file,
            has_progress=bool(checkpoints) or is_done,
            may_change_strategy=may_change_strategy and not is_done,
        )
    return bool(checkpoints)


def _raise_if_files_in_the_way(run_dir: Path) -> None:
    """Raise ConfigError if there is a file where the run needs a directory: its own, or that of logs, checkpoints or lease."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir={run_dir}: is a file; name a directory")
    for directory in (run_dir / "logs", run_dir / "checkpoints", run_dir / "lease"):
        if directory.exists() and not directory.is_dir():
            raise ConfigError(
                f"{directory}: is a file, where the run needs a directory; move it away, or choose another run.dir"
            )


def raise_if_queued(run_dir: Path) -> None:
    """Raise RunDirInUse if a job in SLURM's queue is for this run, so that its configuration must not be frozen now.

    That job would train with the `config.yaml` that the caller is about to write, instead of the one it was submitted with.
    If squeue fails, nobody knows whether there is such a job: RunDirInUse is then raised for any run that was submitted and
    may still be queued.
    """
    job = _job_in_queue(run_dir)
    if job is None:
        return
    state_clause = f"it is pending: {job.waiting_text}" if job.is_pending else f"it is {job.state}"
    raise RunDirInUse(
        f"run.dir={run_dir}: job {job.id} is for this run, and would train with what is frozen now ({state_clause}). "
        f"`shardtune stop {run_dir}` ends it; or choose another run.dir"
    )


def job_with_same_config(composed: ComposedConfig, run_dir: Path) -> QueuedJob | None:
    """Find the job in SLURM's queue that runs, or will run, exactly this configuration in this directory.

    None if there is none.
    """
    try:
        recorded_hash = CONFIG_SHA256_REGEX.search((run_dir / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        return None
    # The hash is of the settings that decide the result.
    if recorded_hash is None or recorded_hash[1] != composed.sha256:
        return None
    return _job_in_queue(run_dir)


def _job_in_queue(run_dir: Path) -> QueuedJob | None:
    """Find the job in SLURM's queue that is for a run, other than the job of this process. None if

    - there is none,
    - it is about to end,
    - or it is the job that this process is part of.

    If squeue fails: None if the run was never submitted, is finished, or was submitted as the job of this process. Any
    other run may be queued, so squeue is called once more; if it fails again, RunDirInUse is raised.
    """
    own_job_ids = _own_job_ids()
    # Part of the cache's key, so that a reading of the queue expires.
    cache_period = int(time.monotonic() // QUEUE_CACHE_S)
    queue = _cached_queue(cache_period, attempt=1)
    if queue.problem is not None:
        submitted_job_id = unfinished_job_id(run_dir)
        # A job for a finished run would find nothing to do.
        may_be_queued = (
            submitted_job_id is not None and submitted_job_id not in own_job_ids and not is_finished(run_dir)
        )
        if not may_be_queued:
            return None
        queue = _cached_queue(cache_period, attempt=2)
        if queue.problem is not None:
            raise RunDirInUse(
                f"run.dir={run_dir}: was submitted as job {submitted_job_id}; whether it still waits or runs is not known "
                f"({queue.problem}). Try again when squeue answers; if job {submitted_job_id} is over, remove "
                f"{run_dir / SUBMITTED_FILE}; or choose another run.dir"
            )
    job = queue.find_job(run_dir, job_id=None)
    # `raw_id` is what the job has in SLURM_JOB_ID, also as a task of an array.
    if job is None or job.raw_id in own_job_ids or job.state == "COMPLETING":
        return None
    return job


def _own_job_ids() -> set[str]:
    """The ids by which SLURM knows the job that this process is part of: `17`, and `16_3` for a task of an array.

    Outside of SLURM none of them is the id of a job.
    """
    env = os.environ
    array_task_id = f"{env.get('SLURM_ARRAY_JOB_ID')}_{env.get('SLURM_ARRAY_TASK_ID')}"  # None_None outside of an array
    job_ids = {env.get("SLURM_JOB_ID"), array_task_id}
    return {job_id for job_id in job_ids if job_id is not None}


@lru_cache(maxsize=2)
def _cached_queue(cache_period: int, attempt: int) -> JobQueue:
    """SLURM's queue, cached: squeue is called once for each `attempt` in each `cache_period`.

    The arguments are only the cache's key: the period changes with time, so that a reading expires.
    """
    return read_queue()
