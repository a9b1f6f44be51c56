"""What stands on a run's page besides its verdict: cards, what it took against what was planned, settings, links, answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from launch.compare.comparison import ComparedPoint
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.run_page.held_out import MetricChange, best_step, card_changes, metric_changes, monitored_metric
from strategies.errors import ShardtuneError
from trainer.pages.numbers import UNKNOWN, byte_size, duration, number, percent
from trainer.pages.pieces import PageCard, PageCell, PageColumn, PageTable, Tone
from trainer.reporting.numbers import short
from trainer.reporting.results import EVALUATION, REVIEW, kept_reports
from trainer.reporting.run_record import MeasuredCost, PredictedCost, Receipt

GIB = 2**30
NEARLY_FULL = 0.92
"""Share of a card's memory from which on longer rows may not fit."""
CPU = "cpu"
PLACES = {"run.dir", "data.cache_dir"}
"""Settings that only say where files are: they are among all settings, and not among those that were chosen."""
RESOLVED = "substitutions."
"""How keys begin under which the run keeps what `auto` became."""


def cards(compared: ComparedPoint) -> list[PageCard]:
    """The numbers at the head: held-out metrics before and after, duration, speed, memory."""
    run = compared.first_repeat
    measured = compared.measured
    held_out = [_metric_card(run, change) for change in card_changes(metric_changes(run))]
    candidates: list[PageCard | None] = [*held_out, *_training_loss_cards(run, has_held_out=bool(held_out))]
    candidates += [_duration_card(run), _speed_card(run, measured), _memory_card(run, measured)]
    return [card for card in candidates if card is not None]


def _metric_card(run: RecordedRun, change: MetricChange) -> PageCard:
    """A held-out metric at the end of the run, with its value before training, and the best step if that was better."""
    notes = []
    if change.before is not None:
        notes.append(f"before training {change.shown(change.before)}")
    if change.judgement:
        notes.append(change.judgement)
    best = best_step(run)
    is_monitored = change.name == monitored_metric(run)
    if is_monitored and best is not None and not best.last_is_as_good and best.beats_beginning:
        notes.append(f"best {change.shown(best.value)} at step {best.step}")
    return PageCard(change.title, change.shown(change.after), ", ".join(notes), change.tone, change.arrow)


def _training_loss_cards(run: RecordedRun, *, has_held_out: bool) -> list[PageCard]:
    """A card with the training loss, if nothing held out was evaluated. It has no colour, because it does not measure quality.

    A run that learns from rewards gets its reward instead: its loss is near 0 by construction.
    """
    name = "reward" if any("reward" in row for row in run.steps.values()) else "loss"
    numbers = [row[name] for row in run.steps.values() if isinstance(row.get(name), int | float)]
    if has_held_out or not numbers:
        return []
    change = MetricChange(name, numbers[-1], numbers[0] if len(numbers) > 1 else None)
    note = f"first step {number(numbers[0])}" if len(numbers) > 1 else ""
    return [PageCard(f"Training {name}", number(numbers[-1]), note, "", change.arrow)]


def _duration_card(run: RecordedRun) -> PageCard | None:
    seconds = sum(row.get("step_s") or 0.0 for row in run.steps.values())
    if not seconds:
        return None
    steps = len(run.steps)
    note = f"{steps:,} step{'s' if steps != 1 else ''}, without start and evaluations"
    return PageCard("Duration", duration(seconds), note)


def _speed_card(run: RecordedRun, measured: RunMeasurements) -> PageCard | None:
    """Tokens a second of all ranks, with the time of a step and the MFU; None if the speed is not known."""
    if not measured.tokens_per_s:
        return None
    notes = []
    if measured.step_s:
        notes.append(f"{duration(measured.step_s)} a step")
    if run.record.world_size:
        ranks = run.record.world_size
        notes.append("1 rank" if ranks == 1 else f"{ranks} ranks together")
    if measured.mfu is not None and _has_peak(run):
        notes.append(f"MFU {percent(measured.mfu)}")
    return PageCard("Speed", number(measured.tokens_per_s, digits=3), ", ".join(notes), unit="tokens/s")


