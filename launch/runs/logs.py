"""Finds the log files of a run, reads their last lines, and follows what is added."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch.runs.queue import run_dirs_of_script
from strategies import atomic_io
from strategies.errors import ConfigError

RANK_LOG_REGEX = re.compile(r"rank-(\d+)\.log")
JOB_OUTPUT_REGEX = re.compile(r".+-(?:(?P<script>\d+(?:_\d+)?)\.out|(?P<node>\d+)-\d+\.log)")
"""`<name>-<job>.out` of the script, `<name>-<job>-<node>.log` of torchrun and its ranks on a node."""
ARRAY_TASK_OUTPUT_REGEX = re.compile(r"-\d+_\d+\.out$")
"""`<name>-<job>_<task>.out` of the script of one task of a job array."""
TAIL_BYTES = 2**18
"""Bytes at the end of a file that are read for its last lines."""
MAX_READ_BYTES = 2**20
"""Bytes that are read at a time of what was added to a file."""


class JobFile(NamedTuple):
    """A file with what a SLURM job, or a start over ssh, printed."""

    job_id: str
    """As the file's name has it: `17`, or `17_3` for the script of a task of a job array."""
    path: Path

    @property
    def is_script_output(self) -> bool:
        """Whether the job script printed it (`.out`), not torchrun and its ranks on a node (`.log`)."""
        return self.path.suffix == ".out"

    @property
    def is_of_array_task(self) -> bool:
        """Whether it is the output of the script of a task of a job array."""
        return "_" in self.job_id


@dataclass(frozen=True, slots=True)
class LogsRequest:
    """Which log files of a run the user wants to see: those of a rank, of a job, or the default."""

    rank: int | None = None
    job: str | None = None
    """The id of a SLURM job, or `last`."""


def choose_log_files(run_dir: Path, request: LogsRequest, failed_rank: int | None) -> list[Path]:
    """Choose the log files to show to a user, the most important one last; empty if the run has written none.

    The first case that applies:

    - A job is requested, or the last one: its output files.
    - A rank is requested: its log.
    - The failed rank (`failed_rank`), or rank 0 if none failed, has no log: the output of the newest job.
    - A rank has failed: the output of the newest job, where libraries print their errors, then the rank's log.
    - Otherwise: the log of rank 0.

    Raises ConfigError for a requested rank or job that has no file, if others have one.
    """
    log_by_rank, job_files = _find_log_files(run_dir)
    newest_job_files = _output_files_of_newest_job(job_files)

    if request.job == "last":
        return newest_job_files
    if request.job is not None:
        requested_files = [file.path for file in job_files if file.job_id == request.job]
        if job_files and not requested_files:
            known_jobs = ", ".join(sorted({file.job_id for file in job_files}))
            raise ConfigError(f"job={request.job}: has no output in {run_dir / 'logs'}; jobs with output: {known_jobs}")
        return requested_files
    if request.rank is not None:
        if log_by_rank and request.rank not in log_by_rank:
            raise ConfigError(
                f"rank={request.rank}: has no log in {run_dir / 'logs'}; ranks with a log: {_ranks_text(log_by_rank)}"
            )
        return [log_by_rank[request.rank]] if log_by_rank else []

    rank_log = log_by_rank.get(failed_rank or 0)
    if rank_log is None:
        return newest_job_files
    if failed_rank is not None:
        return [*newest_job_files, rank_log]
    return [rank_log]


class _FoundLogFiles(NamedTuple):
    """The log files of a run."""

    log_by_rank: dict[int, Path]
    job_files: list[JobFile]
    """What SLURM jobs, or starts over ssh, printed."""


def _find_log_files(run_dir: Path) -> _FoundLogFiles:
    """Find the log files of a run, sorted into logs of ranks and outputs of jobs.

    They are in its directory; those of a task of a job array are in that of the array's first run.
    """
    # Tasks of an array write into the directory of its first run, so most of these outputs belong to other runs.
    files = [path for path in _sorted_files(run_dir / "logs") if not ARRAY_TASK_OUTPUT_REGEX.search(path.name)]
    files += _array_task_outputs(run_dir)
    found = _FoundLogFiles({}, [])
    for path in files:
        if match := RANK_LOG_REGEX.fullmatch(path.name):
            found.log_by_rank[int(match[1])] = path
        if match := JOB_OUTPUT_REGEX.fullmatch(path.name):
            found.job_files.append(JobFile(match["script"] or match["node"], path))
    return found


def _ranks_text(ranks: Collection[int]) -> str:
    """Name ranks in a message: `0 to 7` if there are no gaps, else each of them."""
    has_no_gaps = len(ranks) == max(ranks) + 1
    if has_no_gaps:
        return f"0 to {max(ranks)}"
    return ", ".join(map(str, sorted(ranks)))


class LastLines(NamedTuple):
    """The last complete lines of a file."""

    lines: list[str]
    end_offset: int
    """The byte offset behind them, from which `AddedLinesReader` reads on."""


