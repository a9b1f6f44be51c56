"""Noise on the embeddings while a model trains: NEFTune (Jain et al. 2023, arXiv:2310.05914).

Each document's embeddings `[L, d]` get noise drawn evenly from -1 to 1, times `alpha / sqrt(L d)`. What is drawn is a function of
the run's seed, the step, the document's tokens, the position and the dimension alone: however documents are distributed over
ranks and micro-batches, and in whatever layout they lie, the noise is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SPLITMIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Odd 64-bit constants of splitmix64 (Steele et al. 2014), as signed numbers."""


@contextmanager
def add_embedding_noise(model: nn.Module, batch: dict[str, Any], alpha: float) -> Iterator[None]:
    """Inside the context, the model's input embedding adds noise of strength `alpha` (NEFTune's) to the embeddings of `batch`.

    Only in training: not without gradients, and not for other inputs than those of the batch (a reference's, a teacher's). The
    entry `seed_and_step` of the batch, (the run's seed, the step), decides what is drawn; batches of evaluations have none.
    """
    if not alpha or not torch.is_grad_enabled() or "seed_and_step" not in batch:
        yield
        return
    ids = batch["input_ids"]

    def add_noise(_module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor | None:
        """The hook behind the embedding layer: its output with noise, or None to leave it as it is."""
        # Not where a reference or a teacher looks up, nor another batch than the one that is trained on.
        if not torch.is_grad_enabled() or not args or args[0].shape != ids.shape or embeddings.dim() != 3:
            return None
        return embeddings + embedding_noise_of_batch(batch, embeddings.shape[-1], alpha).to(embeddings.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def embedding_noise_of_batch(batch: dict[str, Any], width: int, alpha: float) -> Tensor:
    """Compute the NEFTune noise of a micro-batch, float32 `[B, T, width]`; rows of padding get some too, which nothing reads.

    It depends on each document's tokens, not on where the document lies, so that it is the same under every strategy. If the
    batch is a slice of a row, `row_input_ids [1, row]` are the ids of the whole row, `cu_seq_lens_q` says where its documents
    begin, and `row_span` which of its tokens `[first, last)` the slice has.
    """
    ids = batch["input_ids"]
    rows, columns = ids.shape
    first = 0
    last = ids.numel()
    # Of each position: the index of its document, its position in it, and whether it is a token. Found by the layout: padded
    # rows, a slice of a row, or a whole row of several documents.
    if "attention_mask" in batch and batch["attention_mask"] is not None:
        document_index = torch.arange(rows, device=ids.device)[:, None].expand(rows, columns).reshape(-1)
        position = torch.arange(columns, device=ids.device).repeat(rows)
        is_token = batch["attention_mask"].reshape(-1).long()
    elif "row_slices" in batch:
        # A document that began in another slice has the hash and the length of all its tokens.
        ids = batch["row_input_ids"]
        first, last = batch["row_span"]
        bounds = batch["cu_seq_lens_q"].long()
        row_position = torch.arange(ids.numel(), device=ids.device)
        document_index = torch.bucketize(row_position, bounds, right=True) - 1
        position = row_position - bounds[document_index]
        is_token = torch.ones_like(position)
    else:
        position = batch["position_ids"].reshape(-1)
        document_index = (position == 0).long().cumsum(0) - 1
        is_token = torch.ones_like(position)
    # More than there are documents. Their exact number lies on the device, and reading it would wait for the device.
    max_documents = int(ids.numel()) + 1
    lengths = torch.zeros(max_documents, dtype=torch.int64, device=ids.device).index_add_(0, document_index, is_token)
    # A document is told by a hash of its tokens, so that its noise does not depend on where it lies.
    token_hashes = is_token * _scrambled(ids.reshape(-1) * _SPLITMIX[0] + position)
    document_hashes = torch.zeros_like(lengths).index_add_(0, document_index, token_hashes)
    # Random bits of each position and dimension, from the run, the step, the document and the position.
    seed, step = batch["seed_and_step"]
    run_and_step = _signed(seed * 1_000_003 + step)
    document_index = document_index[first:last]
    position = position[first:last]
    position_key = _scrambled(document_hashes[document_index] + run_and_step) + position * _SPLITMIX[1]
    dimensions = torch.arange(width, device=ids.device) * _SPLITMIX[0]
    bits = _scrambled(_scrambled(position_key)[:, None] + dimensions)
    # An arithmetic shift: the sign stays.
    uniform = (bits >> 40).float() / 2**23  # 24 bits with their sign: -1 to 1
    scale = alpha / (lengths[document_index].clamp(min=1) * width).float().sqrt()
    return (uniform * scale[:, None]).view(rows, columns, width)


def _scrambled(bits: Tensor) -> Tensor:
    """Numbers hashed bit by bit: the finaliser of splitmix64 on int64, whose products wrap around."""
    bits = (bits ^ _shifted(bits, 30)) * _SPLITMIX[1]
    bits = (bits ^ _shifted(bits, 27)) * _SPLITMIX[2]
    return bits ^ _shifted(bits, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """Each int64 shifted right by so many bits, with zeros from the left instead of its sign."""
    return (number >> bits) & (2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """A whole number modulo 2**64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63
