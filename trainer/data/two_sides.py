"""Batches of encoder-decoder models: a sequence is a prompt and then its answer, parted where the first token is learned.

The prepared data set needs no second store for them: what the encoder reads is what nobody learns, and every token of
the answer is learned. Both sides are padded rows, so a step's documents are grouped by length before they are dealt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.data.store.sequences import Sample, TokenDataset


def boundary(sample: Sample) -> int:
    """Where the answer begins; the end of the sequence where nothing is learned (a filler)."""
    learned = np.flatnonzero(sample.supervised)
    return int(learned[0]) if len(learned) else len(sample.input_ids)


def pad_two_sides(samples: Sequence[Sample], *, pad_token_id: int, start_token_id: int, ignored: int) -> dict[str, Any]:
    """One row a document on each side, padded on the right: `input_ids` and `attention_mask [S, N]` for the encoder;
    `decoder_input_ids` (the start token, then the answer without its last) and `targets` (the answer) `[S, M]`."""
    cuts = [boundary(sample) for sample in samples]
    answers = [sample.input_ids[cut:] for sample, cut in zip(samples, cuts, strict=True)]
    ids = np.full((len(samples), max(cuts)), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    decoder = np.full((len(samples), max(1, *map(len, answers), 1)), pad_token_id, dtype=np.int64)
    targets = np.full_like(decoder, ignored)
    decoder[:, 0] = start_token_id
    for row, (sample, cut, answer) in enumerate(zip(samples, cuts, answers, strict=True)):
        ids[row, :cut], mask[row, :cut] = sample.input_ids[:cut], 1
        decoder[row, 1 : len(answer)] = answer[:-1]
        targets[row, : len(answer)] = answer
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "decoder_input_ids": torch.from_numpy(decoder),
        "targets": torch.from_numpy(targets),
    }


def deal_two_sides(data: TokenDataset, documents: np.ndarray, num_slots: int, capacity: int) -> list[list[int]]:
    """Deal positions in `documents` into `num_slots` slots of exactly `capacity`, similar lengths together.

    Sorted by prompt, by answer or by both, whichever pads least. Deterministic. Slots come back costliest first.
    """
    answers = data.num_supervised[documents]
    prompts = data.lengths[documents] - answers
    best: list[np.ndarray] = []
    least = None
    for keys in ((answers, prompts), (prompts, answers), (prompts, prompts + answers)):
        slots = list(np.lexsort(keys)[::-1].reshape(num_slots, capacity))
        costs = [capacity * int(prompts[slot].max() + answers[slot].max()) for slot in slots]
        if least is None or sum(costs) < least:
            least = sum(costs)
            best = [slots[number] for number in sorted(range(num_slots), key=lambda n: (-costs[n], n))]
    return [sorted(slot.tolist()) for slot in best]
