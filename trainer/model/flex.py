"""Attention over concatenated documents through torch's flex attention: one fused kernel for masks, soft caps and sinks.

transformers builds the mask of each kind of layer (windows, chunks) as a function of two positions, of which torch's blocks
are made; so this covers what the kernel of `trainer/model/attention.py` is not told of. torch has no backward
pass of it on CPUs: there the same functions are computed over all pairs of positions, for proofs alone. Tensors that have
shapes alone (on meta, or of a simulated GPU) get those of what the kernel makes and keeps. torch's own part is imported where
it is used: it brings sympy (torch 2.15), and whoever composes a configuration needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strategies.runtime import SIMULATED
from trainer.model.compat import declares_flex_attention, patch_masks_of_packed_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_ATTENTION = "shardtune_flex"
MIN_HEAD_SIZE = 16
"""Smallest head that the kernel's products take."""
FLEX_REQUIREMENTS_TEXT = "flex attention needs a GPU and precision=bf16 or fp16"
"""What a run must have: torch has no backward pass of it for CPUs, and one in float32 was not tried."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The row of several documents on which a model is being called."""

    bounds: Tensor
    """Where each document begins in the row, and where the last one ends, int32 `[documents + 1]`."""
    length: int | None
    """Tokens of the whole row, if the model is given a slice of it; None if it is given all of it."""
    answer_begins: list[list[int]] | None = None
    """Where answers that share a prompt begin in each document, counted from the document's begin; None if there are none."""

    def full_length(self, num_given: int) -> int:
        """Tokens of the whole row, of which the model is given `num_given`: a slice, or all."""
        return num_given if self.length is None else self.length

    def document_of_position(self, num_given: int) -> Tensor:
        """The number of the document at each position of the whole row, from 1, int64 `[T]`: [1, 1, 1, 2, 2]."""
        positions = torch.arange(self.full_length(num_given), device=self.bounds.device)
        return torch.bucketize(positions, self.bounds, right=True)

    def answers_and_positions(self) -> tuple[Tensor, Tensor]:
        """For each position of the row: the number of its answer, and its position as if that answer were the only one.

        The number is 0 in the prompt. Several answers to a prompt may follow it in one document, and must not see each other. A
        document of 2 tokens of prompt and answers of 2 and 1 tokens (`answer_begins` [[2, 4]]) gives the answers [0, 0, 1, 1,
        2] and the positions [0, 1, 2, 3, 2].
        """
        assert self.answer_begins is not None
        bounds = self.bounds.tolist()
        answer_numbers: list[int] = []
        positions: list[int] = []
        for start, stop, begins in zip(bounds, bounds[1:], self.answer_begins, strict=False):
            answer_numbers += [0] * begins[0]
            positions += range(start, start + begins[0])
            ends = [*begins[1:], stop - start]
            for number, (begin, end) in enumerate(zip(begins, ends, strict=True), start=1):
                answer_numbers += [number] * (end - begin)
                positions += range(start + begins[0], start + begins[0] + end - begin)
        device = self.bounds.device
        return torch.tensor(answer_numbers, device=device), torch.tensor(positions, device=device)


_CURRENT_PACKED_ROW: ContextVar[PackedRow | None] = ContextVar("row", default=None)
"""The row that a model is being called on; None outside `masks_keep_documents_apart`.

Masks are made before the first block, so that a block which is recomputed needs none."""


