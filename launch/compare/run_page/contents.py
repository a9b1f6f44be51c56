"""What stands on a run's page besides its verdict: cards, measured and planned costs, settings, provenance and links."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from launch.compare.comparison import ComparedPoint
from launch.compare.metric_meaning import monitored_metric
from launch.compare.run_files import RecordedRun, RunMeasurements
from launch.compare.run_page.held_out import MetricChange, best_step, card_changes, metric_changes
from strategies.errors import ShardtuneError
from trainer.pages.numbers import UNKNOWN, format_bytes, format_duration, format_number, format_percent
from trainer.pages.pieces import PageCard, PageCell, PageColumn, PageTable, Tone
from trainer.reporting.numbers import format_setting
from trainer.reporting.results import EVALUATION_REPORT, REVIEW_REPORT, kept_reports
from trainer.reporting.run_record import MeasuredCost, PredictedCost, Receipt

BYTES_PER_GIB = 2**30
NEARLY_FULL_SHARE = 0.92
"""Share of a card's memory from which on longer rows may not fit."""
CPU_DEVICE = "cpu"
PATH_KEYS = {"run.dir", "data.cache_dir"}
"""Settings that only say where files are: they are among all settings, and not among those that were chosen."""
RESOLVED_KEY_PREFIX = "substitutions."
"""How keys begin under which the run keeps what `auto` became."""


def run_cards(compared: ComparedPoint) -> list[PageCard]:
    """The cards at the head of a run's page: held-out metrics or the training loss, then duration, speed and memory.

    `compared`: the run as the only point of a comparison, which is how runs are measured. Numbers that are not known have
    no card.
    """
    run = compared.first_repeat
    measured = compared.measured
    # The few held-out metrics that get a card, with their values before and after training.
    metric_cards = [_metric_card(run, change) for change in card_changes(metric_changes(run))]
    if not metric_cards:
        metric_cards = _training_metric_cards(run)
    cost_cards = [_duration_card(run), _speed_card(run, measured), _memory_card(run, measured)]
    return [*metric_cards, *(card for card in cost_cards if card is not None)]


def _metric_card(run: RecordedRun, change: MetricChange) -> PageCard:
    """The card of a held-out metric: its value at the end, before training, and at the best step if that was better."""
    notes = []
    if change.value_before is not None:
        notes.append(f"before training {change.format_value(change.value_before)}")
    if change.judgement:
        notes.append(change.judgement)
    best = best_step(run)
    is_monitored = change.name == monitored_metric(run)
    if is_monitored and best is not None and not best.is_last_step_as_good and best.is_better_than_before_training:
        notes.append(f"best {change.format_value(best.value)} at step {best.step}")
    return PageCard(
        change.title,
        change.format_value(change.value_after),
        note=", ".join(notes),
        tone=change.tone,
        arrow=change.arrow,
    )


def _training_metric_cards(run: RecordedRun) -> list[PageCard]:
    """The card of the training loss, for a run without held-out metrics; no card if no step has a finite loss.

    A run that learns from rewards gets its reward instead: its loss is near 0 by construction. An arrow says whether the
    number rose or fell; it has no colour, because it does not measure quality.
    """
    metric = "reward" if any("reward" in row for row in run.steps.values()) else "loss"
    values = [row[metric] for row in run.steps.values() if isinstance(row.get(metric), int | float)]
    if not values:
        return []
    first_value = values[0] if len(values) > 1 else None
    note = "" if first_value is None else f"first step {format_number(first_value)}"
    change = MetricChange(metric, value_after=values[-1], value_before=first_value)
    return [PageCard(f"Training {metric}", format_number(values[-1]), note, tone="", arrow=change.arrow)]


def _duration_card(run: RecordedRun) -> PageCard | None:
    """The card of the time that all steps of the run took together; None if it was not recorded."""
    duration_s = sum(row.get("step_s") or 0.0 for row in run.steps.values())
    if not duration_s:
        return None
    num_steps = len(run.steps)
    note = f"{num_steps:,} step{'s' if num_steps != 1 else ''}, without start and evaluations"
    return PageCard("Duration", format_duration(duration_s), note)


def _speed_card(run: RecordedRun, measured: RunMeasurements) -> PageCard | None:
    """The card of the speed: tokens a second of all ranks, with the time of a step and the MFU; None if the speed is not known.

    The MFU is the share of the device's peak speed that the run reached.
    """
    if not measured.tokens_per_s:
        return None
    notes = []
    if measured.step_s:
        notes.append(f"{format_duration(measured.step_s)} a step")
    world_size = run.record.world_size
    if world_size:
        notes.append("1 rank" if world_size == 1 else f"{world_size} ranks together")
    # The MFU is a share of a peak. That of a CPU is measured while other programs may run, unless the settings give one.
    has_reliable_peak = run.record.device != CPU_DEVICE or run.config.get("logging.reference_tflops") is not None
    if measured.mfu is not None and has_reliable_peak:
        notes.append(f"MFU {format_percent(measured.mfu)}")
    return PageCard("Speed", format_number(measured.tokens_per_s, digits=3), ", ".join(notes), unit="tokens/s")


