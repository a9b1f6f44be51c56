"""Sequence-parallel groups, and the two collectives with which their ranks compute one row together.

`parallel.sequence=n` makes groups of `n` neighbouring ranks. The ranks of a group read the same documents and hold one slice
of their tokens each. Attention needs all tokens at once, so it exchanges slices for heads (`AllToAll`), as in DeepSpeed
Ulysses (Jacobs et al. 2023, arXiv:2309.14509): each rank then attends over the whole row with some of the heads.

Strategies need not know of it. They average gradients over all ranks as always, which is correct because every rank returns its
share of each sum, and because the backward passes of the collectives here are their exact adjoints.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from strategies.runtime import Runtime
from strategies.simulation import real_tensors


class _SequenceGroup(NamedTuple):
    """The process group of the ranks that share this rank's rows."""

    group: Any
    all_ranks: Any
    """The group of all ranks at the time. If the job has another one now, `group` belongs to a job that has ended."""


_SEQUENCE_GROUPS: dict[int, _SequenceGroup] = {}
"""This rank's group for each degree of sequence parallelism that was set up."""


def with_sequence_parallelism(runtime: Runtime, sequence_parallel_size: int) -> Runtime:
    """Set up sequence parallelism: `sequence_parallel_size` neighbouring ranks (`parallel.sequence`) share each row of tokens.

    Returns `runtime` with that degree. The process group of this rank's neighbours is made once for each degree, and lives as
    long as the group of all ranks: layers, which have no runtime, find it by the degree (`sequence_group_of`). All ranks must
    call.
    """
    if sequence_parallel_size == 1:
        return replace(runtime, sequence_size=1)
    assert runtime.world_size % sequence_parallel_size == 0, "the config layer reports what does not divide"
    runtime = replace(runtime, sequence_size=sequence_parallel_size)
    all_ranks = dist.group.WORLD
    known_group = _SEQUENCE_GROUPS.get(sequence_parallel_size)
    if known_group is not None and known_group.all_ranks is all_ranks:
        return runtime
    first_rank = runtime.dp_rank * sequence_parallel_size
    with real_tensors():
        group = dist.new_group(
            list(range(first_rank, first_rank + sequence_parallel_size)),
            timeout=timedelta(seconds=runtime.timeout_s),
            backend="nccl" if runtime.device.type == "cuda" else None,  # without a second, unused one for CPUs
            # Each rank makes its own group only. Otherwise every rank would have to make all of them.
            use_local_synchronization=True,
        )
    _SEQUENCE_GROUPS[sequence_parallel_size] = _SequenceGroup(group, all_ranks)
    return runtime


def sequence_group_of(row_slices: list[int]) -> Any:
    """Find the process group of the ranks that share a row of tokens with this one (sequence parallelism), for a layer.

    `row_slices`: the borders of the ranks' slices of the row, such as [0, 4, 8] for two ranks; their number tells the group.
    """
    sequence_parallel_size = len(row_slices) - 1
    sequence_group = _SEQUENCE_GROUPS[sequence_parallel_size]
    assert sequence_group.all_ranks is dist.group.WORLD, "the groups of a job that has ended"
    return sequence_group.group


class AllToAll(torch.autograd.Function):
    """All-to-all of a flat tensor within a group of ranks. All ranks of the group must call, forward and backward.

    `send_counts` and `receive_counts` are numbers of elements for each rank of the group, in rank order. They may be uneven, and
    zero. The adjoint is the same exchange with the two swapped: a gradient goes back to the rank that its element came from.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, send_counts: list[int], receive_counts: list[int], group: Any) -> Tensor:
        """Returns what the other ranks sent to this one, one after another: `[sum(receive_counts)]`."""
        ctx.send_counts = send_counts
        ctx.receive_counts = receive_counts
        ctx.group = group
        return _all_to_all_without_gradient(flat, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """The gradient of `flat`, and None for what is no tensor."""
        return _all_to_all_without_gradient(grad, ctx.receive_counts, ctx.send_counts, ctx.group), None, None, None


def _all_to_all_without_gradient(flat: Tensor, send_counts: list[int], receive_counts: list[int], group: Any) -> Tensor:
    """The elements that this rank receives, in rank order. On the meta device nothing is exchanged."""
    output = flat.new_empty(sum(receive_counts))
    if not flat.is_meta:
        # The synchronous call, which is ordered in the stream. An asynchronous one returns a tensor that has no memory yet.
        dist.all_to_all_single(output, flat.contiguous(), receive_counts, send_counts, group=group)
    return output


class SumOverGroup(torch.autograd.Function):
    """The sum of a tensor over a sequence-parallel group. All ranks of the group must call, forward and backward.

    Every rank computes a term of the loss with the sum, so the gradient of `local` is the sum of all ranks' gradients. The
    identity, which is often used as the backward pass, would give only this rank's term.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Any) -> Tensor:
        """Returns the sum, of the shape of `local`."""
        ctx.group = group
        return _all_reduce_without_gradient(local, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The gradient of `local`, and None for the group."""
        return _all_reduce_without_gradient(grad, ctx.group), None


def _all_reduce_without_gradient(local: Tensor, group: Any) -> Tensor:
    """The sum over the group, in a new tensor."""
    total = local.clone(memory_format=torch.contiguous_format)
    if not total.is_meta:
        dist.all_reduce(total, group=group)
    return total


def sum_over_group(local: Tensor, row_slices: list[int] | None) -> Tensor:
    """Sum `local` over the ranks that share a row of tokens, with gradients; `local` itself if nobody shares the row.

    `local`: this rank's part, such as the sum of a loss over its tokens. `row_slices`: the borders of the ranks' slices of the
    row, such as [0, 4, 8]; None for a row that one rank has alone. All ranks of the group must call.
    """
    if row_slices is None:
        return local
    total: Tensor = SumOverGroup.apply(local, sequence_group_of(row_slices))
    return total


def all_to_all_vectors(
    vectors: Tensor, send_counts: list[int], receive_counts: list[int], row_slices: list[int]
) -> Tensor:
    """Send hidden states between the ranks that share a row of tokens; returns what arrives here, `[sum(receive_counts), H]`.

    `vectors`: `[N, H]`, sorted by the rank that they go to: `send_counts[r]` of them to rank r. `receive_counts[r]` come from
    rank r. `row_slices`: the borders of the ranks' slices of the row, which identify the group. Without gradient, unlike
    `AllToAll`. All ranks of the group must call.
    """
    width = vectors.shape[-1]
    num_sent_elements = [count * width for count in send_counts]
    num_received_elements = [count * width for count in receive_counts]
    group = sequence_group_of(row_slices)
    with torch.no_grad():
        flat = _all_to_all_without_gradient(vectors.reshape(-1), num_sent_elements, num_received_elements, group)
    return flat.view(-1, width)