def register() -> None:
    """Make the function, and the blocks it needs, known to transformers under `FLEX_ATTENTION`. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from trainer.model.sequence_attention import over_slices

    AttentionInterface.register(FLEX_ATTENTION, over_slices(flex_attention))
    AttentionMaskInterface.register(FLEX_ATTENTION, block_mask)
    patch_masks_of_packed_rows(_document_of, _positions_of)


@contextmanager
def masks_keep_documents_apart(inputs: dict[str, Any]) -> Iterator[None]:
    """Inside the context, the masks that a model builds keep the documents of its `inputs` apart, if these have boundaries.

    A packed row holds several documents. The functions below that transformers calls for masks (`block_mask`, `_document_of`)
    find the row in a context variable. Entries of `inputs`, the arguments of the model:
    - `cu_seq_lens_q`: the boundaries, such as [0, 5, 12] for documents of 5 and 7 tokens. Without them, masks are as usual.
      transformers itself would find documents by their positions, and for it wait for the device.
    - `row_slices`: the model is given a slice of a row. The masks are those of the whole row, since attention sees it whole.
    - `branches`: where answers begin that share a prompt; masks then keep these apart too.
    """
    bounds = inputs.get("cu_seq_lens_q")
    row_slices = inputs.get("row_slices")
    row = None
    if bounds is not None:
        # The last border of the slices is the length of the row.
        row_length = None if row_slices is None else row_slices[-1]
        row = PackedRow(bounds, row_length, inputs.get("branches"))
    earlier_row = _CURRENT_PACKED_ROW.set(row)
    try:
        yield
    finally:
        _CURRENT_PACKED_ROW.reset(earlier_row)


def _document_of(positions: Tensor) -> Tensor | None:
    """The number of the document at each position of the current row, int64 `[1, T]`; None if there is no such row.

    `positions`: those that the model is given, `[1, t]` of all T.
    """
    row = _CURRENT_PACKED_ROW.get()
    return None if row is None else row.document_of_position(positions.shape[1])[None]


def _positions_of(positions: Tensor) -> Tensor:
    """The positions in their documents of all tokens of the row, of which `positions [1, t]` are a slice: int64 `[1, T]`.

    `positions` itself if it is the whole row, or if no row is known.
    """
    row = _CURRENT_PACKED_ROW.get()
    if row is None or row.full_length(positions.shape[1]) == positions.shape[1]:
        return positions
    documents = row.document_of_position(positions.shape[1])
    places = torch.arange(len(documents), device=row.bounds.device)
    return (places - row.bounds[documents - 1])[None]


def _is_meta_or_simulated(device: torch.device) -> bool:
    """Whether tensors on this device have shapes, but no values."""
    return device.type == "meta" or device == SIMULATED


def block_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> BlockMask:
    """Build FlexAttention's mask for the current packed row: which blocks of positions attend to each other.

    transformers calls it for each kind of layer. `mask_function(batch, head, query, key)`: the architecture's own rule
    (causality, windows). Not every one keeps documents apart, so the boundaries of the row do. `q_length`, `kv_length`: tokens
    that the model is given. Raises ValueError for padding, or without boundaries.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    from trainer.model import flex_shapes

    row = _CURRENT_PACKED_ROW.get()
    if row is None or attention_mask is not None:
        raise ValueError(
            f"attention '{FLEX_ATTENTION}' needs the document boundaries of a padding-free batch; for padded rows or generation "
            "switch the model to 'sdpa' with set_attn_implementation"
        )
    device = torch.device(device)
    document_of_position = row.document_of_position(q_length)
    q_length = row.full_length(q_length)
    kv_length = row.full_length(kv_length)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, query, key) & (document_of_position[query] == document_of_position[key])

    visible = same_document
    if row.answer_begins is not None:
        answer, position = row.answers_and_positions()

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # Causality and windows go by positions as if each answer were the only one: it sees its prompt right before itself.
            same_answer = (answer[key] == 0) | (answer[key] == answer[query])
            return same_document(batch, head, position[query], position[key]) & same_answer

    if _is_meta_or_simulated(device):
        return flex_shapes.uninitialised_block_mask(visible, batch_size, q_length, kv_length, device)
    build_mask = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return build_mask(visible, batch_size, None, q_length, kv_length, device=str(device))


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by FlexAttention, under the mask that the model built: `query [B, H, T, D]`, `key` and `value [B, KV, T, D]` ->
    `[B, T, H, D]`.

    KV divides H: each head of keys serves H / KV heads of queries. `attention_mask`: made by `block_mask`. Raises ValueError
    for what is not computed: a mask that is no BlockMask, dropout, or a position bias.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(attention_mask, BlockMask):
        raise ValueError(f"attention '{FLEX_ATTENTION}' needs a mask of blocks, and this architecture makes none")
    if dropout or kwargs.get("position_bias") is not None:
        raise ValueError(f"attention '{FLEX_ATTENTION}' has no {'dropout' if dropout else 'position_bias'}")
    # Sinks `[H]`: a learned score for each head that takes weight away from the keys. Models use one of two names for them.
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave them wider under autocast
    query_heads_per_key_head = query.shape[1] // key.shape[1]
    is_power_of_two = query_heads_per_key_head & (query_heads_per_key_head - 1) == 0
    if not is_power_of_two:  # the kernel shares keys among powers of two only
        key = key.repeat_interleave(query_heads_per_key_head, dim=1)
        value = value.repeat_interleave(query_heads_per_key_head, dim=1)
    if _is_meta_or_simulated(query.device):  # a plan: there are no values to compute with
        attend: Callable[..., tuple[Tensor, Tensor]] = _attend_on_shapes
    else:
        attend = _attend_by_kernel if query.device.type == "cuda" else _attend_over_pairs
    # `lse`: the logarithm of the sum of exp(score) of each query, which only sinks need.
    out, lse = attend(query, key, value, attention_mask, scaling, softcap, sinks is not None)
    if sinks is not None:
        # The sinks' share of each row: exp(sink) beside the sum of exp(score).
        out = out * torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None]).unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


