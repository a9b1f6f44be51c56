"""Finds the log files of a run, reads their last lines, and follows what is added."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from launch.runs.queue import runs_of
from strategies import atomic_io
from strategies.errors import ConfigError

RANK = re.compile(r"rank-(\d+)\.log")
JOB = re.compile(r".+-(?:(?P<script>\d+(?:_\d+)?)\.out|(?P<node>\d+)-\d+\.log)")
"""`<name>-<job>.out` of the script, `<name>-<job>-<node>.log` of torchrun and its ranks on a node."""
TASK = re.compile(r"-\d+_\d+\.out$")
TAIL = 2**18
"""Bytes at the end of a file in which its last lines are looked for."""
MOST = 2**20
"""Bytes taken at a time of what was added."""


@dataclass(frozen=True, slots=True)
class LogsRequest:
    """What of a run was asked for."""

    rank: int | None = None
    job: str | None = None
    """The id of a SLURM job, or `last`."""


def choose(run_dir: Path, wanted: LogsRequest, failed_rank: int | None) -> list[Path]:
    """The files, the one that says most last; none where the run has written none. Raises ConfigError for what is not there.

    `failed_rank` is that of a run which failed: its rank is shown, and its job's output, where errors of libraries stand.
    """
    there = [path for path in _listed(run_dir / "logs") if not TASK.search(path.name)] + _of_scripts(run_dir)
    ranks = {int(found[1]): path for path in there if (found := RANK.fullmatch(path.name))}
    jobs = [(found["script"] or found["node"], path) for path in there if (found := JOB.fullmatch(path.name))]
    newest = _newest(jobs)
    if wanted.job is not None:
        of_job = newest if wanted.job == "last" else [path for number, path in jobs if number == wanted.job]
        if jobs and not of_job:
            known = ", ".join(sorted({number for number, _ in jobs})) or "none"
            raise ConfigError(f"job={wanted.job}: it left no output in {run_dir / 'logs'}; there is that of: {known}")
        return of_job
    if wanted.rank is not None:
        if ranks and wanted.rank not in ranks:
            known = f"0 to {max(ranks)}" if len(ranks) == max(ranks) + 1 else ", ".join(map(str, sorted(ranks)))
            raise ConfigError(f"rank={wanted.rank}: it left no log in {run_dir / 'logs'}; there are those of {known}")
        return [ranks[wanted.rank]] if ranks else []
    rank = ranks.get(failed_rank or 0)
    if rank is not None and failed_rank is None:
        return [rank]
    return [*newest, rank] if rank is not None else newest


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """(the last whole lines of a file, the byte behind them); a torn last line is left for later. Errors: OSError."""
    with atomic_io.open_regular(path) as (descriptor, size):
        start = max(0, size - TAIL)
        data = os.pread(descriptor, size - start, start)
    whole, end, _ = data.rpartition(b"\n")
    lines = whole.split(b"\n") if end else []
    if start and lines:
        lines = lines[1:]
    return [_shown(line) for line in lines[-count:]] if count else [], start + len(whole) + len(end)


@dataclass(slots=True)
class AddedText:
    """What is added to files from where they were left; a file that became shorter is read anew."""

    places: dict[Path, int] = field(default_factory=dict)
    """The byte from which on each was not shown yet; a file that is not here is read from its beginning."""

    def lines(self, path: Path) -> list[str]:
        """Whole lines that were added; none where it cannot be read now."""
        try:
            with atomic_io.open_regular(path) as (descriptor, size):
                place = self.places.get(path, 0)
                place = place if place <= size else 0
                data = os.pread(descriptor, MOST, place)
        except OSError:
            return []
        whole, end, _ = data.rpartition(b"\n")
        if not end and len(data) == MOST:  # a line of a million characters
            whole = data
        self.places[path] = place + len(whole) + len(end)
        return [_shown(line) for line in whole.split(b"\n")] if whole or end else []


def _shown(line: bytes) -> str:
    """A line as a terminal leaves it: what a progress bar drew over is gone."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _newest(jobs: list[tuple[str, Path]]) -> list[Path]:
    """What the newest job left; a task of an array is named otherwise by its script (`17_3`) than by its nodes."""
    if not jobs:
        return []
    newest = max(jobs, key=lambda each: _changed(each[1]))[0]
    found = [path for number, path in jobs if number == newest]
    tasks = [path for number, path in jobs if "_" in number]
    nodes = [each for each in jobs if each[1].suffix == ".log"]
    if "_" in newest and nodes:
        job = max(nodes, key=lambda each: _changed(each[1]))[0]
        found = [path for number, path in nodes if number == job] + found
    elif tasks and not any(path.suffix == ".out" for path in found):
        found.append(max(tasks, key=_changed))
    return found


def _of_scripts(run_dir: Path) -> list[Path]:
    """What the tasks of arrays for this run printed: it lies with the array's first run, under the number of the task."""
    runs = runs_of(run_dir / "train.sbatch")
    if len(runs) < 2:
        return []
    task = next((number for number, run in enumerate(runs) if run.resolve() == run_dir.resolve()), None)
    return [path for path in _listed(runs[0] / "logs") if path.name.endswith(f"_{task}.out")]


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be listed ({error.strerror})") from error


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
