"""Reads a run from W&B's own files or from W&B's server, for runs whose directory is not here."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.compare.run_files import RecordedRun
from strategies.errors import ConfigError
from trainer.config.resuming import flatten_settings
from trainer.reporting.metric_names import (
    CURRENT_NAMES_EDITION,
    TRACKED_METRIC_BY_NAME,
    TRAINING_S,
    recorded_name,
    restore_rated_reward_names,
)
from trainer.reporting.run_record import parse_run_record
from trainer.reporting.status import RunState
from trainer.reporting.trackers.wandb_server import fetch_wandb_run

WANDB_RUN_DIRECTORY_REGEX = re.compile(r"(offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
"""Name of a directory that W&B writes: one for each start of a run."""
NOT_FINITE_TEXTS = {"NaN", "Infinity", "-Infinity"}
"""What W&B writes for a number that is not finite, since JSON has none."""
SERVER_PREFIX = "wandb:"
"""How a run on a server is named: wandb:<entity>/<project>/<run id>."""
KTO_OBJECTIVE = "kto"
"""The objective that rates answers one by one."""
FIRST_EDITION_STEP_NAME = "train_step"
"""The step in rows of W&B of before metrics had names of their own there."""
RETRY_AFTER_S = 1.0
"""Seconds before wandb is asked once more to read a run's files."""
SKIPPED_DATA_MESSAGE = "skipped corrupt data"
"""In what wandb says of a damaged place of a file, behind which it reads on and ends with 0."""
RUN_PAGE_REGEX = re.compile(r"https?://[^/]+/(?P<entity>[^/]+)/(?P<project>[^/]+)/runs/(?P<run>[^/?#]+).*")
"""Address of a run's page in W&B."""


def is_wandb_directory(directory: Path) -> bool:
    """Whether the directory is one that W&B wrote for a start of a run, such as `offline-run-20250131_120000-ab12`."""
    return WANDB_RUN_DIRECTORY_REGEX.fullmatch(directory.name) is not None and any(directory.glob("*.wandb"))


def wandb_start_directories(wandb_dir: Path) -> list[Path]:
    """W&B's directories of all starts of the run that `wandb_dir` belongs to, in the order of the starts."""
    match = WANDB_RUN_DIRECTORY_REGEX.fullmatch(wandb_dir.name)
    assert match is not None  # `is_wandb_directory` is true of it
    siblings = wandb_dir.parent.glob(f"*run-*-{match['id']}")
    start_dirs = [sibling for sibling in siblings if is_wandb_directory(sibling)]
    # The names begin with the time of the start; that of an offline run has a prefix before it.
    return sorted(start_dirs, key=lambda start_dir: start_dir.name.removeprefix("offline-"))


def read_wandb_directory(wandb_dir: Path) -> RecordedRun:
    """Read a run from W&B's directories. There is one for each start of the run; `wandb_dir` is any of them.

    What a run does not log to W&B stays empty: identity, receipt, checkpoints, events. Raises ConfigError if the run is not
    shardtune's, its files cannot be read, or wandb is not installed.
    """
    contents = _WandbContents()
    damage_notes: list[str] = []  # filled by the reader of the records
    for start_dir in wandb_start_directories(wandb_dir):
        contents.exit_record = {}  # the end of an earlier start is not the end of the run
        for record in _read_wandb_records(start_dir, damage_notes):
            contents.add_record(record)
    config = contents.config
    if contents.host is not None:
        config = {**config, "host": contents.host}
    status = _status_from_wandb(contents.exit_record, contents.summary, contents.started_at)
    return replace(
        _recorded_run_from_wandb(wandb_dir, config, status, contents.logged_steps), unreadable_lines=len(damage_notes)
    )


def is_wandb_address(path: Path) -> bool:
    """Whether this is no path of a directory, but names a run on W&B's server: `wandb:<entity>/<project>/<run id>`."""
    return str(path).startswith(SERVER_PREFIX)


