"""Likelihoods of texts after given contexts, computed in the forward pass of the root module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.batches.cutting import IGNORED_TARGET
from trainer.evaluation.decoding import stock_attention
from trainer.losses.row_scores import target_scores
from trainer.objectives.causal import states_at_targets, unwrap_adapter
from trainer.objectives.seq2seq import supervised_answer_rows


class ContinuationPair(NamedTuple):
    """A context and the continuation that is scored after it, as token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is after its context."""

    logprob: float
    """Natural logarithm of its probability: the sum over its tokens."""
    num_tokens: int
    greedy: bool
    """Whether each of its tokens is the likeliest one at its position."""


class ScoreContinuations:
    """Takes the place of the objective in a step module, which calls `terms`: scores continuations, computes no loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Score each continuation of a batch (of `continuation_batch`), in place of computing a loss: float64 [S] each.

        `logprobs`: the sum of the log-probabilities of its tokens. `num_not_greedy`: how many of its tokens are not the
        likeliest one.
        """
        causal_model: Any = unwrap_adapter(model)
        # A bias of the output head, which only some encoder-decoder models have.
        bias: Tensor | None = None
        with stock_attention(causal_model):
            if causal_model.config.is_encoder_decoder:
                head, hidden, targets, bias = supervised_answer_rows(model, batch)
            else:
                head, hidden, targets = states_at_targets(model, batch)
            token_logprobs, is_argmax = target_scores(head, hidden, targets, bias)
        # There is one score for each target token. Add them up by the sequence that the token belongs to.
        sequence_of_target = batch["row_sequence"]  # int64 [T]: the index of the pair
        zeros = torch.zeros(batch["num_sequences"], dtype=torch.float64)
        zeros = zeros.to(token_logprobs.device)
        return {
            "logprobs": zeros.index_add(0, sequence_of_target, token_logprobs.double()),
            "num_not_greedy": zeros.index_add(0, sequence_of_target, (~is_argmax).double()),
        }


def continuation_batch(
    pairs: Sequence[ContinuationPair], *, pad_token_id: int, decoder_start: int | None
) -> dict[str, Any]:
    """Build the tensors of some pairs of context and continuation, on the CPU, padded on the right.

    No token attends to the padding. A decoder-only model (`decoder_start` None) reads context and continuation in one
    sequence: context [5, 6] and continuation [7, 8] become the input [5, 6, 7] with the targets [ignored, 7, 8]. In an
    encoder-decoder model the encoder reads the context, and the decoder the continuation after the token `decoder_start`.
    Contexts must not be empty.

    Keys, for S pairs, N positions and T target tokens:
    - `input_ids`, `attention_mask`: int64 [S, N].
    - `decoder_input_ids`: int64 [S, N], only with an encoder.
    - `targets`: int64 [S, N], `IGNORED_TARGET` where nothing is predicted.
    - `target_rows`: int64 [T], the indices of the targets in the flattened `targets`.
    - `row_sequence`: int64 [T], the index of the pair that each target belongs to.
    - `num_sequences`: S.
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
    # As wide as the inputs: a continuation may be empty, and then its targets are one shorter.
    padded_targets = pad_sequences(targets, IGNORED_TARGET, width=max(map(len, inputs)))
    target_rows = torch.nonzero(padded_targets.view(-1) != IGNORED_TARGET)[:, 0]
    batch: dict[str, Any] = {
        "targets": padded_targets,
        "target_rows": target_rows,
        "row_sequence": target_rows // padded_targets.shape[1],
        "num_sequences": len(pairs),
    }
    if decoder_start is None:
        return batch | {"input_ids": pad_sequences(inputs, pad_token_id), "attention_mask": padding_mask(inputs)}
    contexts = [[*context] for context, _ in pairs]
    return batch | {
        "input_ids": pad_sequences(contexts, pad_token_id),
        "attention_mask": padding_mask(contexts),
        "decoder_input_ids": pad_sequences(inputs, pad_token_id),
    }


def pad_sequences(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False, width: int | None = None
) -> Tensor:
    """Make sequences of different lengths one tensor, int64 [S, width], padded with `pad_id` on the right, or on the left.

    `width`: None takes the length of the longest sequence.
    """
    width = width or max(map(len, sequences))
    padded_sequences = []
    for sequence in sequences:
        padding = [pad_id] * (width - len(sequence))
        padded_sequences.append([*padding, *sequence] if left else [*sequence, *padding])
    return torch.tensor(padded_sequences)


def padding_mask(sequences: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """The attention mask of the sequences that `pad_sequences` pads: int64 [S, N], 1 at each token and 0 at padding."""
    return pad_sequences([[1] * len(sequence) for sequence in sequences], 0, left=left)
