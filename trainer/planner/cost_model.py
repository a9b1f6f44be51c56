"""The cost model of a step: memory, FLOPs and traffic of one rank, for every size of micro-batch at once.

Each amount is a straight line in the size of the micro-batch, given by its values at two simulated sizes
(`trainer/planner/cost_model_fit.py`). `tests/planner/test_cost_model.py` compares it with the step itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from strategies.pinned_memory import HostTensors
from strategies.tensor_inventory import MemoryKind
from trainer.planner.memory_tracker import PhasePeak, StepPhase

ALL_TO_ALL = "alltoall"
"""How the names of collectives begin by which ranks exchange slices of rows for heads, or send tokens to their experts."""


class CollectiveTiming(StrEnum):
    """In which part of a step a collective runs."""

    each_micro_batch = "each"
    """In each micro-batch but the last."""
    last_micro_batch = "last"
    """In the last micro-batch, which also reduces the gradients if that is deferred."""
    update = "update"
    """In the optimizer's update or after it, where no computation hides it."""


class CollectiveKind(NamedTuple):
    """What the collectives have in common that a cost model counts together."""

    name: str
    """The operation, such as `allgather_base` or `allreduce`."""
    num_ranks: int
    """Ranks of the process group."""
    num_hosts: int
    """Hosts on which these ranks run."""
    dtype: str
    when: CollectiveTiming


class CollectiveTotal(NamedTuple):
    """All collectives of one kind in a step."""

    num_calls: int
    num_bytes: int
    """Bytes of all calls together, each counted by its largest tensor."""


class BytesAtSizes(NamedTuple):
    """An amount of memory or traffic at the two simulated sizes of micro-batch, which give its line."""

    small: int
    large: int


class MicroBatchWork(NamedTuple):
    """What one micro-batch computes and moves."""

    flops: float
    """Floating-point operations of matrix products and attention, those recomputed included."""
    moved_bytes: float
    """Bytes that all other operations read and write in device memory: they are bound by memory bandwidth."""
    host_copy_bytes: float
    """Bytes copied between host and device."""


@dataclass(frozen=True, slots=True)
class TokenAllToAll:
    """What one rank sends to the others of its group, and gets from them, for the tokens of one micro-batch.

    The ranks share rows (`parallel.sequence`) or the experts of a layer (`parallel.experts`). Unlike the collectives on weights
    and gradients it grows with the tokens, and attention or the experts wait for it.
    """

    num_ranks: int
    num_hosts: int
    num_calls: int
    bytes_at_sizes: BytesAtSizes
    """Bytes of all calls, with the part that a rank keeps. Of each call the larger of what is sent and what arrives."""


