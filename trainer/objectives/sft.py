"""Supervised fine-tuning: the next-token loss on supervised tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.loss import LossHead, logits_loss

if TYPE_CHECKING:
    from trainer.data.dataset import Sample

MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "document_bounds",
)
"""What of a batch the model itself is given."""


def plain_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside an adapter wrapper; adapters stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


class Sft:
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    def counts(self, sample: Sample) -> dict[str, int]:
        """Supervised targets: a document's first token has none."""
        return {"loss": int(sample.supervised[1:].sum())}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the decoder on all tokens and the head on supervised rows only."""
        causal_lm = plain_model(model)
        inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        hidden = causal_lm.get_decoder()(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
        rows = batch["target_rows"]
        targets = batch["targets"].view(-1)[rows]
        selected = hidden.reshape(-1, hidden.shape[-1])[rows]
        head = causal_lm.get_output_embeddings()  # type: ignore[operator]
        if _computes_loss(head):
            loss, correct = head(selected, targets=targets)
        else:  # an adapter on the head adds to logits, so the logits are needed
            loss, correct = logits_loss(head(selected), targets)
        return {"loss": loss, "accuracy": correct.detach()}


def _computes_loss(head: nn.Module) -> bool:
    if isinstance(head, LossHead):
        return True
    wrapped = getattr(head, "modules_to_save", None)  # a head trained in full beside adapters
    return wrapped is not None and all(isinstance(m, LossHead) for m in wrapped.values())  # type: ignore[operator]
