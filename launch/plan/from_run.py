"""`shardtune plan from=<run directory>`: a plan calibrated by a finished run, from the receipt in its `run.json`.

The run is simulated as it ran. The ratios between its measured and its simulated steps, memory and checkpoints are
then applied to every option of the plan. What the receipt does not contain stays uncalibrated, and is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from strategies.errors import ConfigError
from trainer.build.rounds import num_prompts_per_round
from trainer.objectives.registry import max_generated_tokens
from trainer.reporting.metric_rows import METRICS_FILE, read_rows
from trainer.reporting.run_record import RUN_RECORD, MeasuredCost, RunRecord, read_run_record

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.planner.fit_check import NotSimulated
    from trainer.planner.hardware import Card
    from trainer.planner.plan import MeasuredImbalance, PlannedChoice
    from trainer.planner.variants import PlanConfig


PERMISSION_PREFIX = "from."
"""Prefix of command-line settings that allow the run of `from=` to use files or hosts outside of its directory."""


@dataclass(frozen=True, slots=True)
class CalibratedCard:
    """A card with figures that a run has measured."""

    card: Card
    expert_imbalance: MeasuredImbalance | None = None
    """How unevenly its expert ranks were chosen; None if the run did not distribute experts."""
    lines: tuple[str, ...] = ()
    """What was measured by which run, and what could not be; empty for a card as its file says."""


def calibrate_card(
    card: Card, run_dir: str, settings: PlanConfig, permissions: list[str], command: list[str]
) -> CalibratedCard:
    """Correct the figures of a GPU ("card") by a run on such GPUs, so that a plan predicts what is measured there.

    The run in `run_dir` is simulated as it ran. How much longer its steps took than predicted, and so on, then applies to every
    option of the plan. `permissions`: settings that allow the run to use something outside of its directory, such as
    "model.trust_remote_code=true". `command`: the command line, for messages. `settings`: those of the planner.
    Raises ConfigError if the run was not on this card, or measured nothing.
    """
    from trainer.planner.fit_check import NotSimulated

    config, record, measured = _read_measured_run(Path(run_dir).expanduser(), permissions, command)
    gpu = measured.device_name
    if gpu != card.name:
        raise ConfigError(f"from={run_dir}: it ran on {gpu or 'an unnamed GPU'}, and hardware names {card.name}")
    calibration = _Calibration(card)
    expert_imbalance = _measured_imbalance(record, config.parallel.experts)
    if expert_imbalance is not None:
        calibration.lines.append(
            f"the busiest rank's experts got {expert_imbalance.busiest_over_mean:.2f} x the mean of tokens, in the least even "
            f"layer, with parallel.experts={expert_imbalance.expert_ranks}"
        )
    choice = _planned_choice_of_run(config, record, card, settings, expert_imbalance)
    if isinstance(choice, NotSimulated):
        calibration.uncalibrated_reasons.append(f"steps and tensors are estimated as without it: {choice.reason}")
    else:
        calibration.take_step_time(_positive_or_none(measured.step_s), choice.step_time.total_s)
        calibration.take_peak_memory(_positive_or_none(measured.memory_gib), choice.memory_peak.total_bytes / 2**30)
        if choice.round_time is not None:
            calibration.take_rounds(
                _measured_rounds(Path(run_dir).expanduser()), config, choice.round_time.generation_s
            )
    calibration.take_allocator_share(_measured_allocator_share(measured))
    calibration.take_disk_rate(_measured_disk_gb_s(measured, config.launcher.nodes))

    heading = f"from {run_dir} ({record.strategy}, {record.world_size} x {gpu}):"
    calibrated_lines = [f"  {line}" for line in calibration.lines]
    uncalibrated_lines = [f"  not calibrated: {reason}" for reason in calibration.uncalibrated_reasons]
    return CalibratedCard(calibration.card, expert_imbalance, (heading, *calibrated_lines, *uncalibrated_lines))


@dataclass(slots=True)
class _Calibration:
    """A card that takes over what a run has measured, figure after figure, with a line for the user on each."""

    card: Card
    lines: list[str] = field(default_factory=list)
    """What was measured, over what is estimated."""
    uncalibrated_reasons: list[str] = field(default_factory=list)
    """What the run did not measure, so that the card's own figure stays."""

    def take_step_time(self, measured_s: float | None, estimated_s: float) -> None:
        """Take over how long steps really took: sets `card.pace`, by which all estimates of a step are multiplied.

        `measured_s` is None if the run tells no time of a step.
        """
        if measured_s is None:
            self.uncalibrated_reasons.append("it tells no time of a step")
            return
        self.card = replace(self.card, pace=measured_s / estimated_s)
        self.lines.append(
            f"steps take {self.card.pace:.2f} x the estimate ({measured_s:.3g} s, {estimated_s:.3g} estimated)"
        )

    def take_peak_memory(self, measured_gib: float | None, simulated_gib: float) -> None:
        """Take over how much memory tensors really took: sets `card.tensors`, a factor of at least 1 on simulated bytes.

        Nothing is done if no peak was measured.
        """
        if measured_gib is None:
            return
        # Its longest documents need not have met in one micro-batch: a smaller peak is no proof that less is needed.
        self.card = replace(self.card, tensors=max(1.0, measured_gib / simulated_gib))
        peaks = f"{measured_gib:.2f} GiB at most, {simulated_gib:.2f} simulated"
        self.lines.append(f"tensors take {self.card.tensors:.2f} x what is simulated ({peaks})")

    def take_rounds(self, rounds: _MeasuredRounds | None, config: RunConfig, estimated_generation_s: float) -> None:
        """Take over how long the run's rounds of reinforcement learning took: writing answers, and scoring each.

        Sets `card.writing_pace`, by which estimates of writing are multiplied, and `card.scoring_s`.
        `estimated_generation_s`: the estimate for answers that are all as long as allowed; those of the run were shorter, so
        it is scaled by their length.
        """
        if rounds is None:
            self.uncalibrated_reasons.append(
                "it has written no round after its first, so writing is estimated as without it"
            )
            return
        estimated_s = estimated_generation_s * rounds.longest_answer / max_generated_tokens(config.objective)
        answers = num_prompts_per_round(config) * int(getattr(config.objective, "group_size", 1))
        self.card = replace(
            self.card, writing_pace=rounds.generation_s / estimated_s, scoring_s=rounds.scoring_s / answers
        )
        self.lines.append(
            f"writing takes {self.card.writing_pace:.2f} x the estimate ({rounds.generation_s:.3g} s a round whose "
            f"longest answer has {rounds.longest_answer:.0f} tokens, {estimated_s:.3g} estimated), and rewards "
            f"{rounds.scoring_s:.3g} s a round"
        )

    def take_allocator_share(self, share: float | None) -> None:
        """Take over what torch's allocator reserved beyond what was allocated, as a share of the latter (`card.allocator`)."""
        if share is None:
            self.uncalibrated_reasons.append("it tells no memory that the allocator reserved")
            return
        self.card = replace(self.card, allocator=share)
        self.lines.append(f"the allocator reserves {share:.1%} beyond what is allocated")

    def take_disk_rate(self, disk_gb_s: float | None) -> None:
        """Take over the rate at which a node wrote checkpoints, in GB/s (`card.disk_gb_s`); None if none was written."""
        if disk_gb_s is None:
            self.uncalibrated_reasons.append("it wrote no checkpoint")
            return
        self.card = replace(self.card, disk_gb_s=disk_gb_s)
        self.lines.append(f"a node writes checkpoints at {disk_gb_s:.3g} GB/s")


