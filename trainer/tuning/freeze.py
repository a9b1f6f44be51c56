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

LAYERS = re.compile(r"last-(\d+)|(\d+)-(\d+)")


class Freeze(Full):
    """Chooses parameters of the base by block, module name or kind."""

    def __init__(
        self, config: FreezeConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()
    ) -> None:
        self.config = config
        self.train_embeddings = train_embeddings
        self.new_heads = new_heads

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze all but what was chosen. Raises ConfigError if nothing is left to train."""
        config = self.config
        chosen = _parameter_ids(self._chosen_modules(model))
        if config.bias_only or config.norm_only:
            chosen &= self._biases_and_norms(model)
        # These train whole, whatever kind of parameter was chosen: heads are drawn anew, and so may embeddings be.
        always: list[nn.Module] = [model.get_submodule(name) for name in self.new_heads]
        if config.embeddings or self.train_embeddings:
            always += _vocabulary_modules(model)
        chosen |= _parameter_ids(always)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())
        if not any(parameter.requires_grad for parameter in model.parameters()):
            kinds = []
            if config.bias_only:
                kinds.append("bias")
            if config.norm_only:
                kinds.append("normalisation")
            kind = " or ".join(kinds) or "trainable"
            raise ConfigError(f"tuning=freeze: the chosen part has no {kind} parameter; choose another")
        return model

    def _chosen_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that `layers` and `modules` name; the whole model if only a kind of parameter is chosen."""
        config = self.config
        modules: list[nn.Module] = []
        if config.layers is not None:
            modules += _blocks(model, config.layers)
        if config.modules is not None:
            matching = [m for name, m in model.named_modules() if name and re.fullmatch(config.modules, name)]
            if not matching:
                name_patterns = sorted({re.sub(r"\d+", "<n>", name) for name, _ in model.named_modules() if name})
                raise ConfigError(
                    f"tuning.modules={config.modules}: no module name matches this expression; here are "
                    f"{', '.join(name_patterns)}"
                )
            modules += matching
        if not modules and (config.bias_only or config.norm_only):
            return [model]
        return modules

    def _biases_and_norms(self, model: nn.Module) -> set[int]:
        """Ids of the parameters that are biases, or belong to normalisation layers, as the settings choose."""
        chosen = set()
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            for key, parameter in own_parameters(module).items():
                is_chosen_kind = (self.config.norm_only and is_norm) or (self.config.bias_only and key == "bias")
                if parameter is not None and is_chosen_kind:
                    chosen.add(id(parameter))
        return chosen


def _parameter_ids(modules: list[nn.Module]) -> set[int]:
    ids: set[int] = set()
    for module in modules:
        ids.update(id(parameter) for parameter in module.parameters())
    return ids


def _blocks(model: Any, layers: str) -> list[nn.Module]:
    """The blocks that `last-n` or `first-last` names. Raises ConfigError, with how many there are, if it names others."""
    classes = block_class_names(model)
    blocks = [m for m in model.modules() if type(m).__name__ in classes]
    match = LAYERS.fullmatch(layers)
    assert match is not None, layers
    count = len(blocks)
    if count == 0:
        raise ConfigError(f"tuning.layers={layers}: this architecture names no repeated blocks; use tuning.modules")
    if match[1]:  # last-n
        first = count - int(match[1])
        last = count - 1
    else:
        first = int(match[2])
        last = int(match[3])
    if not 0 <= first <= last < count:
        raise ConfigError(
            f"tuning.layers={layers}: this model has {count} blocks, numbered from 0; the last two are last-2"
        )
    return blocks[first : last + 1]


def _vocabulary_modules(model: Any) -> list[nn.Module]:
    """The token embeddings, and the output head if the model has one."""
    modules = [model.get_input_embeddings()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        modules.append(head)
    return modules
