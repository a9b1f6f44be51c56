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
        self.config, self.train_embeddings, self.new_heads = config, train_embeddings, new_heads

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze all but what was chosen; raises ConfigError that lists what exists where nothing was."""
        config = self.config
        chosen = {id(p) for module in self._part(model) for p in module.parameters()}
        if config.bias_only or config.norm_only:
            chosen &= self._kinds(model)
        always: list[nn.Module] = [model.get_submodule(name) for name in self.new_heads]
        if config.embeddings or self.train_embeddings:
            always += _vocabulary_modules(model)
        chosen |= {id(p) for module in always for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())
        if not any(p.requires_grad for p in model.parameters()):
            kinds = " or ".join(
                word for word, on in (("bias", config.bias_only), ("normalisation", config.norm_only)) if on
            )
            raise ConfigError(f"tuning=freeze: the chosen part has no {kinds or 'trainable'} parameter; choose another")
        return model

    def _part(self, model: nn.Module) -> list[nn.Module]:
        config, part = self.config, list[nn.Module]()
        if config.layers is not None:
            part += _blocks(model, config.layers)
        if config.modules is not None:
            found = [m for name, m in model.named_modules() if name and re.fullmatch(config.modules, name)]
            if not found:
                some = sorted({re.sub(r"\d+", "<n>", name) for name, _ in model.named_modules() if name})
                raise ConfigError(
                    f"tuning.modules={config.modules}: no module name matches this expression; here are {', '.join(some)}"
                )
            part += found
        only_kind = (config.bias_only or config.norm_only) and not part
        return [model] if only_kind else part

    def _kinds(self, model: nn.Module) -> set[int]:
        """Parameters that are biases or belong to normalisation layers, as asked."""
        found = set()
        for module in model.modules():
            norm = "norm" in type(module).__name__.lower()
            for key, parameter in own_parameters(module).items():
                wanted = (self.config.norm_only and norm) or (self.config.bias_only and key == "bias")
                if parameter is not None and wanted:
                    found.add(id(parameter))
        return found


def _blocks(model: Any, layers: str) -> list[nn.Module]:
    """The blocks that `last-n` or `first-last` means; raises ConfigError with how many there are."""
    classes = block_class_names(model)
    blocks = [m for m in model.modules() if type(m).__name__ in classes]
    match = LAYERS.fullmatch(layers)
    assert match is not None, layers
    count = len(blocks)
    first, last = (count - int(match[1]), count - 1) if match[1] else (int(match[2]), int(match[3]))
    if not 0 <= first <= last < count:
        raise ConfigError(
            f"tuning.layers={layers}: this model has {count} blocks, numbered from 0; the last two are last-2"
            if count
            else f"tuning.layers={layers}: this architecture names no repeated blocks; use tuning.modules"
        )
    return blocks[first : last + 1]


def _vocabulary_modules(model: Any) -> list[nn.Module]:
    modules = [model.get_input_embeddings()]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [*modules, head] if head is not None else modules
