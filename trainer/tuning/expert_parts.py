"""The parts of a mixture of experts: its expert modules, the routers that choose them, and their matrices."""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_names(module: Any) -> tuple[str, ...]:
    """The weights `[E, ., .]` with which transformers' experts functions compute; empty for any other module."""
    if not all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return ()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    held = dict(module.named_parameters(recurse=False))
    return names if all(name in held for name in names) else ()


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of experts that such a function computes with, by name."""
    return {name: module for name, module in model.named_modules() if weight_names(module)}


def unreachable(model: nn.Module) -> list[str]:
    """Names of other modules that hold experts as weights of three dimensions, and compute with them in a way of their own."""
    return [
        name
        for name, module in model.named_modules()
        if not weight_names(module)
        and "experts" in name.rsplit(".", 1)[-1]
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that choose experts, by name: those that stand beside a module of experts and give its choice."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" not in children:
            continue
        for key in ("gate", "router"):
            if key in children:
                found[f"{name}.{key}"] = children[key]
    return found


def router_weights(model: nn.Module) -> list[str]:
    """Names of the matrices with which routers score experts."""
    return [
        f"{name}.{key}"
        for name, module in routers(model).items()
        for key, parameter in module.named_parameters()
        if parameter.dim() == 2
    ]


def linear_routers(model: nn.Module) -> list[str]:
    """Names of the linear layers among the routers, of those that compute a product and no more."""
    owners = [name.rpartition(".")[0] for name in router_weights(model)]
    return [name for name in owners if getattr(type(model.get_submodule(name)), "forward", None) is nn.Linear.forward]
