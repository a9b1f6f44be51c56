"""What a run reports while it trains: on the screen, in `run.json` and `status.json`, and to trackers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from strategies import runtime as processes
from strategies.base import Progress
from strategies.errors import ShardtuneError
from trainer.checkpoints.manager import Checkpoints
from trainer.config.resuming import plain
from trainer.config.run import RunConfig
from trainer.data.prepare import Prepared
from trainer.data.report.preview import preview, summary
from trainer.monitors.stragglers import Slow, Tell
from trainer.objectives.registry import reading_of
from trainer.planner.predicted_vs_measured import measured
from trainer.reporting.console import Console
from trainer.reporting.energy import metering, taken
from trainer.reporting.findings import status_note
from trainer.reporting.metrics import Meter
from trainer.reporting.outcome import Outcome
from trainer.reporting.run_record import RunRecord
from trainer.reporting.status import State, write_status
from trainer.reporting.trackers.base import Ended, Table, Tracked
from trainer.reporting.tracking import Trackers, open_apart, open_trackers, summary_of
from trainer.session.attempt import Where
from trainer.session.run_facts import end_text, outcome_record, start_text, write_run_record
from trainer.session.tracker_columns import name_of, tracker_settings
from trainer.stopping.preempt import Agreement

LINGER_S = 20.0
"""Seconds that a run which failed gives a checkpoint to come to the disk that is being written beside it."""


@dataclass(slots=True)
class RunPlace:
    """Where a run takes place and who hears of it."""

    sha256: str
    """Of the configuration."""
    runtime: processes.Runtime
    console: Console
    agreement: Agreement
    where: Where

    @property
    def run_dir(self) -> Path:
        """The directory of the run, which somebody may rename."""
        assert self.where.run_dir is not None
        return self.where.run_dir


def introduce(config: RunConfig, run_dir: Path, data: Prepared, tokenizer: Any, runtime: processes.Runtime) -> Console:
    """The console of this rank, and on it what will be learned, before anything is."""
    console = Console(enabled=runtime.is_main, log=run_dir / "logs" / f"rank-{runtime.rank}.log")
    head = f"run {run_dir}: {config.strategy.name}, {config.tuning.name}, {runtime.world_size} process(es)"
    reading = reading_of(config.objective)
    shown = preview(data.train, tokenizer, reading, data.label_names, width=console.width)
    console.say("\n".join([head, summary(data.report), shown]))
    return console


def open_records(config: RunConfig, record: RunRecord, progress: Progress, place: RunPlace) -> Trackers:
    """The start screen, and rank 0's trackers, with `run.json` and `status.json` begun; nothing on the others. All ranks call."""
    place.console.say(start_text(record))
    place.where.still_ours(place.runtime)
    if not place.runtime.is_main:
        return Trackers()
    opened = open_trackers(
        Tracked(
            config=config.logging,
            run_dir=place.run_dir,
            run_id=progress.wandb_id or "",
            name=name_of(config),
            resumed_at=progress.step,
            settings=tracker_settings(config, record),
            data=Path(record.data_directory),
            say=place.console.say,
        )
    )
    place.where.on_move.append(opened.trackers.move_to)
    progress.wandb_id = opened.run_id
    record.substitutions |= opened.substitutions
    record.from_environment = opened.from_environment or None
    for key, value in opened.substitutions.items():
        place.console.say(f"resolved: {key}: {value}")
    if opened.passed_over:
        place.console.say(opened.passed_over)
    write_run_record(place.run_dir, record)
    write_status(place.run_dir, State.running, step=progress.step)
    return opened.trackers


def tell_of_slow(place: RunPlace) -> Tell:
    """What rank 0 does about a rank that holds the others up: a warning, and a word in `status.json` while it lasts."""

    def tell(slow: Slow, now: list[Slow], step: int) -> None:
        again = f"rank {slow.rank} on {slow.host} is as fast as the other ranks again"
        place.console.say(f"warning: step {step}: {slow}" if slow in now else f"step {step}: {again}")
        if place.where.lost() is None:
            with suppress(ShardtuneError):  # a full disk is told of by what must be written
                reasons = [*([place.where.note] if place.where.note else []), *(each.since() for each in now)]
                why = "; ".join(reasons) or None
                write_status(place.run_dir, State.running, step=step, reason=why, slow=[asdict(each) for each in now])

    return tell


