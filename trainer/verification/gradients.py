"""Kinds of parameters, and how far two sets of gradients are apart, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.step import Built
from trainer.tuning.expert_parts import router_weights

MODEL_KINDS = ("attention", "MLP", "experts", "router", "norms", "embeddings", "head", "other")
ADAPTERS = "adapters"
KINDS = (*MODEL_KINDS, *(f"{ADAPTERS}, {kind}" for kind in MODEL_KINDS))
"""In the order in which they are shown. Adapters go by what they adapt."""
SPELLINGS = {
    "embeddings": ("embed",),
    "head": ("lm_head",),
    "norms": ("norm", "ln_"),
    "experts": ("expert",),
    "router": ("router",),
    "attention": ("attn", "attention"),
    "MLP": ("mlp", "feed", "ffn", "fc1", "fc2", "dense_h_to", "dense_4h_to"),
}
"""What the name or the class of a module of each kind has in it. The first that is met counts, from the inside out."""
ROUTER_NAMES = ("gate", "router")
"""What models call the module that chooses experts. The gate of an MLP is `gate_proj`."""


def kinds_of_parameters(built: Built, names: list[str]) -> dict[str, str]:
    """The kind of each trained parameter of `names`, by the modules of the plain architecture that hold it."""
    plain = built.plain
    modules = dict(plain.named_modules())
    routers = set(router_weights(plain))
    embeddings = plain.get_input_embeddings()
    head = plain.get_output_embeddings()
    kinds = {}
    for name in names:
        base = built.tuning.base_name(name)
        if built.tuning.owns(name):
            kinds[name] = f"{ADAPTERS}, {_kind_of_adapter(name)}"
        elif base in routers:
            kinds[name] = "router"
        elif base.startswith(built.head_prefixes) and built.head_prefixes:
            kinds[name] = "head"
        else:
            kinds[name] = _kind_by_modules(base, modules, embeddings, head)
    return kinds


def _kind_of_adapter(name: str) -> str:
    """The kind of what an adapter's parameter adapts, by the names of the modules above it."""
    if any(part in ROUTER_NAMES for part in name.split(".")):
        return "router"
    return _kind_by_modules(name, {}, None, None)


def _kind_by_modules(name: str, modules: Mapping[str, Any], embeddings: Any, head: Any) -> str:
    """The kind of a parameter of the plain architecture by the innermost module above it that tells one."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:depth])
        module = modules.get(path)
        words = f"{parts[depth - 1]} {type(module).__name__}".lower()
        if module is not None and module is embeddings:
            return "embeddings"
        if module is not None and module is head:
            return "head"
        for kind, spellings in SPELLINGS.items():
            if any(spelling in words for spelling in spellings):
                return kind
    return "other"


def distances(
    gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor], kinds: Mapping[str, str]
) -> dict[str, tuple[float, float]]:
    """(largest difference, largest element of `expected`) of each kind of gradient; NaN counts as infinite.

    A parameter that only one of both has counts with zeros in the other.
    """
    by_kind: dict[str, tuple[float, float]] = {}
    for name, kind in kinds.items():
        other = expected[name].double()
        own = gradients.get(name, torch.zeros_like(other)).double()
        difference = float((own - other).abs().max()) if other.numel() else 0.0
        if difference != difference:  # NaN
            difference = float("inf")
        largest = float(other.abs().max()) if other.numel() else 0.0
        so_far = by_kind.get(kind, (0.0, 0.0))
        by_kind[kind] = max(so_far[0], difference), max(so_far[1], largest)
    return by_kind


def relative(distance: tuple[float, float]) -> float | None:
    """A difference over the largest element; None if there is no gradient on either side, which is no agreement."""
    difference, largest = distance
    if largest == 0:
        return None if difference == 0 else float("inf")
    return difference / largest
