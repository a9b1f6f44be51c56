"""From samples to the tensors of one micro-batch: concatenated, or padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from trainer.data.batches.cutting import AXES, IGNORED_TARGET, Axis, RowCut, cut_batch
from trainer.data.batches.order import assign_to_slots
from trainer.data.config import Layout
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy the tensors of a batch; from pinned memory the copy does not wait."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Copy a batch with `change` applied to each tensor, such as a copy to the device; to those of inner batches too."""
    changed: dict[str, Any] = {}
    for name, entry in batch.items():
        if torch.is_tensor(entry):
            changed[name] = change(entry)
        elif isinstance(entry, dict):
            changed[name] = map_tensors(entry, change)
        else:
            changed[name] = entry
    return changed


class Collator:
    """Makes micro-batches of samples in one layout: padded rows, or one row without padding. An objective may derive from it.

    It also says which documents lie in one micro-batch.
    """

    axes: ClassVar[Mapping[str, Axis]] = AXES
    """What each entry of a batch goes by, those of `add_loss_inputs` included; needed to cut a row (`parallel.sequence`)."""

    keeps_row_ids = False
    """Whether a cut batch has the ids of its whole row too (`row_input_ids`), as noise on embeddings needs them."""

    def __init__(self, layout: Layout, pad_token_id: int) -> None:
        assert layout is not Layout.auto, "the layout is resolved before batches are made"
        self.layout = layout
        self.pad_token_id = pad_token_id

    def __call__(self, samples: Sequence[Sample], cut: RowCut | None = None) -> dict[str, Any]:
        """Make one micro-batch of samples, on the CPU; with a `cut`, this rank's slice of it along the sequence.

        Beside token ids, positions and targets it has:
        - `target_rows` (int64): which positions of the flattened rows have a target, the "supervised rows";
        - `row_sequence` (int64): the sample that each supervised row belongs to, 0 to `num_sequences` - 1;
        - `target_weights` (float32): what each supervised row counts for in the loss, if some count for less than 1;
        - `reference_logps` (float32, one a sample): log-probabilities of a reference model, if they were recorded;
        - what the objective's `add_loss_inputs` adds.

        Give a `cut` only if all ranks of a sequence-parallel group read the same samples: otherwise they would exchange attention
        heads of different documents. So completions that each rank generates or scores alone are not cut.
        """
        batch = self.token_tensors(samples)
        # Where the targets are, found here on the CPU: the loss then never asks the device how many there are.
        batch["target_rows"] = (batch["targets"].view(-1) != IGNORED_TARGET).nonzero()[:, 0]
        num_targets = [int(np.count_nonzero(sample.supervised[1:])) for sample in samples]
        batch["row_sequence"] = torch.from_numpy(np.repeat(np.arange(len(samples)), num_targets))
        batch["num_sequences"] = len(samples)
        target_weights = _target_weights(samples, num_targets)
        if target_weights is not None:
            batch["target_weights"] = target_weights
        if all(REFERENCE in sample.marks for sample in samples):
            logps = [sample.marks[REFERENCE] for sample in samples]
            batch["reference_logps"] = torch.tensor(logps, dtype=torch.float32)
        self.add_loss_inputs(batch, samples)
        return batch if cut is None else self.cut(batch, cut)

    def cut(self, batch: dict[str, Any], cut: RowCut) -> dict[str, Any]:
        """This rank's slice of a micro-batch; see `cut_batch`. An objective may override it."""
        return cut_batch(batch, cut, self.axes, keep_row_ids=self.keeps_row_ids)

    def token_tensors(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The ids, positions and targets of the samples in the collator's layout. An objective may override it."""
        if self.layout is Layout.padding_free:
            return concatenated_batch(samples)
        return padded_batch(samples, self.pad_token_id)

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to the batch what the loss needs besides tokens and targets. An objective may override it."""

    def assign_to_slots(
        self, dataset: TokenDataset, units: np.ndarray, costs: np.ndarray, shape: tuple[int, int]
    ) -> list[list[int]]:
        """Spread a step's units (documents, packs, pairs) over the micro-batches of all ranks (slots): positions, by slot.

        `units` (int64 [U]): their numbers in `dataset`; `costs` (int64 [U]): what each costs. `shape`: (slots, units a slot).
        Deterministic; the costliest slot comes first. An objective may override it, and then look at the units themselves.
        """
        num_slots, units_per_slot = shape
        return assign_to_slots(costs, num_slots, units_per_slot)

    def filler_samples(self, dataset: TokenDataset, num_samples: int) -> list[Sample]:
        """The first `num_samples` sequences, without targets, for a rank that has run out of samples but must take part.

        Forward passes are collective: if this rank made none, the others would wait for ever.
        """
        return [self.without_targets(dataset.sample(number)) for number in range(num_samples)]

    def without_targets(self, sample: Sample) -> Sample:
        """A copy of the sample in which nothing is scored. An objective may override it."""
        return Sample(sample.input_ids, np.zeros_like(sample.supervised), sample.marks)


def _target_weights(samples: Sequence[Sample], num_targets: list[int]) -> torch.Tensor | None:
    """What each target of the samples counts for in the loss, float32 [targets of all]; None if each counts as 1.

    `num_targets`: how many targets each sample has.
    """
    weights_of_samples = [sample.target_weights() for sample in samples]
    if all(weights is None for weights in weights_of_samples):
        return None
    rows = []
    for count, weights in zip(num_targets, weights_of_samples, strict=True):
        rows.append(np.ones(count, np.float32) if weights is None else weights)
    return torch.from_numpy(np.concatenate(rows))


def _shifted_targets(sample: Sample) -> np.ndarray:
    """The target of each position of a sample, int64 [n]: the next token if it is supervised, else `IGNORED_TARGET` (-100).

    Tokens [5, 6, 7] of which only 7 is supervised have the targets [-100, 7, -100].
    """
    targets = np.full(len(sample.input_ids), IGNORED_TARGET, dtype=np.int64)
    targets[:-1] = np.where(sample.supervised[1:], sample.input_ids[1:], IGNORED_TARGET)
    return targets


def concatenated_batch(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch of one row without padding: the tokens of all samples, one after another, T in all.

    `input_ids`, `position_ids` (from 0 in each sample) and `targets` (shifted to the next token) are int64 [1, T]. The other
    entries say where each sample begins, so that attention stays within a sample.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    # int32 [samples + 1]: where each sample begins in the row, and where the last one ends.
    boundaries = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    position_ids = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
    targets = np.concatenate([_shifted_targets(sample) for sample in samples])
    return {
        "input_ids": torch.from_numpy(input_ids)[None],
        "position_ids": torch.from_numpy(position_ids)[None],
        "targets": torch.from_numpy(targets)[None],
        # These four have the names that flash attention uses; queries and keys have the same boundaries.
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_bounds": boundaries.tolist(),
    }


def padded_batch(samples: Sequence[Sample], pad_token_id: int) -> dict[str, Any]:
    """Make a batch with one row for each sample, padded on the right to the longest: all tensors are int64 [samples, longest].

    Targets are shifted: each position has the next token. Padding has no attention and no target. `pad_token_id`: the id in the
    positions of padding.
    """
    longest = max(len(sample.input_ids) for sample in samples)
    input_ids = np.full((len(samples), longest), pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    targets = np.full_like(input_ids, IGNORED_TARGET)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        targets[row, :length] = _shifted_targets(sample)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.arange(longest, dtype=torch.int64).repeat(len(samples), 1),
        "attention_mask": torch.from_numpy(attention_mask),
        "targets": torch.from_numpy(targets),
    }
