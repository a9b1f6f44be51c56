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
from trainer.reporting.metric_names import EDITION, METRIC_NAMES, TRAINING_S, rated_row, recorded_name
from trainer.reporting.run_record import record_of
from trainer.reporting.status import State
from trainer.reporting.trackers.wandb_server import fetch

RUN_DIRECTORY_NAME = re.compile(r"(offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
"""Name of a directory that W&B writes: one for each start of a run."""
NOT_FINITE = {"NaN", "Infinity", "-Infinity"}
"""What W&B writes for a number that is not finite, since JSON has none."""
SERVER_PREFIX = "wandb:"
"""How a run on a server is named: wandb:<entity>/<project>/<run id>."""
KTO = "kto"
"""The objective that rates answers one by one."""
FIRST_EDITION_STEP = "train_step"
"""The step in rows of W&B of before metrics had names of their own there."""
RETRY_AFTER_S = 1.0
"""Seconds before wandb is asked once more to read a run's files."""
SKIPPED = "skipped corrupt data"
"""In what wandb says of a damaged place of a file, behind which it reads on and ends with 0."""
RUN_PAGE_URL = re.compile(r"https?://[^/]+/(?P<entity>[^/]+)/(?P<project>[^/]+)/runs/(?P<run>[^/?#]+).*")
"""Address of a run's page in W&B."""


def is_wandb_directory(directory: Path) -> bool:
    """Whether the directory is one that W&B wrote for a start of a run, such as `offline-run-20250131_120000-ab12`."""
    return RUN_DIRECTORY_NAME.fullmatch(directory.name) is not None and any(directory.glob("*.wandb"))


def part_directories(directory: Path) -> list[Path]:
    """W&B's directories of all starts of the run that `directory` belongs to, in the order of the starts."""
    match = RUN_DIRECTORY_NAME.fullmatch(directory.name)
    assert match is not None
    siblings = directory.parent.glob(f"*run-*-{match['id']}")
    parts = [sibling for sibling in siblings if is_wandb_directory(sibling)]
    # The names begin with the time of the start; that of an offline run has a prefix before it.
    return sorted(parts, key=lambda part: part.name.removeprefix("offline-"))


def read_wandb_directory(directory: Path) -> RecordedRun:
    """Read a run from W&B's directories. There is one for each start of the run; `directory` is any of them.

    What a run does not log to W&B stays empty: identity, receipt, checkpoints, events. Raises ConfigError if the run is not
    shardtune's, its files cannot be read, or wandb is not installed.
    """
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    exit_record: dict[str, Any] = {}
    history = _LoggedSteps()
    host: str | None = None
    started_at = 0.0
    damage: list[str] = []
    for part in part_directories(directory):
        exit_record = {}  # the end of an earlier start is not the end of the run
        # Later records complete or replace earlier ones, as they do on W&B's server.
        for record in _read_wandb_records(part, damage):
            record_type = record["type"]
            if record_type == "run":
                run = record["run"]
                config |= run.get("config", {}).get("update", {})
                host = run.get("host") or host
                started_at = _unix_time(run.get("start_time")) or started_at
            elif record_type == "summary":
                summary |= record["summary"].get("update", {})
            elif record_type == "exit":
                exit_record = record["exit"]
            elif record_type == "history":
                history.add(record["history"].get("item", {}))
    if host is not None:
        config["host"] = host
    status = _status_from_wandb(exit_record, summary, started_at)
    return replace(_recorded_run(directory, config, status, history), unreadable_lines=len(damage))


def is_wandb_address(directory: Path) -> bool:
    """Whether this is no directory, but names a run on W&B's server: `wandb:<entity>/<project>/<run id>`."""
    return str(directory).startswith(SERVER_PREFIX)


def wandb_address(argument: str) -> str | None:
    """`wandb:<entity>/<project>/<run id>` of the run that a command-line argument names.

    The argument has this form already, or is the address of the run's page in W&B. None if it is neither. Raises ConfigError for
    an incomplete `wandb:...`.
    """
    if match := RUN_PAGE_URL.fullmatch(argument):
        return f"{SERVER_PREFIX}{match['entity']}/{match['project']}/{match['run']}"
    if not argument.startswith(SERVER_PREFIX):
        return None
    parts = argument.removeprefix(SERVER_PREFIX).split("/")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(
            f"{argument}: names no run; write wandb:<entity>/<project>/<run id>, or the address of its page"
        )
    return argument


def read_from_wandb_server(address: Path) -> RecordedRun:
    """Read a run from W&B's server; `address` is `wandb:<entity>/<project>/<run id>`.

    What a run does not log to W&B stays empty. Raises ConfigError where the run cannot be fetched.
    """
    entity, project, run_id = str(address).removeprefix(SERVER_PREFIX).split("/")
    fetched = fetch(entity, project, run_id)
    history = _LoggedSteps()
    for row in fetched.rows:
        history.add(row)
    # The server knows a state and no exit code.
    exit_record: dict[str, Any] = {}
    if fetched.state != "running":
        exit_record = {"exit_code": 0 if fetched.state == "finished" else 1}
    status = _status_from_wandb(exit_record, fetched.summary, _unix_time(fetched.created) or 0.0)
    return _recorded_run(address, fetched.config, status, history)


def _recorded_run(
    directory: Path, wandb_config: dict[str, Any], status: dict[str, Any], history: _LoggedSteps
) -> RecordedRun:
    """A run as W&B has it. Raises ConfigError if it is not shardtune's, or a later version wrote it.

    `wandb_config` has the run's settings under `config`. Its other keys are those of `run.json` and
    columns of W&B's run table.
    """
    config = wandb_config.get("config")
    if not isinstance(config, dict) or "strategy" not in config:
        raise ConfigError(f"{directory}: not a run of shardtune (W&B holds no configuration of one)")
    run_json = {}
    for key, value in wandb_config.items():
        if key != "config" and not key.startswith("_"):  # W&B's own keys begin with _
            run_json[key] = value
    # A column of the user's own may have the name of a key of `run.json`: what does not fit its type is left out.
    record = record_of(run_json, type_errors=[])
    if record.metric_names > EDITION:
        raise ConfigError(
            f"{directory}: W&B has its metrics under names of edition {record.metric_names}, and this shardtune knows editions "
            f"up to {EDITION}: use a later shardtune"
        )
    settings = flatten_settings(config)
    steps = history.steps
    if settings.get("objective.name") == KTO:
        steps = {step: rated_row(row) for step, row in steps.items()}
    return RecordedRun(
        directory=directory,
        config=settings,
        identity={},
        record=record,
        status=status,
        failure={},
        steps=steps,
        evaluations=history.evaluations,
    )


def _read_wandb_records(part: Path, damage: list[str]) -> Iterator[dict[str, Any]]:
    """The records in one directory of W&B, in order, read by a process of wandb.

    What wandb says of damaged places that it skipped is added to `damage`, and so is an end after some of the records.

    Errors: ConfigError if wandb is not installed, or cannot read the files.
    """
    if find_spec("wandb") is None:
        raise ConfigError(f"{part}: its files are read by wandb, which is not installed: pip install wandb")
    completed = _inspect(part)
    if completed.returncode:
        # On a busy machine the command has ended with 1 over files that it could read a moment later.
        time.sleep(RETRY_AFTER_S)
        completed = _inspect(part)
    damage += [line for line in completed.stderr.splitlines() if SKIPPED in line]
    lines = [line for line in completed.stdout.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):  # the last one may be torn, as in the file of a run that is still training
                raise ConfigError(f"{part}: record {number} cannot be read; leave this run out") from None
    if completed.returncode and lines:
        damage.append("the command failed after some records, so that later ones are missing")
    elif completed.returncode:
        last_error_line = (completed.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise ConfigError(f"{part}: wandb cannot read its files ({last_error_line}); leave this run out")


def _inspect(part: Path) -> subprocess.CompletedProcess[str]:
    """Run the command of wandb that prints the records of a directory as JSON lines; it needs no server."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    environment = dict(os.environ)
    # A run that this process tracked has left the address of its W&B service, which is no business of a reader of files.
    environment.pop("WANDB_SERVICE", None)
    environment["WANDB_ERROR_REPORTING"] = "false"  # else W&B is sent a record of each reading
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@dataclass(slots=True)
class _LoggedSteps:
    """Rows of training steps and of evaluations, by step. W&B has one row for all that was logged at a step."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, logged: dict[str, Any]) -> None:
        """Split a row of W&B into the row of its training step and its held-out metrics; a row without a step is ignored.

        The row's names may be of any edition (`trainer/reporting/metric_names.py`).
        """
        row = {}
        for name, logged_value in logged.items():
            # W&B's own names begin with _. A row from a server has null where another row has a number.
            if not name.startswith("_") and logged_value is not None:
                row[name] = _finite_or_none(logged_value)
        if FIRST_EDITION_STEP in row:
            step = row.pop(FIRST_EDITION_STEP)
            step_row, others = _split_first_edition(row)
        else:
            step = row.get(METRIC_NAMES["step"].name)
            step_row, others = _split_row(row)
        if not isinstance(step, int | float):
            return
        step = int(step)
        if "loss" in step_row:
            self.steps[step] = {"step": step, **step_row}
        held_out = {}
        for name, value in others.items():
            # A table has its sizes under its own name and a dot: `eval/facts/worst_rows.nrows`.
            is_of_table = f"{name.rpartition('.')[0]}._type" in row
            if isinstance(value, int | float) and not is_of_table:
                held_out[name] = value
        if held_out:
            self.evaluations[step] = self.evaluations.get(step, {}) | held_out


def _split_row(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics of the training step, by their names in `metrics.jsonl`; all others, by their names in W&B) of a row of W&B."""
    step_row = {}
    others = {}
    for wandb_name, value in row.items():
        name = recorded_name(wandb_name)
        if name is not None:
            step_row[name] = value
        elif wandb_name != TRAINING_S.name:  # the files of a run have no such counter
            others[wandb_name] = value
    return step_row, others


def _split_first_edition(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics of the training step; all others) of a row of W&B, for rows of the first edition of metric names."""
    step_row = {}
    others = {}
    for name, value in row.items():
        # `blocks_s/worst` and `loss/a` belong to the step, because the row also has `blocks_s` and `loss`. `eval/loss` does
        # not, because the row has no `eval`.
        belongs_to_step = "/" not in name or name.partition("/")[0] in row
        if belongs_to_step:
            step_row[name] = value
        else:
            others[name] = value
    return step_row, others


def _finite_or_none(logged: Any) -> Any:
    """The logged value; None for a number that is not finite, which W&B writes as `"NaN"` or `"Infinity"`."""
    if isinstance(logged, str):
        return None if logged in NOT_FINITE else logged
    if isinstance(logged, float) and not math.isfinite(logged):
        return None
    return logged


def _status_from_wandb(exit_record: dict[str, Any], summary: dict[str, Any], started_at: float) -> dict[str, Any]:
    """What the run's `status.json` would hold: its state, its last step, and when it was last seen.

    `exit_record`: W&B's record of the run's end. It is empty while W&B knows of none: the run counts as running then. `summary`:
    the last values that the run logged. `started_at`: a Unix time.
    """
    last_seen_at = started_at + float(summary.get("_runtime") or 0.0)
    if not exit_record:
        state = State.running
    elif summary.get("state") in (State.preempted, State.done):
        state = State(summary["state"])
    else:
        exit_code = exit_record.get("exit_code", 0)
        state = State.done if exit_code == 0 else State.failed
    step = summary.get(METRIC_NAMES["step"].name, summary.get(FIRST_EDITION_STEP))
    return {"step": step, "time": last_seen_at, "state": state}


def _unix_time(iso_time: object) -> float | None:
    """Seconds since 1970 of a time in ISO format; None if it is not one."""
    try:
        return datetime.fromisoformat(str(iso_time)).timestamp()
    except ValueError:
        return None
