"""Replaces a model's output layer by one that computes the loss itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from trainer.losses.next_token import LossHead


class LogitTransform(NamedTuple):
    """What an architecture does to the logits after its head."""

    softcap: float | None
    """c of `c tanh(logits / c)`; None: no soft cap."""
    scale: float
    """Factor on the logits, applied first."""


def head_transform(hf_config: Any) -> LogitTransform:
    """What an architecture does to the logits after its head: a soft cap (Gemma), a factor (Cohere).

    Computed by the loss itself, where the head is replaced.
    """
    softcap = getattr(hf_config, "final_logit_softcapping", None)
    factor = getattr(hf_config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(hf_config, "logits_scaling", None)  # Granite divides
    scale = 1.0
    if factor is not None:
        scale = float(factor)
    if divisor is not None:
        scale = 1.0 / float(divisor)
    return LogitTransform(softcap, scale)


def install_loss_head(model: Any, hf_config: Any, *, frozen_row: int | None = None) -> None:
    """Replace a model's output layer, if it is a plain linear one, by a LossHead, which computes the loss itself.

    `frozen_row`: the row of the input embedding that is always zero (as a rule the padding token's), so that it must not train
    through a layer that is tied to the embedding. None if there is none.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    softcap, scale = head_transform(hf_config)
    loss_head = LossHead.of_linear(head, softcap=softcap, logit_scale=scale)
    if frozen_row is not None and head.weight is model.get_input_embeddings().weight:
        loss_head.frozen_row = frozen_row
    model.set_output_embeddings(loss_head)