@dataclass(frozen=True, slots=True)
class MicroBatchSize:
    """The size of a simulated micro-batch."""

    num_rows_or_tokens: int
    """Rows if `CostModel.size_is_in_rows`; else tokens."""
    sum_of_squared_lengths: int
    """Sum of the squared lengths of its sequences, with which the FLOPs of attention grow."""


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters a model has, all ranks together."""

    num_parameters: int
    num_trained: int
    num_trained_expert_parallel: int
    """How many of the trained ones are in experts distributed over ranks (`parallel.experts`)."""


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
    """Memory and work of one rank's step of `accumulation` micro-batches, at any size of these.

    Two sizes were simulated. An amount at another size lies on the straight line through its two values, since live bytes,
    traffic and FLOPs (but for those of attention) grow in proportion to the rows or tokens. The peak memory of a step is the
    highest of such lines: one for each phase of the step, and for each operation of a phase that may be its peak.
    """

    num_blocks: int
    accumulation: int
    """Micro-batches that were simulated, at most two: a third holds no more than the second."""
    size_is_in_rows: bool
    """Whether sizes are numbers of rows, all as long as the longest sequence; else they are numbers of tokens."""
    simulated_sizes: tuple[MicroBatchSize, MicroBatchSize]
    """The smaller and the larger size that were simulated."""
    phase_peaks_at_sizes: tuple[dict[StepPhase, PhasePeak], dict[StepPhase, PhasePeak]]
    """Peak memory of each phase in the whole model, at the smaller and at the larger size."""
    peak_candidates: dict[StepPhase, list[BytesAtSizes]]
    """By phase, live bytes after each operation that may be the highest of the phase at some size."""
    resting_bytes_by_kind: dict[MemoryKind, int]
    """Bytes between steps."""
    flops_at_sizes: tuple[float, float]
    """Of one micro-batch of either size, those recomputed included."""
    moved_bytes_at_sizes: tuple[float, float]
    """Bytes that operations other than products read and write in one micro-batch of either size."""
    update_bytes: float
    """Bytes that operations other than products read and write in the update."""
    host_copy_bytes_at_sizes: tuple[float, float]
    """Bytes between host and device in one micro-batch of either size."""
    collective_totals: dict[CollectiveKind, CollectiveTotal]
    """Collectives on weights and gradients in a step; `token_all_to_alls` are counted apart, since they grow with the size."""
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
    """How many of the trained ones are in experts that are distributed over ranks."""
    num_vocabulary_rows: int = 0
    """Rows of the model's vocabulary."""
    layout: str = ""
    """How documents lie in a row."""
    notes: tuple[str, ...] = ()
    """What was chosen while the model was built."""
    needs_single_rows: bool = False
    """Whether the model is right for one row at a time only."""

    def memory_peak_at(self, num_rows_or_tokens: float) -> MemoryPeak:
        """How much device memory a rank's step needs at most, with micro-batches of so many rows (`size_is_in_rows`) or tokens.

        A phase is a part of a step, such as the forward pass of block 3. Its live bytes at a size lie on the line through those
        of the two simulated sizes, and the phase with the most bytes is the step's peak.
        """
        small_phases, large_phases = self.phase_peaks_at_sizes
        bytes_by_phase: dict[StepPhase, float] = {}
        for phase, large_peak in large_phases.items():
            # At another size, another operation of the phase may be its highest.
            simulated_peak = BytesAtSizes(small_phases[phase].total_bytes, large_peak.total_bytes)
            candidates = [simulated_peak, *self.peak_candidates[phase]]
            bytes_by_phase[phase] = max(self._on_line(small, large, num_rows_or_tokens) for small, large in candidates)
        peak_phase = max(bytes_by_phase, key=lambda phase: bytes_by_phase[phase])
        peak_bytes = bytes_by_phase[peak_phase]
        # The kinds are those of the larger size. What grows from there are activations, because logits come in chunks.
        bytes_by_kind = dict(large_phases[peak_phase].bytes_by_kind)
        growth = peak_bytes - large_phases[peak_phase].total_bytes
        bytes_by_kind[MemoryKind.activations] = bytes_by_kind.get(MemoryKind.activations, 0) + round(growth)
        # Fitted phases count the last blocks from the end (-1): for readers, a block has its index from the start.
        return MemoryPeak(round(peak_bytes), peak_phase.with_block_from_start(self.num_blocks), bytes_by_kind)

    def max_rows_or_tokens_on_device(self, limit_bytes: float) -> float:
        """The largest micro-batch, in rows (if `size_is_in_rows`) or tokens, whose step fits in `limit_bytes` of device memory.

        The inverse of `memory_peak_at`, and not rounded. 0 if not even an empty micro-batch fits; infinite if no phase takes more
        memory with a larger one.
        """
        small_phases, large_phases = self.phase_peaks_at_sizes
        # Each line (of a phase's peak, or of an operation that may become it) reaches the limit at some size. The lowest counts.
        max_rows_or_tokens = float("inf")
        for phase, large_peak in large_phases.items():
            simulated_peak = BytesAtSizes(small_phases[phase].total_bytes, large_peak.total_bytes)
            if self._on_line(*simulated_peak, num_rows_or_tokens=0) > limit_bytes:
                return 0.0
            for small, large in [simulated_peak, *self.peak_candidates[phase]]:
                bytes_of_empty = self._on_line(small, large, num_rows_or_tokens=0)
                bytes_per_row_or_token = (large - bytes_of_empty) / self.simulated_sizes[1].num_rows_or_tokens
                if bytes_per_row_or_token > 0:
                    max_rows_or_tokens = min(
                        max_rows_or_tokens, (limit_bytes - bytes_of_empty) / bytes_per_row_or_token
                    )
        return max_rows_or_tokens

    def micro_batch_work(self, num_rows_or_tokens: float, sum_of_squared_lengths: float) -> MicroBatchWork:
        """The FLOPs and the traffic of one micro-batch of so many rows (if `size_is_in_rows`) or tokens, to estimate its time.

        `sum_of_squared_lengths`: of its sequences. The FLOPs of attention are proportional to it, all others to the tokens. So
        two unknown rates are found from the FLOPs of the two simulated sizes.
        """
        small, large = self.simulated_sizes
        small_flops, large_flops = self.flops_at_sizes
        determinant = (
            small.num_rows_or_tokens * large.sum_of_squared_lengths
            - large.num_rows_or_tokens * small.sum_of_squared_lengths
        )
        # If all rows have one length, attention grows with the number of rows, as everything else does. Without a determinant,
        # both sizes have the same squares per token, so that the two rates cannot be told apart.
        if self.size_is_in_rows or not determinant:
            flops = self._on_line(small_flops, large_flops, num_rows_or_tokens)
        else:
            # Solve flops = flops_per_token * tokens + flops_per_square * sum_of_squared_lengths for the two simulated sizes.
            flops_per_token = (
                small_flops * large.sum_of_squared_lengths - large_flops * small.sum_of_squared_lengths
            ) / determinant
            flops_per_square = (
                small.num_rows_or_tokens * large_flops - large.num_rows_or_tokens * small_flops
            ) / determinant
            flops = flops_per_token * num_rows_or_tokens + flops_per_square * sum_of_squared_lengths
        return MicroBatchWork(
            flops=flops,
            moved_bytes=self._on_line(*self.moved_bytes_at_sizes, num_rows_or_tokens),
            host_copy_bytes=self._on_line(*self.host_copy_bytes_at_sizes, num_rows_or_tokens),
        )

    def all_to_all_bytes(self, all_to_all: TokenAllToAll, num_rows_or_tokens: float) -> float:
        """Bytes of all calls of one of `token_all_to_alls` in a micro-batch of so many rows or tokens."""
        return self._on_line(*all_to_all.bytes_at_sizes, num_rows_or_tokens)

    def pinned_bytes(self, num_rows_or_tokens: float) -> int:
        """Bytes of pinned host memory for the offloaded inputs of blocks, in a micro-batch of so many rows or tokens."""
        small_inputs, large_inputs = self.host_inputs_at_sizes
        return large_inputs.pinned_size(
            self._on_line(small_inputs.num_bytes, large_inputs.num_bytes, num_rows_or_tokens)
        )

    def max_rows_or_tokens_on_host(self, limit_bytes: float) -> float:
        """The largest micro-batch, in rows or tokens, whose offloaded block inputs fit in `limit_bytes` of host memory.

        With `strategy.offload_activations`, the input of each recomputed block waits in pinned host memory for the backward pass:
        one tensor for each, taken to be of one size. Infinite without it; 0 if `limit_bytes` has not a byte per tensor.
        """
        small_inputs, large_inputs = self.host_inputs_at_sizes
        num_tensors = large_inputs.num_tensors
        if not num_tensors:
            return math.inf
        # Pinned memory is allocated in powers of two: find the largest power that all tensors may have.
        most_bytes_per_tensor = int(limit_bytes // num_tensors)
        if most_bytes_per_tensor < 1:
            return 0.0
        allocated_bytes_per_tensor = 1 << (most_bytes_per_tensor.bit_length() - 1)
        allocated_bytes = num_tensors * allocated_bytes_per_tensor
        # Invert the line through the two simulated sizes. It rises, because an input holds a vector for each token.
        small_size = self.simulated_sizes[0].num_rows_or_tokens
        large_size = self.simulated_sizes[1].num_rows_or_tokens
        bytes_per_row_or_token = (large_inputs.num_bytes - small_inputs.num_bytes) / (large_size - small_size)
        return large_size + (allocated_bytes - large_inputs.num_bytes) / bytes_per_row_or_token

    def _on_line(self, small: float, large: float, num_rows_or_tokens: float) -> float:
        """An amount at another size: the straight line through `small` and `large`, its values at the two simulated sizes.

        Outside of the two sizes the line goes on (it extrapolates).
        """
        small_size = self.simulated_sizes[0].num_rows_or_tokens
        large_size = self.simulated_sizes[1].num_rows_or_tokens
        return large + (large - small) * (num_rows_or_tokens - large_size) / (large_size - small_size)
