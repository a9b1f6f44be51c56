"""From samples to the tensors of one micro-batch: concatenated, or padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from trainer.data.batches.cutting import AXES, IGNORED_TARGET, Axis, Cut, cut_batch
from trainer.data.batches.order import assign_to_slots
from trainer.data.config import Layout
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch; from pinned memory the copy does not wait."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The batch with `change` applied to each tensor, such as a copy to the device; batches within it likewise."""
    changed: dict[str, Any] = {}
    for name, part in batch.items():
        if torch.is_tensor(part):
            changed[name] = change(part)
        elif isinstance(part, dict):
            changed[name] = map_tensors(part, change)
        else:
            changed[name] = part
    return changed


class Collator:
    """Makes micro-batches in one layout, and says which documents lie in one. An objective may derive from it."""

    axes: ClassVar[Mapping[str, Axis]] = AXES
    """What each entry of a batch goes by, `add`'s included: without it a row is not cut (`parallel.sequence`)."""

    keeps_row_ids = False
    """Whether a cut batch has the ids of its whole row too (`row_input_ids`), as noise on embeddings needs them."""

    def __init__(self, layout: Layout, pad_token_id: int) -> None:
        assert layout is not Layout.auto, "the layout is resolved before batches are made"
        self.layout = layout
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample], cut: Cut | None = None) -> dict[str, Any]:
        """Samples as one micro-batch on the CPU; with a `cut`, this rank's slice of it along the sequence.

        Beside the rows (token ids, positions, targets) it has:
        - `target_rows` (int64): which positions of the flattened rows have a target, the "supervised rows";
        - `row_sequence` (int64): the sample that each supervised row belongs to, 0 to `num_sequences` - 1;
        - `target_weights` (float32): what each supervised row counts for in the loss, if some count for less than 1;
        - `reference_logps` (float32, one a sample): log-probabilities of a reference model, if they were recorded;
        - what the objective's `add` adds.

        Give a `cut` only if all ranks of a sequence-parallel group read the same samples: otherwise they would exchange
        attention heads of different documents. So answers that each rank generates or scores alone are not cut.
        """
        batch = self.rows(samples)
        # Where the targets are, found here on the CPU: the loss then never asks the device how many there are.
        batch["target_rows"] = (batch["targets"].view(-1) != IGNORED_TARGET).nonzero()[:, 0]
        num_targets = [int(np.count_nonzero(sample.supervised[1:])) for sample in samples]
        batch["row_sequence"] = torch.from_numpy(np.repeat(np.arange(len(samples)), num_targets))
        batch["num_sequences"] = len(samples)
        weights = [sample.target_weights() for sample in samples]
        if any(sample_weights is not None for sample_weights in weights):
            rows = []
            for count, sample_weights in zip(num_targets, weights, strict=True):
                rows.append(np.ones(count, np.float32) if sample_weights is None else sample_weights)
            batch["target_weights"] = torch.from_numpy(np.concatenate(rows))
        if all(REFERENCE in sample.marks for sample in samples):
            logps = [sample.marks[REFERENCE] for sample in samples]
            batch["reference_logps"] = torch.tensor(logps, dtype=torch.float32)
        self.add(batch, samples)
        return batch if cut is None else self.cut(batch, cut)

    def cut(self, batch: dict[str, Any], cut: Cut) -> dict[str, Any]:
        """This rank's slice of a micro-batch; see `cut_batch`. An objective may override it."""
        return cut_batch(batch, cut, self.axes, keep_row_ids=self.keeps_row_ids)

    def rows(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Tokens and targets."""
        return (
            concatenated_batch(samples)
            if self.layout is Layout.padding_free
            else padded_batch(samples, self.pad_token_id)
        )

    def add(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to the batch what the loss needs besides tokens and targets. An objective may override it."""

    def assign_to_slots(
        self, dataset: TokenDataset, units: np.ndarray, costs: np.ndarray, shape: tuple[int, int]
    ) -> list:
        """Positions in `units` (int64 [U], costing `costs` each) dealt into `shape` = (slots, units a slot).

        Deterministic; slots come back costliest first.
        """
        return assign_to_slots(costs, *shape)

    def fillers(self, dataset: TokenDataset, num: int) -> list[Sample]:
        """The first `num` sequences with nothing to score, for a rank that must take part and has nothing left."""
        return [self.blank(dataset.sample(number)) for number in range(num)]

    def blank(self, sample: Sample) -> Sample:
        """The sample with nothing to score."""
        return Sample(sample.input_ids, np.zeros_like(sample.supervised), sample.marks)


def _targets(sample: Sample) -> np.ndarray:
    """int64 [n]: at each position the next token, where that one is supervised; the last position has none."""
    targets = np.full(len(sample.input_ids), IGNORED_TARGET, dtype=np.int64)
    # The model predicts the next token, so the target of position i is token i + 1.
    targets[:-1] = np.where(sample.supervised[1:], sample.input_ids[1:], IGNORED_TARGET)
    return targets


def concatenated_batch(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples as one row of T tokens without padding: ids, positions that restart per document, targets, document boundaries.

    The boundaries keep attention within a document.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    # In the names that flash attention uses: where each document begins in the row, and where the last ends.
    boundaries = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    position_ids = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    targets = np.concatenate([_targets(sample) for sample in samples])
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "targets": torch.from_numpy(targets)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_bounds": boundaries.tolist(),
    }


def padded_batch(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """One row a sample, `[samples, longest]`, padded on the right; padding has no attention and no target."""
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = np.full((len(samples), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    targets = np.full_like(input_ids, IGNORED_TARGET)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        mask[row, :length] = 1
        targets[row, :length] = _targets(sample)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(longest, dtype=torch.int64).repeat(len(samples), 1),
        "attention_mask": torch.from_numpy(mask),
        "targets": torch.from_numpy(targets),
    }
