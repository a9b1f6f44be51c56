"""Heads that a checkpoint stores with values of their own although its configuration ties them to the embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch

from strategies.errors import ConfigError
from trainer.model.config import ModelConfig
from trainer.model.loading import find_weights_directory
from trainer.model.weights import PretrainedWeights

CHUNK_ELEMENTS = 2**22
"""Elements that are compared at a time."""


def _has_separate_head(config: ModelConfig, model: Any) -> bool:
    """Whether the files of `model` (on meta) hold two different matrices for embeddings and head, though its config ties them.

    Then the head must be a parameter of its own, or its values would be lost. Ties them in `model` first.
    """
    model.tie_weights()
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    # Not tied, or without a head: nothing to find out.
    if head is None or getattr(head, "weight", None) is not embeddings.weight:
        return False
    try:
        directory = find_weights_directory(config)
    except ConfigError:  # said where weights are needed
        return False
    if not any(directory.glob("*.safetensors")):
        return False
    checkpoint = PretrainedWeights(directory, model)
    embedding_weight = f"{_module_name(embeddings, model)}.weight"
    head_weight = f"{_module_name(head, model)}.weight"
    try:
        stored = checkpoint.conversions.groups.keys()
        if embedding_weight not in stored or head_weight not in stored:
            return False
        return _values_differ(checkpoint, embedding_weight, head_weight)
    finally:
        checkpoint.close()


def _module_name(wanted: Any, model: Any) -> str:
    """The name of the module `wanted` in `model`."""
    return next(name for name, module in model.named_modules() if module is wanted)


def _values_differ(checkpoint: PretrainedWeights, first: str, second: str) -> bool:
    """Whether two parameters of a checkpoint differ in shape or values; reads both, up to the first difference."""
    if checkpoint.shape(first) != checkpoint.shape(second):
        return True
    size = math.prod(checkpoint.shape(first))
    # In pieces, so that two vocabulary matrices are never in memory at once.
    for start in range(0, size, CHUNK_ELEMENTS):
        stop = min(start + CHUNK_ELEMENTS, size)
        if not torch.equal(checkpoint.read_slice(first, start, stop), checkpoint.read_slice(second, start, stop)):
            return True
    return False


def untie_as_stored(config: ModelConfig, hf_config: Any, model: Any) -> str:
    """Untie embeddings and head in `hf_config` if the files hold two different matrices; returns a note for the user, else "".

    `hf_config`: transformers' configuration; `model`: built of it on meta, to be built again if the note is not empty.
    """
    text_config = hf_config.get_text_config()
    if not getattr(text_config, "tie_word_embeddings", False) or not _has_separate_head(config, model):
        return ""
    for owner in (hf_config, text_config):  # the same object, but for models that also see or hear
        if hasattr(owner, "tie_word_embeddings"):
            owner.tie_word_embeddings = False
    return (
        "embeddings and head are not tied: config.json ties them, but the files hold two different matrices, and transformers "
        "then keeps both"
    )
