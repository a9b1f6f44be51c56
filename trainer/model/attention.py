"""Attention over concatenated documents: one registered function that never lets a token see another document.

It honours causality, sliding windows, logit soft-capping and grouped heads, or raises. It takes the boundaries that
travel with the batch (`cu_seq_lens_q`) and never builds a mask over the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strategies.matmul import LONG, as_chosen, in_blas
from strategies.runtime import device_kind

NAME = "shardtune_varlen"

PADDING_FREE = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt2",
        "gpt_neox",
    }
)
"""`model_type`s that a test has shown to give the same result concatenated and apart (tests/model/test_attention.py)."""


def register() -> None:
    """Make the function known to transformers under `NAME`. Idempotent."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each document of a row; q `[1, H, T, D]`, k and v `[1, G, T, D]` -> `[1, T, H, D]`.

    `document_bounds` is `cu_seq_lens_q` on the host: with it the CPU path reads no tensor.
    """
    if cu_seq_lens_q is None:
        raise ValueError(
            f"attention '{NAME}' needs the document boundaries of a padding-free batch; for padded rows or generation "
            "switch the model to 'sdpa' with set_attn_implementation"
        )
    for unknown in ("s_aux", "sinks", "head_mask", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise ValueError(f"attention '{NAME}' does not implement {unknown}; set data.layout=padded")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    computes_in = value.dtype  # under autocast, rotary embeddings leave the other two in float32
    if device_kind(query.device) == "cuda":
        query, key = query.to(computes_in), key.to(computes_in)
    if _has_varlen_kernel(query, softcap, dropout):
        return _varlen_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window, causal), None
    bounds = document_bounds if document_bounds is not None else cu_seq_lens_q.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    # On CPUs the bfloat16 backward pass of SDPA is slower than the float32 one, so that casting pays.
    wide = torch.promote_types(computes_in, torch.float32) if device_kind(query.device) == "cpu" else computes_in
    whole = [t.to(wide) for t in (query, key, value)]
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):  # it would cast back
        rest = scaling, dropout, sliding_window, softcap, causal
        out = _by_document(whole, lengths, lambda q, k, v: _one_document(q, k, v, *rest))
    return out.to(computes_in).transpose(1, 2).contiguous(), None


def _by_document(whole: list[Tensor], lengths: list[int], attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """`attend` for each document of a row; on CPUs the products of short documents are left to BLAS (`strategies/matmul.py`)."""
    all_short = max(lengths, default=0) < LONG
    row = in_blas(*whole) if all_short else whole  # one switch for the row, or one for each short document
    pieces = []
    # Split, not sliced: the gradients of the parts are joined once instead of being added up in whole rows of zeros.
    for part, length in zip(zip(*(t.split(lengths, dim=2) for t in row), strict=True), lengths, strict=True):
        alone = not all_short and length < LONG
        piece = attend(*(in_blas(*part) if alone else part))
        pieces.append(as_chosen(piece) if alone else piece)
    joined = torch.cat(pieces, dim=2)
    return as_chosen(joined) if all_short else joined


def _one_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> Tensor:
    length = q.shape[2]
    mask = None
    if window is not None and length > window:
        position = torch.arange(length, device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < window) if causal else distance.abs() < window
    if softcap is not None:
        return _soft_capped(q, k, v, scaling, dropout, softcap, mask, causal)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _soft_capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float,
    mask: Tensor | None,
    causal: bool,
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), dropout)
    return weights @ v


def _has_varlen_kernel(query: Tensor, softcap: float | None, dropout: float) -> bool:
    if device_kind(query.device) != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return softcap is None and dropout == 0.0


def _varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_lens: Tensor,
    max_length: int | None,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> Tensor:
    """torch's own variable-length kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.shape[1] != k.shape[1]
    q, k, v = (t.squeeze(0).transpose(0, 1).contiguous() for t in (q, k, v))  # [T, heads, D]
    left = window - 1 if window is not None else -1
    longest = int(max_length) if max_length is not None else q.shape[0]
    out: Any = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0 if causal else left),
        enable_gqa=grouped,
    )
    return out.unsqueeze(0)
