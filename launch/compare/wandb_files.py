"""Reads a run from W&B's own files or from W&B's server, for runs whose directory is not here."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.compare.run_files import Point
from strategies.errors import ConfigError
from trainer.config.resuming import flat
from trainer.reporting.run_record import record_of
from trainer.reporting.status import State
from trainer.reporting.trackers.wandb_server import fetch

PART = re.compile(r"(offline-)?run-\d{8}_\d{6}-(?P<id>.+)")
"""How W&B calls the directory of a part of a run: one for each start."""
NOT_FINITE = {"NaN", "Infinity", "-Infinity"}
SERVER_PREFIX = "wandb:"
"""How a run on a server is named: wandb:<entity>/<project>/<run id>."""
RUN_PAGE_URL = re.compile(r"https?://[^/]+/(?P<entity>[^/]+)/(?P<project>[^/]+)/runs/(?P<run>[^/?#]+).*")
"""The page of a run."""


def is_wandb(directory: Path) -> bool:
    """Whether W&B wrote a run, or a part of one, here."""
    return PART.fullmatch(directory.name) is not None and any(directory.glob("*.wandb"))


def parts_of(directory: Path) -> list[Path]:
    """All parts of a run that lie beside the one that is named, in the order of their starts."""
    match = PART.fullmatch(directory.name)
    assert match is not None
    siblings = directory.parent.glob(f"*run-*-{match['id']}")
    parts = [sibling for sibling in siblings if is_wandb(sibling)]
    return sorted(parts, key=lambda part: part.name.removeprefix("offline-"))


def read_wandb(directory: Path) -> Point:
    """Read the run of which `directory` is a part, with its other parts.

    What W&B does not get stays empty: identity, receipt, checkpoints, events. Raises ConfigError where the run is no run of
    shardtune, its files cannot be read, or wandb is not installed.
    """
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    exit_record: dict[str, Any] = {}
    history = _History()
    host: str | None = None
    started_at = 0.0
    for part in parts_of(directory):
        exit_record = {}  # what ended an earlier part did not end the run
        for record in _records(part):
            kind = record["type"]
            if kind == "run":
                run = record["run"]
                config |= run.get("config", {}).get("update", {})
                host = run.get("host") or host
                started_at = _seconds(run.get("start_time")) or started_at
            elif kind == "summary":
                summary |= record["summary"].get("update", {})
            elif kind == "exit":
                exit_record = record["exit"]
            elif kind == "history":
                history.add(record["history"].get("item", {}))
    if host is not None:
        config["host"] = host
    return _point_from_config(directory, config, _status(exit_record, summary, started_at), history)


def is_server(directory: Path) -> bool:
    """Whether this names a run on W&B's server."""
    return str(directory).startswith(SERVER_PREFIX)


def server_name(word: str) -> str | None:
    """The run on a server that a word names, as `wandb:<entity>/<project>/<run id>`; None if it names none.

    Errors: ConfigError if the word names a part of one.
    """
    if match := RUN_PAGE_URL.fullmatch(word):
        return f"{SERVER_PREFIX}{match['entity']}/{match['project']}/{match['run']}"
    if not word.startswith(SERVER_PREFIX):
        return None
    parts = word.removeprefix(SERVER_PREFIX).split("/")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"{word}: names no run; write wandb:<entity>/<project>/<run id>, or the address of its page")
    return word


def read_server(directory: Path) -> Point:
    """Read a run that W&B's server has; what W&B does not get stays empty. Raises ConfigError where it cannot be had."""
    entity, project, run = str(directory).removeprefix(SERVER_PREFIX).split("/")
    fetched = fetch(entity, project, run)
    history = _History()
    for row in fetched.rows:
        history.add(row)
    exit_record = {} if fetched.state == "running" else {"exit_code": int(fetched.state != "finished")}
    status = _status(exit_record, fetched.summary, _seconds(fetched.created) or 0.0)
    return _point_from_config(directory, fetched.config, status, history)


def _point_from_config(
    directory: Path, wandb_config: dict[str, Any], status: dict[str, Any], history: _History
) -> Point:
    """A run out of W&B's config: the run's configuration, and beside it columns of the run table and keys of `run.json`."""
    config = wandb_config.get("config")
    if not isinstance(config, dict) or "strategy" not in config:
        raise ConfigError(f"{directory}: not a run of shardtune (W&B holds no configuration of one)")
    recorded = {key: value for key, value in wandb_config.items() if key != "config" and not key.startswith("_")}
    return Point(
        directory=directory,
        config=flat(config),
        identity={},
        # A column of the user's own may have the name of a key of `run.json`: what does not fit its type is left out.
        record=record_of(recorded, wrong=[]),
        status=status,
        failure={},
        steps=history.steps,
        evaluations=history.evaluations,
    )


def _records(part: Path) -> Iterator[dict[str, Any]]:
    """The records of one directory of W&B, read by a process of wandb. Errors: ConfigError if it is not there, or fails."""
    if find_spec("wandb") is None:
        raise ConfigError(f"{part}: its files are read by wandb, which is not installed: pip install wandb")
    # The command of wandb that reads its files without a server.
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):  # the last one may be torn, as in the file of a run that is still training
                raise ConfigError(f"{part}: record {number} cannot be read; leave this run out") from None
    if done.returncode and not lines:
        why = (done.stderr.strip() or "it gives no reason").splitlines()[-1]
        raise ConfigError(f"{part}: wandb cannot read its files ({why}); leave this run out")


@dataclass(slots=True)
class _History:
    """Rows of a run's steps and evaluations, out of W&B's, which have all that was logged at a step in one."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, logged: dict[str, Any]) -> None:
        """Take a row of W&B; one without a step is of nothing that is compared."""
        step = logged.get("train_step")
        if not isinstance(step, int | float):
            return
        step = int(step)
        row = {}
        for name, number in logged.items():
            # W&B's own names begin with _. A row from a server has null where another row has a number.
            if not name.startswith("_") and name != "train_step" and number is not None:
                row[name] = _finite_or_none(number)
        step_row: dict[str, Any] = {"step": step}
        held_out: dict[str, float] = {}
        for name, number in row.items():
            # `blocks_s/worst` and `loss/a` are of the step, as `blocks_s` and `loss` are; `eval/loss` is not, without `eval`.
            if "/" not in name or name.partition("/")[0] in row:
                step_row[name] = number
            elif isinstance(number, int | float):
                held_out[name] = number
        if "loss" in row:
            self.steps[step] = step_row
        if held_out:
            self.evaluations[step] = self.evaluations.get(step, {}) | held_out


def _finite_or_none(logged: Any) -> Any:
    """What W&B logged; None for a number that is not finite, which W&B writes as a word."""
    if isinstance(logged, str):
        return None if logged in NOT_FINITE else logged
    if isinstance(logged, float) and not math.isfinite(logged):
        return None
    return logged


def _status(exit_record: dict[str, Any], summary: dict[str, Any], started_at: float) -> dict[str, Any]:
    """What `status.json` would say: running as long as W&B knows of no exit."""
    last_seen = {"step": summary.get("train_step"), "time": started_at + float(summary.get("_runtime") or 0.0)}
    if not exit_record:
        state = State.running
    elif summary.get("state") in (State.preempted, State.done):
        state = State(summary["state"])
    else:
        state = State.done if exit_record.get("exit_code", 0) == 0 else State.failed
    return {**last_seen, "state": state}


def _seconds(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
