"""The likelihood of a text after another one: a pass of the model inside the root module's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batches.collate import IGNORED
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
    """Whether each of its tokens is the likeliest one where it stands."""


class ScoreContinuations:
    """Stands in for the objective of a step module: scores of each continuation instead of a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logprobs` and `greedy`, `[S]` float64: the sum of log-probabilities, and how many tokens are not the argmax."""
        whole: Any = plain_model(model)
        bias: Tensor | None = None
        with stock_attention(whole):
            if whole.config.is_encoder_decoder:
                head, hidden, targets, bias = answer_rows(model, batch)
            else:
                head, hidden, targets = supervised_rows(model, batch)
            likely, best = row_scores(head, hidden, targets, bias)
        whose, empty = batch["row_sequence"], torch.zeros(batch["num_sequences"], dtype=torch.float64)
        empty = empty.to(likely.device)
        return {
            "logprobs": empty.index_add(0, whose, likely.double()),
            "misses": empty.index_add(0, whose, (~best).double()),
        }


def pair_rows(pairs: Sequence[Pair], *, pad_token_id: int, decoder_start: int | None) -> dict[str, Any]:
    """Pairs as padded rows on the CPU; `decoder_start` is the first token of the decoder, of encoder-decoder models.

    A decoder reads context and continuation in one row; an encoder the context, and the decoder beside it the continuation.
    Padding stands on the right, where no token sees it.
    """
    inputs, targets = [], []
    for context, continuation in pairs:
        if decoder_start is None:
            inputs.append([*context, *continuation[:-1]] if continuation else [*context])
            targets.append([*[IGNORED] * (len(context) - 1), *continuation])
        else:
            inputs.append([decoder_start, *continuation[:-1]])
            targets.append([*continuation])
    wanted = padded(targets, IGNORED, width=max(map(len, inputs)))
    rows = torch.nonzero(wanted.view(-1) != IGNORED)[:, 0]
    found: dict[str, Any] = {
        "targets": wanted,
        "target_rows": rows,
        "row_sequence": rows // wanted.shape[1],
        "num_sequences": len(pairs),
    }
    if decoder_start is None:
        return found | {"input_ids": padded(inputs, pad_token_id), "attention_mask": mask_of(inputs)}
    contexts = [[*context] for context, _ in pairs]
    return found | {
        "input_ids": padded(contexts, pad_token_id),
        "attention_mask": mask_of(contexts),
        "decoder_input_ids": padded(inputs, pad_token_id),
    }


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool = False, width: int | None = None) -> Tensor:
    """int64 `[S, N]`: rows of unlike lengths, filled up on the right, or on the left."""
    width = width or max(map(len, rows))
    around = ([fill] * (width - len(row)) for row in rows)
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, around, strict=True)])


def mask_of(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """int64 `[S, N]`: 1 where `padded` puts a token."""
    return padded([[1] * len(row) for row in rows], 0, left=left)
