"""Builds encoder-decoder architectures. `rules.py` says which of them go with which objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.small_files import read_json_object
from trainer.model.weights import PretrainedWeights
from trainer.tuning.compat.transformers import block_class_names


@dataclass(frozen=True, slots=True)
class EncoderDecoder:
    """What only encoder-decoder models have."""

    decoder_start: int
    """Token that the decoder begins with."""
    computed: dict[str, Tensor] = field(default_factory=dict)
    """Values of parameters that are computed, never trained, and need not be in the checkpoint (sinusoidal positions)."""


def decoder_start_token_id(hf_config: Any, directory: Path | None) -> int:
    """The token that the decoder begins with, from the model's config or its generation_config.json.

    `directory`: of the model's files; None for a published shape. Raises ConfigError if neither names a token.
    """
    start = getattr(hf_config, "decoder_start_token_id", None)
    if start is None and directory is not None:
        try:
            start = read_json_object(directory / "generation_config.json").get("decoder_start_token_id")
        except ConfigError:  # there need not be one
            start = None
    if start is None:
        raise ConfigError(
            f"model.path={directory}: neither config.json nor generation_config.json names decoder_start_token_id, the "
            "token that the decoder begins with; add it to config.json"
        )
    if not isinstance(start, int):
        raise ConfigError(
            f"model.path={directory}: decoder_start_token_id={start!r} is no token's number; mend it there"
        )
    return start


def prepare_encoder_decoder(model: Any, directory: Path | None) -> EncoderDecoder:
    """Untie what the checkpoint holds apart in `model`, which is on meta, and return what only encoder-decoder models have.

    Reads the tensors of tied parameters. `directory`: of the checkpoint; None for a published shape. Without weights, as a plan
    does without them, what the configuration ties stays tied; a run reads the weights later, and says that they are missing.
    """
    if directory is not None and any(directory.glob("*.safetensors")):
        untie_differing_weights(model, PretrainedWeights(directory, model))
    return EncoderDecoder(decoder_start_token_id(model.config, directory), fixed_values(model))


def block_classes(model: Any) -> set[str]:
    """Names of the classes of the repeated blocks: what the architecture says, else those of its two lists of layers."""
    return block_class_names(model) or {
        type(side.layers[0]).__name__ for side in (model.get_encoder(), model.get_decoder())
    }


def untie_differing_weights(model: Any, checkpoint: PretrainedWeights) -> list[str]:
    """Give a parameter of its own to each tied one that the checkpoint holds with other values; returns the names of these.

    T5 v1.1 and Flan-T5 have a head of their own, and transformers ties or not by what the file holds. Changes `model`, on meta;
    reads both tensors of each pair.
    """
    untied = []
    # transformers' table of tied parameters: each name, and the name of the parameter that it shares.
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if checkpoint.name_in_checkpoint(target) is None or checkpoint.name_in_checkpoint(source) is None:
            continue
        if torch.equal(checkpoint.full_tensor(target), checkpoint.full_tensor(source)):
            continue
        owner, _, key = target.rpartition(".")
        parameter = nn.Parameter(torch.empty_like(model.get_parameter(target).data))
        setattr(model.get_submodule(owner), key, parameter)
        untied.append(target)
    return untied


def fixed_values(model: nn.Module) -> dict[str, Tensor]:
    """The values of position embeddings that are computed and never trained (sinusoidal), by parameter name.

    transformers' modules for them have a method `create_weight`; their parameters in `model` are on meta.
    """
    return {
        f"{name}.weight": module.create_weight()  # type: ignore[operator]
        for name, module in model.named_modules()
        if hasattr(module, "create_weight")
    }


def freeze_fixed(model: nn.Module) -> None:
    """Keep computed embeddings from training, whatever the tuning method said."""
    for module in model.modules():
        if hasattr(module, "create_weight"):
            module.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
