"""Attention over concatenated documents: one registered function that never lets a token see another document.

It honours causality, sliding windows, chunks, logit soft-capping, sinks and grouped heads, or raises. It takes the boundaries
that travel with the batch (`cu_seq_lens_q`) and never builds a mask over the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.hardware import MAX_FLASH_HEAD_SIZE, gpu_of_device
from strategies.matmul import LONG_DOCUMENT_TOKENS, switch_to_blas, switch_to_chosen_library
from strategies.runtime import device_kind
from trainer.model.compat import load_models_without_scipy
from trainer.model.sequence_attention import over_slices

VARLEN_ATTENTION = "shardtune_varlen"


MAX_TOKENS_UNDER_ONE_MASK = 128
"""Up to so many tokens of a document with branches, one mask for all of it is faster on CPUs than a call for each branch."""
MIN_QUERIES_PER_CHUNK = 1024
"""A window is computed in chunks of at least so many queries: shorter ones would be many small kernels."""


def register() -> None:
    """Make the function known to transformers under `VARLEN_ATTENTION`. Idempotent."""
    load_models_without_scipy()
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN_ATTENTION, over_slices(varlen_attention))


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    document_bounds: list[int] | None = None,
    branches: list[list[int]] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of a row: q `[1, H, T, D]`, k and v `[1, G, T, D]` -> `[1, T, H, D]`.

    transformers calls it in each layer. `cu_seq_lens_q`: where documents begin in the row, and the row's end, as [0, 5, 12].
    `document_bounds`: the same on the host; with it the CPU path reads no tensor. `branches`: for each document, where its
    branches begin; a branch sees what stands before the first one, and itself (answers to one prompt).

    Raises ValueError without boundaries, and for inputs that are not computed.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            f"attention '{VARLEN_ATTENTION}' needs the document boundaries of a padding-free batch; for padded rows or "
            "generation switch the model to 'sdpa' with set_attn_implementation"
        )
    # What the model asks for. GPT-OSS passes its sinks as `s_aux`.
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    for unknown in ("head_mask", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise ValueError(f"attention '{VARLEN_ATTENTION}' does not implement {unknown}; set data.layout=padded")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    output_dtype = value.dtype  # under autocast, rotary embeddings leave the other two in float32
    if device_kind(query.device) == "cuda":
        query, key = query.to(output_dtype), key.to(output_dtype)
    if _has_chunks(module) or getattr(module, "attn_temperature_tuning", False):
        documents = document_bounds if document_bounds is not None else cu_seq_lens_q.tolist()
        query, document_bounds, cu_seq_lens_q = _by_document_position(module, query, documents)
    if branches is not None and (_has_chunks(module) or not causal):
        raise ValueError("branches of a document are not implemented for attention in chunks or to later tokens")
    # One kernel for all documents, where there is one: on GPUs in half precision.
    if sinks is None and _has_varlen_kernel(query, value, softcap, dropout):
        boundaries = SequenceBounds(cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        if branches is not None:
            assert document_bounds is not None, "branches come with the boundaries of their documents"
            segments = segments_of_branches(document_bounds, branches)
            boundaries = segments.boundaries(query.device)
            rows = segments.key_rows.to(query.device, non_blocking=True)
            # The gradients of a prompt's keys are added up over its branches.
            key = key.index_select(2, rows)
            value = value.index_select(2, rows)
        return _varlen_kernel(query, key, value, boundaries, scaling, sliding_window, causal), None
    # Else document by document.
    bounds = document_bounds if document_bounds is not None else cu_seq_lens_q.tolist()
    remaining_branches = iter(branches if branches is not None else [])
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # On CPUs the bfloat16 backward pass of SDPA is slower than the float32 one, so that casting pays.
    compute_dtype = (
        torch.promote_types(output_dtype, torch.float32) if device_kind(query.device) == "cpu" else output_dtype
    )
    operands = [t.to(compute_dtype) for t in (query, key, value)]
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):  # it would cast back
        rule = AttentionRule(scaling, dropout, sliding_window, softcap, causal, sinks)
        out = _attend_by_document(
            operands, lengths, lambda q, k, v: _attend_one_document(q, k, v, rule, next(remaining_branches, ()))
        )
    return out.to(output_dtype).transpose(1, 2).contiguous(), None


def _has_chunks(module: nn.Module) -> bool:
    """Whether layers like this one may attend in chunks. Looks at no layer's number: each would be compiled apart."""
    return getattr(getattr(module, "config", None), "attention_chunk_size", None) is not None


