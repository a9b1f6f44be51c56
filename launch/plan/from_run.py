"""`shardtune plan from=<run directory>`: a plan calibrated by a finished run, from the receipt in its `run.json`.

The run is simulated as it ran. The ratios between its measured and its simulated steps, memory and checkpoints are
then applied to every way of the plan. What the receipt does not contain stays uncalibrated, and is named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from strategies.errors import ConfigError
from trainer.reporting.run_record import RUN_RECORD, MeasuredCost, RunRecord, read_run_record

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.planner.hardware import Card
    from trainer.planner.plan import Choice, PlanConfig


ALLOWING = "from."
"""Before a setting: it allows what the run of `from=` reaches out to."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A card, and in words what of it was measured by which run."""

    card: Card
    lines: tuple[str, ...] = ()


def calibrated(card: Card, run_dir: str, settings: PlanConfig, allowing: list[str], command: list[str]) -> Calibrated:
    """`card` with the figures of the run in `run_dir`, which is simulated. Raises ConfigError if it tells nothing of GPUs.

    `allowing`: words that allow what the run reaches out to. `command`: all words that were typed, for messages.
    """
    config, record, measured = _read(Path(run_dir).expanduser(), allowing, command)
    gpu = measured.device_name
    if gpu != card.name:
        raise ConfigError(f"from={run_dir}: it ran on {gpu or 'an unnamed GPU'}, and hardware names {card.name}")
    lines = []
    missing = []
    choice = _as_planned(config, record, card, settings)
    if isinstance(choice, str):
        missing.append(f"steps and tensors are reckoned as without it: {choice}")
    else:
        step_s = _positive(measured.step_s)
        if step_s is None:
            missing.append("it tells no time of a step")
        else:
            card = replace(card, pace=step_s / choice.step.total_s)
            seconds = f"{step_s:.3g} s, {choice.step.total_s:.3g} reckoned"
            lines.append(f"steps take {card.pace:.2f} x what is reckoned ({seconds})")
        peak_gib = _positive(measured.memory_gib)
        if peak_gib is not None:
            simulated_gib = choice.peak.total / 2**30
            # Its longest documents need not have come together: less is no proof that less is needed.
            card = replace(card, tensors=max(1.0, peak_gib / simulated_gib))
            peaks = f"{peak_gib:.2f} GiB at most, {simulated_gib:.2f} simulated"
            lines.append(f"tensors take {card.tensors:.2f} x what is simulated ({peaks})")
    allocator = _measured_allocator(measured)
    if allocator is None:
        missing.append("it tells no memory that the allocator reserved")
    else:
        card = replace(card, allocator=allocator)
        lines.append(f"the allocator reserves {allocator:.1%} beyond what is allocated")
    disk_gb_s = _measured_disk_gb_s(measured, config.launcher.nodes)
    if disk_gb_s is None:
        missing.append("it wrote no checkpoint")
    else:
        card = replace(card, disk_gb_s=disk_gb_s)
        lines.append(f"a node writes checkpoints at {disk_gb_s:.3g} GB/s")
    return Calibrated(
        card,
        (
            f"from {run_dir} ({record.strategy}, {record.world_size} x {gpu}):",
            *(f"  {line}" for line in lines),
            *(f"  not calibrated: {reason}" for reason in missing),
        ),
    )


def _measured_allocator(measured: MeasuredCost) -> float | None:
    """Share of what was allocated that the allocator reserved beyond it."""
    peak = _positive(measured.memory_gib)
    reserved = _positive(measured.memory_reserved_gib)
    if peak is None or reserved is None:
        return None
    return max(0.0, reserved / peak - 1)


def _measured_disk_gb_s(measured: MeasuredCost, nodes: int) -> float | None:
    """Rate at which a node wrote the checkpoint."""
    size_bytes = _positive(measured.checkpoint_bytes)
    seconds = _positive(measured.checkpoint_s)
    if size_bytes is None or seconds is None:
        return None
    return size_bytes / seconds / 1e9 / nodes


def _positive(measured: float | None) -> float | None:
    """What was measured; None if it was not, or is no amount."""
    return float(measured) if measured and measured > 0 else None


def _read(run_dir: Path, allowing: list[str], command: list[str]) -> tuple[RunConfig, RunRecord, MeasuredCost]:
    """(configuration, record, what was measured) of a run on GPUs."""
    from launch.config.read_run import ReadingVerb, read_run, uses_model_alone

    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"from={run_dir}: not a run directory (there is no config.yaml in it); name one of a run on GPUs"
        )
    config = read_run(run_dir, ReadingVerb(command, uses_model_alone, ALLOWING), allowing)
    try:
        record = read_run_record(run_dir)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"from={run_dir}: {run_dir / RUN_RECORD} cannot be read ({error}); name another run that took steps"
        ) from error
    if record.receipt is None or not record.device:
        raise ConfigError(f"from={run_dir}: {run_dir / RUN_RECORD} holds no receipt; name a run that took steps")
    if not record.device.startswith("cuda"):
        raise ConfigError(f"from={run_dir}: it ran on {record.device}; a plan of GPUs goes by runs on GPUs")
    if record.receipt.measured is None:
        raise ConfigError(f"from={run_dir}: it has measured nothing yet; name a run that has ended, in whatever way")
    return config, record, record.receipt.measured


def _as_planned(config: RunConfig, record: RunRecord, card: Card, settings: PlanConfig) -> Choice | str:
    """What would be planned for the run as it ran, or why that cannot be told."""
    from launch.plan.job import job_of
    from strategies.base import ActivationCheckpointing, Precision
    from trainer.config.run import Device
    from trainer.planner.plan import RunVariant, rank_choices
    from trainer.planner.sweep import simulate_variants

    if config.strategy.activation_checkpointing is ActivationCheckpointing.auto:
        return "its recomputation was chosen by its free memory (strategy.activation_checkpointing=auto); name a run that set it"
    # A foreign or damaged record may lack what the run was computed with.
    is_known = {
        "world_size": record.world_size > 0,
        "micro_batch": record.micro_batch > 0,
        "precision": record.precision in [*Precision],
    }
    missing = [key for key, known in is_known.items() if not known]
    if missing:
        return f"its {RUN_RECORD} does not say {', '.join(missing)}"
    launcher = replace(config.launcher, processes=record.world_size // config.launcher.nodes)
    config = replace(config, launcher=launcher, precision=Precision(record.precision))
    config.run.device = Device.cuda
    job = job_of(config, card)
    micro = record.micro_batch
    accumulation = 2 if job.global_batch > job.ranks * micro else 1
    variant = RunVariant(config, words=())
    (cost_model,) = simulate_variants([variant], job, accumulation, settings, lambda *_: None)
    if isinstance(cost_model, str):
        return cost_model
    return rank_choices(variant, cost_model, job, [micro])[0]
