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
from typing import Any, NamedTuple

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
    """Find W&B's directories of all starts of the run that `wandb_dir` belongs to, in the order of the starts.

    W&B writes a directory for each start of a run, resumed ones included; their names end with the same run id.
    """
    match = WANDB_RUN_DIRECTORY_REGEX.fullmatch(wandb_dir.name)
    assert match is not None  # `is_wandb_directory` is true of it
    siblings = wandb_dir.parent.glob(f"*run-*-{match['id']}")
    start_dirs = [sibling for sibling in siblings if is_wandb_directory(sibling)]
    # The names begin with the time of the start; that of an offline run has a prefix before it.
    return sorted(start_dirs, key=lambda start_dir: start_dir.name.removeprefix("offline-"))


def read_wandb_directory(wandb_dir: Path) -> RecordedRun:
    """Read a run from the files that W&B wrote, for a comparison with a run whose own directory is not here.

    W&B writes a directory for each start of a run: `wandb_dir` is any of them, and all are read. What a run does not log to
    W&B stays empty: identity, receipt, checkpoints, events.

    Raises ConfigError if the run is not shardtune's, its files cannot be read, or wandb is not installed.
    """
    contents = _WandbContents()
    damage_notes: list[str] = []  # `_read_wandb_records` appends a line for each damaged place
    for start_dir in wandb_start_directories(wandb_dir):
        contents.exit_record = {}  # the end of an earlier start is not the end of the run
        for record in _read_wandb_records(start_dir, damage_notes):
            contents.add_record(record)
    config = contents.config
    if contents.host is not None:
        # `run.json` has the host too, and the record is made of this dict.
        config = {**config, "host": contents.host}
    status = _status_from_wandb(contents.exit_record, contents.summary, contents.started_at)
    return replace(
        _recorded_run_from_wandb(wandb_dir, config, status, contents.logged_steps), unreadable_lines=len(damage_notes)
    )


def is_wandb_address(path: Path) -> bool:
    """Whether this is no path of a directory, but names a run on W&B's server: `wandb:<entity>/<project>/<run id>`."""
    return str(path).startswith(SERVER_PREFIX)


