"""Shapes of what torch's flex attention computes and keeps, for tensors without values (meta, or a simulated GPU).

The kernel itself would have to be compiled for them. Selective checkpointing never keeps the kernel's results, nor
these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FORWARD, BACKWARD = "shardtune::flex_shapes", "shardtune::flex_shapes_backward"
"""The operations, of `(q, k, v)` and of `(grad, q, k, v, out, lse)`: what counts arithmetic finds them by these names."""
BLOCK_POSITIONS = 128
"""Positions in a block of the mask, either way: torch's default."""


def uninitialised_block_mask(
    mask_mod: Callable[..., Tensor], batch_size: int, num_queries: int, num_keys: int, device: torch.device
) -> BlockMask:
    """Make a BlockMask with the shapes of torch's `create_block_mask`, but without values in its lists of blocks.

    For tensors without values only (meta, or a simulated GPU): no kernel may read the mask. `create_block_mask` itself would
    compute a square of all positions. `mask_mod(batch, head, query, key)`: which pairs of positions attend to each other.
    """
    rows = math.ceil(num_queries / BLOCK_POSITIONS)
    columns = math.ceil(num_keys / BLOCK_POSITIONS)

    def block_lists(*shape: int) -> Tensor:
        return torch.empty(batch_size, 1, *shape, dtype=torch.int32, device=device)

    return BlockMask(
        seq_lengths=(num_queries, num_keys),
        kv_num_blocks=block_lists(rows),
        kv_indices=block_lists(rows, columns),
        full_kv_num_blocks=block_lists(rows),
        full_kv_indices=block_lists(rows, columns),
        q_num_blocks=block_lists(columns),
        q_indices=block_lists(columns, rows),
        full_q_num_blocks=block_lists(columns),
        full_q_indices=block_lists(columns, rows),
        BLOCK_SIZE=(BLOCK_POSITIONS, BLOCK_POSITIONS),
        mask_mod=mask_mod,
    )


def attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(output `[B, H, T, D]`, float32 logarithm of the sum of exp(score) `[B, H, T]`) as tensors without values.

    For q `[B, H, T, D]`, k and v `[B, G, T, D]`. All five are kept for the backward pass, as the kernel keeps them.
    """
    return _forward(q, k, v)  # type: ignore[no-any-return]


@torch.library.custom_op(FORWARD, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
def _forward(q: Tensor, k: Tensor, v: Tensor) -> Any:
    raise RuntimeError("flex attention was asked for shapes alone, and given values")


@torch.library.custom_op(
    BACKWARD,
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    raise RuntimeError("flex attention was asked for shapes alone, and given values")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


_forward.register_autograd(lambda ctx, grad, _lse: _backward(grad, *ctx.saved_tensors), setup_context=_keep)