def _has_peak(run: RecordedRun) -> bool:
    """Whether the run has a peak that its MFU can be a share of. A CPU has none unless the settings give one: it is measured
    while other programs may run.
    """
    return run.record.device != CPU or run.config.get("logging.reference_tflops") is not None


def _memory_card(run: RecordedRun, measured: RunMeasurements) -> PageCard | None:
    """The largest peak of a rank's memory, as a share of its GPU's; None if not measured."""
    if measured.memory_gib is None:
        return None
    predicted = _predicted(run)
    note = "largest peak of a rank"
    tone: Tone = ""
    if run.record.device == CPU:
        note += ", libraries included"
    elif predicted.device_gib:
        share = measured.memory_gib / predicted.device_gib
        note = f"{percent(share)} of a card's {number(predicted.device_gib, digits=3)} GiB"
        if share > NEARLY_FULL:
            tone = "warning"
            note += ": longer rows may not fit"
    return PageCard("Memory", byte_size(measured.memory_gib * GIB), note, tone)


def _predicted(run: RecordedRun) -> PredictedCost:
    receipt = run.record.receipt or Receipt()
    return receipt.predicted or PredictedCost()


def cost_table(compared: ComparedPoint) -> PageTable | None:
    """A table of what the run took, beside what was planned, with a row for each cost; None if nothing was measured."""
    run = compared.first_repeat
    measured = compared.measured
    predicted = _predicted(run)
    receipt = (run.record.receipt or Receipt()).measured or MeasuredCost()
    planned_gib = predicted.memory_gib
    planned_step_s = predicted.step_s
    if run.record.device == CPU:
        # Not comparable: the measured memory has the process's libraries in it, and the plan knows no reliable peak of a CPU.
        planned_gib = None
        planned_step_s = None
    planned_exchange = _bytes(measured.planned_exchanged_gib)
    rows = [
        _cost_row("Memory of a rank", byte_size, _bytes(planned_gib), _bytes(measured.memory_gib)),
        _cost_row("Reserved by the allocator", byte_size, None, _bytes(measured.memory_reserved_gib)),
        _cost_row("Time of a step", duration, planned_step_s, measured.step_s),
        _cost_row("Exchanged in a step, rank 0", byte_size, planned_exchange, _bytes(measured.exchanged_gib)),
        _cost_row("Waited for the exchange in a step", duration, None, measured.exposed_s),
        _cost_row("Size of a checkpoint", byte_size, predicted.checkpoint_bytes, receipt.checkpoint_bytes),
        _cost_row("Writing a checkpoint", duration, None, measured.checkpoint_s),
        _cost_row("Start to first step, without evaluation", duration, None, _start_s(measured)),
        _cost_row("Price of a million tokens, US$", number, None, compared.summary.dollars_per_million),
    ]
    columns = [PageColumn("what"), PageColumn("planned"), PageColumn("taken")]
    columns.append(PageColumn("taken / planned", note="1 is as planned, 2 twice as much"))
    measured_rows = [row for row in rows if row is not None]
    return PageTable(columns, measured_rows, "Taken against planned") if measured_rows else None


def _cost_row(
    what: str, format_value: Callable[[float], str], planned: float | None, taken: float | None
) -> list[PageCell] | None:
    """A row of the cost table; None if the cost was not measured. `format_value` writes a value with its unit."""
    if not taken:
        return None
    planned_cell = PageCell(format_value(planned), planned) if planned else PageCell(UNKNOWN)
    ratio_cell = PageCell(f"{taken / planned:.2f}", taken / planned) if planned else PageCell(UNKNOWN)
    return [PageCell(what, what), planned_cell, PageCell(format_value(taken), taken), ratio_cell]


def _bytes(gib: float | None) -> float | None:
    return None if gib is None else gib * GIB


