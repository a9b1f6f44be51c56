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
from strategies.runtime import derived_seed
from trainer.tuning.base import BaseWeightsReader

ADAPTER = "default"
"""peft's name of the one adapter that a model has here; it stands in parameter names."""


class SingleParameterLayer(nn.Module):
    """A layer with one parameter: stands for a parameter of a larger module that peft adapts by itself (`target_parameters`)."""

    def __init__(self, key: str, parameter: Tensor, *, is_transposed: bool) -> None:
        super().__init__()
        self.register_parameter(key, nn.Parameter(parameter.detach(), requires_grad=False))
        self.is_transposed = is_transposed
        """Whether matrices are `[in, out]`; peft reads this attribute."""


class AdaptedLayerBuilder:
    """Builds the adapted layers of one model outside it, on the CPU, when their values are needed. Keeps the last one."""

    def __init__(self, settings: Any, base_layers: dict[str, nn.Module], *, reads_base: bool) -> None:
        """`settings`: peft's config. `base_layers`: the layers that adapters stand on, on meta, by name in the base model."""
        self.settings = settings
        self.base_layers = base_layers
        """A `SingleParameterLayer` is under its full name, `<module>.<parameter>`."""
        self.reads_base = reads_base
        """Whether initial values depend on the base weights."""
        self._initial_layer: nn.Module | None = None
        """The layer that was built last, with initial values: its parameters are asked for one by one."""
        self._initial_layer_key: tuple[str, int] | None = None
        """The (name, seed) of `_initial_layer`."""

    def initial_layer(self, name: str, base: BaseWeightsReader, seed: int) -> nn.Module:
        """The adapted layer `name` before training, from which initial values are read.

        Its base weights have values only if the method reads them.
        """
        if self._initial_layer is None or self._initial_layer_key != (name, seed):
            self._initial_layer = self._build_layer(name, base if self.reads_base else None, seed)
            self._initial_layer_key = (name, seed)
        return self._initial_layer

    def merged_parameters(
        self, name: str, base: BaseWeightsReader, seed: int, trained: dict[str, Tensor], buffer_source: nn.Module
    ) -> dict[str, Tensor]:
        """Merge the trained adapter of the layer `name` into its base weights: {name in the layer: float32 weight}.

        `trained`: the adapter's full tensors, by their name in the layer. `base` reads the base weights. `seed`: that of the
        run, from which some methods draw frozen factors. `buffer_source`: the layer in the model, from which buffers are
        copied, such as a projection that layers share.
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
                live_buffers = own_buffers(buffer_source.get_submodule(path)) if buffers else {}
                for key in buffers:
                    buffers[key] = live_buffers[key].cpu()  # type: ignore[union-attr]
            layer.eval()
            # peft's own: it refuses weights that are not finite.
            layer.merge(safe_merge=True)
        return {key: parameter.detach() for key, parameter in layer.get_base_layer().named_parameters()}

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that peft adds, with their values, by name in peft's wrapper of the whole model.

        They do not depend on the seed.
        """
        layers = [name for name, base in self.base_layers.items() if not isinstance(base, SingleParameterLayer)]
        if not layers:
            return
        tuner = self._wrapped_layers(layers, base=None, seed=0)
        for name, buffer in tuner.named_buffers():
            if ".base_layer." not in name:
                yield name, buffer

    def _build_layer(self, name: str, base: BaseWeightsReader | None, seed: int) -> nn.Module:
        """Build peft's wrapper of the layer `name` alone, on the CPU. `base` reads its weights; None: they have no values."""
        wrapper: Any = self._wrapped_layers([name], base, seed)
        return wrapper.model.get_submodule(self._module_name(name))  # type: ignore[no-any-return]

    def _module_name(self, name: str) -> str:
        """The name of the module that holds an adapted layer: for a parameter adapted by itself, the module around it."""
        if isinstance(self.base_layers[name], SingleParameterLayer):
            return name.rpartition(".")[0]
        return name

    def _wrapped_layers(self, names: list[str], base: BaseWeightsReader | None, seed: int) -> nn.Module:
        """Let peft wrap a small model on the CPU with nothing but the layers `names`: that makes their initial values.

        peft draws values when it wraps a model, and some methods read base weights for it, which a sharded model on meta does
        not have. `base` reads them; None: the base weights have no values. `seed`: that of the run.
        """
        from peft import PEFT_TYPE_TO_TUNER_MAPPING

        # A model of nothing but these layers. `names` are keys of `base_layers`: of a module, or of a parameter in one.
        model = nn.Module()
        module_targets = []
        parameter_targets = []
        for name in names:
            module_name = self._module_name(name)
            _add_at_path(model, module_name, _copy_with_values(self.base_layers[name], module_name, base))
            if isinstance(self.base_layers[name], SingleParameterLayer):
                parameter_targets.append(name)
            else:
                module_targets.append(name)
        settings = self._settings_for_targets(module_targets, parameter_targets)

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The values of one layer depend on its name; those of buffers, which layers share, do not.
            seed_name = names[0] if len(names) == 1 else ""
            torch.default_generator.manual_seed(derived_seed(seed, seed_name))
            return PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](model, settings, ADAPTER)

    def _settings_for_targets(self, module_targets: list[str], parameter_targets: list[str]) -> Any:
        """Copy peft's config so that it adapts exactly these modules and parameters, by full name."""
        settings = copy.deepcopy(self.settings)
        settings.target_modules = module_targets
        if hasattr(settings, "target_parameters"):
            settings.target_parameters = parameter_targets or None
        # Off: settings that choose, tie or train other modules. The layers here are the chosen ones.
        settings.exclude_modules = None
        settings.modules_to_save = None
        for key in ("layers_to_transform", "layers_pattern", "modules_to_tie", "trainable_token_indices"):
            if hasattr(settings, key):
                setattr(settings, key, None)
        if hasattr(settings, "ensure_weight_tying"):
            settings.ensure_weight_tying = False
        return settings


def _add_at_path(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Add `layer` to a model under the dotted `name`, with empty modules as parents where there are none yet."""
    *parent_names, last = name.split(".")
    parent = model
    for parent_name in parent_names:
        if parent_name not in own_modules(parent):
            parent.add_module(parent_name, nn.Module())
        parent = own_modules(parent)[parent_name]  # type: ignore[assignment]
    parent.add_module(last, layer)


def _copy_with_values(meta_layer: nn.Module, name: str, base: BaseWeightsReader | None) -> nn.Module:
    """Copy a layer of the base model, which itself is on meta, to the CPU, so that peft can wrap it. `name`: in the base model.

    Its parameters get their values from `base`, in float32; without `base`, zeros that take no memory.
    """
    layer = copy.deepcopy(meta_layer)
    for path, owner in layer.named_modules():
        parameters = own_parameters(owner)
        for key, parameter in parameters.items():
            if parameter is None:
                continue
            if base is None:
                tensor = torch.zeros(()).expand(parameter.shape)
            else:
                full_name = ".".join(filter(None, (name, path, key)))
                # A copy, since what is read may be the file's own memory, and peft subtracts in place.
                tensor = base.full_tensor(full_name).to(torch.float32, copy=True)
            parameters[key] = nn.Parameter(tensor, requires_grad=False)
    return layer
