"""The state of runs, from a few small files per directory: fast enough for hundreds of runs on a slow file system.

Files may be incomplete, torn, empty or unreadable: the run still gets a row, with what is known. Only a missing root
directory raises.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.runs import job_record, metrics_tail
from launch.runs.ended_job import describe_end
from launch.runs.owner import Holder, holder
from launch.runs.pipeline_jobs import PipelinePart, failed, parts_of
from launch.runs.queue import SUBMITTED, Queue, QueuedJob, unfinished_job
from strategies import atomic_io
from trainer.reporting.run_record import RunRecord, readable_run_record
from trainer.reporting.status import State, read_failure, read_status

DEPTH = 4
"""Directories below the one that is named in which runs are looked for."""
MOST_DIRECTORIES = 5000
AT_ONCE = 16
"""Runs that are read at a time: what a slow file system takes is waiting."""
SEAL = b"# sha256: "
"""How the configuration of a run begins."""
LOST, QUEUED, UNKNOWN, NOT_STARTED = "lost", "queued", "unknown", "not started"
ENDED = (State.done, State.failed, State.preempted)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """One run as it stands; what is not known is None."""

    directory: Path
    state: str
    """`running`, `done`, `failed`, `preempted`, `lost`: says it runs, and nobody gives a sign of life, `queued`, `not started`,
    `unknown`."""
    why: str | None = None
    """Why it is in this state, on one line."""
    step: int | None = None
    total: int | None = None
    """Steps of the whole run."""
    loss: float | None = None
    tokens_per_s: float | None = None
    """This and the next: medians over the last steps, all ranks together."""
    step_s: float | None = None
    memory_gib: float | None = None
    """The largest peak of a rank in the last steps."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation, if it is among the last rows."""
    restarts: int = 0
    """How often it was started again."""
    host: str | None = None
    pid: int | None = None
    job_id: str | None = None
    since: str | None = None
    """When the attempt at work began, by its host's clock."""
    heard_s: float | None = None
    """Seconds since the last sign of life; of a run that has ended, since its end."""
    job: QueuedJob | None = None
    """Its job in the queue."""
    parts: tuple[PipelinePart, ...] = ()
    """The jobs of its chain, where it was submitted as one."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, at the pace of the last ones; None where it is not running."""
        if self.state != State.running or None in (self.step, self.total, self.step_s):
            return None
        assert self.step is not None and self.total is not None and self.step_s is not None
        return max(0, self.total - self.step) * self.step_s


@dataclass(slots=True)
class FoundRuns:
    """What a walk below a directory came across."""

    runs: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    cut: bool = False
    """Whether there were too many directories to look into all."""


def find(root: Path) -> FoundRuns:
    """Runs below a directory, itself included, in the order of their names. Errors: OSError where it cannot be listed."""
    found, looked = FoundRuns(), 0
    level = [root]
    for depth in range(DEPTH + 1):
        deeper: list[Path] = []
        for directory in level:
            looked += 1
            if looked > MOST_DIRECTORIES:
                found.cut = True
                break
            try:
                with os.scandir(directory) as entries:
                    there = {entry.name: entry for entry in entries}
            except OSError as error:
                if directory == root:
                    raise
                found.unreadable[directory] = error.strerror or str(error)
                continue
            if "config.yaml" in there:
                found.runs.append(directory)
            elif depth < DEPTH:
                deeper += [
                    directory / name for name, entry in there.items() if name[0] != "." and _is_inner(entry, root)
                ]
        level = sorted(deeper, key=lambda path: in_order(path.name))
    found.runs.sort(key=lambda path: [in_order(part) for part in path.parts])
    return found


def in_order(name: str) -> tuple[int, str]:
    """Sort key of names: points of `train -m` are called 0, 1, ... 10."""
    return (int(name) if name.isdecimal() else -1, name)