def _chunk_of(module: nn.Module) -> int | None:
    """Tokens of the chunks in which a layer attends as in documents of their own (Llama 4); None if it has no chunks."""
    config: Any = getattr(module, "config", None)
    layer = getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or layer is None:
        return None
    return config.attention_chunk_size if "chunked_attention" in kinds[layer : layer + 1] else None


@torch.compiler.disable  # a compiled block would be compiled anew for other documents
def _by_document_position(module: nn.Module, query: Tensor, bounds: list[int]) -> tuple[Tensor, list[int], Tensor]:
    """For layers that look at a token's position: make it the position in the document, not the one in the row.

    That is so for layers that attend in chunks, and for those that scale queries by position. `bounds`: where documents begin,
    and the row's end. Returns (the query, the boundaries of documents or of their chunks, the same boundaries on the device).
    """
    chunk_bounds = _chunk_bounds(bounds, _chunk_of(module))
    # A tensor made on the device would be waited for.
    on_device = torch.tensor(chunk_bounds, dtype=torch.int32).to(query.device, non_blocking=True)
    return _scaled_by_document_position(module, query, bounds), chunk_bounds, on_device


def _chunk_bounds(bounds: list[int], size: int | None) -> list[int]:
    """The boundaries of documents and of their chunks of `size` tokens, which are counted from where each document begins.

    [0, 5, 7] with chunks of 2 gives [0, 2, 4, 5, 7]. None: no chunks.
    """
    if size is None:
        return bounds
    chunk_bounds: list[int] = []
    for start, stop in pairwise(bounds):
        chunk_bounds += range(start, stop, size)
    return chunk_bounds + bounds[-1:]


