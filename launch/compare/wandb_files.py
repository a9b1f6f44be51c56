"""Reads a run from W&B's own files or from W&B's server, for runs whose directory is not here."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
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
    beside = [part for part in directory.parent.glob(f"*run-*-{match['id']}") if is_wandb(part)]
    return sorted(beside, key=lambda part: part.name.removeprefix("offline-"))


def read_wandb(directory: Path) -> Point:
    """Read the run of which `directory` is a part, with its other parts.

    What W&B is not told stays empty: identity, receipt, checkpoints, events. Raises ConfigError where the run is no run of
    shardtune, its files cannot be read, or wandb is not installed.
    """
    tree: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    host: dict[str, Any] = {}
    exits: dict[str, Any] = {}
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    started = 0.0
    for part in parts_of(directory):
        exits = {}  # what ended an earlier part did not end the run
        for record in _records(part):
            kind = record["type"]
            if kind == "run":
                tree |= record["run"].get("config", {}).get("update", {})
                host = {"host": record["run"]["host"]} if record["run"].get("host") else host
                started = _seconds(record["run"].get("start_time")) or started
            elif kind == "summary":
                summary |= record["summary"].get("update", {})
            elif kind == "exit":
                exits = record["exit"]
            elif kind == "history":
                _add_row(record["history"].get("item", {}), steps, evaluations)
    return _point_from_config(directory, tree, host, _status(exits, summary, started), steps, evaluations)


def is_server(directory: Path) -> bool:
    """Whether this names a run on W&B's server."""
    return str(directory).startswith(SERVER_PREFIX)


def server_name(word: str) -> str | None:
    """The run that a word names, as `wandb:<entity>/<project>/<run id>`; None where it names none, ConfigError where in part."""
    if match := RUN_PAGE_URL.fullmatch(word):
        return f"{SERVER_PREFIX}{match['entity']}/{match['project']}/{match['run']}"
    if not word.startswith(SERVER_PREFIX):
        return None
    parts = word.removeprefix(SERVER_PREFIX).split("/")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"{word}: names no run; write wandb:<entity>/<project>/<run id>, or the address of its page")
    return word


def read_server(directory: Path) -> Point:
    """Read a run that W&B's server has; what W&B is not told stays empty. Raises ConfigError where it cannot be had."""
    entity, project, run = str(directory).removeprefix(SERVER_PREFIX).split("/")
    fetched = fetch(entity, project, run)
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    for row in fetched.rows:
        _add_row(row, steps, evaluations)
    exits = {} if fetched.state == "running" else {"exit_code": int(fetched.state != "finished")}
    status = _status(exits, fetched.summary, _seconds(fetched.created) or 0.0)
    return _point_from_config(directory, fetched.config, {}, status, steps, evaluations)


def _point_from_config(
    directory: Path,
    tree: dict[str, Any],
    host: dict[str, Any],
    status: dict[str, Any],
    steps: dict[int, dict[str, Any]],
    evaluations: dict[int, dict[str, float]],
) -> Point:
    """A run as W&B's copy of its configuration has it, with columns of the run table and keys of `run.json` beside it."""
    config = tree.get("config")
    if not isinstance(config, dict) or "strategy" not in config:
        raise ConfigError(f"{directory}: not a run of shardtune (W&B holds no configuration of one)")
    recorded = {key: value for key, value in tree.items() if key != "config" and not key.startswith("_")}
    # A column of the user's own may have the name of a key of `run.json`: what does not fit its type is left out.
    record = record_of(recorded | host, wrong=[])
    return Point(
        directory=directory,
        config=flat(config),
        identity={},
        record=record,
        status=status,
        failure={},
        steps=steps,
        evaluations=evaluations,
    )


def _records(part: Path) -> Iterator[dict[str, Any]]:
    if find_spec("wandb") is None:
        raise ConfigError(f"{part}: its files are read by wandb, which is not installed: pip install wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines):  # the last one may be torn, as the file of a run that goes on is
                raise ConfigError(f"{part}: record {number} cannot be read; leave this run out") from None
    if done.returncode and not lines:
        why = (done.stderr.strip() or "no word why").splitlines()[-1]
        raise ConfigError(f"{part}: wandb cannot read its files ({why}); leave this run out")


def _add_row(
    logged: dict[str, Any], steps: dict[int, dict[str, Any]], evaluations: dict[int, dict[str, float]]
) -> None:
    """A row of W&B, which has what was measured at one step in one."""
    step = logged.get("train_step")
    if not isinstance(step, int | float):
        return
    step = int(step)
    # Of a server a row has null where another row has a value.
    row = {key: _finite_or_none(value) for key, value in logged.items() if key[0] != "_" and value is not None}
    del row["train_step"]
    # `blocks_s/worst` and `loss/a` are of the step, as `blocks_s` and `loss` are; `eval/loss` is not, without `eval`.
    of_step = {key for key in row if "/" not in key or key.partition("/")[0] in row}
    if "loss" in row:
        steps[step] = {"step": step} | {key: value for key, value in row.items() if key in of_step}
    measured = {key: value for key, value in row.items() if key not in of_step and isinstance(value, int | float)}
    if measured:
        evaluations[step] = evaluations.get(step, {}) | measured


def _finite_or_none(value: Any) -> Any:
    """A value; None for one that is no finite number, which W&B writes as a word."""
    broken = value in NOT_FINITE if isinstance(value, str) else isinstance(value, float) and not math.isfinite(value)
    return None if broken else value


def _status(exits: dict[str, Any], summary: dict[str, Any], started: float) -> dict[str, Any]:
    status = {"step": summary.get("train_step"), "time": started + float(summary.get("_runtime") or 0.0)}
    if not exits:
        return status | {"state": State.running}
    state = str(summary.get("state"))
    if state in ("preempted", "done"):
        return status | {"state": state}
    return status | {"state": State.done if exits.get("exit_code", 0) == 0 else State.failed}


def _seconds(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