def wandb_address(argument: str) -> str | None:
    """The address `wandb:<entity>/<project>/<run id>` of the run on W&B's server that a command-line argument names.

    The argument has this form already, or is the URL of the run's page in W&B. None if it is neither. Raises ConfigError for an
    incomplete `wandb:...`.
    """
    if match := RUN_PAGE_REGEX.fullmatch(argument):
        return f"{SERVER_PREFIX}{match['entity']}/{match['project']}/{match['run']}"
    if not argument.startswith(SERVER_PREFIX):
        return None
    address_parts = argument.removeprefix(SERVER_PREFIX).split("/")
    if len(address_parts) != 3 or not all(address_parts):
        raise ConfigError(
            f"{argument}: names no run; write wandb:<entity>/<project>/<run id>, or the address of its page"
        )
    return argument


def read_from_wandb_server(address: Path) -> RecordedRun:
    """Read a run from W&B's server; `address` is `wandb:<entity>/<project>/<run id>`.

    What a run does not log to W&B stays empty. Raises ConfigError if the run cannot be fetched, or is not shardtune's.
    """
    entity, project, run_id = str(address).removeprefix(SERVER_PREFIX).split("/")
    fetched = fetch_wandb_run(entity, project, run_id)
    logged_steps = _LoggedSteps()
    for row in fetched.rows:
        logged_steps.add_logged_row(row)
    # The server knows a state and no exit code: 0 and 1 stand for a good end and for any other.
    exit_record: dict[str, Any] = {}
    if fetched.state != "running":
        exit_record = {"exit_code": 0 if fetched.state == "finished" else 1}
    status = _status_from_wandb(exit_record, fetched.summary, _unix_time(fetched.created) or 0.0)
    return _recorded_run_from_wandb(address, fetched.config, status, logged_steps)


def _recorded_run_from_wandb(
    directory: Path, wandb_config: dict[str, Any], status: dict[str, Any], logged_steps: _LoggedSteps
) -> RecordedRun:
    """The run as a comparison reads it. Raises ConfigError if it is not shardtune's, or a later version wrote it.

    `wandb_config` has the run's settings under `config`. Its other keys are those of `run.json`, and columns of W&B's run table.
    `status`: what the run's `status.json` would hold.
    """
    config = wandb_config.get("config")
    if not isinstance(config, dict) or "strategy" not in config:
        raise ConfigError(f"{directory}: not a run of shardtune (W&B holds no configuration of one)")
    run_json = {}
    for key, value in wandb_config.items():
        is_of_wandb = key.startswith("_")
        if key != "config" and not is_of_wandb:
            run_json[key] = value
    # A column of the user's own may have the name of a key of `run.json`: what does not fit its type is left out, and is no error
    # of the record. So nobody reads the list of such errors.
    record = parse_run_record(run_json, type_errors=[])
    # Metrics were renamed between versions of shardtune: an edition is one set of names.
    if record.metric_names > CURRENT_NAMES_EDITION:
        raise ConfigError(
            f"{directory}: W&B has its metrics under names of edition {record.metric_names}, and this shardtune knows editions "
            f"up to {CURRENT_NAMES_EDITION}: use a later shardtune"
        )
    settings = flatten_settings(config)
    steps = logged_steps.steps
    if settings.get("objective.name") == KTO_OBJECTIVE:
        steps = {step: restore_rated_reward_names(row) for step, row in steps.items()}
    return RecordedRun(
        directory=directory,
        config=settings,
        identity={},
        record=record,
        status=status,
        failure={},
        steps=steps,
        evaluations=logged_steps.evaluations,
    )


