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
TAIL_BYTES = 2**18
"""Bytes at the end of a file in which its last lines are looked for."""
MOST_BYTES = 2**20
"""Bytes taken at a time of what was added."""


@dataclass(frozen=True, slots=True)
class LogsRequest:
    """What of a run was asked for."""

    rank: int | None = None
    job: str | None = None
    """The id of a SLURM job, or `last`."""


def choose_files(run_dir: Path, request: LogsRequest, failed_rank: int | None) -> list[Path]:
    """The files to show, the most important one last; none if the run has written none.

    Raises ConfigError for a rank or job that has none.
    `failed_rank`: the rank that failed, of a run that did. Its log is shown, and the output of its job, where libraries
    print their errors.
    """
    files = [path for path in _list_directory(run_dir / "logs") if not TASK.search(path.name)]
    files += _array_outputs(run_dir)
    ranks = {}
    jobs = []
    for path in files:
        if match := RANK.fullmatch(path.name):
            ranks[int(match[1])] = path
        if match := JOB.fullmatch(path.name):
            jobs.append((match["script"] or match["node"], path))
    newest = _newest_job_files(jobs)
    if request.job is not None:
        job_files = newest if request.job == "last" else [path for job, path in jobs if job == request.job]
        if jobs and not job_files:
            known = ", ".join(sorted({job for job, _ in jobs})) or "none"
            raise ConfigError(f"job={request.job}: has no output in {run_dir / 'logs'}; jobs with output: {known}")
        return job_files
    if request.rank is not None:
        if ranks and request.rank not in ranks:
            known = f"0 to {max(ranks)}" if len(ranks) == max(ranks) + 1 else ", ".join(map(str, sorted(ranks)))
            raise ConfigError(f"rank={request.rank}: has no log in {run_dir / 'logs'}; ranks with a log: {known}")
        return [ranks[request.rank]] if ranks else []
    rank_log = ranks.get(failed_rank or 0)
    if rank_log is None:
        return newest
    return [rank_log] if failed_rank is None else [*newest, rank_log]


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """(the last whole lines of a file, the offset behind them); a torn last line is left for later. Errors: OSError."""
    with atomic_io.open_regular(path) as (descriptor, size):
        start = max(0, size - TAIL_BYTES)
        tail = os.pread(descriptor, size - start, start)
    whole, end, _ = tail.rpartition(b"\n")
    offset = start + len(whole) + len(end)
    lines = whole.split(b"\n") if end else []
    if start:
        lines = lines[1:]  # the tail begins within a line
    if count == 0:
        return [], offset
    return [_as_terminal_shows(line) for line in lines[-count:]], offset


@dataclass(slots=True)
class AddedText:
    """Reads what is added to files. A file that became shorter is read from its beginning."""

    offsets: dict[Path, int] = field(default_factory=dict)
    """Bytes of each file that were shown; a file that is not here is read from its beginning."""

    def lines(self, path: Path) -> list[str]:
        """Whole lines that were added; none if the file cannot be read now."""
        try:
            with atomic_io.open_regular(path) as (descriptor, size):
                start = self.offsets.get(path, 0)
                if start > size:
                    start = 0
                added = os.pread(descriptor, MOST_BYTES, start)
        except OSError:
            return []
        whole, end, _ = added.rpartition(b"\n")
        if not end and len(added) == MOST_BYTES:  # a line of a million characters
            whole = added
        self.offsets[path] = start + len(whole) + len(end)
        if not whole and not end:
            return []
        return [_as_terminal_shows(line) for line in whole.split(b"\n")]


def _as_terminal_shows(line: bytes) -> str:
    """A line as a terminal leaves it: what a progress bar drew over is gone."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _newest_job_files(jobs: list[tuple[str, Path]]) -> list[Path]:
    """Files of the job that wrote last; `jobs`: (job id, file).

    The script of an array's task names it `17_3`, but its nodes name it by another number.
    """
    if not jobs:
        return []

    def last_writer(jobs: list[tuple[str, Path]]) -> str:
        job, _ = max(jobs, key=lambda job_and_path: _modified_at(job_and_path[1]))
        return job

    newest = last_writer(jobs)
    files = [path for job, path in jobs if job == newest]
    if "_" in newest:
        node_logs = [(job, path) for job, path in jobs if path.suffix == ".log"]
        if node_logs:
            newest_on_nodes = last_writer(node_logs)
            return [path for job, path in node_logs if job == newest_on_nodes] + files
    tasks = [path for job, path in jobs if "_" in job]
    if tasks and not any(path.suffix == ".out" for path in files):
        files.append(max(tasks, key=_modified_at))
    return files


def _array_outputs(run_dir: Path) -> list[Path]:
    """Output of the scripts of arrays in which this run was a task. It lies with the array's first run."""
    runs = runs_of(run_dir / "train.sbatch")
    if len(runs) < 2:
        return []
    task = next((number for number, run in enumerate(runs) if run.resolve() == run_dir.resolve()), None)
    return [path for path in _list_directory(runs[0] / "logs") if path.name.endswith(f"_{task}.out")]


def _list_directory(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be listed ({error.strerror})") from error


def _modified_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
