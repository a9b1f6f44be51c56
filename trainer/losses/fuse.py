"""Replaces a model's output layer by one that computes the loss itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.losses.next_token import LossHead


def head_transform(config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) that an architecture applies to its logits after the head, read from its config."""
    softcap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    scale = 1.0
    if factor is not None:
        scale = float(factor)
    if divisor is not None:
        scale = 1.0 / float(divisor)
    return softcap, scale


def fuse_head(model: Any, hf_config: Any, *, frozen_row: int | None = None) -> None:
    """Replace a model's output layer by a LossHead if it is a plain linear one.

    `frozen_row`: the row that does not train, if the layer is tied to the input embedding.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return
    softcap, scale = head_transform(hf_config)
    loss_head = LossHead.replace(head, softcap=softcap, logit_scale=scale)
    if frozen_row is not None and head.weight is model.get_input_embeddings().weight:
        loss_head.frozen_row = frozen_row
    model.set_output_embeddings(loss_head)