def _start_s(measured: RunMeasurements) -> float | None:
    if measured.start_s is None:
        return None
    return measured.start_s - (measured.evaluation_before_s or 0)


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's settings as (key, value): those that are no defaults, and all."""

    chosen: list[tuple[str, str]]
    all: list[tuple[str, str]]


def settings(run: RecordedRun) -> Settings:
    """The settings of a run: all of them, and those that were chosen, which are neither defaults nor paths nor resolved.

    If this version cannot read the run's `config.yaml`, none count as chosen.
    """
    defaults = _defaults(run.directory)
    chosen = []
    everything = []
    for key, value in run.config.items():
        everything.append((key, _setting_value(value)))
        is_default = key in defaults and defaults[key] == value
        is_chosen = key not in PLACES and not key.startswith(RESOLVED) and value not in (None, [], {})
        if defaults and not is_default and is_chosen:
            chosen.append((key, _setting_value(value)))
    return Settings(chosen, everything)


def _setting_value(value: Any) -> str:
    """A value as on the command line: true, 2e-4, [q_proj,v_proj], none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_setting_value, value))}]"
    return short(value)


def _defaults(run_dir: Path) -> dict[str, Any]:
    """The defaults of a run's settings by dotted key; empty if they cannot be read, as of a run of another version."""
    from launch.config.frozen import load_frozen
    from trainer.config.resuming import default_settings

    try:
        return default_settings(load_frozen(run_dir / "config.yaml"))
    except (ShardtuneError, OSError, ValueError, TypeError):
        return {}


def provenance(run: RecordedRun) -> list[tuple[str, str]]:
    """(name, text) rows on where the run comes from: data, method, batch, machine, versions; one not recorded has no row."""
    record = run.record
    methods = (record.strategy, record.tuning, record.objective, record.precision, record.attention)
    batch = ""
    if record.global_batch and record.micro_batch and record.accumulation and record.world_size:
        batch = f"{record.global_batch} = {record.micro_batch} micro x {record.accumulation} accumulation x {record.readers}"
    parameters = ""
    if record.sharding.parameters:
        share = record.sharding.trainable_parameters / record.sharding.parameters
        parameters = (
            f"{record.sharding.parameters:,}, trained {record.sharding.trainable_parameters:,} ({percent(share)})"
        )
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    rows = (
        ("directory", str(run.directory)),
        ("model", record.base_model),
        ("data", record.data_directory),
        ("method", ", ".join(filter(None, methods))),
        ("parameters", parameters),
        ("batch", batch),
        ("device", record.device_name or record.device),
        ("host", record.host),
        ("command", record.command),
        ("revision", record.git_revision),
        ("versions", versions),
        ("configuration", record.config_sha256),
        ("data fingerprint", record.data_fingerprint),
    )
    return [(name, text) for name, text in rows if text]


def links(run: RecordedRun) -> list[tuple[str, str]]:
    """(text, address relative to the page) of a link to each other page or file about the run that exists."""
    targets: list[tuple[str, Path]] = []
    if run.record.data_directory:
        targets.append(("audit of the data", Path(run.record.data_directory) / "audit.html"))
    targets.append(("evaluation", run.directory / "evaluation.html"))
    for kind, text in ((EVALUATION, "newest evaluation report"), (REVIEW, "review by people")):
        targets += [(text, report.path) for report in kept_reports(run.directory, kind)[:1]]
    targets += [("model card", run.directory / "export" / "README.md"), ("metrics", run.directory / "metrics.jsonl")]
    targets.append(("run record", run.directory / "run.json"))
    return [(text, address(run.directory, path)) for text, path in targets if path.is_file()]


def address(run_dir: Path, path: Path) -> str:
    """A file's address from the page in the run directory: relative, so that both can be moved together."""
    relative = os.path.relpath(path.absolute(), run_dir.absolute())
    return quote(relative.replace(os.sep, "/"))  # a `#` or `%` in a directory's name would lead elsewhere
