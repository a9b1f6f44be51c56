"""Gradients that wait for the last micro-batch of a step before ranks reduce them: what they take, in a plan.

A step is simulated with a reduction in each micro-batch. What waiting changes is computed from that simulation.
"""

from __future__ import annotations

from dataclasses import replace

from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import CostModel
from trainer.planner.memory_tracker import PhasePeak, StepPhase


def deferred_gradient_bytes(cost_model: CostModel, shards: int, expert_ranks: int = 1) -> int:
    """Bytes more that gradients take if they wait unreduced for the last micro-batch.

    They are in fp32, and 1 of `shards` is there anyway. Of experts dealt over `expert_ranks` ranks, a rank has its own alone.
    """
    waiting = (cost_model.trained - cost_model.trained_dealt) * (1 - 1 / shards)
    waiting += cost_model.trained_dealt * (1 / expert_ranks - 1 / shards)
    return round(4 * waiting)


def with_deferred_reduction(cost_model: CostModel, waiting: int) -> CostModel:
    """The cost model of the same step if gradients are reduced in the last micro-batch alone.

    `waiting`: bytes that whole gradients take more than reduced ones until then. Against that, the buffers that a reduction
    reads, which outlive their micro-batch into the next forward pass, are not there.
    """
    # Keys are (collective, ranks, hosts, type, when); the reductions of all micro-batches but the last go.
    exchanged = {}
    for key, calls_and_bytes in cost_model.exchanged.items():
        collective = key[0]
        when = key[4]
        if when != "each" or "reduce" not in collective:
            exchanged[key] = calls_and_bytes
    small_phases, large_phases = cost_model.phases

    def released_bytes(phase: StepPhase) -> int:
        """What the reduction of the micro-batch before holds in buffers during a forward pass."""
        if phase.name != "forward":
            return 0
        # In the first micro-batch only what is gathered is in buffers.
        first = large_phases.get(replace(phase, micro=0), large_phases[phase])
        in_buffers = large_phases[phase].kinds.get(MemoryKind.communication, 0)
        return in_buffers - first.kinds.get(MemoryKind.communication, 0)

    growth = {phase: waiting - released_bytes(phase) for phase in large_phases}

    def deferred_peaks(phases: dict[StepPhase, PhasePeak]) -> dict[StepPhase, PhasePeak]:
        """The peaks with gradients that wait unreduced, and without the buffers of the reductions."""
        peaks = {}
        for phase, peak in phases.items():
            kinds = peak.kinds
            if kinds:
                kinds = dict(kinds)
                kinds[MemoryKind.gradients] = kinds.get(MemoryKind.gradients, 0) + waiting
                kinds[MemoryKind.communication] = kinds.get(MemoryKind.communication, 0) - released_bytes(phase)
            peaks[phase] = PhasePeak(peak.total + growth[phase], peak.operation, kinds)
        return peaks

    candidates = {}
    for phase, live_at_sizes in cost_model.peak_candidates.items():
        candidates[phase] = [(small + growth[phase], large + growth[phase]) for small, large in live_at_sizes]
    return replace(
        cost_model,
        exchanged=exchanged,
        phases=(deferred_peaks(small_phases), deferred_peaks(large_phases)),
        peak_candidates=candidates,
    )
