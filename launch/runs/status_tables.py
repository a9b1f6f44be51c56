"""How runs stand, as tables of 80 columns and as JSON."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.runs import efficiency, pipeline_jobs
from launch.runs.checkpoints import Store, StoredCheckpoint
from launch.runs.metrics_tail import curve
from launch.runs.queue import Queue, QueuedJob
from launch.runs.sparkline import cut, folded, sparkline
from launch.runs.status import LOST, NOT_STARTED, QUEUED, UNKNOWN, RunView, age, one_line
from strategies.atomic_io import size_text
from trainer.reporting.status import State

NAME = 20
STATE = 12
MOST_JOBS, MOST_STARTS = 20, 5
Column = tuple[str, int, Callable[[RunView], str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class One:
    """What is shown beside, where one run was asked for."""

    store: Store
    failure: dict[str, Any]
    curve: list[float]
    """The loss at some places of the run."""
    logs: Path
    starts: list[dict[str, Any]]
    """What each start of its jobs took, as `launch/runs/efficiency.py` has recorded it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusAnswer:
    """All that was found."""

    root: Path
    runs: list[RunView]
    queue: Queue
    cut: bool
    """Whether there were too many directories to look into all."""
    one: One | None = None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(value: float | None) -> str:
    if value is None or value < 1e6:
        return _number(value, ",.0f" if value is None or value >= 100 else ".1f")
    return f"{value / 1e6:.2f}M"


def clock(seconds: float | None) -> str:
    """Hours, minutes and seconds; days where it is long."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = int(seconds)
    if whole >= 360000:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _step(run: RunView) -> str:
    if not run.step and not run.total:
        return "-"
    return "/".join(
        "-" if each is None else f"{each}" if each < 1e5 else f"{each / 1e3:,.0f}k" for each in (run.step, run.total)
    )


COLUMNS: tuple[Column, ...] = (
    ("step", 11, _step),
    ("loss", 8, lambda run: _number(run.loss, ".4g" if run.loss is None or run.loss >= 1000 else ".4f")),
    ("tok/s", 8, lambda run: _rate(run.tokens_per_s)),
    ("left", 8, lambda run: clock(run.left_s)),
    ("GiB", 6, lambda run: _number(run.memory_gib, ".3g")),
    ("heard", 7, lambda run: "-" if run.heard_s is None else age(run.heard_s)),
)


def text(found: StatusAnswer, damaged: Mapping[Path, str] | None, *, live: bool = False) -> str:
    """What a person reads. `damaged` by checkpoint, None where none was verified; `live` adds curves to runs that run."""
    if found.one is not None:
        lines = _in_full(found.runs[0], found.one, damaged)
        lines += ["", *folded(f"queue: {found.queue.problem}")] if found.queue.problem else []
        return "\n".join(lines)
    lines = _table(found, live=live) if found.runs else [f"no runs below {found.root}"]
    if damaged is not None:
        lines += ["", *([f"damaged: {path}: {why}" for path, why in damaged.items()] or ["all checkpoints are whole"])]
    mine = _jobs_of(found)
    others = [job for job in found.queue.jobs if job.id not in mine]
    if others:
        lines += ["", "other jobs of yours in the queue:"]
        lines += [cut(f"  {job.says}  ({job.name})") for job in others[:MOST_JOBS]]
        lines += [f"  and {len(others) - MOST_JOBS} more"] if len(others) > MOST_JOBS else []
    if found.queue.problem:
        lines += ["", cut(f"queue: {found.queue.problem}")]
    return "\n".join(lines)


def _table(found: StatusAnswer, *, live: bool) -> list[str]:
    lines = [f"{'':<{NAME}}{'state':<{STATE}}" + "".join(f"{title:>{width}}" for title, width, _ in COLUMNS)]
    runs = sorted(found.runs, key=_urgent) if live else found.runs
    for number, run in enumerate(runs):
        rows = _rows(run, found.root, live=live)
        if live and len(lines) + len(rows) > shutil.get_terminal_size((80, 24)).lines - 8:
            lines.append(f"... and {len(runs) - number} more")
            break
        lines += rows
    counts = Counter(run.state for run in found.runs)
    told = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    lines += ["", f"{len(found.runs)} run{'s' * (len(found.runs) != 1)}: {told}"]
    if found.cut:
        lines.append(f"there are too many directories below {found.root}: not all were looked into; name a lower one")
    return lines


def _rows(run: RunView, root: Path, *, live: bool) -> list[str]:
    """The lines of one run."""
    cells = f"{run.state:<{STATE}}" + "".join(f"{value(run):>{width}}" for _, width, value in COLUMNS)
    name = _name(run.directory, root)
    lines = [f"{name:<{NAME}}{cells}"] if len(name) < NAME else [name, f"{'':<{NAME}}{cells}"]
    lines += [cut(f"  {told}")] if (told := _beside(run)) else []
    if live and run.state == State.running:
        lines += [f"  {sparkline(losses)}"] if (losses := curve(run.directory / "metrics.jsonl", 60)) else []
    return lines


def _urgent(run: RunView) -> tuple[int, float]:
    """Sort key where not all may be seen: what works, what waits, what needs somebody, then what ended last."""
    order = (State.running, QUEUED, LOST)
    rank = order.index(run.state) if run.state in order else len(order)
    return rank, run.heard_s if run.heard_s is not None else math.inf


def _name(directory: Path, root: Path) -> str:
    return str(directory.relative_to(root)) if directory.is_relative_to(root) and directory != root else str(directory)


def _beside(run: RunView) -> str:
    """What stands below a run's row: where it runs, and why it does not."""
    if run.state in (State.done, NOT_STARTED) and not run.why:
        return ""
    where = _where(run) if run.state in (State.running, LOST, QUEUED) else []
    if run.restarts and run.state != State.done:
        where.append(f"{run.restarts} restart{'s' if run.restarts > 1 else ''}")
    return ": ".join(part for part in (", ".join(where), run.why) if part)


