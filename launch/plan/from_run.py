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
    said: tuple[str, ...] = ()


def calibrated(card: Card, run_dir: str, settings: PlanConfig, allowing: list[str], command: list[str]) -> Calibrated:
    """`card` with the figures of the run in `run_dir`, which is simulated. Raises ConfigError where it tells nothing of GPUs.

    `allowing`: words that allow what the run reaches out to. `command`: all words that were typed, for messages.
    """
    config, record, took = _read(Path(run_dir).expanduser(), allowing, command)
    named = took.device_name
    if named != card.name:
        raise ConfigError(f"from={run_dir}: it ran on {named or 'an unnamed GPU'}, and hardware names {card.name}")
    said, lacks = [f"from {run_dir} ({record.strategy}, {record.world_size} x {named}):"], []
    choice = _as_planned(config, record, card, settings)
    if isinstance(choice, str):
        lacks.append(f"steps and tensors are reckoned as without it: {choice}")
    else:
        if step_s := _positive(took.step_s):
            card = replace(card, pace=step_s / choice.step.total_s)
            said.append(
                f"steps take {card.pace:.2f} x what is reckoned ({step_s:.3g} s, {choice.step.total_s:.3g} reckoned)"
            )
        else:
            lacks.append("it tells no time of a step")
        if peak := _positive(took.memory_gib):
            simulated = choice.taken.total / 2**30
            # Its longest documents need not have come together: less is no proof that less is needed.
            card = replace(card, tensors=max(1.0, peak / simulated))
            said.append(
                f"tensors take {card.tensors:.2f} x what is simulated ({peak:.2f} GiB at most, {simulated:.2f} simulated)"
            )
    card, of_memory, of_disk = _beside(card, took, config.launcher.nodes)
    said += [*of_memory, *of_disk]
    if not of_memory:
        lacks.append("it tells no memory that the allocator reserved")
    if not of_disk:
        lacks.append("it wrote no checkpoint")
    return Calibrated(
        card, (said[0], *(f"  {one}" for one in said[1:]), *(f"  not calibrated: {one}" for one in lacks))
    )


def _beside(card: Card, took: MeasuredCost, nodes: int) -> tuple[Card, list[str], list[str]]:
    """The card with the run's allocator and disk, and what is said of either."""
    of_memory, of_disk = [], []
    peak, reserved = _positive(took.memory_gib), _positive(took.memory_reserved_gib)
    if peak and reserved:
        card = replace(card, allocator=max(0.0, reserved / peak - 1))
        of_memory.append(f"the allocator reserves {card.allocator:.1%} beyond what is allocated")
    size, seconds = _positive(took.checkpoint_bytes), _positive(took.checkpoint_s)
    if size and seconds:
        card = replace(card, disk_gb_s=size / seconds / 1e9 / nodes)
        of_disk.append(f"a node writes checkpoints at {card.disk_gb_s:.3g} GB/s")
    return card, of_memory, of_disk


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
    from trainer.planner.plan import Way, choices
    from trainer.planner.sweep import simulate_ways

    if config.strategy.activation_checkpointing is ActivationCheckpointing.auto:
        return "its recomputation was chosen by its free memory (strategy.activation_checkpointing=auto); name a run that set it"
    # A foreign or damaged record may lack what the run was computed with.
    is_known = {
        "world_size": record.world_size > 0,
        "micro_batch": record.micro_batch > 0,
        "precision": record.precision in [*Precision],
    }
    if missing := [key for key, known in is_known.items() if not known]:
        return f"its {RUN_RECORD} does not say {', '.join(missing)}"
    world, nodes, micro = record.world_size, config.launcher.nodes, record.micro_batch
    launcher = replace(config.launcher, processes=world // nodes)
    config = replace(config, launcher=launcher, precision=Precision(record.precision))
    config.run.device = Device.cuda
    job = job_of(config, card)
    accumulation = 2 if job.global_batch > job.world * micro else 1
    way = Way(config, ())
    (form,) = simulate_ways([way], job, accumulation, settings, lambda *_: None)
    return form if isinstance(form, str) else choices(way, form, job, [micro])[0]
