"""Kinds of parameters, and how far two sets of gradients are apart, kind by kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.step import BuiltModel
from trainer.tuning.expert_parts import router_weight_names

MODEL_KINDS = ("attention", "MLP", "experts", "router", "norms", "embeddings", "head", "other")
ADAPTERS = "adapters"
PARAMETER_KINDS = (*MODEL_KINDS, *(f"{ADAPTERS}, {kind}" for kind in MODEL_KINDS))
"""Kinds in the order in which they are shown. The kind of an adapter's parameter is that of the weight which it adapts."""
NAME_PARTS_BY_KIND = {
    "embeddings": ("embed",),
    "head": ("lm_head",),
    "norms": ("norm", "ln_"),
    "experts": ("expert",),
    "router": ("router",),
    "attention": ("attn", "attention"),
    "MLP": ("mlp", "feed", "ffn", "fc1", "fc2", "dense_h_to", "dense_4h_to"),
}
"""Texts in the name or class of a module of each kind. Modules are tried from the innermost to the outermost."""
ROUTER_NAMES = ("gate", "router")
"""What models call the module that chooses experts. The gate of an MLP is `gate_proj`."""


def kind_by_parameter(built: BuiltModel, names: list[str]) -> dict[str, str]:
    """Sort trained parameters by kind, so that a report compares gradients kind by kind: {name: one of `PARAMETER_KINDS`}.

    The first of these that applies: an adapter's parameter; a router's weight; a new classification head; the kind of the
    innermost module that contains the parameter and has a known kind. `names`: as in the tuned model.
    """
    base_model = built.base_on_meta
    modules = dict(base_model.named_modules())
    routers = set(router_weight_names(base_model))
    embeddings = base_model.get_input_embeddings()
    head = base_model.get_output_embeddings()
    kinds = {}
    for name in names:
        base_name = built.tuning.base_name(name)  # the parameter's name in the base model
        if built.tuning.is_added_parameter(name):
            kinds[name] = f"{ADAPTERS}, {_kind_of_adapted_weight(name)}"
        elif base_name in routers:
            kinds[name] = "router"
        elif built.head_prefixes and base_name.startswith(built.head_prefixes):  # a new classification head
            kinds[name] = "head"
        else:
            kinds[name] = _kind_by_modules(base_name, modules, embeddings, head)
    return kinds


def _kind_of_adapted_weight(name: str) -> str:
    """The kind of the weight that an adapter's parameter adapts, by the names of the modules in the parameter's name."""
    if any(part in ROUTER_NAMES for part in name.split(".")):
        return "router"
    return _kind_by_modules(name, modules={}, embeddings=None, head=None)


def _kind_by_modules(name: str, modules: Mapping[str, Any], embeddings: Any, head: Any) -> str:
    """The kind of the innermost module that contains a parameter and has a known kind; `other` if none has.

    `modules`: those of the architecture before tuning, by path; empty if only the names count. `embeddings`, `head`: its input
    and output layers.
    """
    parts = name.split(".")  # the last one is the parameter, such as `weight`, not a module
    for depth in range(len(parts) - 1, 0, -1):
        module_path = ".".join(parts[:depth])
        module = modules.get(module_path)
        if module is not None and module is embeddings:
            return "embeddings"
        if module is not None and module is head:
            return "head"
        name_and_class = f"{parts[depth - 1]} {type(module).__name__}".lower()
        for kind, name_parts in NAME_PARTS_BY_KIND.items():
            if any(name_part in name_and_class for name_part in name_parts):
                return kind
    return "other"


class GradientDistance(NamedTuple):
    """How far gradients are from expected ones, over the elements of several parameters."""

    max_difference: float
    """The largest absolute difference of an element; infinite if one is NaN."""
    max_expected: float
    """The largest absolute element of the expected gradients."""


def gradient_distances_by_kind(
    gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, GradientDistance]:
    """How far `gradients` are from `expected`, over the parameters of each kind: {"norms": GradientDistance, ...}.

    A parameter that `gradients` lacks counts as zeros there. A difference that is NaN counts as infinite. `kinds`: the kind of
    each parameter by name, such as `norms`.
    """
    distance_by_kind: dict[str, GradientDistance] = {}
    for name, kind in kinds.items():
        expected_gradient = expected[name].double()
        gradient = gradients.get(name, torch.zeros_like(expected_gradient)).double()
        max_difference = 0.0
        max_expected = 0.0
        if expected_gradient.numel():
            max_difference = float((gradient - expected_gradient).abs().max())
            max_expected = float(expected_gradient.abs().max())
        if math.isnan(max_difference):
            max_difference = float("inf")
        earlier = distance_by_kind.get(kind, GradientDistance(max_difference=0.0, max_expected=0.0))
        distance_by_kind[kind] = GradientDistance(
            max_difference=max(earlier.max_difference, max_difference),
            max_expected=max(earlier.max_expected, max_expected),
        )
    return distance_by_kind


def relative_difference(difference: float, max_expected: float) -> float | None:
    """A difference as a share of the largest expected element; infinite if that is zero and there is a difference.

    None if both are zero: nothing was compared, so that they do not count as equal.
    """
    if max_expected == 0:
        return None if difference == 0 else float("inf")
    return difference / max_expected