def _memory_card(run: RecordedRun, measured: RunMeasurements) -> PageCard | None:
    """The card of a rank's largest memory, on a GPU also as a share of the card's; None if it was not measured.

    A warning says if the card is nearly full. `measured`: the numbers of the run as a comparison has them.
    """
    if measured.memory_gib is None:
        return None
    # The plan knows the memory of the card; None without a plan.
    gpu_memory_gib = _predicted_cost(run).device_gib
    note = "largest peak of a rank"
    tone: Tone = ""
    if run.record.device == CPU_DEVICE:
        note += ", libraries included"
    elif gpu_memory_gib:  # only a card's memory is known to be the run's alone
        share = measured.memory_gib / gpu_memory_gib
        note = f"{format_percent(share)} of a card's {format_number(gpu_memory_gib, digits=3)} GiB"
        if share > NEARLY_FULL_SHARE:
            tone = "warning"
            note += ": longer rows may not fit"
    return PageCard("Memory", format_bytes(measured.memory_gib * BYTES_PER_GIB), note, tone)


def _predicted_cost(run: RecordedRun) -> PredictedCost:
    """What the plan at the start of the run predicted, as `run.json` recorded it; its fields are None without a plan."""
    receipt = run.record.receipt or Receipt()
    return receipt.predicted or PredictedCost()


def cost_table(compared: ComparedPoint) -> PageTable | None:
    """The table of what a run cost beside what was planned: a row for each cost that was measured, None if there is none.

    The receipt in `run.json` is what the run recorded of its plan and its costs. `compared`: the run as the only point of a
    comparison, which is how runs are measured.
    """
    run = compared.first_repeat
    measured = compared.measured
    predicted = _predicted_cost(run)
    measured_receipt = (run.record.receipt or Receipt()).measured or MeasuredCost()
    planned_memory_gib = predicted.memory_gib
    planned_step_s = predicted.step_s
    if run.record.device == CPU_DEVICE:
        # Not comparable: the measured memory has the process's libraries in it, and the plan knows no reliable peak of a CPU.
        planned_memory_gib = None
        planned_step_s = None
    planned_exchanged_bytes = _gib_to_bytes(measured.planned_exchanged_gib)
    exchanged_bytes = _gib_to_bytes(measured.exchanged_gib)
    memory_bytes = _gib_to_bytes(measured.memory_gib)
    rows = [
        _cost_row("Memory of a rank", format_bytes, memory_bytes, planned=_gib_to_bytes(planned_memory_gib)),
        _cost_row("Reserved by the allocator", format_bytes, _gib_to_bytes(measured.memory_reserved_gib)),
        _cost_row("Time of a step", format_duration, measured.step_s, planned=planned_step_s),
        _cost_row("Exchanged in a step, rank 0", format_bytes, exchanged_bytes, planned=planned_exchanged_bytes),
        _cost_row("Waited for the exchange in a step", format_duration, measured.exposed_s),
        _cost_row(
            "Size of a checkpoint",
            format_bytes,
            measured_receipt.checkpoint_bytes,
            planned=predicted.checkpoint_bytes,
        ),
        _cost_row("Writing a checkpoint", format_duration, measured.checkpoint_s),
        _cost_row("Start to first step, without evaluation", format_duration, measured.start_without_evaluation_s),
        _cost_row("Price of a million tokens, US$", format_number, compared.summary.dollars_per_million),
    ]
    columns = [PageColumn("what"), PageColumn("planned"), PageColumn("measured")]
    columns.append(PageColumn("measured / planned", note="1 is as planned, 2 twice as much"))
    measured_rows = [row for row in rows if row is not None]
    return PageTable(columns, measured_rows, "Measured against planned") if measured_rows else None


def _cost_row(
    title: str, format_value: Callable[[float], str], measured: float | None, *, planned: float | None = None
) -> list[PageCell] | None:
    """A row of the cost table: title, planned, measured, and measured / planned. None if the cost was not measured.

    `format_value`: writes a value with its unit. `planned`: None without a plan; the cells that need it are dashes then.
    """
    if not measured:
        return None
    planned_cell = ratio_cell = PageCell(UNKNOWN)
    if planned:
        planned_cell = PageCell(format_value(planned), sort_value=planned)
        ratio_cell = PageCell(f"{measured / planned:.2f}", sort_value=measured / planned)
    measured_cell = PageCell(format_value(measured), sort_value=measured)
    return [PageCell(title, sort_value=title), planned_cell, measured_cell, ratio_cell]


