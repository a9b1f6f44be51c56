"""Fits a cost model to simulated steps: two sizes of micro-batch, in models of two depths.

Live bytes, traffic and FLOPs of each step phase are linear in the size and in the number of blocks. So the four corners
give any depth and any size: first each size is extrapolated to the whole model, and then the two sizes give a line.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from strategies.runtime import Runtime
from strategies.simulation import fake_tensors
from trainer.data.config import Layout
from trainer.losses.next_token import CHUNK_LOGITS
from trainer.planner.cost_model import (
    ALL_TO_ALL,
    BytesAtSizes,
    CollectiveKind,
    CollectiveTiming,
    CollectiveTotal,
    CostModel,
    MicroBatchSize,
    ParameterCounts,
    TokenAllToAll,
)
from trainer.planner.depth_extrapolation import (
    DEFAULT_END_BLOCKS,
    DepthExtrapolation,
    extrapolate_by_key,
    host_inputs_at_depth,
    phases_at_depth,
    phases_of_deeper_model,
    shallow_depths,
)
from trainer.planner.fake_tensors import replace_tensors_by_fakes
from trainer.planner.memory_tracker import PhasePeak, StepPhase
from trainer.planner.simulate import RecordedEngine, RecordedStep, SimulatedStep, StepParts, recording_engine
from trainer.planner.step_recorder import Collective
from trainer.step import BuiltModel

MIN_CHUNK_TOKENS = 128
"""Fewest tokens that are simulated as a chunk. The loss takes fewer with a huge vocabulary, and several chunks then."""
MAX_ROWS_TO_FILL_A_CHUNK = 4
"""Rows above which it takes too long to simulate micro-batches that fill a chunk of logits."""


class SizesToSimulate(NamedTuple):
    """The two micro-batches to simulate for a cost model, each as the lengths of its sequences in tokens."""

    size_is_in_rows: bool
    """Whether sizes between and beyond the two are numbers of rows; else numbers of tokens."""
    small_lengths: list[int]
    large_lengths: list[int]

    def sizes(self, sequences_per_document: int) -> tuple[MicroBatchSize, MicroBatchSize]:
        """The sizes of the two micro-batches, in rows (a document each) or in tokens."""
        return (
            self._size_of(self.small_lengths, sequences_per_document),
            self._size_of(self.large_lengths, sequences_per_document),
        )

    def _size_of(self, lengths: list[int], sequences_per_document: int) -> MicroBatchSize:
        """The size of the micro-batch with sequences of `lengths` tokens."""
        num_documents = len(lengths) // sequences_per_document
        return MicroBatchSize(
            num_rows_or_tokens=num_documents if self.size_is_in_rows else sum(lengths),
            sum_of_squared_lengths=sum(tokens**2 for tokens in lengths),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationOfSizes:
    """Steps of one model at two sizes of micro-batch, and what a cost model says of the model itself."""

    small: SimulatedStep
    large: SimulatedStep
    sizes: tuple[MicroBatchSize, MicroBatchSize]
    size_is_in_rows: bool
    parameter_counts: ParameterCounts
    num_vocabulary_rows: int
    layout: str
    notes: tuple[str, ...]
    needs_single_rows: bool
    """Whether the model is right for one row at a time only."""


def micro_batches_to_simulate(
    built: BuiltModel, vocabulary: int, length: int, *, is_linear: bool, ranks_per_row: int = 1, in_tiles: bool = False
) -> SizesToSimulate:
    """Choose the two micro-batches to simulate, through whose memory and work a cost model draws a line for all other sizes.

    Both must be on the straight part of that line, and as small as possible, since a larger one takes longer to simulate:

    - padded rows, or memory of attention that is not linear in the length (not `is_linear`): sequences of `length` tokens;
    - MLPs that take their tokens in tiles (`in_tiles`), which short sequences would not fill: half of `length`, and `length`;
    - else short sequences that fill two and three chunks of logits: the loss takes tokens in chunks, and the second chunk is
      made while the first is still live. If chunks are too large for that: `length` and twice `length`.

    `built`: of it, the layout of rows and the sequences of a document count. `vocabulary`: its number of rows. `length`: tokens
    of the run's sequences. `ranks_per_row`: each takes a slice of the row, and chunks of its own.
    """
    # A document is one sequence, or two where an objective compares answers; it is never split over micro-batches.
    per_document = built.data_spec.sequences_per_document
    chunk_tokens = ranks_per_row * max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // max(1, vocabulary))
    fills_chunks = chunk_tokens <= MAX_ROWS_TO_FILL_A_CHUNK * length
    is_padded = built.layout is not Layout.padding_free
    if is_padded or not is_linear:
        documents = 1
        if fills_chunks:
            documents = math.ceil(2 * chunk_tokens / (per_document * length))
        sequences = per_document * documents
        return SizesToSimulate(
            size_is_in_rows=is_padded,
            small_lengths=[length] * sequences,
            large_lengths=[length] * (sequences + per_document),
        )
    # From here on rows have no padding, and a micro-batch is one row with the sequences of one document.
    if in_tiles:
        small_length = math.ceil(length / 2)
        large_length = length
    elif fills_chunks:
        small_length = 2 * chunk_tokens // per_document
        large_length = 3 * chunk_tokens // per_document
    else:
        small_length = length
        large_length = 2 * length
    return SizesToSimulate(
        size_is_in_rows=False,
        small_lengths=[small_length] * per_document,
        large_lengths=[large_length] * per_document,
    )


def simulate_two_sizes(
    parts: StepParts,
    batches_of_sizes: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    runtime: Runtime,
    expected_peaks: dict[StepPhase, int] | None = None,
    is_needed: Callable[[StepPhase], bool] = lambda _: True,
) -> tuple[SimulatedStep, SimulatedStep]:
    """Simulate a step of each of two sizes of micro-batch with one engine, so that the engine is built only once.

    A warm-up step before them creates the optimizer's state, which every later step has.

    `batches_of_sizes`: the micro-batches of the step of the smaller, and of the larger size. `expected_peaks`: by phase of a
    step, the number of the operation after which its memory is probably highest; None: the same as at the smaller size.
    `is_needed`: whether the peak of a phase must be known by kind of memory.

    The model of `parts` is on meta, and cannot be used afterwards. Raises what the engine raises, and ConfigError for what it
    refuses.
    """
    with fake_tensors(runtime.device):
        small_batches, large_batches = replace_tensors_by_fakes(parts.built, [*batches_of_sizes])
        with recording_engine(replace(parts, micro_batches=small_batches), runtime) as recorded:
            recorded.take_step(small_batches[:1])  # the warm-up
            small = recorded.take_step(small_batches)
            small_peaks = small.peak_operations()
            if expected_peaks is None:
                expected_peaks = small_peaks
            else:  # the update depends on the depth alone, so it peaks where it did at the smaller size
                outside_passes = {phase: small_peaks[phase] for phase in small_peaks if not phase.is_in_pass}
                expected_peaks = {**expected_peaks, **outside_passes}
            large = _take_step_by_kind(recorded, large_batches, expected_peaks, is_needed)
            return recorded.step_result(small), recorded.step_result(large)


def _take_step_by_kind(
    recorded: RecordedEngine,
    batches: list[dict[str, Any]],
    expected_peaks: dict[StepPhase, int],
    is_needed: Callable[[StepPhase], bool],
) -> RecordedStep:
    """Take a simulated step, and count by kind (parameters, activations, ...) the memory at the peak of each phase.

    To count by kind after each operation would take too long. So it is done where a phase is expected to peak, and after any
    higher operation that follows. If a peak came earlier than expected, in a phase that `is_needed`, the step is taken once more,
    now that the peaks are known.

    `expected_peaks`: by phase, the number of that operation within the phase, from 0.
    """
    # The tally tells more precisely what tensors hold. The second step must begin with what was known before the first.
    known_kinds = recorded.recorder.known_kinds()
    step = recorded.take_step(batches, expected_peaks)
    if not _were_tallied_at_peaks(step.peaks, expected_peaks, is_needed):
        recorded.recorder.restore_kinds(known_kinds)
        second_step = recorded.take_step(batches, step.peak_operations())
        for phase, peak in second_step.peaks.items():
            step.peaks[phase].bytes_by_kind = peak.bytes_by_kind
    return step


def _were_tallied_at_peaks(
    peaks: dict[StepPhase, PhasePeak], expected_peaks: dict[StepPhase, int], is_needed: Callable[[StepPhase], bool]
) -> bool:
    """Whether memory was counted by kind at the peak of each needed phase, so that the step need not be repeated.

    It was if the phase exists, and its peak is at the expected operation or after it.
    """
    for phase, operation in expected_peaks.items():
        if is_needed(phase) and (phase not in peaks or peaks[phase].operation_index < operation):
            return False
    return True


def fit_cost_model(
    simulate_at_depth: Callable[[int, dict[StepPhase, int] | None], SimulationOfSizes],
    num_blocks: int,
    *,
    period: int | None,
    accumulation: int,
    local_world_size: int,
    num_end_blocks: int = DEFAULT_END_BLOCKS,
    ends_may_overlap: bool = False,
) -> CostModel:
    """Fit the cost model of a step in a model of `num_blocks` blocks, from simulated steps in two models with fewer blocks.

    In each, steps of two sizes of micro-batch are simulated. First each size is extrapolated to all blocks, then a line through
    the two gives every other size.

    `simulate_at_depth(depth, expected_peaks)`: simulates both sizes in a model of `depth` blocks (see `simulate_two_sizes`).
    `period`: after how many blocks their kinds repeat; None simulates the whole model. `accumulation`: micro-batches of a step.
    `local_world_size`: ranks of a host. `num_end_blocks`: blocks at either end of a model that may take other memory than those
    between. `ends_may_overlap`: whether a block may belong to both ends.
    """
    depths = None
    if period:
        depths = shallow_depths(num_blocks, period, num_end_blocks, ends_may_overlap=ends_may_overlap)
    if depths is None:  # no period, or too few blocks to extrapolate: the whole model is simulated
        shallow = deep = simulate_at_depth(num_blocks, None)
        extrapolation = DepthExtrapolation(shallow_depth=num_blocks, deep_depth=num_blocks, num_blocks=num_blocks)
        small_phases = deep.small.peak_by_phase
        large_phases = deep.large.peak_by_phase
    else:
        # Simulate two shallow models: every further block costs what the last one did.
        extrapolation = DepthExtrapolation(*depths, num_blocks=num_blocks)
        shallow = simulate_at_depth(extrapolation.shallow_depth, None)
        # A further block changes how many bytes are live, not after which operation of a phase they are most.
        peaks_of_deep = phases_of_deeper_model(shallow.large.peak_by_phase, depths, num_end_blocks)
        expected_peaks = {phase: peak.operation_index for phase, peak in peaks_of_deep.items()}
        deep = simulate_at_depth(extrapolation.deep_depth, expected_peaks)
        small_phases = phases_at_depth(shallow.small, deep.small, extrapolation, num_end_blocks)
        large_phases = phases_at_depth(shallow.large, deep.large, extrapolation, num_end_blocks)
    return _cost_model_of_depths(
        shallow, deep, extrapolation, (small_phases, large_phases), accumulation, local_world_size
    )


def _cost_model_of_depths(
    shallow: SimulationOfSizes,
    deep: SimulationOfSizes,
    extrapolation: DepthExtrapolation,
    phase_peaks_at_sizes: tuple[dict[StepPhase, PhasePeak], dict[StepPhase, PhasePeak]],
    accumulation: int,
    local_world_size: int,
) -> CostModel:
    """Assemble the cost model of the whole model: extrapolates each amount of the two simulated depths to all its blocks.

    `shallow`, `deep`: the simulations of the model with fewer and with more blocks; the same one twice if the whole model was
    simulated. `phase_peaks_at_sizes`: the peaks of the whole model, extrapolated already. `accumulation`: micro-batches of a
    step. `local_world_size`: ranks of a host.
    """
    # Memory between steps, collectives on weights and host memory do not depend on the size of micro-batches: those of the
    # larger size are taken below.

    def at_full_depth(amount_of: Callable[[SimulatedStep], float]) -> tuple[float, float]:
        """An amount of a step of the whole model, at either size."""
        small = extrapolation.amount(amount_of(shallow.small), amount_of(deep.small))
        large = extrapolation.amount(amount_of(shallow.large), amount_of(deep.large))
        return small, large

    small_phases, large_phases = phase_peaks_at_sizes
    counts = _parameter_counts_at_depth(shallow.parameter_counts, deep.parameter_counts, extrapolation)
    return CostModel(
        num_blocks=extrapolation.num_blocks,
        accumulation=accumulation,
        size_is_in_rows=shallow.size_is_in_rows,
        simulated_sizes=shallow.sizes,
        phase_peaks_at_sizes=phase_peaks_at_sizes,
        peak_candidates={
            phase: find_peak_candidates(small_phases[phase], peak) for phase, peak in large_phases.items()
        },
        resting_bytes_by_kind=extrapolate_by_key(
            shallow.large.resting_bytes_by_kind, deep.large.resting_bytes_by_kind, extrapolation
        ),
        flops_at_sizes=at_full_depth(lambda step: step.flops / accumulation),
        moved_bytes_at_sizes=at_full_depth(lambda step: _moved_before_update(step) / accumulation),
        update_bytes=at_full_depth(lambda step: step.moved_bytes_by_phase["update"])[1],
        host_copy_bytes_at_sizes=at_full_depth(lambda step: (step.bytes_to_host + step.bytes_to_device) / accumulation),
        collective_totals=_extrapolate_totals(
            _collective_totals(shallow.large.collectives, accumulation, local_world_size),
            _collective_totals(deep.large.collectives, accumulation, local_world_size),
            extrapolation,
        ),
        token_all_to_alls=_token_all_to_alls_at_depth(shallow, deep, extrapolation, accumulation, local_world_size),
        host_bytes=extrapolation.whole_amount(shallow.large.host_bytes, deep.large.host_bytes),
        host_inputs_at_sizes=(
            host_inputs_at_depth(shallow.small, deep.small, extrapolation),
            host_inputs_at_depth(shallow.large, deep.large, extrapolation),
        ),
        num_parameters=counts.num_parameters,
        num_trained_parameters=counts.num_trained,
        num_trained_expert_parameters=counts.num_trained_expert_parallel,
        num_vocabulary_rows=deep.num_vocabulary_rows,
        layout=deep.layout,
        notes=deep.notes,
        needs_single_rows=deep.needs_single_rows,
    )


def _parameter_counts_at_depth(
    shallow: ParameterCounts, deep: ParameterCounts, extrapolation: DepthExtrapolation
) -> ParameterCounts:
    """Extrapolate the numbers of parameters to the whole model, from those of the two models with fewer blocks."""
    return ParameterCounts(
        num_parameters=extrapolation.whole_amount(shallow.num_parameters, deep.num_parameters),
        num_trained=extrapolation.whole_amount(shallow.num_trained, deep.num_trained),
        num_trained_expert_parallel=extrapolation.whole_amount(
            shallow.num_trained_expert_parallel, deep.num_trained_expert_parallel
        ),
    )


def _moved_before_update(step: SimulatedStep) -> int:
    """Bytes that the forward and backward passes of a step read and write, outside matrix products."""
    return sum(moved for phase, moved in step.moved_bytes_by_phase.items() if phase != "update")


def find_peak_candidates(small: PhasePeak, large: PhasePeak) -> list[BytesAtSizes]:
    """Find the operations of a phase whose memory may be its highest at some larger micro-batch: their live bytes at both sizes.

    `small` and `large` are the same phase at the two simulated sizes. Which operation is highest depends on the size: what a
    block keeps for its backward pass grows with the tokens, the gradients of its weights do not. An operation is a candidate if
    no other has both more bytes at the large size and more growth: [(10, 20), (2, 18)] of [(10, 20), (2, 18), (9, 17)].

    The list is empty if the two sizes have different operations. Empties `live_after_operation` of both phases, which may be
    long, and which nothing needs afterwards.
    """
    candidates: list[BytesAtSizes] = []
    if len(small.live_after_operation) == len(large.live_after_operation):
        live_at_sizes = set(zip(small.live_after_operation, large.live_after_operation, strict=True))
        most_bytes_first = sorted(live_at_sizes, key=lambda small_and_large: (-small_and_large[1], small_and_large[0]))
        largest_growth = None
        for small_bytes, large_bytes in most_bytes_first:
            growth = large_bytes - small_bytes
            if largest_growth is None or growth > largest_growth:
                candidates.append(BytesAtSizes(small_bytes, large_bytes))
                largest_growth = growth
    small.live_after_operation = []
    large.live_after_operation = []
    return candidates


def _extrapolate_totals(
    shallow: dict[Any, CollectiveTotal], deep: dict[Any, CollectiveTotal], extrapolation: DepthExtrapolation
) -> dict[Any, CollectiveTotal]:
    """Extrapolate how often collectives are called, and on how many bytes, from two shallow models to the whole model.

    The keys of the dicts are kinds of collectives, or sizes of groups. A kind that one of the two models lacks has no calls in
    it; one that has no calls in the whole model is left out.
    """
    none_of_kind = CollectiveTotal(num_calls=0, num_bytes=0)
    extrapolated = {}
    for kind in dict.fromkeys((*deep, *shallow)):
        shallow_total = shallow.get(kind, none_of_kind)
        deep_total = deep.get(kind, none_of_kind)
        num_calls = extrapolation.whole_amount(shallow_total.num_calls, deep_total.num_calls)
        if num_calls:
            num_bytes = extrapolation.whole_amount(shallow_total.num_bytes, deep_total.num_bytes)
            extrapolated[kind] = CollectiveTotal(num_calls, num_bytes)
    return extrapolated


def _collective_totals(
    collectives: list[Collective], accumulation: int, local_world_size: int
) -> dict[CollectiveKind, CollectiveTotal]:
    """Count the collectives on weights and gradients in a simulated step by kind, to estimate how long they take.

    All-to-alls of tokens are left out: they grow with the micro-batch, and `_token_all_to_alls` counts them. `accumulation`:
    micro-batches of the step. `local_world_size`: ranks of a host, to count the hosts of a process group.
    """
    calls: Counter[CollectiveKind] = Counter()
    size_bytes: Counter[CollectiveKind] = Counter()
    for collective in collectives:
        if collective.name.startswith(ALL_TO_ALL):
            continue
        if not collective.phase.is_in_pass:
            when = CollectiveTiming.update
        elif collective.phase.micro_batch_index == accumulation - 1:
            when = CollectiveTiming.last_micro_batch
        else:
            when = CollectiveTiming.each_micro_batch
        kind = CollectiveKind(
            name=collective.name,
            num_ranks=len(collective.ranks),
            num_hosts=len({rank // local_world_size for rank in collective.ranks}),
            dtype=collective.dtype,
            when=when,
        )
        calls[kind] += 1
        size_bytes[kind] += collective.num_bytes
    return {kind: CollectiveTotal(calls[kind], size_bytes[kind]) for kind in calls}


def _token_all_to_alls(collectives: list[Collective], accumulation: int) -> dict[int, CollectiveTotal]:
    """Count the all-to-alls of one micro-batch, by the number of ranks in their group: {4: CollectiveTotal(64, 1.2e9)}, say.

    By these, ranks exchange slices of rows for heads (`parallel.sequence`), or send tokens to their experts. `collectives`: those
    of a step of `accumulation` micro-batches.
    """
    calls: Counter[int] = Counter()
    size_bytes: Counter[int] = Counter()
    for collective in collectives:
        if collective.name.startswith(ALL_TO_ALL):
            calls[len(collective.ranks)] += 1
            size_bytes[len(collective.ranks)] += collective.num_bytes
    return {ranks: CollectiveTotal(calls[ranks] // accumulation, size_bytes[ranks] // accumulation) for ranks in calls}


def _token_all_to_alls_at_depth(
    shallow: SimulationOfSizes,
    deep: SimulationOfSizes,
    extrapolation: DepthExtrapolation,
    accumulation: int,
    local_world_size: int,
) -> tuple[TokenAllToAll, ...]:
    """Extrapolate the all-to-alls of a micro-batch to the whole model: one entry for each number of ranks in a group.

    Their bytes are given at both simulated sizes, since they grow with the tokens. `shallow`, `deep`: the simulations of the two
    depths. `accumulation`: micro-batches of a simulated step. `local_world_size`: ranks of a host.
    """
    small_totals = _extrapolate_totals(
        _token_all_to_alls(shallow.small.collectives, accumulation),
        _token_all_to_alls(deep.small.collectives, accumulation),
        extrapolation,
    )
    large_totals = _extrapolate_totals(
        _token_all_to_alls(shallow.large.collectives, accumulation),
        _token_all_to_alls(deep.large.collectives, accumulation),
        extrapolation,
    )
    all_to_alls = []
    for num_ranks, large_total in large_totals.items():
        all_to_alls.append(
            TokenAllToAll(
                num_ranks=num_ranks,
                num_hosts=most_hosts_of_a_group(num_ranks, local_world_size),
                num_calls=large_total.num_calls,
                bytes_at_sizes=BytesAtSizes(small_totals[num_ranks].num_bytes, large_total.num_bytes),
            )
        )
    return tuple(all_to_alls)


def most_hosts_of_a_group(group_size: int, local_world_size: int) -> int:
    """On how many hosts the ranks of a group are, if each `group_size` neighbouring ranks form one; the most of any group.

    Every step waits for the group on most hosts. On hosts of six ranks (`local_world_size`), groups of four are on one host
    (ranks 0 to 3) or two (4 to 7): 2.
    """
    # The first ranks of groups, counted within their hosts, are all multiples of the greatest common divisor (0, 4 and 2 for
    # groups of four on hosts of six). A group that begins at the largest of them crosses most hosts.
    largest_first_rank = local_world_size - math.gcd(group_size, local_world_size)
    last_rank = largest_first_rank + group_size - 1
    return last_rank // local_world_size + 1
