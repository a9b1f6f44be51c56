"""What objectives over next tokens share: the decoder runs on all tokens, the head on supervised rows only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.losses.next_token import Counting, computes_loss, logits_loss
from trainer.model import flex
from trainer.objectives.base import Reference

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "decoder_input_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "document_bounds",
)
"""What of a batch the model itself is given."""


@dataclass(frozen=True, slots=True)
class CausalWay:
    """How a batch goes through a causal model (`trainer/objectives/forward_path.py` proves which way is right for which)."""

    fused: bool
    """The decoder gives hidden states, of which the head itself makes the loss; else the model's own forward pass gives
    logits, at supervised rows only."""
    positions: bool
    """The model is told each token's position; else it counts them itself."""
    alone: bool = False
    """A batch must be one document: beside another, padded to one length, the model computes something else, or nothing."""


FUSED = CausalWay(fused=True, positions=True)
PLAIN = CausalWay(fused=False, positions=False)
"""What the library itself does with padded rows."""
WAYS = (FUSED, CausalWay(fused=False, positions=True), PLAIN, CausalWay(fused=False, positions=False, alone=True))
"""Every way, the fastest first."""


def plain_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside an adapter wrapper; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def supervised_rows(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    """The output head, the hidden states `[N, H]` that it is given, and the targets `[N]` of these rows.

    Where the model's own forward pass must be taken the "hidden states" are logits already, and the head passes them on.
    """
    causal_lm = plain_model(model)
    way: CausalWay = getattr(causal_lm, "way", FUSED)
    inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch and (way.positions or key != "position_ids")}
    rows, targets = batch["target_rows"], batch["targets"].view(-1)
    if not way.fused:
        return nn.Identity(), _own_logits(causal_lm, inputs, rows), targets[rows]
    with flex.documents(inputs):
        hidden = causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    head: nn.Module = causal_lm.get_output_embeddings()  # type: ignore[operator]
    return head, hidden.reshape(-1, hidden.shape[-1])[rows], targets[rows]


def forward_pass(model: nn.Module, batch: dict[str, Any]) -> None:
    """A batch through a causal model or a classifier, for what happens on the way: no head and no loss of a causal one."""
    if hasattr(plain_model(model), "way"):
        supervised_rows(model, {**batch, "target_rows": batch["target_rows"][:0]})
    else:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _own_logits(causal_lm: Any, inputs: dict[str, Any], rows: Tensor) -> Tensor:
    """Logits `[N, V]` at `rows`, of the model's own forward pass, in which its head sees these rows alone where it can."""
    head = causal_lm.get_output_embeddings()
    positions = inputs["input_ids"].numel()

    def select(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        if (
            hidden.numel() != positions * hidden.shape[-1]
        ):  # several predictions of a token, of which one are its logits
            return args
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, rows], *rest)

    hook = None if head is None else head.register_forward_pre_hook(select)
    try:
        with flex.documents(inputs):
            logits = causal_lm(**inputs, use_cache=False).logits
    finally:
        if hook is not None:
            hook.remove()
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if len(logits) == len(rows) else logits[rows]


def counting_of(batch: dict[str, Any], smoothing: float = 0.0) -> Counting:
    """The weights of the supervised rows, and whose source each is, where the batch says so; in training, `smoothing`."""
    spread = smoothing if torch.is_grad_enabled() else 0.0
    return Counting(batch.get("target_weights"), batch.get("row_source"), len(batch.get("source_names", ())), spread)


def counted(batch: dict[str, Any], loss: Tensor, correct: Tensor, *apart: Tensor) -> dict[str, Tensor]:
    """The terms of a next-token loss; `loss/NAME` of each source where the batch tells them apart, `nll` where it is smoothed."""
    terms = {"loss": loss, "accuracy": correct.detach()}
    if len(apart) > int("row_source" in batch):
        *apart_only, plain = apart
        apart, terms["nll"] = tuple(apart_only), plain.detach()
    for parts in apart:
        terms |= {f"loss/{name}": part for name, part in zip(batch["source_names"], parts.unbind(), strict=True)}
    return terms


def summed_loss(model: nn.Module, batch: dict[str, Any], smoothing: float = 0.0) -> tuple[Tensor, ...]:
    """Cross-entropy summed over supervised rows, and how many argmaxes are right (counted in evaluation only).

    Where the batch has `target_weights`, a row counts as much in both; with `row_source` the third is the loss by source; in
    training with `smoothing` the last is the loss without.
    """
    head, selected, targets = supervised_rows(model, batch)
    if computes_loss(head):
        return head(selected, targets=targets, counting=counting_of(batch, smoothing))
    return logits_loss(
        head(selected), targets, counting_of(batch, smoothing)
    )  # an adapter on the head adds to logits, so the logits are needed


def sequence_logps(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probability of each sequence's supervised tokens, and their number, both `[S]` float32.

    Sequences lie in the batch one after another; `batch["row_sequence"]` says whose each supervised row is.
    """
    head, selected, targets = supervised_rows(model, batch)
    if computes_loss(head):
        nll = head(selected, targets=targets, by_row=True)
    else:
        nll = F.cross_entropy(head(selected).float(), targets, reduction="none")
    whose, empty = batch["row_sequence"], nll.new_zeros(batch["num_sequences"])
    return empty.index_add(0, whose, -nll), empty.index_add(0, whose, nll.new_ones(len(whose)))


def reference_logps(model: nn.Module, batch: dict[str, Any], reference: Reference | None) -> Tensor:
    """`[S]` float32: what `sequence_logps` said before training, as recorded, or computed with adapter and dropout off."""
    if reference is None:
        return batch["reference_logps"]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reference(model):
            return sequence_logps(model, batch)[0]
    finally:
        model.train(training)