def _measured_imbalance(record: RunRecord, expert_ranks: int) -> MeasuredImbalance | None:
    """How unevenly tokens were spread over groups of `expert_ranks` ranks, in the least even layer; None if not recorded."""
    from trainer.planner.plan import MeasuredImbalance

    if record.outcome is None:
        return None
    imbalance_by_layer = [_positive_or_none(layer.get("rank_max_over_mean")) for layer in record.outcome.experts]
    known_imbalances = [imbalance for imbalance in imbalance_by_layer if imbalance is not None]
    return MeasuredImbalance(max(known_imbalances), expert_ranks) if known_imbalances else None


@dataclass(frozen=True, slots=True)
class _MeasuredRounds:
    """What the rounds of a run took (answers generated and scored), medians of all but the first."""

    generation_s: float
    scoring_s: float
    longest_answer: float
    """Tokens of the longest answer of a round: the others wait for it."""


def _measured_rounds(run_dir: Path) -> _MeasuredRounds | None:
    """Measure a run's rounds of reinforcement learning by its `metrics.jsonl`: seconds of writing and scoring answers.

    Medians over all rounds but the first. None if there are none that have all metrics, or if the median time of writing or
    the median length is 0.
    """
    needed_metrics = {"write_s", "reward_s", "completions/max_length"}
    metrics_of_rounds = [row for row in read_rows(run_dir / METRICS_FILE).rows if row.keys() >= needed_metrics]
    # The first round also holds what libraries set up when a model is first called.
    later_rounds = metrics_of_rounds[1:]
    if not later_rounds:
        return None
    generation_s = _median_of_metric(later_rounds, "write_s")
    longest_answer = _median_of_metric(later_rounds, "completions/max_length")
    if generation_s <= 0 or longest_answer <= 0:
        return None
    scoring_s = _median_of_metric(later_rounds, "reward_s")
    return _MeasuredRounds(generation_s=generation_s, scoring_s=scoring_s, longest_answer=longest_answer)


