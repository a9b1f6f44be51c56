"""Builds adapted layers one at a time outside the model, through peft itself: initial values, buffers and merged weights.

Adapters are added on the meta device, where peft's initial values would be lost, and the model is sharded when values
are needed. So peft wraps a copy of the single layer, on the CPU, with random numbers drawn from (seed, layer name). The
values are peft's own, whole, and the same on every rank and under every strategy.
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


class LoneParameter(nn.Module):
    """A layer with one parameter: stands for a parameter of a larger module that peft adapts by itself (`target_parameters`)."""

    def __init__(self, key: str, parameter: Tensor, *, is_transposed: bool) -> None:
        super().__init__()
        self.register_parameter(key, nn.Parameter(parameter.detach(), requires_grad=False))
        self.is_transposed = is_transposed
        """Whether matrices are `[in, out]`; peft reads this attribute."""


class AdapterReplicas:
    """Copies of the adapted layers of one model, made when they are needed. Keeps the last one."""

    def __init__(self, settings: Any, base_layers: dict[str, nn.Module], *, reads_base: bool) -> None:
        """`settings`: peft's config. `base_layers`: on meta, by name in the base model."""
        self.settings = settings
        self.base_layers = base_layers
        """A `LoneParameter` is under its full name, `<module>.<parameter>`."""
        self.reads_base = reads_base
        """Whether initial values depend on the base weights."""
        self._cached: tuple[tuple[str, int], nn.Module] | None = None

    def initial_layer(self, name: str, base: BaseReader, seed: int) -> nn.Module:
        """The adapted layer `name` before training. Its base weights have values only if the method reads them."""
        if self._cached is None or self._cached[0] != (name, seed):
            layer = self._build_layer(name, base if self.reads_base else None, seed)
            self._cached = (name, seed), layer
        return self._cached[1]

    def merged(
        self, name: str, base: BaseReader, seed: int, trained: dict[str, Tensor], live: nn.Module
    ) -> dict[str, Tensor]:
        """The base parameters of layer `name` with the adapter merged in, float32, by their name in the layer.

        `trained`: the adapter's full tensors, by their name in the layer. `live`: the layer in the model, from which buffers
        are copied, such as a projection that layers share.
        """
        layer: Any = self._build_layer(name, base, seed)
        parameters = dict(layer.named_parameters())
        with torch.no_grad():
            for key, tensor in trained.items():
                parameters[key].copy_(tensor)
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
        """The buffers that peft adds, with their values, by name in peft's wrapper of the whole model."""
        layers = [name for name, base in self.base_layers.items() if not isinstance(base, LoneParameter)]
        if not layers:
            return
        tuner = self._wrap(layers, None, seed=0)
        for name, buffer in tuner.named_buffers():
            if ".base_layer." not in name:
                yield name, buffer

    def _build_layer(self, name: str, base: BaseReader | None, seed: int) -> nn.Module:
        return self._wrap([name], base, seed).model.get_submodule(self._path_of(name))  # type: ignore[union-attr]

    def _path_of(self, name: str) -> str:
        return name.rpartition(".")[0] if isinstance(self.base_layers[name], LoneParameter) else name

    def _wrap(self, names: list[str], base: BaseReader | None, seed: int) -> nn.Module:
        """peft's wrapper of a model that has only the layers `names`, under their own names. `base` of None: no values."""
        from peft import PEFT_TYPE_TO_TUNER_MAPPING

        holder = nn.Module()
        for name in names:
            path = self._path_of(name)
            _add_at_path(holder, path, _copy_with_values(self.base_layers[name], path, base))
        settings = copy.deepcopy(self.settings)
        lone = [name for name in names if isinstance(self.base_layers[name], LoneParameter)]
        settings.target_modules = [name for name in names if name not in lone]
        settings.exclude_modules = None
        settings.modules_to_save = None
        if hasattr(settings, "target_parameters"):
            settings.target_parameters = lone or None
        # The names are those that were chosen already, and nothing else is here to be chosen, tied or trained in full.
        for key in ("layers_to_transform", "layers_pattern", "modules_to_tie", "trainable_token_indices"):
            if hasattr(settings, key):
                setattr(settings, key, None)
        if hasattr(settings, "ensure_weight_tying"):
            settings.ensure_weight_tying = False
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The values of one layer depend on its name; those of buffers, which layers share, do not.
            seed_name = names[0] if len(names) == 1 else ""
            torch.default_generator.manual_seed(derive_seed(seed, seed_name))
            return PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](holder, settings, ADAPTER)


def _add_at_path(holder: nn.Module, name: str, layer: nn.Module) -> None:
    """Add `layer` under the dotted `name`, with empty modules as parents."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in own_modules(holder):
            holder.add_module(part, nn.Module())
        holder = own_modules(holder)[part]  # type: ignore[assignment]
    holder.add_module(last, layer)


def _copy_with_values(template: nn.Module, name: str, base: BaseReader | None) -> nn.Module:
    """A copy of a layer on meta: with values from `base` in float32, or without `base` with zeros that take no memory."""
    layer = copy.deepcopy(template)
    for path, owner in layer.named_modules():
        parameters = own_parameters(owner)
        for key, parameter in parameters.items():
            if parameter is None:
                continue
            if base is None:
                tensor = torch.zeros(()).expand(parameter.shape)
            else:
                full_name = ".".join(part for part in (name, path, key) if part)
                # A copy, since what is read may be the file's own memory, and peft subtracts in place.
                tensor = base.full_tensor(full_name).to(torch.float32, copy=True)
            parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return layer
