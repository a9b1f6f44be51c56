"""`batch.micro=auto`: the largest micro-batch that fits in memory, chosen once and frozen into the configuration.

The run's own step is simulated for every micro-batch. The largest that should fit is tried by two real steps of the
longest documents, on all ranks. If any rank runs out of memory, the next smaller one is tried. What a trial built is
built anew for the run, so that it takes the same steps as a run with a given micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, Precision
from strategies.errors import DoesNotFit
from strategies.runtime import SIMULATED, Runtime, broadcast_object, gather_objects
from trainer.config.parallel import samples_per_dp_rank
from trainer.config.run import AUTO, MICRO_BATCH_KEY, RunConfig, requested_micro_batch
from trainer.data.prepare import PreparedData
from trainer.objectives.registry import data_spec_of
from trainer.planner.cost_model import CostModel
from trainer.planner.fit_check import TIMEOUT_SHARE, call_in_process, single_step_config, why_not_simulated
from trainer.planner.hardware import GIB, fit_in_memory, group_count
from trainer.planner.lengths import DocumentLengths, divisors, sampled_lengths
from trainer.planner.oom_probe import PROBE_STEPS, TrialDescription, TrialInputs, memory_gib, runs_out_of_memory
from trainer.reporting.resolution import OutOfMemoryTrial, Resolution

UNPLANNED_MICRO = 4
"""Micro-batch that is tried first if the step cannot be simulated."""


def resolve_micro_batch(
    config: RunConfig, inputs: TrialInputs, announce: Callable[[str], None], freeze: Callable[[RunConfig], None]
) -> RunConfig:
    """Resolve `batch.micro=auto`: choose the largest micro-batch that fits in memory. Any other number stays.

    `announce` prints a line for the user. `freeze` writes the choice to the run directory, so that a later start takes the same
    one. All ranks must call; they follow rank 0, which may have read an earlier start's choice. Raises DoesNotFit on every rank
    if not even the smallest fits, or if some ranks run out of memory and others do not.
    """
    runtime = inputs.runtime
    batch, earlier_resolution = broadcast_object((config.batch, config.resolution(MICRO_BATCH_KEY)), runtime)
    config = _with_micro(config, batch["micro"], earlier_resolution)
    samples = samples_per_dp_rank(config, runtime.world_size)
    if batch["micro"] != AUTO:
        # The user's own number stays. An earlier start's choice stays if it divides each reader's samples: their number differs
        # if this start has another number of ranks.
        is_users_choice = requested_micro_batch(batch, config.substitutions) != AUTO
        if is_users_choice or samples % batch["micro"] == 0:
            return config

    # Rank 0 simulates a step. All ranks take the same micro-batch, so the smallest device decides.
    announce("choosing the micro-batch (batch.micro=auto): simulating a step")
    least_gib = min(gather_objects(memory_gib(runtime), runtime))
    proposal: tuple[int, str] = (0, "")
    if runtime.is_main:
        ranks = runtime.world_size, runtime.local_world_size
        timeout_s = TIMEOUT_SHARE * runtime.timeout_s
        proposal = propose_micro(config, inputs.data, inputs.precision, ranks, (runtime.kind, least_gib), timeout_s)
    micro, plan_summary = broadcast_object(proposal, runtime)

    # The simulation may be too optimistic: try real steps, with a smaller micro-batch each time they run out of memory.
    failed_trials: list[OutOfMemoryTrial] = []
    while runs_out_of_memory(_with_micro(config, micro, None), inputs, _trial_of(micro)):
        failed_trials.append(OutOfMemoryTrial(micro))
        smaller_micros = [divisor for divisor in divisors(samples) if divisor < micro]
        if not smaller_micros:
            raise DoesNotFit(
                f"batch.micro=auto: a step of one document in each forward pass runs out of memory ({plan_summary}); shorten "
                "them (data.max_length), recompute (strategy.activation_checkpointing=full), shard more or take "
                "tuning=lora; `shardtune plan` compares them"
            )
        announce(f"batch.micro={micro} runs out of memory; trying {smaller_micros[-1]}")
        micro = smaller_micros[-1]
    reason = f"{plan_summary}; {PROBE_STEPS} steps of the longest documents held"
    resolved_config = _with_micro(config, micro, Resolution(MICRO_BATCH_KEY, AUTO, micro, reason, tuple(failed_trials)))
    freeze(resolved_config)
    return resolved_config


def preview_micro(config: RunConfig, prepared: PreparedData) -> RunConfig:
    """The run with the micro-batch that `auto` would try first on devices like those of this host. Nothing is tried.

    For commands that show a run before it starts, when there are no ranks yet.
    """
    if config.batch["micro"] != AUTO:
        return config
    device_kind = str(config.run.device)
    if device_kind == "cuda" and not torch.cuda.is_available():
        return _with_micro(
            config, 1, f"{AUTO} -> as memory allows, on the host with the GPUs; the figures here are for 1"
        )
    ranks_per_host = config.launcher.per_node
    ranks = ranks_per_host * config.launcher.nodes
    runtime = Runtime(0, ranks, 0, ranks_per_host, torch.device("cuda" if device_kind == "cuda" else "cpu"), None)
    device = (runtime.kind, memory_gib(runtime))
    timeout_s = TIMEOUT_SHARE * config.run.timeout_s
    micro, plan_summary = propose_micro(config, prepared, config.precision, (ranks, ranks_per_host), device, timeout_s)
    reason = f"{plan_summary}; {PROBE_STEPS} steps of the longest documents will be tried"
    return _with_micro(config, micro, Resolution(MICRO_BATCH_KEY, AUTO, micro, reason))


def _trial_of(micro: int) -> TrialDescription:
    return TrialDescription(
        MICRO_BATCH_KEY, f"{micro} documents in each forward pass", "give batch.micro a smaller number"
    )


def _with_micro(config: RunConfig, micro: Any, note: Resolution | str | None) -> RunConfig:
    """The run with `batch.micro=micro`, and with `note` as the reason of that choice; None removes an earlier reason."""
    substitutions = dict(config.substitutions)
    substitutions.pop(MICRO_BATCH_KEY, None)
    if note:
        substitutions[MICRO_BATCH_KEY] = note
    return replace(config, batch={**config.batch, "micro": micro}, substitutions=substitutions)


def recomputation_modes(requested: ActivationCheckpointing) -> tuple[ActivationCheckpointing, ...]:
    """Modes to plan with. `auto` recomputes only if nothing fits without."""
    if requested is ActivationCheckpointing.auto:
        return ActivationCheckpointing.none, ActivationCheckpointing.full
    return (requested,)


def propose_micro(
    config: RunConfig,
    prepared: PreparedData,
    precision: Precision,
    ranks: tuple[int, int],
    device: tuple[str, float],
    timeout_s: float,
) -> tuple[int, str]:
    """(the largest micro-batch that fits according to a simulated step, the reason as a sentence).

    `ranks`: (all ranks, those of a host). `device`: (`cuda` or `cpu`, GiB of each device). If the step cannot be simulated,
    a small number is proposed; if nothing fits, 1. Real steps test the proposal afterwards.
    """
    world_size = ranks[0]
    kind, available_gib = device
    sequences = data_spec_of(config.objective).sequences_per_document
    lengths = sampled_lengths(config, prepared.train, sequences).lengths(config.data, sequences)
    longest = int(lengths.longest[0]) // sequences
    micros = divisors(samples_per_dp_rank(config, world_size))
    reason = ""
    for mode in recomputation_modes(config.strategy.activation_checkpointing):
        step_config = single_step_config(_with_micro(config, 1, None), world_size, mode_if_auto=mode)
        arguments = (replace(step_config, precision=precision), longest, ranks, kind)
        cost_model: CostModel | str = call_in_process(try_simulate_cost_model, arguments, timeout_s)
        if isinstance(cost_model, str):
            first_tried = max(micro for micro in micros if micro <= UNPLANNED_MICRO)
            return first_tried, f"not planned: {cost_model}"
        if cost_model.alone:
            return 1, "the model is right for one document at a time only"
        gib_by_micro = {micro: needed_gib(cost_model, micro, lengths, available_gib) for micro in micros}
        fitting_micros = [micro for micro in micros if gib_by_micro[micro] <= available_gib]
        largest = fitting_micros[-1] if fitting_micros else 1
        reason = f"planned {gib_by_micro[largest]:.2f} of {available_gib:.2f} GiB"
        if fitting_micros:
            return largest, reason
    return 1, reason


def needed_gib(cost_model: CostModel, micro: int, lengths: DocumentLengths, available_gib: float) -> float:
    """GiB that a rank needs with `micro` documents in each forward pass, the longest ones; `available_gib`: of its device."""
    peak = cost_model.peak_at(float(micro) if cost_model.rows else lengths.tokens_of_longest(micro))
    return fit_in_memory(peak.total, group_count(cost_model), available_gib).total / GIB


def try_simulate_cost_model(config: RunConfig, length: int, ranks: tuple[int, int], kind: str) -> CostModel | str:
    """The cost model of a rank's step, or a text that says why the step cannot be simulated.

    `length`: tokens of each sequence. `ranks`: (all ranks, those of a host). `kind`: `cuda` or `cpu`. To be called through
    `call_in_process`, since a process that is part of a job cannot simulate.
    """
    from trainer.planner.simulation import simulate_cost_model_of_run

    device = SIMULATED if kind == "cuda" else torch.device("cpu")
    accumulation = samples_per_dp_rank(config, ranks[0])
    try:
        return simulate_cost_model_of_run(
            config, length, accumulation=accumulation, world_size=ranks[0], local_world_size=ranks[1], device=device
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that is an answer
        return f"its step {why_not_simulated(error)}"
