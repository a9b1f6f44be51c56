"""LoRA on experts and routers: which parameters get it, and a forward pass of low-rank products.

Parameters, names and files are peft's (`target_parameters`); its own forward pass adds the whole update to the weights
first. A layer's adapters are asked for their matrices as modules, and its weights are read within their own module's
forward pass: engines that gather parameters module by module see both.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.tuning.base import LoraConfig
from trainer.tuning.compat.peft import names_read_as_experts
from trainer.tuning.expert_parts import (
    expert_modules_by_name,
    expert_weight_names,
    linear_router_names,
    names_of_unsupported_experts,
    router_weight_names,
)
from trainer.tuning.low_rank import LoraUpdate
from trainer.tuning.replica import ADAPTER


def expert_and_router_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the parameters of experts and routers that LoRA adapts by itself, such as `layers.0.mlp.experts.gate_up_proj`.

    These are no linear layers, so peft adapts them as parameters. Raises ConfigError if `tuning.experts` or `tuning.router` is
    set, and the model has none that can be adapted.
    """
    targets: list[str] = []
    if config.experts:
        targets += _expert_targets(model)
    if config.router:
        targets += _router_targets(model)
    return targets


def _expert_targets(model: nn.Module) -> list[str]:
    """Names of the weights of all experts, each a stack of one matrix for each expert: `layers.0.mlp.experts.down_proj`.

    Raises ConfigError if there are none, or some that cannot be adapted.
    """
    modules = expert_modules_by_name(model)
    unsupported_names = names_of_unsupported_experts(model)
    if unsupported_names:
        raise ConfigError(
            f"tuning.experts=true: {unsupported_names[0]} ({type(model).__name__}) computes its experts in a way of its own, "
            "which low-rank products cannot follow; set tuning.experts=false"
        )
    if not modules:
        raise ConfigError(f"tuning.experts=true: {type(model).__name__} has no experts; set tuning.experts=false")
    targets = []
    for name, module in modules.items():
        targets += [f"{name}.{key}" for key in expert_weight_names(module)]
    return targets


def _router_targets(model: nn.Module) -> list[str]:
    """Names of the router weights that must be adapted as parameters: those of routers that are not plain linear layers.

    A router that is a plain linear layer gets an ordinary adapter, as a module. Raises ConfigError if the model has no router
    at all.
    """
    router_names = router_weight_names(model)
    if not router_names:
        raise ConfigError(
            f"tuning.router=true: {type(model).__name__} has no router beside its experts that is known here; set "
            "tuning.router=false"
        )
    linear_weights = {f"{name}.weight" for name in linear_router_names(model)}
    return [name for name in router_names if name not in linear_weights]


def choose_expert_targets(settings: Any, model: nn.Module, config: LoraConfig) -> None:
    """Write into peft's `settings` which experts and routers get LoRA, and which routers `all-linear` must leave out.

    Routers that are plain linear layers, by `tuning.router` and the form of the targets:
    - `tuning.router=false`, and targets are `all-linear`: excluded by name, since `all-linear` would adapt them too.
    - `tuning.router=true`, and targets are a set of module names: added to the set.
    - `tuning.router=true`, and targets are a regular expression: added as alternatives, so that `q_proj` becomes
      `(q_proj)|layers\\.0\\.mlp\\.gate`.
    - else: nothing to do.

    Raises ConfigError if the settings ask for experts or routers and the model has none that can be adapted.
    """
    settings.target_parameters = expert_and_router_targets(model, config) or None
    router_names = linear_router_names(model)
    router_patterns = [re.escape(name) for name in router_names]  # full names: peft matches the whole name
    if not config.router:
        if router_names and config.targets == "all-linear":
            excluded = [settings.exclude_modules] if settings.exclude_modules else []
            settings.exclude_modules = "|".join([*excluded, *router_patterns])
    elif isinstance(settings.target_modules, set):
        settings.target_modules |= set(router_names)
    elif router_names and settings.target_modules != "all-linear":  # a regular expression
        settings.target_modules = "|".join([f"({settings.target_modules})", *router_patterns])


