"""Heads that a checkpoint stores beside the embeddings, with values of their own, although its configuration ties them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from strategies.errors import ConfigError
from trainer.model.config import ModelConfig
from trainer.model.loading import weights_directory
from trainer.model.weights import Checkpoint

CHUNK = 2**22
"""Elements that are compared at a time."""


def _stored_apart(config: ModelConfig, model: Any) -> bool:
    """Whether the files of `model` (on meta) hold two different matrices for embeddings and head.

    Reads both as far as they are equal.
    """
    model.tie_weights()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not embeddings.weight:
        return False
    try:
        directory = weights_directory(config)
    except ConfigError:  # said where weights are needed
        return False
    if not any(directory.glob("*.safetensors")):
        return False
    checkpoint = Checkpoint(directory, model)
    one, two = (next(f"{n}.weight" for n, m in model.named_modules() if m is module) for module in (embeddings, head))
    if not {one, two} <= checkpoint.conversions.groups.keys():
        return False
    if checkpoint.shape(one) != checkpoint.shape(two):
        return True
    size = math.prod(checkpoint.shape(one))
    parts = ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))
    apart = any(not torch.equal(checkpoint.run(one, *part), checkpoint.run(two, *part)) for part in parts)
    checkpoint.close()
    return apart


def untied_as_stored(config: ModelConfig, settings: Any, build: Callable[[], Any]) -> str:
    """Let `settings` say that the head is a matrix of its own where the files do, and what to say of it; else empty.

    `settings`: transformers' configuration; `build` makes its model on meta.
    """
    if not getattr(settings.get_text_config(), "tie_word_embeddings", False) or not _stored_apart(config, build()):
        return ""
    for owner in {id(owner): owner for owner in (settings, settings.get_text_config())}.values():
        if hasattr(owner, "tie_word_embeddings"):
            owner.tie_word_embeddings = False
    return (
        "embeddings and head are not tied: config.json ties them, but the files hold two different matrices, and transformers "
        "then keeps both"
    )
