"""`batch.micro=auto`: the largest micro-batch that fits in memory, chosen once and written into the run's configuration file.

The run's own step is simulated for every micro-batch. The largest that should fit is tried by two real steps of the
longest documents, on all ranks. If any rank runs out of memory, the next smaller one is tried. What a trial built is
built anew for the run, so that it takes the same steps as a run with a given micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from strategies.base import ActivationCheckpointing, Precision
from strategies.errors import DoesNotFit
from strategies.runtime import SIMULATED, Runtime, broadcast_object, gather_objects
from trainer.build.inputs import RunInputs
from trainer.config.parallel import samples_per_dp_rank
from trainer.config.run import AUTO, MICRO_BATCH_KEY, RunConfig, requested_micro_batch
from trainer.data.prepare import PreparedData
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import (
    TIMEOUT_SHARE,
    NotSimulated,
    call_in_process,
    single_step_config,
    why_not_simulated,
)
from trainer.planner.hardware import GIB, device_memory_fit, num_rank_groups
from trainer.planner.lengths import DocumentLengths, lengths_of_data, micro_batch_divisors
from trainer.planner.oom_probe import (
    PROBE_STEPS,
    ProbeDescription,
    available_device_gib,
    probe_runs_out_of_memory,
)
from trainer.planner.rank_devices import DeviceMemory, RankCounts
from trainer.reporting.resolution import OutOfMemoryTrial, ResolvedSetting

FIRST_MICRO_BATCH_IF_UNPLANNED = 4
"""Micro-batch that is tried first if the step cannot be simulated."""


class MicroBatchProposal(NamedTuple):
    """A micro-batch that should fit, before any real step was taken with it."""

    micro_batch: int
    """Documents in each forward pass."""
    reason: str
    """Such as `planned 12.30 of 79.10 GiB`."""


def resolve_micro_batch(
    config: RunConfig, inputs: RunInputs, announce: Callable[[str], None], write_config: Callable[[RunConfig], None]
) -> RunConfig:
    """Resolve `batch.micro=auto`: choose the largest micro-batch that fits in memory. All ranks must call.

    - The user's own number stays.
    - An earlier start's choice stays, if it divides the samples that a data-parallel rank takes in a step.
    - Else rank 0 proposes a micro-batch by simulation, and all ranks try it by real steps, then the next smaller divisor each
      time memory runs out. `write_config` writes the choice to the run directory, so that a later start takes the same one.

    `announce` prints a line for the user. All ranks follow rank 0, which may have read an earlier start's choice. Raises
    DoesNotFit on every rank if not even the smallest fits, or if some ranks run out of memory and others do not.
    """
    runtime = inputs.runtime
    batch, earlier_resolution = broadcast_object((config.batch, config.resolution(MICRO_BATCH_KEY)), runtime)
    config = _with_micro_batch(config, batch["micro"], earlier_resolution)
    dp_rank_samples = samples_per_dp_rank(config, runtime.world_size)
    if batch["micro"] != AUTO:
        is_users_choice = requested_micro_batch(batch, config.substitutions) != AUTO
        # An earlier start's choice may not divide the samples of a rank, if this start has another number of ranks.
        if is_users_choice or dp_rank_samples % batch["micro"] == 0:
            return config

    # Rank 0 simulates a step. All ranks take the same micro-batch, so the smallest device decides.
    announce("choosing the micro-batch (batch.micro=auto): simulating a step")
    least_gib = min(gather_objects(available_device_gib(runtime), runtime))
    own_proposal: MicroBatchProposal | None = None
    if runtime.is_main:
        own_proposal = propose_micro_batch(
            config,
            inputs.data,
            inputs.precision,
            RankCounts.of_job(runtime),
            DeviceMemory(runtime.kind, least_gib),
            timeout_s=TIMEOUT_SHARE * runtime.timeout_s,
        )
    micro_batch, plan_summary = broadcast_object(own_proposal, runtime)

    # The simulation may be too optimistic: try real steps, with a smaller micro-batch each time they run out of memory.
    failed_trials: list[OutOfMemoryTrial] = []
    while probe_runs_out_of_memory(
        _with_micro_batch(config, micro_batch, note=None), inputs, _trial_description(micro_batch)
    ):
        failed_trials.append(OutOfMemoryTrial(micro_batch))
        smaller_micro_batches = [divisor for divisor in micro_batch_divisors(dp_rank_samples) if divisor < micro_batch]
        if not smaller_micro_batches:
            raise DoesNotFit(
                f"batch.micro=auto: a step of one document in each forward pass runs out of memory ({plan_summary}); shorten "
                "them (data.max_length), recompute (strategy.activation_checkpointing=full), shard more or take "
                "tuning=lora; `shardtune plan` compares them"
            )
        announce(f"batch.micro={micro_batch} runs out of memory; trying {smaller_micro_batches[-1]}")
        micro_batch = smaller_micro_batches[-1]
    reason = f"{plan_summary}; {PROBE_STEPS} steps of the longest documents held"
    resolved_config = _with_micro_batch(
        config, micro_batch, ResolvedSetting(MICRO_BATCH_KEY, AUTO, micro_batch, reason, tuple(failed_trials))
    )
    write_config(resolved_config)
    return resolved_config


def with_proposed_micro_batch(config: RunConfig, prepared: PreparedData) -> RunConfig:
    """Give a configuration with `batch.micro=auto` the micro-batch that would be tried first on devices like those of this host.

    For commands that show a run before it starts, when there are no ranks yet: a step is simulated, and no real step is taken.

    - A configuration whose micro-batch is a number is returned as it is.
    - For GPUs, on a host without any, the micro-batch is 1, with a note that the real choice is made on the host with the GPUs.
    - Else it is the proposal of `propose_micro_batch`, with its reason.
    """
    if config.batch["micro"] != AUTO:
        return config
    device_kind = str(config.run.device)
    if device_kind == "cuda" and not torch.cuda.is_available():
        # Nothing is chosen, so that the run itself will choose: a text, and no `ResolvedSetting`.
        note = f"{AUTO} -> as memory allows, on the host with the GPUs; the figures here are for 1"
        return _with_micro_batch(config, 1, note)
    runtime = runtime_of_first_rank(config)  # as it would be; no process group is formed
    micro_batch, plan_summary = propose_micro_batch(
        config,
        prepared,
        config.precision,
        RankCounts.of_job(runtime),
        DeviceMemory(runtime.kind, available_device_gib(runtime)),
        timeout_s=TIMEOUT_SHARE * config.run.timeout_s,
    )
    reason = f"{plan_summary}; {PROBE_STEPS} steps of the longest documents will be tried"
    return _with_micro_batch(config, micro_batch, ResolvedSetting(MICRO_BATCH_KEY, AUTO, micro_batch, reason))


def _trial_description(micro_batch: int) -> ProbeDescription:
    """The trial of a micro-batch, as the messages of the trial name it."""
    return ProbeDescription(
        MICRO_BATCH_KEY, f"{micro_batch} documents in each forward pass", "give batch.micro a smaller number"
    )


def _with_micro_batch(config: RunConfig, micro_batch: Any, note: ResolvedSetting | str | None) -> RunConfig:
    """Set `batch.micro` of a run, and record why it is not what the user gave (`note`); None removes an earlier reason.

    `note`: a `ResolvedSetting` is a choice that a later start takes again; a text is a placeholder for one that is made
    elsewhere.
    """
    # By setting: what was set in place of what the user gave, and why.
    substitutions = dict(config.substitutions)
    substitutions.pop(MICRO_BATCH_KEY, None)
    if note:
        substitutions[MICRO_BATCH_KEY] = note
    return replace(config, batch={**config.batch, "micro": micro_batch}, substitutions=substitutions)


def runtime_of_first_rank(config: RunConfig) -> Runtime:
    """Make the runtime that rank 0 of the configured job would have, to plan for it before any job is started."""
    ranks_per_host = config.launcher.per_node
    # `control_group=None`: no collective may be called.
    return Runtime(
        rank=0,
        world_size=ranks_per_host * config.launcher.nodes,
        local_rank=0,
        local_world_size=ranks_per_host,
        device=torch.device("cuda" if str(config.run.device) == "cuda" else "cpu"),
        control_group=None,
    )


def recomputation_modes(requested: ActivationCheckpointing) -> tuple[ActivationCheckpointing, ...]:
    """Modes to plan with, in the order in which they are tried. `auto` recomputes only if nothing fits without."""
    if requested is ActivationCheckpointing.auto:
        return ActivationCheckpointing.none, ActivationCheckpointing.full
    return (requested,)


def propose_micro_batch(
    config: RunConfig,
    prepared: PreparedData,
    precision: Precision,
    rank_counts: RankCounts,
    device: DeviceMemory,
    timeout_s: float,
) -> MicroBatchProposal:
    """Propose the largest micro-batch that fits according to a simulated step, for `batch.micro=auto`. No real step is taken.

    A step is simulated with each mode of recomputation that is open, none first, until one of these cases ends the search:

    - the step cannot be simulated: the largest micro-batch up to `FIRST_MICRO_BATCH_IF_UNPLANNED`;
    - the model is right for one row at a time only: 1;
    - some micro-batch fits: the largest that does.

    If none fits with any mode, 1 is proposed. `device`: the smallest of the ranks'. `timeout_s`: how long one simulation may
    take.
    """
    lengths = lengths_of_data(config, prepared.train)
    micro_batches = micro_batch_divisors(samples_per_dp_rank(config, rank_counts.world_size))
    reason = ""
    for mode in recomputation_modes(config.strategy.activation_checkpointing):
        # With one document in a micro-batch: the cost model holds for all sizes.
        config_of_mode = single_step_config(
            _with_micro_batch(config, 1, note=None), rank_counts.world_size, mode_if_auto=mode
        )
        config_of_mode = replace(config_of_mode, precision=precision)
        cost_model = simulate_cost_model_in_process(config_of_mode, lengths, rank_counts, device.kind, timeout_s)
        if isinstance(cost_model, NotSimulated):
            first_tried = max(
                micro_batch for micro_batch in micro_batches if micro_batch <= FIRST_MICRO_BATCH_IF_UNPLANNED
            )
            return MicroBatchProposal(first_tried, f"not planned: {cost_model.reason}")
        if cost_model.needs_single_rows:
            return MicroBatchProposal(1, "the model is right for one document at a time only")
        largest = _largest_fitting(cost_model, micro_batches, lengths, device.available_gib)
        planned_gib = needed_device_gib(cost_model, largest or 1, lengths, device.available_gib)
        reason = f"planned {planned_gib:.2f} of {device.available_gib:.2f} GiB"
        if largest is not None:
            return MicroBatchProposal(largest, reason)
    return MicroBatchProposal(1, reason)  # the reason of the last mode, which recomputes most


def _largest_fitting(
    cost_model: CostModel, micro_batches: list[int], lengths: DocumentLengths, available_gib: float
) -> int | None:
    """The largest of the micro-batches whose step fits in a device of `available_gib` GiB; None if none fits.

    `cost_model`: memory of the step at any micro-batch. `lengths`: of the run's documents, of which the longest count.
    """
    fitting = [
        micro_batch
        for micro_batch in micro_batches
        if needed_device_gib(cost_model, micro_batch, lengths, available_gib) <= available_gib
    ]
    return max(fitting, default=None)


def needed_device_gib(cost_model: CostModel, micro_batch: int, lengths: DocumentLengths, available_gib: float) -> float:
    """GiB of device memory that a rank needs for micro-batches of the `micro_batch` longest documents, libraries included.

    `cost_model`: memory of the step at any micro-batch. `available_gib`: memory of the device.
    """
    num_rows_or_tokens = lengths.size_of_longest(micro_batch, in_rows=cost_model.size_is_in_rows)
    live_bytes = cost_model.memory_peak_at(num_rows_or_tokens).total_bytes
    return device_memory_fit(live_bytes, num_rank_groups(cost_model), available_gib).needed_bytes / GIB


def simulate_cost_model_in_process(
    config: RunConfig, lengths: DocumentLengths, rank_counts: RankCounts, device_kind: str, timeout_s: float
) -> CostModel | NotSimulated:
    """Simulate a rank's step of the longest documents in a new process: its memory and work at any micro-batch.

    Returns why it cannot be simulated if that fails. `config`: with a micro-batch of one document, and a step of at most two of
    them. `device_kind`: `cuda` or `cpu`. `timeout_s`: how long the simulation may take.
    """
    longest_sequence = int(lengths.longest[0]) // lengths.sequences_per_sample
    arguments = (config, longest_sequence, rank_counts, device_kind)
    cost_model: CostModel | NotSimulated = call_in_process(_simulate_cost_model, arguments, timeout_s)
    return cost_model


def _simulate_cost_model(
    config: RunConfig, length: int, rank_counts: RankCounts, device_kind: str
) -> CostModel | NotSimulated:
    """Simulate a rank's step, in a process that is part of no job: its memory and work at any micro-batch, or why that failed.

    `length`: tokens of each sequence. `device_kind`: `cuda` or `cpu`.
    """
    from trainer.planner.simulation import simulate_cost_model_of_run

    try:
        return simulate_cost_model_of_run(
            config,
            length,
            accumulation=samples_per_dp_rank(config, rank_counts.world_size),
            world_size=rank_counts.world_size,
            local_world_size=rank_counts.ranks_per_host,
            device=SIMULATED if device_kind == "cuda" else torch.device("cpu"),
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that is an answer
        return NotSimulated(f"its step {why_not_simulated(error)}")
