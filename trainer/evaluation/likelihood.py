"""Likelihoods of texts after given contexts, computed in the forward pass of the root module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batches.cutting import IGNORED_TARGET
from trainer.evaluation.decoding import stock_attention
from trainer.losses.row_scores import row_scores
from trainer.objectives.causal import plain_model, supervised_rows
from trainer.objectives.seq2seq import answer_rows

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of what follows it."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is after its context."""

    logprob: float
    """Natural logarithm of its probability: the sum over its tokens."""
    tokens: int
    """How many tokens it has."""
    greedy: bool
    """Whether each of its tokens is the likeliest one at its position."""


class ScoreContinuations:
    """Takes the place of the objective in a step module: scores each continuation instead of computing a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logprobs` and `misses`, `[S]` float64: the sum of log-probabilities, and how many tokens are not the argmax."""
        causal_model: Any = plain_model(model)
        bias: Tensor | None = None
        with stock_attention(causal_model):
            if causal_model.config.is_encoder_decoder:
                head, hidden, targets, bias = answer_rows(model, batch)
            else:
                head, hidden, targets = supervised_rows(model, batch)
            logprobs, is_argmax = row_scores(head, hidden, targets, bias)
        # One row for each target token: add them up by the sequence that they belong to.
        sequence_numbers = batch["row_sequence"]
        zeros = torch.zeros(batch["num_sequences"], dtype=torch.float64)
        zeros = zeros.to(logprobs.device)
        return {
            "logprobs": zeros.index_add(0, sequence_numbers, logprobs.double()),
            "misses": zeros.index_add(0, sequence_numbers, (~is_argmax).double()),
        }


def pair_rows(pairs: Sequence[Pair], *, pad_token_id: int, decoder_start: int | None) -> dict[str, Any]:
    """A batch of pairs, as padded rows on the CPU; `decoder_start` is the decoder's first token, of encoder-decoder models.

    A decoder-only model reads context and continuation in one row. Otherwise the encoder reads the context, and the decoder the
    continuation. Padding is on the right, where no token sees it.

    Context [5, 6] and continuation [7, 8]: of a decoder-only model, input [5, 6, 7] and targets [ignored, 7, 8].
    """
    inputs = []
    targets = []
    for context, continuation in pairs:
        if decoder_start is None:
            inputs.append([*context, *continuation[:-1]] if continuation else [*context])
            targets.append([*[IGNORED_TARGET] * (len(context) - 1), *continuation])
        else:
            inputs.append([decoder_start, *continuation[:-1]])
            targets.append([*continuation])
    padded_targets = padded(targets, IGNORED_TARGET, width=max(map(len, inputs)))
    target_rows = torch.nonzero(padded_targets.view(-1) != IGNORED_TARGET)[:, 0]
    batch: dict[str, Any] = {
        "targets": padded_targets,
        "target_rows": target_rows,
        "row_sequence": target_rows // padded_targets.shape[1],
        "num_sequences": len(pairs),
    }
    if decoder_start is None:
        return batch | {"input_ids": padded(inputs, pad_token_id), "attention_mask": mask_of(inputs)}
    contexts = [[*context] for context, _ in pairs]
    return batch | {
        "input_ids": padded(contexts, pad_token_id),
        "attention_mask": mask_of(contexts),
        "decoder_input_ids": padded(inputs, pad_token_id),
    }


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False, width: int | None = None) -> Tensor:
    """int64 `[S, N]`: rows of different lengths, padded on the right, or with `left` on the left."""
    width = width or max(map(len, rows))
    padded_rows = []
    for row in rows:
        padding = [fill] * (width - len(row))
        padded_rows.append([*padding, *row] if left else [*row, *padding])
    return torch.tensor(padded_rows)


def mask_of(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """int64 `[S, N]`: 1 where `padded` puts a token."""
    return padded([[1] * len(row) for row in rows], 0, left=left)