def tell_of_challenges(place: RunPlace) -> Callable[[dict[str, Any]], None]:
    """What is done with the record of the detectors after each look: a few words in `status.json`, now and at the end."""

    def tell(challenges: dict[str, Any]) -> None:
        note = status_note(challenges)
        if note == place.where.note:
            return
        place.where.note = note
        if place.runtime.is_main and place.where.lost() is None:
            with suppress(ShardtuneError):  # a full disk is told of by what must be written
                write_status(place.run_dir, State.running, step=place.where.step, reason=note)

    return tell


@contextmanager
def until_it_ends(
    config: RunConfig,
    trackers: Trackers,
    outcome: Outcome,
    record: RunRecord,
    measures: tuple[Meter, Checkpoints],
    place: RunPlace,
) -> Iterator[None]:
    """Around all that may end the run: however it does, trackers are told, and `run.json` has what it took."""
    meter, checkpoints = measures
    ended = Ended(State.done)
    try:
        yield
    except BaseException as error:
        ended = Ended.by(error)
        if ended.state is State.failed and isinstance(error, Exception):  # not where somebody pressed Ctrl-C
            checkpoints.linger(LINGER_S)
        raise
    finally:
        place.console.leave()
        speed = outcome.speed or meter.speed()
        trackers.summarise(summary_of({**outcome.last_row, **meter.peaks}, speed, outcome.after))
        export = place.run_dir / "export"
        done = ended.state is State.done and config.export.at_end and export.is_dir()
        trackers.close(replace(ended, exported=export if done else None))
        if ended.state is not State.done:
            for name, where in trackers.hints:
                place.console.say(f"{name + ':':<11} {where}")
        record.challenges = outcome.challenges
        note_measured(record, meter, checkpoints, place)


def note_measured(record: RunRecord, meter: Meter, checkpoints: Checkpoints, place: RunPlace) -> None:
    """What the run took into `run.json`, however it ends: rank 0's word, without a collective."""
    if place.runtime.is_main:
        if (refused := checkpoints.copies.refused) is not None:
            record.substitutions["checkpoint.background"] = f"false: {refused}"
        assert record.receipt is not None  # since `run_facts`
        record.receipt.measured = measured(meter, place.runtime.device, checkpoints.last)
        with suppress(OSError, ShardtuneError):  # what ended the run is not to be hidden; a success writes it once more
            if place.where.lease is not None:
                place.where.lease.check()
            write_run_record(place.run_dir, record)


def metered(config: RunConfig, place: RunPlace) -> AbstractContextManager[None]:
    """Meanwhile each host measures its energy, where that is asked for."""
    return metering(config.logging.energy, place.run_dir, place.runtime, place.console.say)


def close_records(
    record: RunRecord, outcome: Outcome, exported: Path | None, trackers: Trackers, place: RunPlace
) -> None:
    """The outcome into `run.json`, and the last lines on the screen. All ranks must call."""
    if place.runtime.is_main:
        record.energy = taken(place.run_dir)
        record.outcome = outcome_record(outcome)
        write_run_record(place.run_dir, record)
        place.console.say(end_text(place.run_dir, outcome, exported, trackers.hints))
    processes.barrier(place.runtime)


def track_evaluation(
    config: RunConfig, directory: Path, report: dict[str, Any], shown: dict[str, Table], say: Callable[[str], None]
) -> None:
    """A run of its own in W&B, where W&B is on, with the numbers of a report and its tables; rank 0 alone.

    `directory`: where W&B's files go. A tracker that fails is told of and ends nothing.
    """
    model = report["model"]
    name = Path(model["run"] or model["path"]).name
    step = int(re.sub(r"\D", "", model["checkpoint"] or "") or 0)
    about = {key: report[key] for key in ("strategy", "processes", "precision", "device", "versions")}
    opened = open_apart(
        Tracked(
            config=replace(
                config.logging,
                tensorboard=False,
                trackio=False,
                mlflow=False,
                artifacts=False,
                name=None,
                job_type="evaluate",
                group=config.logging.group or name,
            ),
            run_dir=directory,
            run_id="",
            name=f"evaluate-{name}",
            resumed_at=0,
            settings={**model, **about, "against": report.get("against", {}).get("what"), "config": plain(config)},
            say=say,
        )
    )
    for key, value in opened.substitutions.items():
        say(f"resolved: {key}: {value}")
    values = {
        f"eval/{task}/{metric}{part and '/' + part}": each[part or "value"]
        for task, said in report["tasks"].items()
        for metric, each in said["metrics"].items()
        for part in ("", "low", "high")
        if each.get(part or "value") is not None
    }
    opened.trackers.log(values, step=step)
    opened.trackers.tables(shown, step=step)
    opened.trackers.summarise(values)
    opened.trackers.close(Ended(State.done))
    for tracker, where in opened.trackers.hints:
        say(f"{tracker}: {where}")