def _is_inner(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether it is a directory to look into; what a link names below `root` is met there anyway."""
    try:
        known = entry.is_symlink() and Path(entry.path).resolve().is_relative_to(root.resolve())
        return entry.is_dir() and not known
    except (OSError, RuntimeError):
        return False


def look_at_all(found: FoundRuns, queue: Queue) -> list[RunView]:
    """Each of the runs, and what may be one and cannot be read."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        looked = list(pool.map(lambda run: look(run, queue), found.runs))
    # A file of that name alone makes no run.
    seen = [run for run in looked if run.state != NOT_STARTED or is_frozen(run.directory)]
    return seen + [
        RunView(directory=path, state=UNKNOWN, why=f"cannot be read: {why}") for path, why in found.unreadable.items()
    ]


def look(run_dir: Path, queue: Queue) -> RunView:
    """One run. Reads its status, its lease, a record of how many steps there are, and the end of its metrics."""
    status, trouble = read_status(run_dir), None
    try:
        held = holder(run_dir)
    except (OSError, ValueError) as error:
        held, trouble = Holder(0, None, None, None), f"its lease cannot be read: {atomic_io.reason(error)}"
    failure = read_failure(run_dir) if status.get("state") in (None, State.failed) else {}
    has_started = status.get("state") is not None or held.starts > 0
    record = readable_run_record(run_dir) if has_started else RunRecord()
    job_id = held.owner.job if held.owner is not None else record.slurm_job_id
    job = queue.job_of(run_dir, None if job_id is None else str(job_id))
    state, why = _state(run_dir, status, failure, held, job)
    if job is None and state in (LOST, NOT_STARTED):
        state, why = _by_its_job(run_dir, queue, state, why)
    parts = parts_of(run_dir, queue)
    if (broken := failed(parts)) is not None and broken.part != "train":
        why = f"{broken.part} (job {broken.job}) {broken.says}" + (f"; {why}" if why and state != NOT_STARTED else "")
        state = State.failed if state in (NOT_STARTED, QUEUED) else state
    if trouble and state == LOST:  # nobody knows
        state, why = UNKNOWN, trouble
    last = metrics_tail.newest(run_dir / "metrics.jsonl")
    steps = [row for row in last if "loss" in row]
    heard_s = held.silent_s if held.owner is not None and state in (State.running, LOST) else _since(status)
    owner = held.owner
    reached = [step for step in (status.get("step"), steps[-1]["step"] if steps else None) if isinstance(step, int)]
    return RunView(
        directory=run_dir,
        state=state,
        why=why or trouble,
        step=max(reached, default=None),
        total=record.total_steps or None,
        loss=metrics_tail.number(steps[-1], "loss") if steps else None,
        tokens_per_s=metrics_tail.recent(steps, "tokens_per_s"),
        step_s=metrics_tail.recent(steps, "step_s"),
        memory_gib=max((v for row in steps if (v := metrics_tail.number(row, "memory_gib")) is not None), default=None),
        evaluated=_evaluated(last),
        restarts=max(_whole(status.get("restart")) or 0, held.starts - 1),
        host=owner.host if owner is not None else _text(status.get("host")),
        pid=owner.pid if owner is not None else _whole(status.get("pid")),
        job_id=job.id if job is not None else _text(job_id),
        since=owner.since if owner is not None else None,
        heard_s=heard_s,
        job=job,
        parts=tuple(parts),
    )


def _state(
    run_dir: Path, status: dict[str, Any], failure: dict[str, Any], held: Holder, job: QueuedJob | None
) -> tuple[str, str | None]:
    """(state, why) of a run."""
    said = status.get("state")
    if job is not None and job.pends and said != State.done:
        return QUEUED, job.says
    if said == State.running or (said not in ENDED and held.owner is not None):
        if held.works:
            return State.running, _text(status.get("reason"))
        return LOST, _lost(held)
    if said in ENDED:
        why = failure.get("message") if said == State.failed and failure else status.get("reason")
        return str(said), one_line(why or status.get("reason"))
    if failure:
        return State.failed, one_line(failure.get("message"))
    if (run_dir / "status.json").exists():
        return UNKNOWN, "its status.json cannot be read"
    return NOT_STARTED, job.says if job is not None else None


def _by_its_job(run_dir: Path, queue: Queue, state: str, why: str | None) -> tuple[str, str | None]:
    """(state, why) of a run that says nothing itself and has no job in the queue."""
    if not any((run_dir / name).exists() for name in (job_record.FILE, SUBMITTED)):
        return state, why
    end = describe_end(run_dir, queue)
    if end is not None:
        return (State.failed, end) if state == NOT_STARTED else (state, f"{why}; {end}" if why else end)
    submitted = unfinished_job(run_dir)
    if submitted is not None and (queue.problem or queue.missing):
        unknown = queue.problem or "this host has no squeue"
        words = f"was submitted as job {submitted}, and whether that waits or runs is not known: {unknown}"
        return state, f"{why}; {words}" if why else words
    return state, why


def _lost(held: Holder) -> str:
    owner = held.owner
    if owner is None:
        return "ended without a word: it says that it runs, and nobody runs it"
    silent = "never gave a sign of life" if held.silent_s is None else f"no sign of life for {age(held.silent_s)}"
    if held.lives is False:
        return f"process {owner.pid} on {owner.host} is gone without a word (killed, or its host was)"
    if held.lives:
        return f"process {owner.pid} on {owner.host} lives, but {silent}: it was stopped, or hangs"
    return f"{silent} from process {owner.pid} on {owner.host}"


def is_frozen(run_dir: Path) -> bool:
    """Whether a run was composed for this directory; also where that cannot be read."""
    try:
        with atomic_io.open_regular(run_dir / "config.yaml") as (descriptor, _):
            return SEAL in os.pread(descriptor, 4096, 0)
    except OSError:
        return True


def _evaluated(last: list[dict[str, Any]]) -> dict[str, float]:
    row: dict[str, Any] = next((row for row in reversed(last) if "loss" not in row), {})
    return {key: value for key in row if key != "tokens" and (value := metrics_tail.number(row, key)) is not None}


def _since(status: dict[str, Any]) -> float | None:
    told = status.get("time")
    return max(0.0, time.time() - told) if isinstance(told, int | float) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def one_line(value: Any) -> str | None:
    """What was said, without line breaks."""
    return " ".join(str(value).split()) if value else None


def age(seconds: float) -> str:
    """A time in its largest unit."""
    for unit, size, until in (("s", 1, 120), ("min", 60, 5400), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