def _read_wandb_records(start_dir: Path, damage_notes: list[str]) -> Iterator[dict[str, Any]]:
    """The records in W&B's directory of one start of a run, in order, read by a process of wandb.

    Appends to `damage_notes` a line for each damaged place that wandb skipped, and one if wandb failed after some of the records.
    Raises ConfigError if wandb is not installed, cannot read the files, or prints a record that is no JSON.
    """
    if find_spec("wandb") is None:
        raise ConfigError(f"{start_dir}: its files are read by wandb, which is not installed: pip install wandb")
    completed = _run_wandb_inspect(start_dir)
    if completed.returncode:
        # On a busy machine the command has ended with 1 over files that it could read a moment later.
        time.sleep(RETRY_AFTER_S)
        completed = _run_wandb_inspect(start_dir)
    damage_notes += [line for line in completed.stderr.splitlines() if SKIPPED_DATA_MESSAGE in line]
    lines = [line for line in completed.stdout.splitlines() if line.strip()]
    for record_number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            is_last = record_number == len(lines)  # it may be torn, as in the file of a run that is still training
            if not is_last:
                raise ConfigError(f"{start_dir}: record {record_number} cannot be read; leave this run out") from None
    if completed.returncode and lines:
        damage_notes.append("the command failed after some records, so that later ones are missing")
    elif completed.returncode:
        last_error_line = (completed.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise ConfigError(f"{start_dir}: wandb cannot read its files ({last_error_line}); leave this run out")


def _run_wandb_inspect(start_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of wandb that prints the records in W&B's directory as JSON lines; it needs no server."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(start_dir)]
    environment = dict(os.environ)
    # A run that this process tracked left the address of its W&B service there; reading files must not go to that service.
    environment.pop("WANDB_SERVICE", None)
    environment["WANDB_ERROR_REPORTING"] = "false"  # else W&B is sent a record of each reading
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@dataclass(slots=True)
class _LoggedSteps:
    """Rows of training steps and of evaluations, by step. W&B has one row for all that was logged at a step."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def add_logged_row(self, logged_row: dict[str, Any]) -> None:
        """Add a row of W&B: the metrics of its training step to `steps`, its held-out metrics to `evaluations`.

        A row without a step is ignored. A row with today's names is {"train/global_step": 5, "train/loss": 2.3}, one with the
        names of the first edition {"train_step": 5, "loss": 2.3}; see `trainer/reporting/metric_names.py`.
        """
        row = {}
        for name, logged_value in logged_row.items():
            is_of_wandb = name.startswith("_")
            # A row from a server has null where another row has a number.
            if not is_of_wandb and logged_value is not None:
                row[name] = _finite_or_none(logged_value)
        if FIRST_EDITION_STEP_NAME in row:
            step = row.pop(FIRST_EDITION_STEP_NAME)
            step_metrics, other_metrics = _split_first_edition_row(row)
        else:
            step = row.get(TRACKED_METRIC_BY_NAME["step"].name)
            step_metrics, other_metrics = _split_wandb_row(row)
        if not isinstance(step, int | float):
            return
        step = int(step)
        if "loss" in step_metrics:
            self.steps[step] = {"step": step, **step_metrics}
        held_out_metrics = {}
        for name, value in other_metrics.items():
            if isinstance(value, int | float) and not _is_size_of_table(name, row):
                held_out_metrics[name] = value
        if held_out_metrics:
            self.evaluations[step] = self.evaluations.get(step, {}) | held_out_metrics


@dataclass(slots=True)
class _WandbContents:
    """What W&B's own files hold of a run. Later records complete or replace earlier ones, as they do on W&B's server."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    """The last values that the run logged."""
    exit_record: dict[str, Any] = field(default_factory=dict)
    """How the last start ended; empty if it did not."""
    logged_steps: _LoggedSteps = field(default_factory=_LoggedSteps)
    host: str | None = None
    started_at: float = 0.0
    """Unix time of the last start."""

    def add_record(self, record: dict[str, Any]) -> None:
        """Add one record of W&B's files, such as {"type": "history", "history": {"item": {"train/loss": 2.3}}}.

        A record of a run, a summary or an exit completes or replaces an earlier one; a history record adds what was logged at a
        step. Other types are ignored.
        """
        record_type = record["type"]
        if record_type == "run":
            run = record["run"]
            self.config |= run.get("config", {}).get("update", {})
            self.host = run.get("host") or self.host
            self.started_at = _unix_time(run.get("start_time")) or self.started_at
        elif record_type == "summary":
            self.summary |= record["summary"].get("update", {})
        elif record_type == "exit":
            self.exit_record = record["exit"]
        elif record_type == "history":
            self.logged_steps.add_logged_row(record["history"].get("item", {}))


def _is_size_of_table(name: str, row: dict[str, Any]) -> bool:
    """Whether a name in a row of W&B is a size of a logged table, such as `eval/facts/worst_rows.nrows`, and no metric.

    W&B has the type of a table beside its sizes, as `eval/facts/worst_rows._type`.
    """
    return f"{name.rpartition('.')[0]}._type" in row


def _split_wandb_row(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a row of W&B into (metrics of the training step, all other metrics).

    Metrics of the step get their names in `metrics.jsonl` (`train/loss` -> `loss`); the others keep their names in W&B.
    """
    step_metrics = {}
    other_metrics = {}
    for wandb_name, value in row.items():
        name = recorded_name(wandb_name)  # None if it is no metric of a step
        if name is not None:
            step_metrics[name] = value
        elif wandb_name != TRAINING_S.name:  # the files of a run have no such counter
            other_metrics[wandb_name] = value
    return step_metrics, other_metrics


def _split_first_edition_row(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a row of W&B with names of the first edition into (metrics of the training step, all other metrics).

    The first edition: the names of metrics in early versions of shardtune, which were the same in W&B as in `metrics.jsonl`.
    """
    step_metrics = {}
    other_metrics = {}
    for name, value in row.items():
        # `blocks_s/worst` and `loss/a` belong to the step, because the row also has `blocks_s` and `loss`. `eval/loss` does
        # not, because the row has no `eval`.
        belongs_to_step = "/" not in name or name.partition("/")[0] in row
        if belongs_to_step:
            step_metrics[name] = value
        else:
            other_metrics[name] = value
    return step_metrics, other_metrics


def _finite_or_none(logged: Any) -> Any:
    """The logged value; None for a number that is not finite, which W&B writes as `"NaN"` or `"Infinity"`."""
    if isinstance(logged, str):
        return None if logged in NOT_FINITE_TEXTS else logged
    if isinstance(logged, float) and not math.isfinite(logged):
        return None
    return logged


def _status_from_wandb(exit_record: dict[str, Any], summary: dict[str, Any], started_at: float) -> dict[str, Any]:
    """What the run's `status.json` would hold: its state, its last step, and when it was last seen.

    - W&B knows of no end (`exit_record` is empty): running.
    - The run logged itself that it was preempted or done, as its last value of `state`: that.
    - Otherwise: done for exit code 0, else failed.

    `summary`: the last values that the run logged. `started_at`: Unix time of the start.
    """
    last_seen_at = started_at + float(summary.get("_runtime") or 0.0)
    if not exit_record:
        state = RunState.running
    elif summary.get("state") in (RunState.preempted, RunState.done):
        state = RunState(summary["state"])
    else:
        exit_code = exit_record.get("exit_code", 0)
        state = RunState.done if exit_code == 0 else RunState.failed
    step = summary.get(TRACKED_METRIC_BY_NAME["step"].name, summary.get(FIRST_EDITION_STEP_NAME))
    return {"step": step, "time": last_seen_at, "state": state}


def _unix_time(iso_time: object) -> float | None:
    """Seconds since 1970 of a time in ISO format; None if it is not one."""
    try:
        return datetime.fromisoformat(str(iso_time)).timestamp()
    except ValueError:
        return None
