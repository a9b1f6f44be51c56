"""Extrapolates from models of few blocks to the whole one: each step phase costs linearly in the number of blocks.

Blocks of one kind cost the same. So live bytes, collectives and FLOPs in a phase, counted from either end (the
second block, the last but one), grow by the same amount with each further block. Between the ends they lie on a line.
The peak is the highest of these lines at full depth, which may be in another phase than in the shallow models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from strategies.pinned_memory import HostTensors
from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import CollectiveTotal
from trainer.planner.memory_tracker import PhasePeak, StepPhase
from trainer.planner.simulate import SimulatedStep
from trainer.planner.step_recorder import Collective

DEFAULT_END_BLOCKS = 2
"""Blocks at either end of a model that may take other memory than those between: blocks gather the next ones ahead, and those at
an end have no neighbour. An engine that keeps more blocks gathered has more of them (`num_end_blocks_of`)."""


@dataclass(frozen=True, slots=True)
class DepthExtrapolation:
    """Extrapolates an amount (bytes, calls, FLOPs) from two shallow models to the whole model of `num_blocks` blocks.

    The two depths differ by a period, the number of blocks after which their kinds repeat. Each further period adds as much as
    the deeper model has more than the shallower one. If the whole model was simulated, all three numbers are equal.
    """

    shallow_depth: int
    """Blocks of the shallower simulated model."""
    deep_depth: int
    num_blocks: int

    @property
    def further_periods(self) -> float:
        """How many periods of blocks the whole model has beyond the deeper simulated one; 0.0 if that is the whole model."""
        period = max(1, self.deep_depth - self.shallow_depth)
        return (self.num_blocks - self.deep_depth) / period

    def amount(self, shallow: float, deep: float) -> float:
        """The amount in the whole model, from those in the shallower and in the deeper simulated model."""
        return deep + (deep - shallow) * self.further_periods

    def whole_amount(self, shallow: int, deep: int) -> int:
        """As `amount`, rounded to a whole number."""
        return round(self.amount(shallow, deep))


class ExtrapolatedCollective(NamedTuple):
    """What the collectives have in common that an extrapolated step counts together."""

    name: str
    """The operation, such as `allgather_base`."""
    num_ranks: int
    """Ranks of the process group."""
    dtype: str


@dataclass(frozen=True, slots=True)
class ExtrapolatedStep:
    """A step of a model of `num_blocks` blocks, extrapolated from the simulated steps of two models of fewer."""

    num_blocks: int
    peak_phase: StepPhase
    peak_bytes: int
    """Live bytes on the device at the peak."""
    peak_bytes_by_kind: dict[MemoryKind, int]
    """Bytes of the peak by kind."""
    resting_bytes_by_kind: dict[MemoryKind, int]
    """Bytes between steps."""
    collective_totals: dict[ExtrapolatedCollective, CollectiveTotal]
    num_host_reads: int
    """How often the host waits for a value of the device."""
    flops: float
    host_bytes: int
    """Bytes that the engine keeps on the host."""
    host_inputs: HostTensors
    """Inputs of recomputed blocks that wait on the host."""


def shallow_depths(
    num_blocks: int, period: int = 1, num_end_blocks: int = DEFAULT_END_BLOCKS, *, ends_may_overlap: bool = False
) -> tuple[int, int] | None:
    """Choose how many blocks the two shallow models have that are simulated in place of a model of `num_blocks` blocks.

    The two differ by one period, the number of blocks after which their kinds repeat: the difference between their costs is what
    each further period of the whole model costs. 32 blocks of one kind -> (4, 5). None if the two together have more blocks
    than the whole model, which is then simulated itself.

    `num_end_blocks`: blocks at either end of a model that may take other memory than those between; both models have them all.
    `ends_may_overlap`: a block may belong to both ends, because all blocks are of one kind and nothing reaches from one end to
    the other.
    """
    # `num_end_blocks` periods at either end; if all blocks are of one kind and the ends may overlap, one block less.
    if ends_may_overlap and period == 1:
        fewest_blocks = 2 * num_end_blocks - 1
    else:
        fewest_blocks = 2 * num_end_blocks * period
    # Add the remainder, so that the last block is at the same position of its period as in the whole model.
    shallower = fewest_blocks + (num_blocks - fewest_blocks) % period
    if 2 * shallower + period > num_blocks:  # the two together would cost as much as the whole model
        return None
    return shallower, shallower + period


def phases_at_depth(
    shallow: SimulatedStep,
    deep: SimulatedStep,
    extrapolation: DepthExtrapolation,
    num_end_blocks: int = DEFAULT_END_BLOCKS,
) -> dict[StepPhase, PhasePeak]:
    """Extrapolate the peak memory of each phase to the whole model, from the steps of a shallower and a deeper model.

    A phase is a part of a step, such as the forward pass of block 3. Only those of the first and the last `num_end_blocks`
    blocks, and those outside blocks, are needed: the peaks of blocks between lie on a line, whose highest point is at an end.
    The keys of the last blocks have negative indices (-1 is the last), so that they are the same at every depth.
    """
    shallow_phases = phases_from_ends(shallow.peak_by_phase, extrapolation.shallow_depth, num_end_blocks)
    deep_phases = phases_from_ends(deep.peak_by_phase, extrapolation.deep_depth, num_end_blocks)
    return {phase: _extrapolate_peak(shallow_phases[phase], peak, extrapolation) for phase, peak in deep_phases.items()}


def _extrapolate_peak(shallow: PhasePeak, deep: PhasePeak, extrapolation: DepthExtrapolation) -> PhasePeak:
    """Extrapolate the peak memory of one phase of a step to the whole model, from two simulated models of fewer blocks.

    The live bytes after each operation are extrapolated by themselves, so the peak may be after another operation than in the
    simulated models. Nobody asks which: `operation_index` of the result is always 0.
    """
    total_bytes = extrapolation.whole_amount(shallow.total_bytes, deep.total_bytes)
    bytes_by_kind = extrapolate_by_key(shallow.bytes_by_kind, deep.bytes_by_kind, extrapolation)
    # If the two models have different operations, these cannot be matched: only the peaks are extrapolated.
    if len(shallow.live_after_operation) != len(deep.live_after_operation):
        return PhasePeak(total_bytes=total_bytes, operation_index=0, bytes_by_kind=bytes_by_kind)
    live_after_operation = [*map(extrapolation.whole_amount, shallow.live_after_operation, deep.live_after_operation)]
    highest_bytes = max(live_after_operation, default=total_bytes)
    # Bytes by kind are known at the simulated peak only: the difference to the highest operation counts as activations.
    if highest_bytes != total_bytes and bytes_by_kind:
        activation_bytes = bytes_by_kind.get(MemoryKind.activations, 0)
        bytes_by_kind[MemoryKind.activations] = activation_bytes + highest_bytes - total_bytes
    return PhasePeak(
        total_bytes=highest_bytes,
        operation_index=0,
        bytes_by_kind=bytes_by_kind,
        live_after_operation=live_after_operation,
    )


def extrapolate_by_key(
    shallow: dict[MemoryKind, int], deep: dict[MemoryKind, int], extrapolation: DepthExtrapolation
) -> dict[MemoryKind, int]:
    """Extrapolate how many bytes of each kind of memory are live, from two models of fewer blocks to the whole model.

    A kind that one of the two lacks has 0 bytes there; kinds of 0 bytes are left out of the result.
    """
    extrapolated = {}
    for kind in dict.fromkeys((*deep, *shallow)):
        size_bytes = extrapolation.whole_amount(shallow.get(kind, 0), deep.get(kind, 0))
        if size_bytes:
            extrapolated[kind] = size_bytes
    return extrapolated


def extrapolate_step(
    shallow: SimulatedStep,
    deep: SimulatedStep,
    extrapolation: DepthExtrapolation,
    num_end_blocks: int = DEFAULT_END_BLOCKS,
) -> ExtrapolatedStep:
    """Extrapolate a step to the whole model, from the simulated steps of a shallower and a deeper model of the same blocks.

    Each amount grows by the same for each further period of blocks. `num_end_blocks`: blocks at either end of a model that may
    take other memory than those between.
    """
    # The peak memory of each part of the step, such as the backward pass of the last block; the highest is the step's peak.
    phases = phases_at_depth(shallow, deep, extrapolation, num_end_blocks)
    peak_phase, phase_peak = max(phases.items(), key=lambda phase_and_peak: phase_and_peak[1].total_bytes)
    whole_amount = extrapolation.whole_amount
    shallow_totals = _totals_by_collective(shallow.collectives)
    deep_totals = _totals_by_collective(deep.collectives)
    collective_totals = {}
    # Both models call the same collectives, only more or less often: each key is in both dicts.
    for key in {**deep_totals, **shallow_totals}:
        collective_totals[key] = CollectiveTotal(
            num_calls=whole_amount(shallow_totals[key].num_calls, deep_totals[key].num_calls),
            num_bytes=whole_amount(shallow_totals[key].num_bytes, deep_totals[key].num_bytes),
        )
    return ExtrapolatedStep(
        num_blocks=extrapolation.num_blocks,
        # The last blocks are counted from the end (-1) so far.
        peak_phase=peak_phase.with_block_from_start(extrapolation.num_blocks),
        peak_bytes=phase_peak.total_bytes,
        peak_bytes_by_kind=phase_peak.bytes_by_kind,
        resting_bytes_by_kind=extrapolate_by_key(
            shallow.resting_bytes_by_kind, deep.resting_bytes_by_kind, extrapolation
        ),
        collective_totals=collective_totals,
        num_host_reads=whole_amount(sum(shallow.host_reads.values()), sum(deep.host_reads.values())),
        flops=extrapolation.amount(shallow.flops, deep.flops),
        host_bytes=whole_amount(shallow.host_bytes, deep.host_bytes),
        host_inputs=host_inputs_at_depth(shallow, deep, extrapolation),
    )


def host_inputs_at_depth(shallow: SimulatedStep, deep: SimulatedStep, extrapolation: DepthExtrapolation) -> HostTensors:
    """How many block inputs wait in host memory in the whole model, extrapolated from two models of fewer blocks.

    With `strategy.offload_activations`, the input of each recomputed block waits there for the backward pass.
    """
    return HostTensors(
        num_tensors=extrapolation.whole_amount(shallow.host_inputs.num_tensors, deep.host_inputs.num_tensors),
        num_bytes=extrapolation.whole_amount(shallow.host_inputs.num_bytes, deep.host_inputs.num_bytes),
    )


def full_depth_step(step: SimulatedStep, num_blocks: int) -> ExtrapolatedStep:
    """Bring the step of a model that was simulated as a whole into the form of an extrapolated one, which readers expect.

    `num_blocks`: blocks of the model.
    """
    peak_phase, phase_peak = step.phase_and_peak
    return ExtrapolatedStep(
        num_blocks=num_blocks,
        peak_phase=peak_phase,
        peak_bytes=phase_peak.total_bytes,
        peak_bytes_by_kind=phase_peak.bytes_by_kind,
        resting_bytes_by_kind=step.resting_bytes_by_kind,
        collective_totals=_totals_by_collective(step.collectives),
        num_host_reads=sum(step.host_reads.values()),  # `host_reads` counts them by line of the code
        flops=step.flops,
        host_bytes=step.host_bytes,
        host_inputs=step.host_inputs,
    )


def simulate_or_extrapolate_step(
    simulate_model_of: Callable[[int], SimulatedStep],
    num_blocks: int,
    period: int = 1,
    *,
    num_end_blocks: int = DEFAULT_END_BLOCKS,
    ends_may_overlap: bool = False,
    exact: bool = False,
) -> ExtrapolatedStep:
    """Find the step of a model of `num_blocks` blocks: simulate two models of fewer blocks and extrapolate, where possible.

    The whole model is simulated with `exact`, or if it has too few blocks to extrapolate.

    `simulate_model_of(depth)`: simulates the step of the model with its first `depth` blocks. `period`: after how many blocks
    their kinds repeat. `num_end_blocks`: blocks at either end that may take other memory than those between.
    `ends_may_overlap`: whether a block may belong to both ends.
    """
    depths = None
    if not exact:
        depths = shallow_depths(num_blocks, period, num_end_blocks, ends_may_overlap=ends_may_overlap)
    if depths is None:
        return full_depth_step(simulate_model_of(num_blocks), num_blocks)
    extrapolation = DepthExtrapolation(*depths, num_blocks)
    shallow = simulate_model_of(extrapolation.shallow_depth)
    deep = simulate_model_of(extrapolation.deep_depth)
    return extrapolate_step(shallow, deep, extrapolation, num_end_blocks)


def phases_from_ends(
    peak_by_phase: dict[StepPhase, PhasePeak], num_blocks: int, num_end_blocks: int = DEFAULT_END_BLOCKS
) -> dict[StepPhase, PhasePeak]:
    """Give the phases of a simulated step keys that are the same in models of different depths, so that they can be compared.

    A phase of a block has the block's index as `model_part`. The first `num_end_blocks` of the `num_blocks` blocks keep theirs,
    the last ones get negative indices (-1 is the last block), and phases of the blocks between are left out. A block that is
    near both ends has two entries. Phases outside blocks stay.
    """
    phases: dict[StepPhase, PhasePeak] = {}
    for phase, peak in peak_by_phase.items():
        block = phase.model_part
        if not isinstance(block, int):
            phases[phase] = peak  # outside blocks, such as the head
            continue
        if block < num_end_blocks:
            phases[phase] = peak
        if block >= num_blocks - num_end_blocks:
            phases[replace(phase, model_part=block - num_blocks)] = peak
    return phases


def is_near_an_end(phase: StepPhase, num_blocks: int, num_end_blocks: int = DEFAULT_END_BLOCKS) -> bool:
    """Whether `phases_from_ends` keeps the phase of a model of `num_blocks` blocks."""
    block = phase.model_part
    return not isinstance(block, int) or block < num_end_blocks or block >= num_blocks - num_end_blocks


def phases_of_deeper_model(
    shallow_phases: dict[StepPhase, PhasePeak], depths: tuple[int, int], num_end_blocks: int
) -> dict[StepPhase, PhasePeak]:
    """Predict, before the deeper of two models is simulated, the peaks of its phases: those of the matching shallow blocks.

    At these peaks the simulation counts memory by kind. `shallow_phases`: the peaks of the shallow model. `depths`: blocks of the
    shallow and of the deeper model. `num_end_blocks`: blocks at either end of a model that may take other memory than those
    between.

    With depths 3 and 6 and one end block, blocks 0 to 5 of the deeper model get the peaks of blocks 0, 1, 2, none, none, 2 in
    forward passes, and of 0, none, none, 0, 1, 2 in backward passes. Phases of blocks that match none are left out.
    """
    shallow_depth, deep_depth = depths
    expected: dict[StepPhase, PhasePeak] = {}
    # The passes of a block (forward and backward of each micro-batch), as phases of block 0.
    passes_of_block_0 = set()
    for phase, peak in shallow_phases.items():
        if isinstance(phase.model_part, int):
            passes_of_block_0.add(replace(phase, model_part=0))
        else:
            expected[phase] = peak
    for block in range(deep_depth):
        for block_pass in passes_of_block_0:
            # Blocks near the end, and all but the first in a backward pass, correspond by their distance from the end.
            from_start = block < num_end_blocks or (
                block < deep_depth - num_end_blocks and block_pass.name == "forward"
            )
            shallow_block = block if from_start else block - (deep_depth - shallow_depth)
            peak_of_same_block = shallow_phases.get(replace(block_pass, model_part=shallow_block))
            if peak_of_same_block is not None:
                expected[replace(block_pass, model_part=block)] = peak_of_same_block
    return expected


def _totals_by_collective(collectives: list[Collective]) -> dict[ExtrapolatedCollective, CollectiveTotal]:
    """Count the calls and bytes of a step's collectives by operation, ranks of the group and dtype, to extrapolate them."""
    calls: Counter[ExtrapolatedCollective] = Counter()
    size_bytes: Counter[ExtrapolatedCollective] = Counter()
    for collective in collectives:
        key = ExtrapolatedCollective(collective.name, len(collective.ranks), collective.dtype)
        calls[key] += 1
        size_bytes[key] += collective.num_bytes
    return {key: CollectiveTotal(calls[key], size_bytes[key]) for key in calls}
