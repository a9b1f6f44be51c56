"""Gradients that wait for the last micro-batch of a step before ranks reduce them: what they take, in a plan.

A step is simulated with a reduction in each micro-batch. What waiting changes is computed from that simulation.
"""

from __future__ import annotations

from dataclasses import replace

from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import BytesAtSizes, CollectiveTiming, CostModel
from trainer.planner.memory_tracker import PhasePeak, StepPhase


def deferred_gradient_bytes(cost_model: CostModel, num_shards: int, num_expert_ranks: int = 1) -> int:
    """Bytes that full gradients in fp32 take beyond this rank's shard, if FSDP2 reduces them only in the last micro-batch.

    `cost_model`: of it, only the numbers of trained parameters are read. `num_shards`: ranks that shard the gradients.
    `num_expert_ranks`: ranks over which experts are distributed (`parallel.experts`): a rank has full gradients of its own
    experts only.
    """
    bytes_per_element = 4
    num_other_parameters = cost_model.num_trained_parameters - cost_model.num_trained_expert_parameters
    elements = num_other_parameters * (1 - 1 / num_shards)
    elements += cost_model.num_trained_expert_parameters * (1 / num_expert_ranks - 1 / num_shards)
    return round(bytes_per_element * elements)


def with_deferred_reduction(cost_model: CostModel, waiting_bytes: int) -> CostModel:
    """Compute what a step takes if gradients are reduced only in its last micro-batch, from one that reduces in each.

    Each phase (such as the forward pass of block 3) then holds `waiting_bytes` more, those of full gradients beyond reduced ones.
    A forward pass holds less again: the buffers that the reduction of the micro-batch before would still have there.
    """
    # Leave out the reductions of all micro-batches but the last.
    collective_totals = {}
    for kind, total in cost_model.collective_totals.items():
        if kind.when != CollectiveTiming.each_micro_batch or "reduce" not in kind.name:
            collective_totals[kind] = total
    small_phases, large_phases = cost_model.phase_peaks_at_sizes
    released_bytes = {phase: _bytes_without_earlier_reduction(phase, large_phases) for phase in large_phases}
    growth = {phase: waiting_bytes - released for phase, released in released_bytes.items()}
    candidates = {}
    for phase, live_at_sizes in cost_model.peak_candidates.items():
        candidates[phase] = [
            BytesAtSizes(small + growth[phase], large + growth[phase]) for small, large in live_at_sizes
        ]
    return replace(
        cost_model,
        collective_totals=collective_totals,
        phase_peaks_at_sizes=(
            _peaks_with_full_gradients(small_phases, waiting_bytes, released_bytes),
            _peaks_with_full_gradients(large_phases, waiting_bytes, released_bytes),
        ),
        peak_candidates=candidates,
    )


def _bytes_without_earlier_reduction(phase: StepPhase, phases: dict[StepPhase, PhasePeak]) -> int:
    """Bytes of buffers that a phase would not hold if the micro-batch before had not reduced gradients; 0 outside forward passes.

    `phases`: the peaks of a step that reduces in each micro-batch, with their bytes by kind.
    """
    if phase.name != "forward":
        return 0
    # No reduction precedes the first micro-batch: its buffers are those of gathered weights, which stay.
    first_micro_batch = phases.get(replace(phase, micro_batch_index=0), phases[phase])
    gathered_bytes = first_micro_batch.bytes_by_kind.get(MemoryKind.communication, 0)
    return phases[phase].bytes_by_kind.get(MemoryKind.communication, 0) - gathered_bytes


def _peaks_with_full_gradients(
    phases: dict[StepPhase, PhasePeak], waiting_bytes: int, released_bytes: dict[StepPhase, int]
) -> dict[StepPhase, PhasePeak]:
    """The peaks of a step whose gradients wait for the last micro-batch, from those of one that reduces in each (`phases`).

    `waiting_bytes`: what full gradients take more. `released_bytes`: by phase, buffers of reductions that are not made any more.
    """
    peaks = {}
    for phase, peak in phases.items():
        bytes_by_kind = dict(peak.bytes_by_kind)
        if bytes_by_kind:  # the larger size alone has bytes by kind
            gradient_bytes = bytes_by_kind.get(MemoryKind.gradients, 0)
            bytes_by_kind[MemoryKind.gradients] = gradient_bytes + waiting_bytes
            communication_bytes = bytes_by_kind.get(MemoryKind.communication, 0)
            bytes_by_kind[MemoryKind.communication] = communication_bytes - released_bytes[phase]
        total_bytes = peak.total_bytes + waiting_bytes - released_bytes[phase]
        peaks[phase] = PhasePeak(total_bytes, peak.operation_index, bytes_by_kind)
    return peaks