def name_targets_for_peft(settings: Any, model: Any) -> None:
    """Name the targets in peft's `settings` so that plain peft, when it loads the files, adapts what is adapted in `model`.

    peft takes some names of linear layers for those that experts had in transformers 4, such as the `gate_proj` of a dense
    layer. The weight of such a layer is named as a parameter (`target_parameters`) instead, which gives the same tensors under
    the same keys. Nothing changes if the architecture has no such names, or if the method is not LoRA.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    expert_names = names_read_as_experts(getattr(getattr(model, "config", None), "model_type", ""))
    if not expert_names or str(settings.peft_type.value) != "LORA":
        return
    layers = set()
    for name, layer in model.get_base_model().named_modules():
        # peft's ParamWrapper adapts one parameter, which is named as such already.
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper):
            layers.add(name)
    misread = {name for name in layers if name.rsplit(".", 1)[-1] in expert_names}
    parameters = set(settings.target_parameters or ())
    parameters |= {f"{name}.weight" for name in misread}
    settings.target_modules = layers - misread
    settings.target_parameters = sorted(parameters)


class _MatrixModule(nn.Linear):
    """A matrix of an adapter, as a module whose forward pass returns it: engines gather parameters module by module."""

    def forward(self) -> Tensor:  # type: ignore[override]
        """A copy: the parameter itself may be freed when this returns."""
        return self.weight.clone()


def _lora_update(wrapper: Any) -> LoraUpdate:
    """The LoRA update of one adapted parameter as matrices by expert: A `[E, r, in]` and B `[E, out, r]`.

    `wrapper`: peft's module around the parameter, which keeps A as `[E * r, in]` and B as `[out, r * E]`.
    """
    num_experts = wrapper.num_experts
    down = wrapper.lora_A[ADAPTER]()
    up = wrapper.lora_B[ADAPTER]()
    down = down.view(num_experts, -1, down.shape[-1])  # [E, r, in]
    up = up.view(up.shape[0], -1, num_experts).permute(2, 0, 1)  # [E, out, r]
    return LoraUpdate(down, up, wrapper.scaling[ADAPTER])


@cache
def _router_with_update(router_class: Any) -> type[nn.Module]:
    """Make a subclass of a router's class that can add a matrix (a LoRA update) to one of its weights for one forward pass."""

    class Router(router_class):  # type: ignore[misc]
        def forward(self, *args: Any, update: tuple[str, Tensor] | None = None, **kwargs: Any) -> Any:
            """The router's output with `update` = (parameter's name, matrix to add to it); without it, as it was."""
            if update is None:
                return super().forward(*args, **kwargs)
            name, update_matrix = update
            weight = self._parameters[name]
            # `self.name` finds this before the parameter of the same name.
            self.__dict__[name] = weight + update_matrix.to(weight.dtype)
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.__dict__[name]

    Router.__name__ = router_class.__name__
    return Router


@cache
def _low_rank_wrapper_class() -> type:
    """Make a subclass of peft's ParamWrapper with another forward pass: once, at the first call, since peft is a heavy import.

    peft's ParamWrapper adapts one parameter of a module (of experts or a router), not a layer.
    """
    from peft.tuners.lora import ParamWrapper

    class LowRankWrapper(ParamWrapper):
        """As peft's, without a copy of the adapted weights."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Compute the adapted experts or router without making a copy of their weights.

            peft would add `B A` to a copy of all weights, which for experts is large. Here experts get A, B and the scaling as
            `lora_updates`, by parameter name, and add the products `(x A) B` themselves. A router gets its whole small update as
            `update`.
            """
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            # A module with several adapted parameters has one wrapper for each, nested.
            wrappers: list[ParamWrapper] = [self]
            base = self.base_layer
            while isinstance(base, ParamWrapper):
                wrappers.append(base)
                base = base.base_layer
            if expert_weight_names(base):  # experts
                lora_updates = {wrapper.parameter_name: _lora_update(wrapper) for wrapper in wrappers}
                return base(x, *args, lora_updates=lora_updates, **kwargs)
            # A router: one small matrix, so its whole update is multiplied out. peft counts it as one expert.
            lora_update = _lora_update(self)
            update_matrix = lora_update.scaling * (lora_update.up @ lora_update.down)[0]
            return base(x, *args, update=(self.parameter_name, update_matrix), **kwargs)

        def __getattr__(self, name: str) -> Any:
            # Some models read the buffers of a router from outside.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is not None and name in base._buffers:
                return base._buffers[name]
            return super().__getattr__(name)

    return LowRankWrapper


def use_low_rank_forward(model: nn.Module) -> int:
    """Let the adapted experts and routers of a model compute with A and B alone, in place; returns how many those are.

    That is `x W + (x A) B`, where peft's own forward pass adds `A B` to a copy of W first. Returns 0 for a model without
    adapters.
    """
    if not hasattr(model, "peft_config"):
        return 0
    from peft.tuners.lora import ParamWrapper

    wrappers: list[Any] = [m for m in model.modules() if type(m) is ParamWrapper]
    # Only classes are exchanged: parameters, their names and peft's files stay as they are.
    for wrapper in wrappers:
        wrapper.__class__ = _low_rank_wrapper_class()
        for matrix in (wrapper.lora_A[ADAPTER], wrapper.lora_B[ADAPTER]):
            # Its forward pass returns the matrix instead of a product with it.
            matrix.__class__ = _MatrixModule
        base = wrapper.get_base_layer()
        if not expert_weight_names(base):  # a router
            router_class: Any = type(base)
            base.__class__ = _router_with_update(router_class)
    return len(wrappers)
