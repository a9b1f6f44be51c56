"""One adapted layer at a time, built by peft itself outside the model: initial values, buffers and merged weights.

The model is on the meta device when adapters are added, where peft's initial values would be lost, and sharded when
values are needed. So peft wraps a copy of the single layer, on the CPU, with random numbers drawn from (seed, layer
name): the values are peft's own, whole, and the same on every rank and under every strategy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import own_buffers, own_modules, own_parameters
from strategies.runtime import derive_seed
from trainer.tuning.base import BaseReader

ADAPTER = "default"


class Lone(nn.Module):
    """One parameter of a module that peft adapts by itself, apart from the rest: a layer of its own."""

    def __init__(self, key: str, parameter: Tensor, *, is_transposed: bool) -> None:
        super().__init__()
        self.register_parameter(key, nn.Parameter(parameter.detach(), requires_grad=False))
        self.is_transposed = is_transposed
        """Whether matrices lie as `[in, out]`; peft reads it."""


class AdapterReplicas:
    """Copies of the adapted layers of one model, made when asked for; keeps the last one."""

    def __init__(self, settings: Any, bases: dict[str, nn.Module], *, reads_base: bool) -> None:
        self.settings, self.bases, self.reads_base = settings, bases, reads_base
        """peft's config; the base layers, on meta, by their name in the base model; whether values depend on weights.

        A `Lone` parameter has its own name, that of its module included.
        """
        self._last: tuple[tuple[str, int], nn.Module] | None = None

    def initial(self, name: str, base: BaseReader, seed: int) -> nn.Module:
        """The adapted layer `name` before training; its base weights hold values only where the method reads them."""
        if self._last is None or self._last[0] != (name, seed):
            self._last = (name, seed), self._layer(name, base if self.reads_base else None, seed)
        return self._last[1]

    def merged(
        self, name: str, base: BaseReader, seed: int, trained: dict[str, Tensor], live: nn.Module
    ) -> dict[str, Tensor]:
        """The base parameters of layer `name` with the adapter folded in, float32, by their name in the layer.

        `trained`: the adapter's full tensors by their name in the layer; `live`: the layer in the model, whose buffers
        hold what layers share.
        """
        layer: Any = self._layer(name, base, seed)
        parameters = dict(layer.named_parameters())
        with torch.no_grad():
            for key, value in trained.items():
                parameters[key].copy_(value)
            for path, owner in layer.named_modules():
                if f"{path}.".startswith("base_layer."):
                    continue
                buffers = own_buffers(owner)
                for key in buffers:
                    buffers[key] = own_buffers(live.get_submodule(path))[key].cpu()  # type: ignore[union-attr]
            layer.eval()
            layer.merge(safe_merge=True)
        return {key: p.detach() for key, p in layer.get_base_layer().named_parameters()}

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What peft keeps beside parameters, by name in peft's wrapper of the whole model."""
        layers = [name for name, base in self.bases.items() if not isinstance(base, Lone)]
        if not layers:
            return
        tuner = self._wrap(layers, None, seed=0)
        for name, buffer in tuner.named_buffers():
            if ".base_layer." not in name:
                yield name, buffer

    def _layer(self, name: str, base: BaseReader | None, seed: int) -> nn.Module:
        return self._wrap([name], base, seed).model.get_submodule(self._place_of(name))  # type: ignore[union-attr]

    def _place_of(self, name: str) -> str:
        return name.rpartition(".")[0] if isinstance(self.bases[name], Lone) else name

    def _wrap(self, names: list[str], base: BaseReader | None, seed: int) -> nn.Module:
        """peft's wrapper of a model that has only the layers `names`, under their own names."""
        from peft import PEFT_TYPE_TO_TUNER_MAPPING

        holder = nn.Module()
        for name in names:
            place = self._place_of(name)
            _place(holder, place, _filled(self.bases[name], place, base))
        settings = copy.deepcopy(self.settings)
        alone = [name for name in names if isinstance(self.bases[name], Lone)]
        settings.target_modules = [name for name in names if name not in alone]
        settings.exclude_modules, settings.modules_to_save = None, None
        if hasattr(settings, "target_parameters"):
            settings.target_parameters = alone or None
        # The names are already those that were chosen; nothing else is here that could be tied or trained in full.
        for key in ("layers_to_transform", "layers_pattern", "modules_to_tie", "trainable_token_indices"):
            if hasattr(settings, key):
                setattr(settings, key, None)
        if hasattr(settings, "ensure_weight_tying"):
            settings.ensure_weight_tying = False
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(derive_seed(seed, ".".join(names) if len(names) == 1 else ""))
            return PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](holder, settings, ADAPTER)


def _place(holder: nn.Module, name: str, layer: nn.Module) -> None:
    *parents, last = name.split(".")
    for part in parents:
        if part not in own_modules(holder):
            holder.add_module(part, nn.Module())
        holder = own_modules(holder)[part]  # type: ignore[assignment]
    holder.add_module(last, layer)


def _filled(template: nn.Module, name: str, base: BaseReader | None) -> nn.Module:
    """A copy with values from `base`, in float32; without it, with parameters that have a shape and no memory."""
    layer = copy.deepcopy(template)
    for path, owner in layer.named_modules():
        parameters = own_parameters(owner)
        for key, p in parameters.items():
            if p is None:
                continue
            if base is None:
                value = torch.zeros(()).expand(p.shape)
            else:
                # A copy: what is read may be the file's own memory, and peft subtracts in place.
                value = base.whole(".".join(part for part in (name, path, key) if part)).to(torch.float32, copy=True)
            parameters[key] = nn.Parameter(value, requires_grad=False)
    return layer
