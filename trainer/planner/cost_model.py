"""The cost model of a step: memory and work, linear in blocks and in tokens, for every micro-batch at once.

One engine takes steps of two sizes, in models of two depths. Live bytes in each step phase are linear in both, so the
four corners give any depth and any size. `tests/planner/test_cost_model.py` compares them with the step itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from strategies.pinned_memory import HostTensors
from strategies.runtime import Runtime
from strategies.simulation import fake_tensors
from strategies.tensor_inventory import MemoryKind
from trainer.data.config import Layout
from trainer.losses.next_token import CHUNK_LOGITS
from trainer.planner.depth_extrapolation import (
    END_BLOCKS,
    extrapolate_by_key,
    extrapolate_pairs,
    extrapolation_to,
    host_inputs_at_depth,
    phases_at_depth,
    phases_of_deeper_model,
    shallow_depths,
)
from trainer.planner.fake_tensors import replace_tensors_by_fakes
from trainer.planner.memory_tracker import PhasePeak, StepPhase
from trainer.planner.simulate import SimulatedStep, StepParts, peak_operations, recording_engine

Batches = list[dict[str, Any]]
CollectiveKind = tuple[str, int, int, str, str]
"""Collective, ranks, hosts among which they are, type, and when: in `each` micro-batch but the last, the `last`, the `update`."""


ALL_TO_ALL = "alltoall"
"""How the names of collectives begin by which ranks exchange slices of rows for heads, or send tokens to their experts."""


@dataclass(frozen=True, slots=True)
class TokenAllToAll:
    """What one rank sends to the others of its group, and gets from them, for the tokens of one micro-batch.

    The ranks share rows (`parallel.sequence`) or the experts of a layer (`parallel.experts`). Unlike the collectives on weights
    and gradients it grows with the tokens, and attention or the experts wait for it.
    """

    num_ranks: int
    num_hosts: int
    num_calls: int
    bytes_at_sizes: tuple[int, int]
    """Bytes of all calls at either size of micro-batch, with the part that a rank keeps. Of each call the larger of what is
    sent and what arrives."""


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """The size of a simulated micro-batch, in the unit of its cost model."""

    num_units: int
    """Tokens of a row without padding; else rows."""
    sum_of_squared_lengths: int
    """Sum of the squared lengths of its sequences."""


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The most that one rank holds in a step, at one size of micro-batch."""

    total_bytes: int
    """Live bytes on the device at the peak."""
    phase: StepPhase
    bytes_by_kind: dict[MemoryKind, int]
    """Bytes of the peak by kind."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """A rank's step of `accumulation` micro-batches, at any size of them."""

    num_blocks: int
    accumulation: int
    """Micro-batches that were simulated; more of them hold no more."""
    units_are_rows: bool
    """Whether sizes are counted in rows, which are as long as the longest sequence; else in tokens."""
    simulated_sizes: tuple[MicroBatchSize, MicroBatchSize]
    phase_peaks_at_sizes: tuple[dict[StepPhase, PhasePeak], dict[StepPhase, PhasePeak]]
    """At either size, in the whole model."""
    peak_candidates: dict[StepPhase, list[tuple[int, int]]]
    """Bytes at either size after each operation of a phase that may be its highest in larger micro-batches."""
    resting_bytes_by_kind: dict[MemoryKind, int]
    """Bytes between steps."""
    flops_at_sizes: tuple[float, float]
    """Of one micro-batch of either size, those recomputed included."""
    moved_bytes_at_sizes: tuple[float, float]
    """Bytes read and written by other operations in one micro-batch of either size."""
    update_bytes: float
    """Bytes that operations other than products read and write in the update."""
    host_copy_bytes_at_sizes: tuple[float, float]
    """Bytes between host and device in one micro-batch of either size."""
    collective_totals: dict[CollectiveKind, tuple[int, int]]
    """(calls, bytes of all calls) in a step, without `token_all_to_alls`."""
    token_all_to_alls: tuple[TokenAllToAll, ...]
    """One for each size of group."""
    host_bytes: int
    """Bytes that the engine keeps on the host."""
    host_inputs_at_sizes: tuple[HostTensors, HostTensors]
    """Inputs of recomputed blocks that wait on the host, of one micro-batch of either size."""
    num_parameters: int = 0
    """Of the whole model."""
    num_trained_parameters: int = 0
    """Parameters that train."""
    num_trained_expert_parameters: int = 0
    """Those of experts that are distributed over ranks among them."""
    num_vocabulary_rows: int = 0
    """Rows of the model's vocabulary."""
    layout: str = ""
    """How documents lie in a row."""
    notes: tuple[str, ...] = ()
    """What was chosen while the model was built."""
    needs_single_rows: bool = False
    """Whether the model is right for one row at a time only."""

    def memory_peak_at(self, units: float) -> MemoryPeak:
        """The peak memory of a rank's step with micro-batches of `units` rows (if `units_are_rows`) or tokens.

        The live bytes of each phase lie on the line through the two simulated sizes; the phase with the most bytes is the peak.
        """
        small_phases, large_phases = self.phase_peaks_at_sizes
        bytes_by_phase: dict[StepPhase, float] = {}
        for phase, large_peak in large_phases.items():
            # At another size, another operation of the phase may be its highest.
            candidates = [(small_phases[phase].total_bytes, large_peak.total_bytes), *self.peak_candidates[phase]]
            bytes_by_phase[phase] = max(self._interpolated(small, large, units) for small, large in candidates)
        peak_phase = max(bytes_by_phase, key=lambda phase: bytes_by_phase[phase])
        peak_bytes = bytes_by_phase[peak_phase]
        # The kinds are those of the larger size. What grows from there are activations, because logits come in chunks.
        bytes_by_kind = dict(large_phases[peak_phase].bytes_by_kind)
        growth = peak_bytes - large_phases[peak_phase].total_bytes
        bytes_by_kind[MemoryKind.activations] = bytes_by_kind.get(MemoryKind.activations, 0) + round(growth)
        block = peak_phase.place
        if isinstance(block, int) and block < 0:  # counted from the last block
            peak_phase = replace(peak_phase, place=self.num_blocks + block)
        return MemoryPeak(round(peak_bytes), peak_phase, bytes_by_kind)

    def largest_units(self, limit: float) -> float:
        """The largest micro-batch, in rows or tokens, whose peak fits in `limit` bytes of device memory.

        0 if not even an empty one fits; infinite if no phase takes more memory with a larger micro-batch.
        """
        small_phases, large_phases = self.phase_peaks_at_sizes
        # Every peak is linear in the units: each candidate gives a bound, and the lowest one counts.
        most_units = float("inf")
        for phase, large_peak in large_phases.items():
            simulated_peak = (small_phases[phase].total_bytes, large_peak.total_bytes)
            if self._interpolated(*simulated_peak, units=0) > limit:
                return 0.0
            for small, large in [simulated_peak, *self.peak_candidates[phase]]:
                bytes_of_empty = self._interpolated(small, large, units=0)
                bytes_per_unit = (large - bytes_of_empty) / self.simulated_sizes[1].num_units
                if bytes_per_unit > 0:
                    most_units = min(most_units, (limit - bytes_of_empty) / bytes_per_unit)
        return most_units

    def micro_batch_work(self, units: float, squares: float) -> tuple[float, float, float]:
        """The work of one micro-batch of `units` units, whose sequences' squared lengths add up to `squares`.

        Returns (floating-point operations of matrix products and attention, bytes that other operations read and write,
        bytes copied between host and device).
        """
        small, large = self.simulated_sizes
        determinant = small.num_units * large.sum_of_squared_lengths - large.num_units * small.sum_of_squared_lengths
        # If all rows have one length, attention grows with the number of rows, as everything else does.
        if self.units_are_rows or not determinant:
            flops = self._interpolated(*self.flops_at_sizes, units)
        else:
            # Solve flops = flops_per_unit * units + flops_per_square * squares for the two simulated sizes.
            small_flops, large_flops = self.flops_at_sizes
            flops_per_unit = (
                small_flops * large.sum_of_squared_lengths - large_flops * small.sum_of_squared_lengths
            ) / determinant
            flops_per_square = (small.num_units * large_flops - large.num_units * small_flops) / determinant
            flops = flops_per_unit * units + flops_per_square * squares
        return (
            flops,
            self._interpolated(*self.moved_bytes_at_sizes, units),
            self._interpolated(*self.host_copy_bytes_at_sizes, units),
        )

    def all_to_all_bytes(self, all_to_all: TokenAllToAll, units: float) -> float:
        """Bytes of all calls of one of `token_all_to_alls` in a micro-batch of `units` rows or tokens."""
        return self._interpolated(*all_to_all.bytes_at_sizes, units)

    def pinned_bytes(self, units: float) -> int:
        """Bytes of pinned host memory for the offloaded inputs of blocks, in a micro-batch of `units` rows or tokens."""
        small_inputs, large_inputs = self.host_inputs_at_sizes
        return large_inputs.pinned_size(self._interpolated(small_inputs.num_bytes, large_inputs.num_bytes, units))

    def units_in_host_memory(self, limit: float) -> float:
        """The largest micro-batch, in rows or tokens, whose block inputs fit in `limit` bytes of pinned host memory.

        Inputs wait there only with `strategy.offload_activations`: infinite without it. 0 if `limit` has not a byte per tensor.
        """
        small_inputs, large_inputs = self.host_inputs_at_sizes
        num_tensors = large_inputs.num_tensors
        if not num_tensors:
            return math.inf
        # Pinned memory is allocated in powers of two: find the largest power that all tensors may have.
        most_bytes_per_tensor = int(limit // num_tensors)
        if most_bytes_per_tensor < 1:
            return 0.0
        allocated_bytes_per_tensor = 1 << (most_bytes_per_tensor.bit_length() - 1)
        allocated_bytes = num_tensors * allocated_bytes_per_tensor
        # Invert the line through the two simulated sizes.
        small_units = self.simulated_sizes[0].num_units
        large_units = self.simulated_sizes[1].num_units
        bytes_per_unit = (large_inputs.num_bytes - small_inputs.num_bytes) / (large_units - small_units)
        return large_units + (allocated_bytes - large_inputs.num_bytes) / bytes_per_unit

    def _interpolated(self, small: float, large: float, units: float) -> float:
        """The value at `units` rows or tokens, on the line through `small` and `large`, the values at the two simulated sizes."""
        small_units = self.simulated_sizes[0].num_units
        large_units = self.simulated_sizes[1].num_units
        return large + (large - small) * (units - large_units) / (large_units - small_units)


def micro_batches_to_simulate(
    built: Any, vocabulary: int, length: int, *, is_linear: bool, slices: int = 1, in_tiles: bool = False
) -> tuple[bool, list[list[int]]]:
    """The two micro-batches to simulate for a cost model, as the lengths of their sequences in tokens.

    Returns (whether the unit of a size is a row, not a token; the lengths for the smaller and for the larger size). All other
    sizes lie on the line through these two. The cases in order:

    - padded rows, or memory of attention that is not linear in the length (not `is_linear`): sequences of `length` tokens;
    - MLPs that take their tokens in tiles (`in_tiles`), which short sequences would not fill: half of `length`, and `length`;
    - else short sequences, which are simulated sooner, but fill two and three chunks of logits: the loss takes tokens in
      chunks, and the second chunk is made while the first is still live.

    `slices`: ranks that share a row.
    """
    per_document = built.data_spec.sequences_per_document
    chunk_tokens = slices * max(128, CHUNK_LOGITS // max(1, vocabulary))
    fills_chunks = chunk_tokens <= 4 * length  # else no micro-batch of a few rows fills one
    padded = built.layout is not Layout.padding_free
    if padded or not is_linear:
        documents = 1
        if fills_chunks:
            documents = math.ceil(2 * chunk_tokens / (per_document * length))
        sequences = per_document * documents
        return padded, [[length] * sequences, [length] * (sequences + per_document)]
    # From here on rows have no padding, and a micro-batch is one row with the sequences of one document.
    if in_tiles:
        return False, [[math.ceil(length / 2)] * per_document, [length] * per_document]
    if fills_chunks:
        short = 2 * chunk_tokens // per_document
        long = 3 * chunk_tokens // per_document
        return False, [[short] * per_document, [long] * per_document]
    return False, [[length] * per_document, [2 * length] * per_document]


def simulate_sizes(
    parts: StepParts,
    sizes: list[Batches],
    runtime: Runtime,
    expected: dict[StepPhase, int] | None = None,
    is_needed: Callable[[StepPhase], bool] = lambda _: True,
) -> list[SimulatedStep]:
    """Simulate a step of each size of micro-batch with one engine, after a warm-up step that creates the optimizer's state.

    `sizes`: the micro-batches of each step, smallest first. In the last step memory is also counted by kind (a tally), once a
    phase, after the operation at which the phase peaks. `expected`: the number of that operation by phase, as a guess; default:
    as at the size before. If the guess was too late for a phase that `is_needed`, the step is taken again. The model is on
    meta, and cannot be used afterwards. Raises what the engine raises, and ConfigError for what it refuses.
    """
    with fake_tensors(runtime.device):
        batches_by_size = replace_tensors_by_fakes(parts.built, sizes)
        with recording_engine(replace(parts, micro_batches=batches_by_size[0]), runtime) as recorded:
            recorded.take_step(batches_by_size[0][:1])
            steps = [recorded.take_step_and_peaks(batches) for batches in batches_by_size[:-1]]
            smaller_peaks, _ = steps[-1]
            known_operations = peak_operations(smaller_peaks)
            if expected is None:
                expected = known_operations
            else:  # the update depends on the depth alone, so it peaks where it did at the smaller size
                for phase, operation in known_operations.items():
                    if phase.name in ("update", "between"):
                        expected = {**expected, phase: operation}
            known_kinds = recorded.recorder.known_kinds()
            largest_batches = batches_by_size[-1]
            peaks, record = recorded.take_step_and_peaks(largest_batches, expected)
            # If a phase peaked before its tally, take the step again, now that the peaks are known.
            if not _tallied_at_peaks(peaks, expected, is_needed):
                recorded.recorder.restore_kinds(known_kinds)
                tallied, _ = recorded.take_step_and_peaks(largest_batches, peak_operations(peaks))
                for phase, peak in tallied.items():
                    peaks[phase].bytes_by_kind = peak.bytes_by_kind
            steps.append((peaks, record))
            return [recorded.step_result(peaks, record) for peaks, record in steps]


def _tallied_at_peaks(
    peaks: dict[StepPhase, PhasePeak], expected: dict[StepPhase, int], is_needed: Callable[[StepPhase], bool]
) -> bool:
    """Whether each needed phase was tallied at its peak: it exists, and its peak is not before the `expected` operation."""
    for phase, operation in expected.items():
        if is_needed(phase) and (phase not in peaks or peaks[phase].operation_index < operation):
            return False
    return True


def fit_cost_model(
    simulate_at_depth: Callable[
        [int, dict[StepPhase, int] | None], tuple[list[SimulatedStep], list[MicroBatchSize], bool]
    ],
    num_blocks: int,
    *,
    period: int | None,
    accumulation: int,
    local_world_size: int,
    ends: int = END_BLOCKS,
    ends_overlap: bool = False,
) -> CostModel:
    """The cost model of a step in a model of `num_blocks` blocks, from steps of two sizes in models of two depths.

    `simulate_at_depth(depth, expected)` simulates both sizes of micro-batch in a model of `depth` blocks, and returns (the
    steps, the sizes, whether they are in rows); for `expected` see `simulate_sizes`. `period`: after how many blocks their
    kinds repeat; None simulates the whole model. `accumulation`: micro-batches of a step. `local_world_size`: ranks of a host.
    `ends`: blocks at either end that may differ from those between. `ends_overlap`: whether a block may belong to both ends.
    """
    depths = shallow_depths(num_blocks, period, ends, ends_overlap=ends_overlap) if period else None
    if depths is None:  # no period, or too few blocks to extrapolate
        shallow, sizes, rows = simulate_at_depth(num_blocks, None)
        deep = shallow
        phases = [step.peak_by_phase for step in deep]
        further_periods = 0.0
        extrapolate: Callable[[int, int], int] = _as_simulated
    else:
        # Simulate two shallow models: every further block costs what the last one did.
        shallow, sizes, rows = simulate_at_depth(depths[0], None)
        # A further block changes how many bytes are live, not after which operation of a phase they are most.
        expected = peak_operations(phases_of_deeper_model(shallow[1].peak_by_phase, depths, ends))
        deep, _, _ = simulate_at_depth(depths[1], expected)
        phases = [phases_at_depth(shallow[i], deep[i], depths, num_blocks, ends) for i in range(2)]
        further_periods = (num_blocks - depths[1]) / (depths[1] - depths[0])
        extrapolate = extrapolation_to(depths, num_blocks)

    def at_full_depth(amount_of: Callable[[SimulatedStep], float]) -> tuple[float, float]:
        """An amount of the whole model, at either size."""
        small, large = (
            amount_of(deep_step) + (amount_of(deep_step) - amount_of(shallow_step)) * further_periods
            for shallow_step, deep_step in zip(shallow, deep, strict=True)
        )
        return small, large

    small_phases, large_phases = phases
    # Memory between steps, collectives and host memory do not depend on the size: those of the larger one (index 1) are taken.
    return CostModel(
        num_blocks=num_blocks,
        accumulation=accumulation,
        units_are_rows=rows,
        simulated_sizes=(sizes[0], sizes[1]),
        phase_peaks_at_sizes=(small_phases, large_phases),
        peak_candidates={
            phase: find_peak_candidates(small_phases[phase], peak) for phase, peak in large_phases.items()
        },
        resting_bytes_by_kind=extrapolate_by_key(
            shallow[1].resting_bytes_by_kind, deep[1].resting_bytes_by_kind, extrapolate
        ),
        flops_at_sizes=at_full_depth(lambda step: step.flops / accumulation),
        moved_bytes_at_sizes=at_full_depth(lambda step: _moved_before_update(step) / accumulation),
        update_bytes=at_full_depth(lambda step: step.moved_bytes_by_phase["update"])[1],
        host_copy_bytes_at_sizes=at_full_depth(lambda step: (step.bytes_to_host + step.bytes_to_device) / accumulation),
        collective_totals=extrapolate_pairs(
            _collective_totals(shallow[1], accumulation, local_world_size),
            _collective_totals(deep[1], accumulation, local_world_size),
            extrapolate,
        ),
        token_all_to_alls=_token_all_to_alls_at_depth(shallow, deep, extrapolate, accumulation, local_world_size),
        host_bytes=extrapolate(shallow[1].host_bytes, deep[1].host_bytes),
        host_inputs_at_sizes=(
            host_inputs_at_depth(shallow[0], deep[0], extrapolate),
            host_inputs_at_depth(shallow[1], deep[1], extrapolate),
        ),
    )


def _as_simulated(_shallow: int, deep: int) -> int:
    """In place of an extrapolation, if the whole model was simulated: its own amount."""
    return deep


def _moved_before_update(step: SimulatedStep) -> int:
    """Bytes that the forward and backward passes of a step read and write, outside matrix products."""
    return sum(moved for phase, moved in step.moved_bytes_by_phase.items() if phase != "update")


def find_peak_candidates(small: PhasePeak, large: PhasePeak) -> list[tuple[int, int]]:
    """Live bytes after those operations of a phase that may be its peak at some size, as (at the small, at the large size).

    `small` and `large` are the same phase at the two simulated sizes. Which operation is highest depends on the size: what a
    block keeps for its backward pass grows with the tokens, the gradients of its weights do not. An operation is a candidate if
    no other has both more bytes at the large size and more growth. The list is empty if the two sizes have different operations.
    Side effect: empties `live_after_operation` of both, which nothing needs afterwards.
    """
    candidates: list[tuple[int, int]] = []
    if len(small.live_after_operation) == len(large.live_after_operation):
        live_at_sizes = set(zip(small.live_after_operation, large.live_after_operation, strict=True))
        most_bytes_first = sorted(live_at_sizes, key=lambda small_and_large: (-small_and_large[1], small_and_large[0]))
        largest_growth = None
        for small_bytes, large_bytes in most_bytes_first:
            growth = large_bytes - small_bytes
            if largest_growth is None or growth > largest_growth:
                candidates.append((small_bytes, large_bytes))
                largest_growth = growth
    small.live_after_operation = []
    large.live_after_operation = []
    return candidates


def _collective_totals(
    step: SimulatedStep, accumulation: int, local_world_size: int
) -> dict[CollectiveKind, tuple[int, int]]:
    """(calls, bytes together) of each kind of collective on weights and gradients in a step; all-to-alls of tokens are left out.

    `accumulation`: micro-batches of the step. `local_world_size`: ranks of a host, to count the hosts of a process group.
    """
    calls: Counter[CollectiveKind] = Counter()
    size_bytes: Counter[CollectiveKind] = Counter()
    for collective in step.collectives:
        if collective.name.startswith(ALL_TO_ALL):
            continue
        if collective.phase.name in ("update", "between"):
            when = "update"
        elif collective.phase.micro_batch_index == accumulation - 1:
            when = "last"
        else:
            when = "each"
        hosts = len({rank // local_world_size for rank in collective.ranks})
        key = collective.name, len(collective.ranks), hosts, collective.dtype, when
        calls[key] += 1
        size_bytes[key] += collective.num_bytes
    return {key: (calls[key], size_bytes[key]) for key in calls}


def _token_all_to_alls(step: SimulatedStep, accumulation: int) -> dict[int, tuple[int, int]]:
    """(calls, bytes together) of what ranks exchange for the tokens of one micro-batch, by the number of ranks of a group."""
    calls: Counter[int] = Counter()
    size_bytes: Counter[int] = Counter()
    for collective in step.collectives:
        if collective.name.startswith(ALL_TO_ALL):
            calls[len(collective.ranks)] += 1
            size_bytes[len(collective.ranks)] += collective.num_bytes
    return {ranks: (calls[ranks] // accumulation, size_bytes[ranks] // accumulation) for ranks in calls}


def most_hosts_of_a_group(degree: int, local_world_size: int) -> int:
    """Hosts of the group that lies on most of them, if `degree` neighbouring ranks form a group.

    Hosts of six ranks have groups of four on one host and across two. Every step waits for the group across two.
    """
    # The first ranks of groups, counted within their hosts, are all multiples of the greatest common divisor. A group with the
    # largest of them crosses most hosts.
    largest_first_rank = local_world_size - math.gcd(degree, local_world_size)
    last_rank = largest_first_rank + degree - 1
    return last_rank // local_world_size + 1


def _token_all_to_alls_at_depth(
    shallow: list[SimulatedStep],
    deep: list[SimulatedStep],
    extrapolate: Callable[[int, int], int],
    accumulation: int,
    local_world_size: int,
) -> tuple[TokenAllToAll, ...]:
    """The all-to-alls of tokens in a micro-batch in the whole model, from steps of two sizes (the lists) at two depths."""
    all_to_alls_by_size: list[dict[int, tuple[int, int]]] = []
    for shallow_step, deep_step in zip(shallow, deep, strict=True):
        shallow_all_to_alls = _token_all_to_alls(shallow_step, accumulation)
        deep_all_to_alls = _token_all_to_alls(deep_step, accumulation)
        all_to_alls_by_size.append(extrapolate_pairs(shallow_all_to_alls, deep_all_to_alls, extrapolate))
    small, large = all_to_alls_by_size
    all_to_alls = []
    for ranks, (calls, large_bytes) in large.items():
        hosts = most_hosts_of_a_group(ranks, local_world_size)
        all_to_alls.append(TokenAllToAll(ranks, hosts, calls, (small[ranks][1], large_bytes)))
    return tuple(all_to_alls)
