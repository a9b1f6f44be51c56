"""Encoder-decoder models: the next-token loss on the answer, which the decoder writes after the encoder read the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trainer.heads.loss import computes_loss, logits_loss
from trainer.objectives.causal import plain_model

if TYPE_CHECKING:
    from trainer.data.store.sequences import Sample


class Seq2seq:
    """Terms: `loss` (summed cross-entropy, carries the gradient) and `accuracy` (correct argmaxes, evaluation only)."""

    sequences_per_document = 1
    perplexity = True
    metrics: tuple[str, ...] = ()
    head_labels: int | None = None
    uses_reference = False
    looks_ahead = False

    def counts(self, sample: Sample) -> dict[str, int]:
        """Every token of the answer is a target: the first follows the decoder's start token."""
        return {"loss": int(sample.supervised[1:].sum())}

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the encoder on `input_ids [S, N]`, the decoder on `decoder_input_ids [S, M]`, the head on `target_rows`."""
        whole: Any = plain_model(model)
        read = whole.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        # Answers are padded on the right, and no token sees a later one: the decoder needs no mask of its own.
        hidden = whole.get_decoder()(
            input_ids=batch["decoder_input_ids"],
            encoder_hidden_states=read.last_hidden_state,
            encoder_attention_mask=batch["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        rows = batch["target_rows"]
        hidden, targets = hidden.reshape(-1, hidden.shape[-1])[rows], batch["targets"].view(-1)[rows]
        if getattr(whole.config, "scale_decoder_outputs", False):  # T5 of 2019, whose head is its embedding
            hidden = hidden * whole.config.d_model**-0.5
        bias = getattr(whole, "final_logits_bias", None)  # BART's kin: a buffer [1, V] added to the head's output
        head = whole.get_output_embeddings()
        if computes_loss(head):
            loss, correct = head(hidden, targets=targets, added_bias=None if bias is None else bias[0])
        else:  # an adapter on the head adds to logits, so the logits are needed
            logits = head(hidden)
            loss, correct = logits_loss(logits if bias is None else logits + bias, targets)
        return {"loss": loss, "accuracy": correct.detach()}