def _where(run: RunView) -> list[str]:
    found = [f"on {run.host}"] if run.host and run.state == State.running else []
    odd = f" {run.job.state}" if run.job is not None and run.job.state != "RUNNING" else ""
    return found + ([f"job {run.job_id}{odd}"] if run.job_id and run.state != QUEUED else [])


def _in_full(run: RunView, one: One, damaged: Mapping[Path, str] | None) -> list[str]:
    share = f" ({run.step / run.total:.1%})" if run.step and run.total else ""
    lines = [f"{run.directory}: {run.state}, step {_step(run)}{share}"]
    lines += folded(f"  {run.why}") if run.why and run.state != State.failed else []
    facts: list[tuple[str, str]] = []
    if run.loss is not None:
        facts.append(("loss", f"{run.loss:.4f}  {sparkline(one.curve)}"))
    if run.evaluated:
        at = run.evaluated.get("step")
        shown = ", ".join(f"{key} {value:.4f}" for key, value in run.evaluated.items() if key != "step")
        facts.append(("held out", f"{shown} (step {at:.0f})" if at is not None else shown))
    if run.tokens_per_s is not None:
        left = f", {clock(run.left_s)} left" if run.left_s is not None else ""
        pace = f", {run.step_s:.3g} s a step" if run.step_s is not None else ""
        facts.append(("rate", f"{_rate(run.tokens_per_s)} tokens/s{pace}{left}"))
    if run.memory_gib is not None:
        facts.append(("memory", f"{run.memory_gib:.3g} GiB, the largest peak of a rank"))
    facts += _runner(run) + [("took", efficiency.said(start)) for start in one.starts[-MOST_STARTS:]]
    for title, told in facts:
        lines += folded(f"  {title:<10}{told}", 12)
    lines += _chain(run)
    lines += _failed(run, one)
    lines += _checkpoints(one.store, damaged)
    if one.logs.is_dir():
        lines += ["", f"logs: {one.logs}"]
    return lines


def _chain(run: RunView) -> list[str]:
    """The jobs that it was submitted as, one after another."""
    return [
        line
        for part in run.parts
        for line in folded(f"  {part.part:<10}job {part.job}: {part.says.removeprefix(f'job {part.job} ')}", 12)
    ]


def _runner(run: RunView) -> list[tuple[str, str]]:
    """Who runs it, or did."""
    who = [f"process {run.pid} on {run.host}" if run.host else ""]
    who.append(f"job {run.job_id}" if run.job_id else "")
    who.append(f"since {run.since}" if run.since else "")
    if run.heard_s is not None:
        last = (
            "last sign of life"
            if run.state in (State.running, LOST)
            else "ended"
            if run.state != UNKNOWN
            else "heard of"
        )
        who.append(f"{last} {age(run.heard_s)} ago")
    facts = [("by", ", ".join(filter(None, who)))] if any(who) else []
    facts += [("restarts", str(run.restarts))] if run.restarts else []
    if run.job is not None and run.state != QUEUED:
        # squeue's word for the left time of a job that is past its limit, and is about to be ended for it
        left = "past its time limit" if run.job.left == "INVALID" else f"{run.job.left} left"
        facts.append(("queue", f"{run.job.says}, {left} on {run.job.nodes}"))
    return facts


