"""The parts of a mixture of experts: its expert modules, the routers that choose them, and their matrices."""

from __future__ import annotations

from typing import Any

from torch import nn


def expert_weight_names(module: Any) -> tuple[str, ...]:
    """Names of the weights of a module of experts, such as `("gate_up_proj", "down_proj")`, each a stack `[experts, ., .]`.

    Empty if `module` holds no experts, or some that transformers' own functions do not compute.
    """
    # transformers sets these attributes, whatever their values, on the experts that its functions compute.
    if not all(hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return ()
    names = ("up_proj", "down_proj")
    if module.has_gate:  # both in one matrix
        names = ("gate_up_proj", "down_proj")
    own_parameters = dict(module.named_parameters(recurse=False))
    if not all(name in own_parameters for name in names):
        return ()
    return names


def expert_modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a mixture's experts that transformers' experts functions compute with, by name."""
    return {name: module for name, module in model.named_modules() if expert_weight_names(module)}


def names_of_unsupported_experts(model: nn.Module) -> list[str]:
    """Names of modules that hold experts as weights `[E, ., .]`, but compute with them by code of their own.

    Neither adapters nor expert parallelism reach such experts.
    """
    names = []
    for name, module in model.named_modules():
        if expert_weight_names(module) or "experts" not in name.rsplit(".", 1)[-1]:
            continue
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            names.append(name)
    return names


def routers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that choose experts, by name (`model.layers.0.mlp.gate`): `gate` or `router` beside a module `experts`."""
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" not in children:
            continue
        for key in ("gate", "router"):
            if key in children:
                by_name[f"{name}.{key}"] = children[key]
    return by_name


def router_weight_names(model: nn.Module) -> list[str]:
    """Names of the matrices with which routers score experts."""
    names = []
    for name, module in routers_by_name(model).items():
        names += [f"{name}.{key}" for key, parameter in module.named_parameters() if parameter.dim() == 2]
    return names


def linear_router_names(model: nn.Module) -> list[str]:
    """Names of the routers that are plain linear layers: they compute a product and nothing more."""
    names = []
    for weight in router_weight_names(model):
        owner = weight.rpartition(".")[0]
        # A subclass with a forward pass of its own returns a choice, not a product.
        if getattr(type(model.get_submodule(owner)), "forward", None) is nn.Linear.forward:
            names.append(owner)
    return names