def wandb_address(argument: str) -> str | None:
    """The address `wandb:<entity>/<project>/<run id>` if a command-line argument names a run on W&B's server, else None.

    `argument`: such an address, or the URL of the run's page in W&B; anything else, such as a directory, gives None. Raises
    ConfigError for an incomplete `wandb:...`.
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
    """Download a run's settings and metrics from W&B's server, to compare a run whose files are not here.

    `address`: `wandb:<entity>/<project>/<run id>`; it is no path, but takes the place of the run's directory. What a run
    does not log to W&B stays empty. Raises ConfigError if the run cannot be fetched, or is not shardtune's.
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
    """Build the run as a comparison reads it, from what W&B holds of it.

    `directory`: where it was read from, a directory or an address.
    `wandb_config`: what the run registered in W&B. `config` holds its settings as a tree; other keys are those of
        `run.json`, or columns that the user added to W&B's run table.
    `status`: what the run's `status.json` would hold.
    `logged_steps`: the metrics of steps and evaluations.

    Raises ConfigError if the run is not shardtune's, or a later version wrote it.
    """
    config = wandb_config.get("config")
    if not isinstance(config, dict) or "strategy" not in config:
        raise ConfigError(f"{directory}: not a run of shardtune (W&B holds no configuration of one)")
    run_json = {}
    for key, value in wandb_config.items():
        is_of_wandb = key.startswith("_")
        if key != "config" and not is_of_wandb:
            run_json[key] = value
    # The parser leaves out what does not fit a key's type, and appends it to `type_errors`. Nobody reads that list here: a column
    # of the user's own may have the name of a key, which is no error.
    record = parse_run_record(run_json, type_errors=[])
    # Versions of shardtune renamed metrics. Each set of names has a number, its edition; `record.metric_names` is that number.
    if record.metric_names > CURRENT_NAMES_EDITION:
        raise ConfigError(
            f"{directory}: W&B has its metrics under names of edition {record.metric_names}, and this shardtune knows editions "
            f"up to {CURRENT_NAMES_EDITION}: use a later shardtune"
        )
    settings = flatten_settings(config)
    steps = logged_steps.steps
    if settings.get("objective.name") == KTO_OBJECTIVE:
        # Trackers name KTO's rewards like those of preference pairs; `metrics.jsonl` does not.
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
    """Read what W&B recorded of one start of a run, as dicts in the order of recording, such as {"type": "summary", ...}.

    Appends to `damage_notes` a line for each damaged place that wandb skipped, and one if wandb failed after some records.
    Raises ConfigError if wandb is not installed, cannot read the files, or prints a record that is no JSON.
    """
    completed = _inspect_wandb_files(start_dir)
    damage_notes += [line for line in completed.stderr.splitlines() if SKIPPED_DATA_MESSAGE in line]
    lines = [line for line in completed.stdout.splitlines() if line.strip()]
    for record_number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            is_last = record_number == len(lines)  # it may be torn, as in the file of a run that is still training
            if not is_last:
                raise ConfigError(f"{start_dir}: record {record_number} cannot be read; leave this run out") from None
    # It may fail behind the records that it could read: these count.
    if completed.returncode and lines:
        damage_notes.append("the command failed after some records, so that later ones are missing")
    elif completed.returncode:
        last_error_line = (completed.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise ConfigError(f"{start_dir}: wandb cannot read its files ({last_error_line}); leave this run out")


def _inspect_wandb_files(start_dir: Path) -> subprocess.CompletedProcess[str]:
    """Let wandb print the records of one start of a run; if it fails, once more. Raises ConfigError if it is not installed.

    The files are in W&B's own binary format, which only wandb reads.
    """
    if find_spec("wandb") is None:
        raise ConfigError(f"{start_dir}: its files are read by wandb, which is not installed: pip install wandb")
    completed = _run_wandb_inspect(start_dir)
    if completed.returncode:
        # On a busy machine the command has ended with 1 over files that it could read a moment later.
        time.sleep(RETRY_AFTER_S)
        completed = _run_wandb_inspect(start_dir)
    return completed


def _run_wandb_inspect(start_dir: Path) -> subprocess.CompletedProcess[str]:
    """Let wandb print the records of one start of a run as JSON lines on stdout; it needs no server. Read the exit code."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(start_dir)]
    environment = dict(os.environ)
    # A run that this process tracked left the address of its W&B service there; reading files must not go to that service.
    environment.pop("WANDB_SERVICE", None)
    environment["WANDB_ERROR_REPORTING"] = "false"  # else W&B is sent a record of each reading
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@dataclass(slots=True)
class _LoggedSteps:
    """Metrics of a run by step, collected from rows of W&B: it has one row for all that was logged at a step."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def add_logged_row(self, logged_row: dict[str, Any]) -> None:
        """Sort a row that W&B has of a run into metrics of the training step (`steps`) and held-out metrics (`evaluations`).

        `logged_row`: {"train/global_step": 5, "train/loss": 2.3, "eval/loss": 2.5}. Early versions of shardtune used other
        names, the first edition: {"train_step": 5, "loss": 2.3}. A row without a step is ignored.
        """
        row = {}
        for name, logged_value in logged_row.items():
            is_of_wandb = name.startswith("_")
            # A row from a server has null where another row has a number.
            if not is_of_wandb and logged_value is not None:
                row[name] = _finite_or_none(logged_value)
        # Only rows of the first edition have this name.
        if FIRST_EDITION_STEP_NAME in row:
            step = row.pop(FIRST_EDITION_STEP_NAME)
            metrics = _split_first_edition_row(row)
        else:
            step = row.get(TRACKED_METRIC_BY_NAME["step"].name)
            metrics = _split_wandb_row(row)
        if not isinstance(step, int | float):
            return
        step = int(step)
        # A row of an evaluation alone has no training loss.
        if "loss" in metrics.of_step:
            self.steps[step] = {"step": step, **metrics.of_step}
        held_out_metrics = {}
        for name, value in metrics.others.items():
            # A logged table has sizes such as `eval/facts/worst_rows.nrows` beside its type `eval/facts/worst_rows._type`.
            is_size_of_table = f"{name.rpartition('.')[0]}._type" in row
            if isinstance(value, int | float) and not is_size_of_table:
                held_out_metrics[name] = value
        if held_out_metrics:
            # Several rows may be of the same step.
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
        """Take over one record of W&B's files, such as {"type": "history", "history": {"item": {"train/loss": 2.3}}}.

        A record of a run, a summary or an exit completes or replaces an earlier one; a history record adds what was logged
        at a step. Other types are ignored.
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


class _RowMetrics(NamedTuple):
    """The metrics in a row of W&B."""

    of_step: dict[str, Any]
    """Those of the training step, under their names in `metrics.jsonl`, such as `loss`."""
    others: dict[str, Any]
    """All others under their names in W&B, such as `eval/loss`."""


def _split_wandb_row(row: dict[str, Any]) -> _RowMetrics:
    """Split a row of W&B, with today's names, into metrics of the training step and others.

    {"train/loss": 2.3, "eval/loss": 2.5} becomes of_step={"loss": 2.3}, others={"eval/loss": 2.5}.
    """
    metrics = _RowMetrics({}, {})
    for wandb_name, value in row.items():
        name = recorded_name(wandb_name)  # `train/loss` -> `loss`; None for what is no metric of a step
        if name is not None:
            metrics.of_step[name] = value
        elif wandb_name != TRAINING_S.name:  # the files of a run have no such counter
            metrics.others[wandb_name] = value
    return metrics


def _split_first_edition_row(row: dict[str, Any]) -> _RowMetrics:
    """Split a row of W&B from an early version of shardtune into metrics of the training step and others.

    These versions logged the names of `metrics.jsonl` unchanged, the first edition of names: {"loss": 2.3, "loss/a": 2.1,
    "eval/loss": 2.5} becomes of_step={"loss": 2.3, "loss/a": 2.1}, others={"eval/loss": 2.5}.
    """
    metrics = _RowMetrics({}, {})
    for name, value in row.items():
        # `blocks_s/worst` and `loss/a` belong to the step, because the row also has `blocks_s` and `loss`. `eval/loss` does
        # not, because the row has no `eval`.
        belongs_to_step = "/" not in name or name.partition("/")[0] in row
        (metrics.of_step if belongs_to_step else metrics.others)[name] = value
    return metrics


def _finite_or_none(logged: Any) -> Any:
    """The logged value, with None for a number that is not finite: W&B writes it as the text `"NaN"` or `"Infinity"`."""
    if isinstance(logged, str):
        return None if logged in NOT_FINITE_TEXTS else logged
    if isinstance(logged, float) and not math.isfinite(logged):
        return None
    return logged


def _status_from_wandb(exit_record: dict[str, Any], summary: dict[str, Any], started_at: float) -> dict[str, Any]:
    """Tell from W&B's records what the run's `status.json` would hold: its state, its last step, and when it was last seen.

    - W&B knows of no end (`exit_record` is empty): running.
    - The run itself logged a last `state` of preempted or done: that.
    - Otherwise: done for exit code 0, else failed.

    `summary`: the last value of each metric that the run logged. `started_at`: Unix time of the last start.
    """
    # `_runtime` is W&B's count of seconds.
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
