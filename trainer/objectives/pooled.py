"""Classifiers on rows without padding: the head sees one token of each sequence, wherever in the row that lies.

transformers' classifiers take padded rows, score every token, and keep the score of each row's last token that is no padding.
Here the decoder runs on documents one after another in a row, and the head on the kept tokens alone. Ranks can share such a
row (`parallel.sequence`): a sequence belongs to the rank that holds its last token. That this is right for an architecture is
proven (`trainer/objectives/pooled_proof.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.sequence import sum_over_group
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import AXES, Axis, RowCut, num_rows_before
from trainer.data.config import Layout
from trainer.data.store.sequences import Sample
from trainer.objectives.causal import MODEL_INPUTS, token_states, unwrap_adapter

LAST_TOKEN_POSITIONS = "last_token_positions"
"""Entry of a batch without padding: where in the row the last token of each sequence is, int64 `[S]`, ascending."""
LOCAL_SEQUENCES = "local_sequences"
"""Entry of a cut batch: the first of the sequences whose token this rank's slice has, and the one after the last."""
IS_SUPERVISED = "is_supervised"
"""Entry of a batch without padding: whether any token of a sequence is supervised, bool `[S]`. A filler has none."""
SCORE_HEAD = "score"
"""transformers' name of the head in classifiers that keep the score of the last token."""


class PooledCollator(Collator):
    """Adds to rows without padding `last_token_positions` and `is_supervised`, and to cut ones `local_sequences`."""

    axes = AXES | {LAST_TOKEN_POSITIONS: Axis.sequence, IS_SUPERVISED: Axis.sequence}

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        """Add to a batch without padding what a classifier's head needs: where each document's last token lies, and if it counts.

        A classifier scores one token of each document, the last one. A document counts if any of its tokens but the first is
        supervised; a filler has none. A batch of padded rows is left as it is.
        """
        if self.layout is not Layout.padding_free:
            return
        document_starts = batch["document_bounds"][:-1]  # the last bound is the end of the row
        positions = []
        # Strict: a batch without padding has the bounds of all its samples.
        for start, sample in zip(document_starts, samples, strict=True):
            positions.append(start + last_token_index(sample.input_ids, self.pad_token_id))
        batch[LAST_TOKEN_POSITIONS] = torch.tensor(positions, dtype=torch.int64)
        batch[IS_SUPERVISED] = torch.tensor([bool(sample.supervised[1:].any()) for sample in samples])

    def cut(self, batch: dict[str, Any], cut: RowCut) -> dict[str, Any]:
        """Cut this rank's slice of a row that ranks share, and add which sequences are its own; see the class."""
        slices = super().cut(batch, cut)
        start, stop = slices["row_span"]
        # A sequence belongs to the rank that holds its last token: how many last tokens lie before the slice's start and its end.
        first, end = num_rows_before(batch[LAST_TOKEN_POSITIONS], [start, stop])
        slices[LAST_TOKEN_POSITIONS] = batch[LAST_TOKEN_POSITIONS][first:end] - start
        slices[LOCAL_SEQUENCES] = (first, end)
        return slices


def last_token_index(ids: np.ndarray, pad_token_id: int) -> int:
    """Where the last token of a sequence is that is not padding; 0 if there is none.

    A tokenizer may use its end token for padding. transformers' classifiers then keep the score of the token before it, as here.
    """
    token_indices = np.flatnonzero(ids != pad_token_id)
    return int(token_indices[-1]) if len(token_indices) else 0


def classifier_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Run a classifier: logits `[S, outputs]` float32 of each sequence in a batch, padded or not.

    In a batch without padding (`LAST_TOKEN_POSITIONS` in it) the head scores the last tokens alone. If ranks share its row:
    logits of the sequences whose last token this rank holds.
    """
    if LAST_TOKEN_POSITIONS not in batch:  # padded rows: transformers finds the last tokens itself
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.float()
    classifier: Any = unwrap_adapter(model)
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    states = token_states(classifier.base_model, inputs)
    # A rank may have no sequence of its own. Its head then gets no rows, and its part of the graph is still there.
    score_head: nn.Module = getattr(classifier, SCORE_HEAD)
    sequence_logits: Tensor = score_head(states[0, batch[LAST_TOKEN_POSITIONS]])
    return sequence_logits.float()


def select_local_sequences(batch: dict[str, Any], by_sequence: Tensor) -> Tensor:
    """Select from a tensor `[S]`, such as labels, the part `[s]` of this rank's own sequences; all of it if the row is whole."""
    first, end = batch.get(LOCAL_SEQUENCES, (0, len(by_sequence)))
    return by_sequence[first:end]


def gather_sequences(batch: dict[str, Any], local: Tensor) -> Tensor:
    """Gather a tensor `[S]` of all sequences in the row, such as scores, from each rank's `local`, `[s]` of its own sequences.

    It has gradients. All ranks that share the row must call.
    """
    if LOCAL_SEQUENCES not in batch:
        return local
    first, end = batch[LOCAL_SEQUENCES]
    num_sequences = batch["num_sequences"]
    # Zeros elsewhere: the sum over the ranks then has each sequence once.
    with_zeros = torch.cat([local.new_zeros(first), local, local.new_zeros(num_sequences - end)])
    return sum_over_group(with_zeros, batch["row_slices"])
