"""Extrapolates from models of few blocks to the whole one: each step phase costs linearly in the number of blocks.

Blocks of one kind cost the same. So live bytes, collectives and arithmetic in a phase, counted from either end (the
second block, the last but one), grow by the same amount with each further block. Between the ends they lie on a line.
The peak is the highest of these lines at full depth, which may be in another phase than in the shallow models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from strategies.pinned_memory import HostTensors
from strategies.tensor_inventory import MemoryKind
from trainer.planner.memory_tracker import PhasePeak, StepPhase
from trainer.planner.simulate import SimulatedStep
from trainer.planner.step_recorder import Collective

END_BLOCKS = 2
"""Blocks at either end of a model that may differ from those between: blocks gather the next ones ahead, and those at an end
have no neighbour. An engine that keeps more blocks gathered has more of them (`end_blocks_of`)."""


@dataclass(frozen=True, slots=True)
class ExtrapolatedStep:
    """A step of a model of `num_blocks` blocks, extrapolated from two simulations of fewer."""

    num_blocks: int
    peak_phase: StepPhase
    peak_bytes: int
    """Live bytes on the device at the peak."""
    peak_bytes_by_kind: dict[MemoryKind, int]
    """Bytes of the peak by kind."""
    resting_bytes_by_kind: dict[MemoryKind, int]
    collective_totals: dict[tuple[str, int, str], tuple[int, int]]
    """By collective, ranks and type: calls, and bytes together."""
    num_host_reads: int
    flops: float
    host_bytes: int
    """Bytes that the engine keeps on the host."""
    host_inputs: HostTensors
    """Inputs of recomputed blocks that wait on the host."""


def shallow_depths(
    num_blocks: int, period: int = 1, ends: int = END_BLOCKS, *, ends_overlap: bool = False
) -> tuple[int, int] | None:
    """Two numbers of blocks to simulate in place of a model of `num_blocks` blocks, whose kinds repeat after `period` blocks.

    None if the two together have about as many blocks as the whole model, which is then simulated itself. Both have the same
    remainder by `period` as `num_blocks`, so that the last block is of the same kind. `ends_overlap`: a block may belong to both
    ends, because all blocks are of one kind and nothing reaches from one end to the other.
    """
    if ends_overlap and period == 1:
        fewest_blocks = 2 * ends - 1
    else:
        fewest_blocks = 2 * ends * period
    # Add the remainder, so that the last block is at the same position of its period as in the whole model.
    shallower = fewest_blocks + (num_blocks - fewest_blocks) % period
    if 2 * shallower + period > num_blocks:  # the two together would cost as much as the whole model
        return None
    return shallower, shallower + period


def phases_at_depth(
    shallow: SimulatedStep, deep: SimulatedStep, depths: tuple[int, int], num_blocks: int, ends: int = END_BLOCKS
) -> dict[StepPhase, PhasePeak]:
    """The peak memory of each phase in a step of a model of `num_blocks` blocks, from the steps of two shallow models.

    `depths`: blocks of the shallow models. `ends`: blocks at either end that may differ from those between. A phase is a
    stretch of a step in which one block or the head is at work; phases of the last blocks have negative places, from -1.
    """
    extrapolate = extrapolation_to(depths, num_blocks)
    shallow_phases = phases_from_ends(shallow, depths[0], ends)
    deep_phases = phases_from_ends(deep, depths[1], ends)
    return {phase: _extrapolate_peak(shallow_phases[phase], peak, extrapolate) for phase, peak in deep_phases.items()}


def _extrapolate_peak(shallow: PhasePeak, deep: PhasePeak, extrapolate: Callable[[int, int], int]) -> PhasePeak:
    """The peak of one phase in the whole model, from its peaks in the shallow and in the deeper of two simulated models.

    The live bytes after each operation are extrapolated by themselves, so the peak may be after another operation than in the
    simulated models. `extrapolate`: from an amount in both models to that of the whole one.
    """
    total = extrapolate(shallow.total_bytes, deep.total_bytes)
    kinds = extrapolate_by_key(shallow.bytes_by_kind, deep.bytes_by_kind, extrapolate)
    # If the two models have different operations, these cannot be matched: only the peaks are extrapolated.
    if len(shallow.live_after_operation) != len(deep.live_after_operation):
        return PhasePeak(total, 0, kinds, [])
    live_after_operation = [*map(extrapolate, shallow.live_after_operation, deep.live_after_operation)]
    highest = max(live_after_operation, default=total)
    # Bytes by kind are known at the simulated peak only: the difference to the highest operation counts as activations.
    if highest != total and kinds:
        kinds[MemoryKind.activations] = kinds.get(MemoryKind.activations, 0) + highest - total
    return PhasePeak(highest, 0, kinds, live_after_operation)


def extrapolation_to(depths: tuple[int, int], num_blocks: int) -> Callable[[int, int], int]:
    """A function that takes an amount at the two depths (shallower, deeper) and returns the amount at `num_blocks` blocks.

    Each further period of blocks adds as much as the deeper model has more than the shallower one.
    """
    further_periods = (num_blocks - depths[1]) / (depths[1] - depths[0])
    return lambda shallow, deep: round(deep + (deep - shallow) * further_periods)


def extrapolate_by_key(
    shallow: dict[Any, int], deep: dict[Any, int], extrapolate: Callable[[int, int], int]
) -> dict[Any, int]:
    """Extrapolate the values of each key; a key that one side lacks is 0 there, and zeros are left out of the result."""
    extrapolated = {}
    for key in dict.fromkeys((*deep, *shallow)):
        size = extrapolate(shallow.get(key, 0), deep.get(key, 0))
        if size:
            extrapolated[key] = size
    return extrapolated


def extrapolate_pairs(
    shallow: dict[Any, tuple[int, int]], deep: dict[Any, tuple[int, int]], extrapolate: Callable[[int, int], int]
) -> dict[Any, tuple[int, int]]:
    """Extrapolate the (calls, bytes) of each kind of collective; a kind that has no calls in the whole model is left out."""
    extrapolated = {}
    for key in dict.fromkeys((*deep, *shallow)):
        shallow_calls, shallow_bytes = shallow.get(key, (0, 0))
        deep_calls, deep_bytes = deep.get(key, (0, 0))
        calls = extrapolate(shallow_calls, deep_calls)
        if calls:
            extrapolated[key] = (calls, extrapolate(shallow_bytes, deep_bytes))
    return extrapolated


def extrapolate_step(
    shallow: SimulatedStep, deep: SimulatedStep, depths: tuple[int, int], num_blocks: int, ends: int = END_BLOCKS
) -> ExtrapolatedStep:
    """The step of a model of `num_blocks` blocks, from the steps of two shallow models of `depths` blocks."""
    phases = phases_at_depth(shallow, deep, depths, num_blocks, ends)
    extrapolate = extrapolation_to(depths, num_blocks)
    peak_phase, phase_peak = max(phases.items(), key=lambda phase_and_peak: phase_and_peak[1].total_bytes)
    if isinstance(peak_phase.place, int) and peak_phase.place < 0:  # counted from the last block
        peak_phase = replace(peak_phase, place=num_blocks + peak_phase.place)
    shallow_totals = _totals_by_collective(shallow.collectives)
    deep_totals = _totals_by_collective(deep.collectives)
    collective_totals = {}
    for key in {**deep_totals, **shallow_totals}:
        shallow_calls, shallow_bytes = shallow_totals[key]
        deep_calls, deep_bytes = deep_totals[key]
        collective_totals[key] = (extrapolate(shallow_calls, deep_calls), extrapolate(shallow_bytes, deep_bytes))
    return ExtrapolatedStep(
        num_blocks=num_blocks,
        peak_phase=peak_phase,
        peak_bytes=phase_peak.total_bytes,
        peak_bytes_by_kind=phase_peak.bytes_by_kind,
        resting_bytes_by_kind=extrapolate_by_key(
            shallow.resting_bytes_by_kind, deep.resting_bytes_by_kind, extrapolate
        ),
        collective_totals=collective_totals,
        num_host_reads=extrapolate(sum(shallow.host_reads.values()), sum(deep.host_reads.values())),
        flops=deep.flops + (deep.flops - shallow.flops) * (num_blocks - depths[1]) / (depths[1] - depths[0]),
        host_bytes=extrapolate(shallow.host_bytes, deep.host_bytes),
        host_inputs=host_inputs_at_depth(shallow, deep, extrapolate),
    )


def host_inputs_at_depth(
    shallow: SimulatedStep, deep: SimulatedStep, extrapolate: Callable[[int, int], int]
) -> HostTensors:
    """The inputs of recomputed blocks that wait in host memory (`strategy.offload_activations`), in the whole model."""
    return HostTensors(
        num_tensors=extrapolate(shallow.host_inputs.num_tensors, deep.host_inputs.num_tensors),
        num_bytes=extrapolate(shallow.host_inputs.num_bytes, deep.host_inputs.num_bytes),
    )


def full_depth_step(step: SimulatedStep, num_blocks: int) -> ExtrapolatedStep:
    """`step` of a model that was simulated with all its `num_blocks` blocks, in the form of an extrapolated step."""
    peak_phase, phase_peak = step.phase_and_peak
    return ExtrapolatedStep(
        num_blocks=num_blocks,
        peak_phase=peak_phase,
        peak_bytes=phase_peak.total_bytes,
        peak_bytes_by_kind=phase_peak.bytes_by_kind,
        resting_bytes_by_kind=step.resting_bytes_by_kind,
        collective_totals=dict(_totals_by_collective(step.collectives)),
        num_host_reads=sum(step.host_reads.values()),
        flops=step.flops,
        host_bytes=step.host_bytes,
        host_inputs=step.host_inputs,
    )


def step_at_depth(
    simulate: Callable[[int], SimulatedStep],
    num_blocks: int,
    period: int = 1,
    *,
    ends: int = END_BLOCKS,
    ends_overlap: bool = False,
    exact: bool = False,
) -> ExtrapolatedStep:
    """The step of a model of `num_blocks` blocks, extrapolated from two shallow ones where that is possible.

    `simulate(depth)` takes the step of the model with `depth` blocks. `period`: after how many blocks their kinds repeat.
    `ends`: blocks at either end that may differ from those between. `ends_overlap`: as for `shallow_depths`. With `exact`
    the whole model is simulated.
    """
    depths = None if exact else shallow_depths(num_blocks, period, ends, ends_overlap=ends_overlap)
    if depths is None:
        return full_depth_step(simulate(num_blocks), num_blocks)
    return extrapolate_step(simulate(depths[0]), simulate(depths[1]), depths, num_blocks, ends)


def phases_from_ends(step: SimulatedStep, depth: int, ends: int = END_BLOCKS) -> dict[StepPhase, PhasePeak]:
    """The phases of a step in a model of `depth` blocks, with keys by which models of different depths can be compared.

    The first `ends` blocks keep their index as `place`, the last `ends` blocks have negative places (-1 is the last block), and
    phases of the blocks between are left out. A block that is near both ends has two entries. Phases outside blocks stay.
    """
    phases: dict[StepPhase, PhasePeak] = {}
    for phase, peak in step.peak_by_phase.items():
        place = phase.place
        if not isinstance(place, int):
            phases[phase] = peak  # outside blocks, such as the head
            continue
        if place < ends:
            phases[phase] = peak
        if place >= depth - ends:
            phases[replace(phase, place=place - depth)] = peak
    return phases


def is_near_an_end(phase: StepPhase, depth: int, ends: int = END_BLOCKS) -> bool:
    """Whether `phases_from_ends` keeps the phase of a model of `depth` blocks."""
    place = phase.place
    return not isinstance(place, int) or place < ends or place >= depth - ends


def phases_of_deeper_model(
    shallow_phases: dict[StepPhase, PhasePeak], depths: tuple[int, int], ends: int
) -> dict[StepPhase, PhasePeak]:
    """The expected phases of the deeper of two models: each has the peak of the corresponding block in the shallow model.

    The planner uses it before it simulates the deeper model, to know after which operation a phase will peak. `depths`: blocks
    of the shallow and of the deeper model. `ends`: blocks at either end that may differ from those between.
    """
    shallow_depth, deep_depth = depths
    expected: dict[StepPhase, PhasePeak] = {}
    # The passes of a block (forward and backward of each micro-batch), as phases of block 0.
    passes_of_block_0 = set()
    for phase, peak in shallow_phases.items():
        if isinstance(phase.place, int):
            passes_of_block_0.add(replace(phase, place=0))
        else:
            expected[phase] = peak
    for block in range(deep_depth):
        for block_pass in passes_of_block_0:
            # Blocks near the end, and all but the first in a backward pass, correspond by their distance from the end.
            from_start = block < ends or (block < deep_depth - ends and block_pass.name == "forward")
            shallow_block = block if from_start else block - (deep_depth - shallow_depth)
            peak_of_same_block = shallow_phases.get(replace(block_pass, place=shallow_block))
            if peak_of_same_block is not None:
                expected[replace(block_pass, place=block)] = peak_of_same_block
    return expected


def _totals_by_collective(collectives: list[Collective]) -> dict[tuple[str, int, str], tuple[int, int]]:
    """(calls, bytes together) of a step's collectives, by operation, number of ranks and type."""
    calls: Counter[tuple[str, int, str]] = Counter()
    size_bytes: Counter[tuple[str, int, str]] = Counter()
    for collective in collectives:
        key = collective.name, len(collective.ranks), collective.dtype
        calls[key] += 1
        size_bytes[key] += collective.num_bytes
    return {key: (calls[key], size_bytes[key]) for key in calls}
