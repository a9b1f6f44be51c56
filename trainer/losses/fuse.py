"""Makes a model's own output layer compute the loss."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.losses.next_token import LossHead


def head_transform(config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) that an architecture applies to its logits after the head, read from its config."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere multiplies
        scale = float(factor)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
        scale = 1.0 / float(divisor)
    return softcap, scale


def fuse_head(model: Any, model_config: Any, *, frozen_row: int | None = None) -> None:
    """Let a model's plain output layer compute the loss itself. `frozen_row`: the row of a tied one that is not to train."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        softcap, scale = head_transform(model_config)
        loss_head = LossHead.replace(head, softcap=softcap, logit_scale=scale)
        if frozen_row is not None and head.weight is model.get_input_embeddings().weight:
            loss_head.frozen_row = frozen_row
        model.set_output_embeddings(loss_head)