def read_last_lines(path: Path, count: int) -> LastLines:
    """Read the last `count` complete lines of a file, and the offset behind them. Raises OSError if it cannot be read.

    They are fewer if they are longer than `TAIL_BYTES` together. A last line without a line break is left for
    `AddedLinesReader`, which reads it when it is complete.
    """
    with atomic_io.open_regular_file(path) as (descriptor, size):
        start = max(0, size - TAIL_BYTES)
        tail = os.pread(descriptor, size - start, start)
    complete, line_break, _ = tail.rpartition(b"\n")
    end_offset = start + len(complete) + len(line_break)
    lines = complete.split(b"\n") if line_break else []
    begins_within_line = start > 0
    if begins_within_line:
        lines = lines[1:]
    if count == 0:
        return LastLines([], end_offset)
    return LastLines([_text_on_terminal(line) for line in lines[-count:]], end_offset)


@dataclass(slots=True)
class AddedLinesReader:
    """Reads what is added to log files."""

    offset_by_file: dict[Path, int] = field(default_factory=dict)
    """Byte offset in each file up to which it was read; a file that is not here is read from its beginning."""

    def read_new_lines(self, path: Path) -> list[str]:
        """Read the complete lines that were added to a file since the last call.

        Empty if there are none, or it cannot be read now. At most `MAX_READ_BYTES` are read; call it again until it returns
        no lines.
        """
        try:
            with atomic_io.open_regular_file(path) as (descriptor, size):
                start = self.offset_by_file.get(path, 0)
                if start > size:  # the file was truncated or replaced: everything in it is new
                    start = 0
                added = os.pread(descriptor, MAX_READ_BYTES, start)
        except OSError:
            return []
        complete, line_break, _ = added.rpartition(b"\n")
        if not line_break and len(added) == MAX_READ_BYTES:  # a line of a million characters: shown in pieces
            complete = added
        self.offset_by_file[path] = start + len(complete) + len(line_break)
        if not complete and not line_break:
            return []
        return [_text_on_terminal(line) for line in complete.split(b"\n")]


def _text_on_terminal(line: bytes) -> str:
    """What a terminal shows of a line in the end: a progress bar writes a carriage return before each of its states."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _output_files_of_newest_job(job_files: list[JobFile]) -> list[Path]:
    """Choose the output files of the job that wrote last, the most important one last.

    `job_files`: those of all jobs, by file name. The output of a job's script and the logs of its nodes have the same id in
    their names, except for a task of an array: its script writes `train-17_3.out`, and its nodes write `train-18-0.log`.
    Nothing says that 17_3 and 18 belong together. So, for the job that wrote last:

    - The script of an array task: the newest node logs are put before its output.
    - Node logs without the output of a script: the newest output of an array task is put behind them.
    - Any other job: its own files.
    """
    if not job_files:
        return []
    last_written = _last_written_file(job_files)
    # By file name, `train-17-0.log` of a node comes before `train-17.out` of the script, which is the more important one.
    newest_files = [file for file in job_files if file.job_id == last_written.job_id]
    newest_paths = [file.path for file in newest_files]
    if last_written.is_of_array_task:
        return [*_newest_node_logs(job_files), *newest_paths]
    has_script_output = any(file.is_script_output for file in newest_files)
    task_outputs = [file for file in job_files if file.is_of_array_task]
    if task_outputs and not has_script_output:
        return [*newest_paths, _last_written_file(task_outputs).path]
    return newest_paths


def _newest_node_logs(job_files: list[JobFile]) -> list[Path]:
    """The node logs of the job whose nodes wrote last; empty if there are none."""
    node_logs = [file for file in job_files if not file.is_script_output]
    if not node_logs:
        return []
    newest_job_id = _last_written_file(node_logs).job_id
    return [file.path for file in node_logs if file.job_id == newest_job_id]


def _last_written_file(job_files: list[JobFile]) -> JobFile:
    """The file that was written to last; `job_files`: at least one."""
    return max(job_files, key=lambda file: _modification_time(file.path))


def _array_task_outputs(run_dir: Path) -> list[Path]:
    """Find what the job script printed for this run as a task of a job array: `<name>-<job>_<task>.out`, one file for each job.

    These files are in the directory of the array's first run. Empty if the run is not a task of an array.
    """
    run_dirs = run_dirs_of_script(run_dir / "train.sbatch")
    if len(run_dirs) < 2:
        return []
    resolved_run_dir = run_dir.resolve()
    task_number = next(
        (number for number, task_dir in enumerate(run_dirs) if task_dir.resolve() == resolved_run_dir), None
    )
    return [path for path in _sorted_files(run_dirs[0] / "logs") if path.name.endswith(f"_{task_number}.out")]


def _sorted_files(directory: Path) -> list[Path]:
    """The files of a directory, by name; empty if there is no such directory. Raises ConfigError if it cannot be listed."""
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be listed ({error.strerror})") from error


def _modification_time(path: Path) -> float:
    """When a file was last written to, as a Unix time; 0 if it cannot be told."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
