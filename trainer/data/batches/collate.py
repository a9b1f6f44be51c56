"""From samples to the tensors of one micro-batch: concatenated, padded, or in two sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.config import Layout
from trainer.data.replay import replayed
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.data.two_sides import pad_two_sides

IGNORED = -100
"""Target of a position that is not supervised."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch; from pinned memory the copy does not wait."""
    return each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def each_tensor(batch: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The batch, and a batch within it, with each tensor changed."""
    return {
        k: change(v) if torch.is_tensor(v) else each_tensor(v, change) if isinstance(v, dict) else v
        for k, v in batch.items()
    }


def collate(
    samples: Sequence[Sample], layout: Layout, pad_token_id: int, decoder_start: int | None = None
) -> dict[str, Any]:
    """Samples as one micro-batch on the CPU, in the given layout; with `decoder_start`, in two sides of padded rows."""
    if decoder_start is not None:
        batch = pad_two_sides(samples, pad_token_id=pad_token_id, start_token_id=decoder_start, ignored=IGNORED)
    else:
        batch = _concatenate(samples) if layout is Layout.padding_free else _pad(samples, pad_token_id)
    # Where the targets are, found here on the CPU: the loss then never asks the device how many there are.
    batch["target_rows"] = (batch["targets"].view(-1) != IGNORED).nonzero()[:, 0]
    learned = [int(np.count_nonzero(sample.supervised[1:])) for sample in samples]
    batch["row_sequence"] = torch.from_numpy(np.repeat(np.arange(len(samples)), learned))
    batch["num_sequences"] = len(samples)
    if all(sample.reference is not None for sample in samples):
        batch["reference_logps"] = torch.tensor([s.reference for s in samples], dtype=torch.float32)
    if any(sample.label is not None for sample in samples):
        batch["labels"] = torch.tensor([IGNORED if s.label is None else s.label for s in samples], dtype=torch.int64)
    if samples[0].desirable is not None:
        batch["desirable"] = torch.tensor([bool(s.desirable) for s in samples])
    if samples[0].replay is not None:
        chosen, rows = replayed(samples, batch["row_sequence"])
        batch |= {"replay": collate(chosen, layout, pad_token_id), **rows}
    return batch


def _targets(sample: Sample) -> np.ndarray:
    """int64 [n]: at each position the next token, where that one is supervised; the last position has none."""
    targets = np.full(len(sample.input_ids), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(sample.supervised[1:], sample.input_ids[1:], IGNORED)
    return targets


def _concatenate(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of T tokens: ids, positions that restart per document, targets, document boundaries."""
    lengths = [len(sample.input_ids) for sample in samples]
    boundaries = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    return {
        "input_ids": torch.from_numpy(np.concatenate([s.input_ids for s in samples]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))[None],
        "targets": torch.from_numpy(np.concatenate([_targets(s) for s in samples]))[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_bounds": boundaries.tolist(),
    }


def _pad(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """One row a document, padded on the right to the longest."""
    longest = max(len(sample.input_ids) for sample in samples)
    ids = np.full((len(samples), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    targets = np.full_like(ids, IGNORED)
    for row, sample in enumerate(samples):
        n = len(sample.input_ids)
        ids[row, :n] = sample.input_ids
        mask[row, :n] = 1
        targets[row, :n] = _targets(sample)
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.arange(longest, dtype=torch.int64).repeat(len(samples), 1),
        "attention_mask": torch.from_numpy(mask),
        "targets": torch.from_numpy(targets),
    }


def fillers(dataset: TokenDataset, num: int) -> list[Sample]:
    """The first `num` sequences with nothing to score, for a rank that must take part and has nothing left."""
    found = [dataset.sample(number) for number in range(num)]
    for sample in found:
        sample.supervised = np.zeros_like(sample.supervised)
        sample.label = None if sample.label is None else IGNORED
    return found