def _scaled_by_document_position(module: Any, query: Tensor, document_bounds: list[int]) -> Tensor:
    """Correct queries `[1, H, T, D]` that Llama 4 has scaled by their position in the row: that in their document counts.

    It scales in layers without rotary positions, from position `floor_scale` on: a shorter row is as it should be.
    """
    is_scaled = getattr(module, "attn_temperature_tuning", False) and not module.use_rope
    if not is_scaled or document_bounds[-1] < module.floor_scale:
        return query

    def scale(positions: Tensor) -> Tensor:
        return torch.log1p(torch.floor((positions.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    row_positions = torch.arange(document_bounds[-1])
    document_positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(document_bounds)])
    correction = scale(document_positions) / scale(row_positions)
    return query * correction.to(query.device, query.dtype, non_blocking=True)[:, None]


def _attend_by_document(
    operands: list[Tensor], lengths: list[int], attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Call `attend(q, k, v)` for each document of a row, and join the results to `[1, heads, T, width]` again.

    `operands`: q, k and v of the row, `[1, heads, T, width]`. `lengths`: tokens of each document. On CPUs the products of short
    documents are left to BLAS (`strategies/matmul.py`): the switches change no value, only the library of the products behind
    them, in the backward pass too.
    """
    all_short = max(lengths, default=0) < LONG_DOCUMENT_TOKENS
    row = switch_to_blas(*operands) if all_short else operands  # one switch for the row, or one for each short document
    pieces = []
    # Split, not sliced: the gradients of the parts are joined once instead of being added up in whole rows of zeros.
    for part, length in zip(zip(*(t.split(lengths, dim=2) for t in row), strict=True), lengths, strict=True):
        in_blas_alone = not all_short and length < LONG_DOCUMENT_TOKENS
        piece = attend(*(switch_to_blas(*part) if in_blas_alone else part))
        pieces.append(switch_to_chosen_library(piece) if in_blas_alone else piece)
    joined = torch.cat(pieces, dim=2)
    return switch_to_chosen_library(joined) if all_short else joined


@dataclass(frozen=True, slots=True)
class SequenceBounds:
    """Where the queries and keys of each sequence begin and end, as variable-length kernels take them."""

    queries: Tensor
    """int32 [sequences + 1], on the device."""
    keys: Tensor
    longest_query: int | None
    """Queries of the longest sequence; None if it is not known (the kernel is then told that of the whole row)."""
    longest_key: int | None


@dataclass(frozen=True, slots=True)
class Segments:
    """Documents with branches as sequences for a kernel: what stands before the branches, then each branch.

    The queries of all sequences are the row as it is. The keys of a branch are those before the branches, and its own, so a
    kernel that aligns causality at the last key sees the branch as if it were the only one.
    """

    key_rows: Tensor
    """int64 [keys]: the position in the row of each key of all sequences."""
    query_bounds: list[int]
    """Where each sequence begins among the queries, and where the last one ends."""
    key_bounds: list[int]
    """The same among the keys in `key_rows`."""

    def boundaries(self, device: torch.device) -> SequenceBounds:
        """The bounds as tensors on a device, which nobody waits for."""
        queries = torch.tensor(self.query_bounds, dtype=torch.int32).to(device, non_blocking=True)
        keys = torch.tensor(self.key_bounds, dtype=torch.int32).to(device, non_blocking=True)
        return SequenceBounds(queries, keys, _longest_sequence(self.query_bounds), _longest_sequence(self.key_bounds))


def segments_of_branches(bounds: Sequence[int], branches: Sequence[Sequence[int]]) -> Segments:
    """Cut a row of documents with branches (answers to one prompt, the trunk) into sequences for a variable-length kernel.

    A branch sees the trunk and itself, so the trunk's keys come once for each branch. `bounds`: where documents begin in the
    row, and the row's end. `branches`: where the branches of each document begin, counted from the document's begin.

    A document of 2 tokens of prompt and answers of 2 and 1 tokens gives the `key_rows` (positions in the row) [0, 1, 0, 1, 2,
    3, 0, 1, 4], and the bounds [0, 2, 4, 5] of queries and [0, 2, 6, 9] of keys.
    """
    key_rows = []
    query_bounds = [0]
    key_bounds = [0]
    for (start, stop), begins in zip(pairwise(bounds), branches, strict=True):
        trunk = torch.arange(start, start + begins[0])
        key_rows.append(trunk)
        query_bounds.append(start + begins[0])
        key_bounds.append(key_bounds[-1] + begins[0])
        for begin, end in pairwise([*begins, stop - start]):
            key_rows += [trunk, torch.arange(start + begin, start + end)]
            query_bounds.append(start + end)
            key_bounds.append(key_bounds[-1] + begins[0] + end - begin)
    return Segments(torch.cat(key_rows), query_bounds, key_bounds)


def _longest_sequence(bounds: Sequence[int]) -> int:
    return max(stop - start for start, stop in pairwise(bounds))


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How a layer attends within a document."""

    scaling: float | None
    dropout: float
    window: int | None
    softcap: float | None
    causal: bool
    sinks: Tensor | None
    """`[H]`: logits that take a part of each row and give nothing."""

    def window_mask(self, length: int, device: torch.device) -> Tensor | None:
        """The keys that each query sees, bool `[T, T]`; None if no window hides any."""
        if self.window is None or length <= self.window:
            return None
        position = torch.arange(length, device=device)
        distance = position[:, None] - position[None, :]
        return (distance >= 0) & (distance < self.window) if self.causal else distance.abs() < self.window

    def mask_of_last_queries(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Which keys each query sees, bool `[queries, keys]`, if the queries are the last keys: an answer behind its prompt."""
        query = torch.arange(keys - queries, keys, device=device)
        distance = query[:, None] - torch.arange(keys, device=device)[None, :]
        visible = distance >= 0
        return visible if self.window is None else visible & (distance < self.window)

    def branch_mask(self, length: int, starts: Sequence[int], device: torch.device) -> Tensor:
        """Which keys each query sees in a document that is a prompt with several answers (branches): bool `[T, T]`.

        `length`: T, its tokens. `starts`: where the answers begin. Each sees the prompt and itself, within the window if the
        rule has one. With 4 tokens and `starts` [2, 3], the last token sees tokens 0, 1 and 3.
        """
        token_index = torch.arange(length, device=device)
        begins = torch.tensor(starts, device=device)
        branch = torch.searchsorted(begins, token_index, right=True)  # 0 before the first branch
        # A token's position is counted as if its branch were the only one.
        position = token_index - torch.where(branch > 0, begins[(branch - 1).clamp(min=0)] - starts[0], 0)
        sees_branch = (branch[None, :] == 0) | (branch[None, :] == branch[:, None])
        visible = (token_index[:, None] >= token_index[None, :]) & sees_branch
        if self.window is None:
            return visible
        return visible & (position[:, None] - position[None, :] < self.window)


def _attend_one_document(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, branches: Sequence[int] = ()) -> Tensor:
    """Attention within one document: q `[1, heads, T, width]`, k and v with as many heads or fewer. Chooses how it is computed.

    `rule`: how the layer attends (window, soft cap and so on). `branches`: where its branches (answers to one prompt) begin;
    empty if it has none. On a CPU one mask serves, unless a document with branches is too long for it.
    """
    on_gpu = q.device.type == "cuda"
    if branches and (on_gpu or q.shape[2] > MAX_TOKENS_UNDER_ONE_MASK):
        return _attend_branch_by_branch(q, k, v, rule, branches)
    if on_gpu:
        return _attend_on_gpu(q, k, v, rule)
    if branches:
        return _attend_with_mask(q, k, v, rule, rule.branch_mask(q.shape[2], branches, q.device))
    return _attend_with_mask(q, k, v, rule, rule.window_mask(q.shape[2], q.device))


def _attend_branch_by_branch(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, branches: Sequence[int]) -> Tensor:
    """Attention within one document that is a prompt (the trunk) with several answers: each answer sees the prompt and itself.

    For answers there is no mask of the whole document: each is attended with the keys of the prompt before its own. `q`, `k`,
    `v`: `[1, heads, tokens, width]`. `branches`: where the answers begin.
    """
    trunk = branches[0]
    pieces = [_attend_one_document(q[:, :, :trunk], k[:, :, :trunk], v[:, :, :trunk], rule)]
    for begin, end in pairwise([*branches, q.shape[2]]):
        keys = torch.cat([k[:, :, :trunk], k[:, :, begin:end]], dim=2)
        values = torch.cat([v[:, :, :trunk], v[:, :, begin:end]], dim=2)
        mask = rule.mask_of_last_queries(end - begin, keys.shape[2], q.device)
        pieces.append(_attend_with_mask(q[:, :, begin:end], keys, values, rule, mask))
    return torch.cat(pieces, dim=2)


def _attend_with_mask(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, mask: Tensor | None) -> Tensor:
    """Attention to the keys that `mask` shows, bool `[queries, keys]`; None: causal if the rule is, else to all keys."""
    if rule.softcap is not None or rule.sinks is not None:  # torch's kernel knows neither
        return _attend_with_score_matrix(q, k, v, rule, mask)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=rule.causal and mask is None,
        scale=rule.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule) -> Tensor:
    """Attention within one document by the kernels of a GPU: q `[B, H, T, D]`, k and v `[B, G, T, D]` -> `[B, H, T, D]`.

    Heads of keys are repeated, because torch's kernel for float32 and masks knows no grouped heads: torch would build all
    H x T x T scores instead. A window is computed in chunks of queries, because a mask over all queries has T x T entries.
    """

    needs_score_matrix = rule.softcap is not None or rule.sinks is not None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if needs_score_matrix:
            return _attend_with_score_matrix(q, k, v, rule, mask)
        causal = rule.causal and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=rule.dropout, is_causal=causal, scale=rule.scaling
        )

    queries_per_key = q.shape[1] // k.shape[1]
    length = q.shape[2]
    window = rule.window
    if not needs_score_matrix and queries_per_key > 1:
        k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
    if window is None or length <= window:
        return attend(q, k, v, None)
    position = torch.arange(length, device=q.device)
    queries_per_chunk = max(window, MIN_QUERIES_PER_CHUNK)
    pieces = []
    for start in range(0, length, queries_per_chunk):
        stop = min(length, start + queries_per_chunk)
        visible_keys = slice(max(0, start - window + 1), stop if rule.causal else min(length, stop + window - 1))
        distance = position[start:stop, None] - position[None, visible_keys]
        mask = (distance >= 0) & (distance < window) if rule.causal else distance.abs() < window
        pieces.append(attend(q[:, :, start:stop], k[:, :, visible_keys], v[:, :, visible_keys], mask))
    return torch.cat(pieces, dim=2)


def _attend_with_score_matrix(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, mask: Tensor | None) -> Tensor:
    """Attention with the matrix of all scores in memory, for what no kernel has: capped scores, and sinks.

    A sink is a learned score of a head that takes weight away from the keys. q `[B, H, T, D]`, k and v `[B, G, T, D]` -> `[B,
    H, T, D]`. `mask`: bool `[queries, keys]`, True where a query sees a key; None: causal if the rule is, else every key.
    """
    queries_per_key = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(queries_per_key, dim=1), v.repeat_interleave(queries_per_key, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (rule.scaling if rule.scaling is not None else q.shape[-1] ** -0.5)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None and rule.causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    # The sink's weight is cut off after the softmax: it gives nothing to the output.
    weights = scores.softmax(dim=-1, dtype=wide)[..., : k.shape[2]]
    return F.dropout(weights.to(q.dtype), rule.dropout) @ v


def _has_varlen_kernel(query: Tensor, value: Tensor, softcap: float | None, dropout: float) -> bool:
    """Whether torch's variable-length kernel computes this: on GPUs in half precision, without caps and dropout."""
    if device_kind(query.device) != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if value.shape[-1] > query.shape[-1]:
        return False
    return softcap is None and dropout == 0.0 and _has_flash_kernel(query.device, query.shape[-1])


def _has_flash_kernel(device: torch.device, head: int) -> bool:
    """Whether flash attention on `device` has forward and backward passes for heads of this size."""
    is_built, lacking = _flash_support(device)
    if not is_built or head % 8 or head > MAX_FLASH_HEAD_SIZE:
        return False
    return not (lacking and lacking[0] <= head <= lacking[1])


@torch.compiler.assume_constant_result
def _flash_support(device: torch.device) -> tuple[bool, tuple[int, int] | None]:
    """(whether there is flash attention on `device`, the sizes of heads (smallest, largest) that its backward pass lacks).

    A function of its own, so that a compiled block takes the answer for a constant.
    """
    gpu = gpu_of_device(device)
    return (False, None) if gpu is None else (gpu.has_flash, gpu.unsupported_flash_head_sizes())


def _varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: SequenceBounds,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """Attention within documents by torch's variable-length kernel (CUDA, half precision), for all documents at once.

    q, k and v are `[1, heads, T, width]`, the result is `[1, T, heads, width]`. `boundaries`: where sequences begin among
    queries and keys. `window`: a query sees so many keys up to itself (and as many after it unless `causal`).
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped, width = q.shape[1] != k.shape[1], v.shape[-1]
    if width < q.shape[-1]:  # values of latent attention are narrower, and the kernel knows one size of heads
        v = F.pad(v, (0, q.shape[-1] - width))
    q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (q, k, v))  # [T, heads, D]
    # Keys beside the query itself; -1: no window.
    left_window = window - 1 if window is not None else -1
    longest_query = q.shape[0] if boundaries.longest_query is None else int(boundaries.longest_query)
    longest_key = k.shape[0] if boundaries.longest_key is None else int(boundaries.longest_key)
    out: Any = varlen_attn(
        q,
        k,
        v,
        boundaries.queries,
        boundaries.keys,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(left_window, 0 if causal else left_window),
        enable_gqa=grouped,
    )
    return out.unsqueeze(0)[..., :width]