def _median_of_metric(metrics_of_rounds: list[dict[str, Any]], name: str) -> float:
    """The median of the metric `name` over some rounds, all of which have it."""
    return float(median(metrics[name] for metrics in metrics_of_rounds))


def _measured_allocator_share(measured: MeasuredCost) -> float | None:
    """What the allocator reserved beyond what was allocated, as a share of the latter; None if it was not measured."""
    peak_gib = _positive_or_none(measured.memory_gib)
    reserved_gib = _positive_or_none(measured.memory_reserved_gib)
    if peak_gib is None or reserved_gib is None:
        return None
    return max(0.0, reserved_gib / peak_gib - 1)


def _measured_disk_gb_s(measured: MeasuredCost, nodes: int) -> float | None:
    """GB/s at which one of the nodes wrote its part of the last checkpoint; None if none was written."""
    checkpoint_bytes = _positive_or_none(measured.checkpoint_bytes)
    checkpoint_s = _positive_or_none(measured.checkpoint_s)
    if checkpoint_bytes is None or checkpoint_s is None:
        return None
    return checkpoint_bytes / checkpoint_s / 1e9 / nodes


def _positive_or_none(measured: float | None) -> float | None:
    """A measured figure; None if it was not measured, or is not above 0 and so cannot be one."""
    return float(measured) if measured and measured > 0 else None


class _MeasuredRun(NamedTuple):
    """A run on GPUs that has measured what it takes."""

    config: RunConfig
    record: RunRecord
    """Its `run.json`."""
    measured: MeasuredCost
    """What it measured: memory, seconds of a step, checkpoints."""


def _read_measured_run(run_dir: Path, permissions: list[str], command: list[str]) -> _MeasuredRun:
    """Read the run of `from=`: its settings, its record, and what it measured. It must have run on GPUs.

    Raises ConfigError if it has not, if it cannot be read, or if `run.json` has no receipt (predicted and measured cost) or
    one without measurements. `permissions`: settings that allow what the run uses outside of its directory. `command`: the
    command line, for messages.
    """
    from launch.config.read_run import RunReader, read_run, uses_model_alone

    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"from={run_dir}: not a run directory (there is no config.yaml in it); name one of a run on GPUs"
        )
    config = read_run(run_dir, RunReader(command, uses_model_alone, PERMISSION_PREFIX), permissions)
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
    return _MeasuredRun(config, record, record.receipt.measured)


def _planned_choice_of_run(
    config: RunConfig, record: RunRecord, card: Card, settings: PlanConfig, expert_imbalance: MeasuredImbalance | None
) -> PlannedChoice | NotSimulated:
    """Predict a run that has ended, with the settings, ranks and micro-batch that it had, to compare with what it measured.

    If that cannot be simulated, returns why, as a clause for a message: "its run.json does not say world_size".
    """
    from launch.plan.job import prepare_planned_job
    from strategies.base import ActivationCheckpointing, Precision
    from trainer.config.parallel import dp_size_of
    from trainer.config.run import Device
    from trainer.planner.fit_check import NotSimulated
    from trainer.planner.plan import plan_choices, with_imbalance
    from trainer.planner.sweep import simulate_variants
    from trainer.planner.variants import RunVariant

    if config.strategy.activation_checkpointing is ActivationCheckpointing.auto:
        return NotSimulated(
            "its recomputation was chosen by its free memory (strategy.activation_checkpointing=auto); name a run that set it"
        )
    # A record that is damaged or not ours may lack what the run was computed with.
    missing_keys = []
    if record.world_size <= 0:
        missing_keys.append("world_size")
    if record.micro_batch <= 0:
        missing_keys.append("micro_batch")
    if record.precision not in [*Precision]:
        missing_keys.append("precision")
    if missing_keys:
        return NotSimulated(f"its {RUN_RECORD} does not say {', '.join(missing_keys)}")
    launcher = replace(config.launcher, processes=record.world_size // config.launcher.nodes)
    config = replace(
        config,
        launcher=launcher,
        precision=Precision(record.precision),
        run=replace(config.run, device=Device.cuda),  # this machine may have no GPU
    )
    job = with_imbalance(prepare_planned_job(config, card), settings, expert_imbalance)
    has_several_micro_batches = job.global_batch > dp_size_of(config, job.world_size) * record.micro_batch
    accumulation = 2 if has_several_micro_batches else 1  # two tell the last micro-batch from the others
    variant = RunVariant(config, overrides=())
    # One variant, one micro-batch: one choice.
    (cost_model,) = simulate_variants([variant], job, [accumulation], settings, lambda *_: None)
    if isinstance(cost_model, NotSimulated):
        return cost_model
    (choice,) = plan_choices(variant, cost_model, job, [record.micro_batch])
    return choice
