"""Dropout of an architecture, whatever its configuration calls it."""

from __future__ import annotations

from typing import Any

from trainer.model.encoder_decoder import DROPOUTS, LAYER_DROP

FIELDS = (
    "attention_dropout",
    "hidden_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "seq_classif_dropout",
)


def set_dropout(model_config: Any, probability: float) -> dict[str, float]:
    """Set every dropout the architecture has, whatever its fields are called; returns the values that were there."""
    before = {name: getattr(model_config, name, None) for name in (*FIELDS, *DROPOUTS)}
    found = {name: value for name, value in before.items() if isinstance(value, float | int)}
    for name in found:
        setattr(model_config, name, 0.0 if name in LAYER_DROP else probability)
    return found