@cache
def _softcap_scores(softcap: float) -> Callable[..., Tensor]:
    """A function that caps a score, for FlexAttention's kernel. The same object for the same cap: a new one would be compiled."""

    def change(score: Tensor, *_: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return change


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    """A function of torch, compiled: one for all calls, which keeps what it was compiled to."""
    return torch.compile(function)


def _attend_by_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float | None, softcap: float | None, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Attention by torch's FlexAttention kernel: (output `[B, H, T, D]`, log of the sum of exp(score), by query, `[B, H, T]`).

    Without `with_lse` the second is a 0-d zero, which nobody reads.
    """
    from torch.nn.attention.flex_attention import AuxRequest
    from torch.nn.attention.flex_attention import flex_attention as torch_flex

    # Inside a block that is being compiled, the kernel is compiled with it.
    kernel = torch_flex if torch.compiler.is_compiling() else _compiled(torch_flex)
    output = kernel(
        q,
        k,
        v,
        score_mod=None if softcap is None else _softcap_scores(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True) if with_lse else None,
    )
    if not with_lse:
        return output, q.new_zeros(())
    attended, aux = output
    return attended, aux.lse


def _attend_on_shapes(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float | None, softcap: float | None, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """The shapes of what the kernel makes and keeps, for tensors without values."""
    from trainer.model import flex_shapes

    return flex_shapes.attention_shapes(q, k, v)


def _attend_over_pairs(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float | None, softcap: float | None, _with_lse: bool
) -> tuple[Tensor, Tensor]:
    """Attention as FlexAttention's kernel computes it, by plain products over all pairs of positions: for CPUs, in proofs.

    Every query sees a key: at least itself, since masks are causal. Returns (output `[B, H, T, D]`, logarithm of the sum of
    exp(score) of each query `[B, H, T]`).
    """
    from torch.nn.attention.flex_attention import create_mask

    queries_per_key = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = _softcap_scores(softcap)(scores)
    visible = create_mask(mask.mask_mod, q.shape[0], None, q.shape[2], k.shape[2], device=str(q.device))
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - lse.unsqueeze(-1)) @ v, lse


def flex_refusal(meta_model: Any, head_sizes: list[int], *, dropout: float) -> str | None:
    """Why flex attention cannot compute a model's attention on a GPU in half precision, as part of a sentence; else None.

    `meta_model`: the model on meta. `head_sizes`: of its layers. `dropout`: of its attention; 0.0: none.
    """
    if not declares_flex_attention(meta_model.get_decoder()):
        return f"transformers has none for {type(meta_model).__name__}"
    too_small = [size for size in head_sizes if size < MIN_HEAD_SIZE]
    if too_small:
        return f"it has no heads of {too_small[0]}, {MIN_HEAD_SIZE} are the least"
    return "it has no dropout" if dropout else None


def needs_eager(meta_model: Any, text_config: Any) -> bool:
    """Whether eager attention alone, of those that transformers has, computes a model's scores: soft caps on them, sinks.

    SDPA refuses the ones and ignores the others.
    """
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    return bool(softcap) or any(name.endswith("sinks") for name, _ in meta_model.named_parameters())