def _gib_to_bytes(gib: float | None) -> float | None:
    return None if gib is None else gib * BYTES_PER_GIB


@dataclass(frozen=True, slots=True)
class ShownSettings:
    """A run's settings as (key, value as on the command line): those that were chosen, and all."""

    chosen_settings: list[tuple[str, str]]
    all_settings: list[tuple[str, str]]


def run_settings(run: RecordedRun) -> ShownSettings:
    """List the settings of a run for its page: all of them, and those that somebody chose. Not chosen are settings that are

    - equal to their default,
    - paths that only say where files are,
    - what `auto` became,
    - or empty.

    If this version cannot read the run's `config.yaml`, none count as chosen.
    """
    # By dotted key, such as {"optim.lr": None}; empty if they are not known.
    defaults = _default_settings(run.directory)
    chosen = []
    all_settings = []
    for key, value in run.config.items():  # by dotted key, such as `optim.lr`
        all_settings.append((key, _value_on_command_line(value)))
        is_default = key in defaults and defaults[key] == value
        is_empty = value in (None, [], {})
        is_not_chosen = is_default or is_empty or key in PATH_KEYS or key.startswith(RESOLVED_KEY_PREFIX)
        if defaults and not is_not_chosen:
            chosen.append((key, _value_on_command_line(value)))
    return ShownSettings(chosen, all_settings)


def _value_on_command_line(value: Any) -> str:
    """A value as on the command line: true, 2e-4, [q_proj,v_proj], none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_value_on_command_line, value))}]"
    return format_setting(value)


def _default_settings(run_dir: Path) -> dict[str, Any]:
    """The defaults of a run's settings by dotted key, among which are those of the choices that it made, such as `tuning=lora`.

    Empty if its `config.yaml` is of another version or cannot be read.
    """
    from launch.config.frozen import load_frozen_config
    from trainer.config.resuming import default_settings

    try:
        return default_settings(load_frozen_config(run_dir / "config.yaml"))
    except (ShardtuneError, OSError, ValueError, TypeError):
        return {}


def provenance_rows(run: RecordedRun) -> list[tuple[str, str]]:
    """Say where a run comes from: (name, text) rows on data, method, batch, machine and versions.

    What was not recorded has no row. The batch reads `64 = 4 micro x 2 accumulation x 8 ranks`.
    """
    record = run.record
    methods = (record.strategy, record.tuning, record.objective, record.precision, record.attention)
    batch = ""
    if record.global_batch and record.micro_batch and record.accumulation and record.world_size:
        batch = f"{record.global_batch} = {record.micro_batch} micro x {record.accumulation} accumulation x "
        batch += record.dp_ranks_text
    # The parameters were counted when the sharding was measured on the model, so they stand in its record.
    parameters = ""
    if record.sharding.parameters:
        share = record.sharding.trainable_parameters / record.sharding.parameters
        parameters = f"{record.sharding.parameters:,}, trained {record.sharding.trainable_parameters:,} ({format_percent(share)})"
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


def run_links(run: RecordedRun) -> list[tuple[str, str]]:
    """The links to the pages and files about the run that exist: (text, relative URL), such as ("metrics", "metrics.jsonl")."""
    targets: list[tuple[str, Path]] = []
    if run.record.data_directory:
        targets.append(("audit of the data", Path(run.record.data_directory) / "audit.html"))
    targets.append(("evaluation", run.directory / "evaluation.html"))
    for kind, text in ((EVALUATION_REPORT, "newest evaluation report"), (REVIEW_REPORT, "review by people")):
        reports = kept_reports(run.directory, kind)  # the newest first
        if reports:
            targets.append((text, reports[0].path))
    targets += [
        ("model card", run.directory / "export" / "README.md"),
        ("metrics", run.directory / "metrics.jsonl"),
        ("run record", run.directory / "run.json"),
    ]
    return [(text, relative_address(run.directory, path)) for text, path in targets if path.is_file()]


def relative_address(run_dir: Path, path: Path) -> str:
    """The URL of a file in a link of the page in the run directory: `../data%20%231/audit.html`.

    It is relative, so that the page and the file can be moved together.
    """
    relative_path = os.path.relpath(path.absolute(), run_dir.absolute())
    return quote(relative_path.replace(os.sep, "/"))  # a `#` or `%` in a directory's name would lead elsewhere
