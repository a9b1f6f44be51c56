"""Trains a part of the base and freezes the rest."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from strategies.compat.modules import own_parameters
from strategies.errors import ConfigError
from trainer.tuning.compat.transformers import block_class_names
from trainer.tuning.config import FreezeConfig
from trainer.tuning.full import Full

LAYER_RANGE_REGEX = re.compile(r"last-(\d+)|(\d+)-(\d+)")
"""A value of `tuning.layers`: `last-<n>` or `<first>-<last>`."""


class Freeze(Full):
    """Chooses parameters of the base by block, module name or kind."""

    def __init__(
        self, config: FreezeConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()
    ) -> None:
        self.config = config
        self.train_embeddings = train_embeddings
        self.new_heads = new_heads

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze every parameter but those that the settings choose (by layers, modules or kinds), and return the model.

        Raises ConfigError if nothing is left to train.
        """
        config = self.config
        # `id()` of each parameter that trains.
        trained_ids = _parameter_ids(self._chosen_modules(model))
        if config.bias_only or config.norm_only:
            trained_ids &= self._bias_and_norm_ids(model)
        # These train whole, also with `bias_only` or `norm_only`: heads start at random, and so may embeddings.
        always_trained: list[nn.Module] = [model.get_submodule(name) for name in self.new_heads]
        if config.embeddings or self.train_embeddings:
            always_trained += _vocabulary_modules(model)
        trained_ids |= _parameter_ids(always_trained)

        has_trained = False
        for parameter in model.parameters():
            trains = id(parameter) in trained_ids and parameter.is_floating_point()
            parameter.requires_grad_(trains)
            has_trained = has_trained or trains
        if not has_trained:
            kinds = []
            if config.bias_only:
                kinds.append("bias")
            if config.norm_only:
                kinds.append("normalisation")
            parameter_kind = " or ".join(kinds) or "trainable"
            raise ConfigError(f"tuning=freeze: the chosen part has no {parameter_kind} parameter; choose another")
        return model

    def _chosen_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that `tuning.layers` and `tuning.modules` choose together.

        The whole model if both are unset and only a kind of parameter is chosen (`bias_only`, `norm_only`). Raises ConfigError
        if the regular expression `tuning.modules` matches no module name.
        """
        config = self.config
        modules: list[nn.Module] = []
        if config.layers is not None:
            modules += _blocks_of_layer_range(model, config.layers)
        if config.modules is not None:
            named_modules = [(name, module) for name, module in model.named_modules() if name]
            matching = [module for name, module in named_modules if re.fullmatch(config.modules, name)]
            if not matching:
                # One line for all blocks: layers.<n>.mlp.
                name_patterns = sorted({re.sub(r"\d+", "<n>", name) for name, _ in named_modules})
                raise ConfigError(
                    f"tuning.modules={config.modules}: no module name matches this expression; here are "
                    f"{', '.join(name_patterns)}"
                )
            modules += matching
        if not modules and (config.bias_only or config.norm_only):
            return [model]
        return modules

    def _bias_and_norm_ids(self, model: nn.Module) -> set[int]:
        """`id()` of the parameters that are biases (with `bias_only`) or belong to normalisation layers (with `norm_only`)."""
        ids = set()
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            for key, parameter in own_parameters(module).items():
                is_chosen_kind = (self.config.norm_only and is_norm) or (self.config.bias_only and key == "bias")
                if parameter is not None and is_chosen_kind:
                    ids.add(id(parameter))
        return ids


def _parameter_ids(modules: list[nn.Module]) -> set[int]:
    """`id()` of every parameter of these modules: a shared parameter is one object."""
    ids: set[int] = set()
    for module in modules:
        ids.update(id(parameter) for parameter in module.parameters())
    return ids


def _blocks_of_layer_range(model: Any, layers: str) -> list[nn.Module]:
    """The blocks of the model that `tuning.layers` names, in forward order: `last-2` the last two, `4-7` those from 4 to 7.

    Blocks are numbered from 0, and both ends are included. Raises ConfigError, with how many blocks there are, if it names
    others.
    """
    class_names = block_class_names(model)
    blocks = [module for module in model.modules() if type(module).__name__ in class_names]
    # Checked when the run was composed.
    match = LAYER_RANGE_REGEX.fullmatch(layers)
    assert match is not None, layers
    num_blocks = len(blocks)
    if num_blocks == 0:
        raise ConfigError(f"tuning.layers={layers}: this architecture names no repeated blocks; use tuning.modules")
    if match[1]:  # last-n
        first = num_blocks - int(match[1])
        last = num_blocks - 1
    else:
        first = int(match[2])
        last = int(match[3])
    if not 0 <= first <= last < num_blocks:
        raise ConfigError(
            f"tuning.layers={layers}: this model has {num_blocks} blocks, numbered from 0; the last two are last-2"
        )
    return blocks[first : last + 1]


def _vocabulary_modules(model: Any) -> list[nn.Module]:
    """The token embeddings, and the output head if the model has one."""
    modules = [model.get_input_embeddings()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        modules.append(head)
    return modules