def _failed(run: RunView, one: One) -> list[str]:
    """The cause, and what to do."""
    failure = one.failure
    again = "the same command continues it from the newest whole checkpoint"
    if run.state == State.failed:
        where = ""
        if (broken := pipeline_jobs.failed(list(run.parts))) is not None and not failure:
            look = f"shardtune logs {run.directory} job={broken.job} says why; submit the same words again"
            return ["", *folded(f"failed: {run.why}"), *folded(f"to do: {look}")]
        if failure:
            at = f", step {failure['step']}" if failure.get("step") is not None else ""
            where = f"rank {failure.get('rank')} on {failure.get('host')}, {failure.get('phase')}{at}: "
            where += "" if failure.get("user_error") else f"{failure.get('error')}: "
        todo = again if run.step else f"shardtune logs {run.directory} shows its output; submit the same words again"
        lasting = failure.get("retry") in (None, "out_of_memory")
        if failure.get("user_error") and lasting:
            todo = "change what the message says; the same command then continues it"
        elif failure and lasting:
            todo = f"the traceback is in {run.directory / 'failure.json'}"
        return ["", *folded(f"failed: {where}{run.why or 'no word of why'}"), *folded(f"to do: {todo}")]
    if run.state == LOST:
        end = "stop it, then " if run.why and "lives, but" in run.why else ""
        return ["", *folded(f"to do: {end}{again}")]
    if run.state != State.preempted:
        return []
    if run.job is not None and run.job.state == "RUNNING":
        return ["", f"{run.job.says} starts it again"]
    return ["", *folded(f"to do: {again}")]


def _checkpoints(store: Store, damaged: Mapping[Path, str] | None) -> list[str]:
    if store.problem:
        return ["", *folded(f"checkpoints: {store.problem}")]
    if not store.checkpoints:
        return ["", "no checkpoints"]
    lines = ["", f"checkpoints in {store.checkpoints[0].path.parent}:"]
    for each in store.checkpoints:
        said = f"  {each.path.name}  {age(each.age_s) + ' old':>11}  {size_text(each.size):>9}"
        notes = _notes(each, store.watch)
        if damaged is not None:
            notes.insert(0, f"damaged: {damaged[each.path]}" if each.path in damaged else "whole")
        lines += folded(f"{said}  {'; '.join(notes)}".rstrip(), 4)
    return lines


def _notes(each: StoredCheckpoint, watch: str | None) -> list[str]:
    notes = [f"best: {watch or 'held out'} {each.best:.4f}"] if each.best is not None else []
    notes += [f"in {each.path.parent}"] if each.elsewhere else []
    return notes + ([f"given up, in {each.path.parent.name}"] if each.given_up else [])


def as_dict(found: StatusAnswer, damaged: Mapping[Path, str] | None) -> dict[str, Any]:
    """The same as JSON values: seconds, GiB, bytes, tokens a second of all ranks together."""
    mine = _jobs_of(found)
    answer: dict[str, Any] = {"directory": str(found.root), "runs": [_run(run) for run in found.runs]}
    if found.one is not None:
        run = answer["runs"][0]
        run["failure"] = found.one.failure or None
        run["watch"] = found.one.store.watch
        run["checkpoints"] = [
            {**asdict(each), "path": str(each.path), "damage": (damaged or {}).get(each.path)}
            for each in found.one.store.checkpoints
        ]
        run["starts"] = found.one.starts
        run["checkpoints_problem"] = found.one.store.problem
    if damaged is not None:
        answer["damaged"] = {str(path): why for path, why in damaged.items()}
    answer["other_jobs"] = [_job(job) for job in found.queue.jobs if job.id not in mine]
    answer["queue_problem"] = found.queue.problem
    answer["all_looked_into"] = not found.cut
    return answer


def _jobs_of(found: StatusAnswer) -> set[str]:
    """Jobs of the queue that are told of with their runs."""
    return {run.job.id for run in found.runs if run.job is not None} | {p.job for run in found.runs for p in run.parts}


def _run(run: RunView) -> dict[str, Any]:
    told = asdict(run)
    told |= {"directory": str(run.directory), "why": one_line(run.why), "left_s": run.left_s}
    told["job"] = None if run.job is None else _job(run.job)
    return told


def _job(job: QueuedJob) -> dict[str, str]:
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "name": job.name,
        "start": job.start,
        "left": job.left,
    }
