"""Documents of `replay` sources within a micro-batch: general text on which a model is kept as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from strategies.errors import DataError
from trainer.data.store.sequences import REPLAY, Sample, TokenDataset


def check_replayed(dataset: TokenDataset) -> None:
    """Raise DataError where nothing of the replayed sources is left to hold the model by."""
    if REPLAY not in dataset.counts or not dataset.counts[REPLAY].any():
        raise DataError(
            "objective.forgetting.kl_weight: no learned token of the sources marked replay=true is left (see what was "
            "dropped in the data report); raise data.max_length, loosen data.filters, or set objective.forgetting.kl_weight=0"
        )


def replayed(samples: Sequence[Sample], row_sequence: torch.Tensor) -> tuple[list[Sample], dict[str, torch.Tensor]]:
    """The replayed documents alone, and which supervised rows of the micro-batch are theirs (int64 each).

    Where there is none, its shortest document with nothing supervised: all ranks must run the model alike.
    """
    shortest = min(samples, key=lambda sample: len(sample.input_ids))
    chosen = [replace(sample, replay=None) for sample in samples if sample.replay]
    ours = torch.tensor([bool(sample.replay) for sample in samples])[row_sequence]
    rows = {"replay_rows": ours.nonzero()[:, 0], "other_rows": (~ours).nonzero()[:, 0]}
    return chosen or [Sample(shortest.input_ids, np.zeros_like(shortest.supervised))], rows
