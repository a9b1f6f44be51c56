"""Shapes of what torch's flex attention computes and keeps, for tensors without values (meta, or a simulated GPU).

The kernel itself would have to be compiled for them. Selective checkpointing never keeps the kernel's results, nor
these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FORWARD, BACKWARD = "shardtune::flex_shapes", "shardtune::flex_shapes_backward"
"""The operations, of `(q, k, v)` and of `(grad, q, k, v, out, lse)`: what counts arithmetic finds them by these names."""
BLOCK = 128
"""Positions in a block of the mask, either way: torch's default."""


def block_mask(rule: Any, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """A mask as `create_block_mask` makes it of `rule`: its lists of blocks without values, and no square of positions."""
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)

    def block_lists(*shape: int) -> Tensor:
        return torch.empty(batch, 1, *shape, dtype=torch.int32, device=device)

    return BlockMask(
        seq_lengths=(queries, keys),
        kv_num_blocks=block_lists(rows),
        kv_indices=block_lists(rows, columns),
        full_kv_num_blocks=block_lists(rows),
        full_kv_indices=block_lists(rows, columns),
        q_num_blocks=block_lists(columns),
        q_indices=block_lists(columns, rows),
        full_q_num_blocks=block_lists(columns),
        full_q_indices=block_lists(columns, rows),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=rule,
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, H, T, D]` and float32 `[B, H, T]` for q `[B, H, T, D]`, k and v `[B, G, T, D]`; all five are kept."""
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
