"""Gradients that wait for the last micro-batch of a step before ranks reduce them: what they take, in a plan.

A step is simulated with a reduction in each micro-batch. What waiting changes is computed from that simulation.
"""

from __future__ import annotations

from dataclasses import replace

from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import CostModel
from trainer.planner.memory_tracker import PhasePeak, StepPhase


def deferred_gradient_bytes(cost_model: CostModel, shards: int, expert_ranks: int = 1) -> int:
    """Bytes that full gradients in fp32 take beyond this rank's shard, if they wait unreduced for the last micro-batch.

    `shards`: ranks that shard the gradients. `expert_ranks`: ranks over which experts are distributed (`parallel.experts`): a
    rank has full gradients of its own experts only.
    """
    bytes_per_element = 4
    elements = (cost_model.num_trained_parameters - cost_model.num_trained_expert_parameters) * (1 - 1 / shards)
    elements += cost_model.num_trained_expert_parameters * (1 / expert_ranks - 1 / shards)
    return round(bytes_per_element * elements)


def with_deferred_reduction(cost_model: CostModel, waiting: int) -> CostModel:
    """The cost model of the same step if gradients are reduced only in the last micro-batch.

    Each phase then holds `waiting` bytes more, those of full gradients beyond reduced ones. A forward pass holds less again: the
    buffers that the reduction of the micro-batch before would still have there.
    """
    # Leave out the reductions of all micro-batches but the last. Keys are (collective, ranks, hosts, type, when).
    collective_totals = {}
    for key, calls_and_bytes in cost_model.collective_totals.items():
        collective = key[0]
        when = key[4]
        if when != "each" or "reduce" not in collective:
            collective_totals[key] = calls_and_bytes
    small_phases, large_phases = cost_model.phase_peaks_at_sizes

    def released_bytes(phase: StepPhase) -> int:
        """Bytes of buffers that the reduction of the micro-batch before holds during a forward pass; 0 in other phases."""
        if phase.name != "forward":
            return 0
        # No reduction precedes the first micro-batch: its buffers are those of gathered weights, which stay.
        first_micro_batch = large_phases.get(replace(phase, micro_batch_index=0), large_phases[phase])
        gathered_bytes = first_micro_batch.bytes_by_kind.get(MemoryKind.communication, 0)
        return large_phases[phase].bytes_by_kind.get(MemoryKind.communication, 0) - gathered_bytes

    growth = {phase: waiting - released_bytes(phase) for phase in large_phases}

    def deferred_peaks(phases: dict[StepPhase, PhasePeak]) -> dict[StepPhase, PhasePeak]:
        """The peaks with full gradients, and without the buffers of reductions."""
        peaks = {}
        for phase, peak in phases.items():
            kinds = dict(peak.bytes_by_kind)
            if kinds:  # the larger size alone has bytes by kind
                kinds[MemoryKind.gradients] = kinds.get(MemoryKind.gradients, 0) + waiting
                kinds[MemoryKind.communication] = kinds.get(MemoryKind.communication, 0) - released_bytes(phase)
            peaks[phase] = PhasePeak(peak.total_bytes + growth[phase], peak.operation_index, kinds)
        return peaks

    candidates = {}
    for phase, live_at_sizes in cost_model.peak_candidates.items():
        candidates[phase] = [(small + growth[phase], large + growth[phase]) for small, large in live_at_sizes]
    return replace(
        cost_model,
        collective_totals=collective_totals,
        phase_peaks_at_sizes=(deferred_peaks(small_phases), deferred_peaks(large_phases)),
        peak_candidates=candidates,
    )
