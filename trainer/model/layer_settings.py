"""Reads settings of a transformers configuration that layers may have differently."""

from __future__ import annotations

from typing import Any


def layer_values(text_config: Any, name: str) -> list[Any]:
    """Read a setting that layers may have differently: its different values, first layer first; `[None]` without the setting.

    `text_config`: transformers' configuration of the text model. Layers of one model may differ: Gemma 4 has larger heads where
    attention is full. transformers then raises an error if the setting of the whole model is read.
    """
    if name not in (getattr(text_config, "per_layer_attributes", None) or ()):
        return [getattr(text_config, name, None)]
    values: list[Any] = []
    for layer in text_config.per_layer_config:
        value = getattr(layer, name, None)
        if value not in values:
            values.append(value)
    return values
