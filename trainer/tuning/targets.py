"""Linear layers that an adapter must leave alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn

from trainer.tuning.key_mapping import lost_layers

CHOOSES = re.compile(r"Router|Gate|Grouped")
"""In the names of classes of linear layers that compute more than a product."""


def left_alone(model: nn.Module, settings: Any, *, every_linear: bool) -> tuple[str | None, str]:
    """A regular expression of the names of modules that get no adapter (None: there are none), and what to say of it.

    Towers for images and sound, which texts give no gradient. With `every_linear` also layers that compute more than a
    product (routers that return a choice), all but the input projection of a state-space mixer, whose fused kernels take
    the other weights past an adapter, layers whose weight their model takes so by itself, and those whose adapters plain
    peft does not read back. `settings`: peft's config.
    """
    towers = [rf"{re.escape(name)}(\..*)?" for name in getattr(model, "beside_text", ())]
    if not every_linear:
        return "|".join(towers) or None, ""
    product, passed = [], []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for owner_name, owner in model.named_modules():
        kind: Any = type(owner)
        mixer = hasattr(owner, "A_log") and hasattr(owner, "D")
        for name, child in owner.named_children():
            if child is head or not isinstance(child, nn.Linear):
                continue
            full = f"{owner_name}.{name}".lstrip(".")
            if CHOOSES.search(type(child).__name__) or (mixer and name != "in_proj"):
                product.append(full)
            elif name in _taken_past(kind):
                passed.append(full)
    lost = [
        name for name in lost_layers(model, settings) if not name.startswith(tuple(getattr(model, "beside_text", ())))
    ]
    said = [
        f"{_last(names)} ({why})"
        for names, why in (
            (passed, "the model takes the weight past the layer"),
            (lost, "peft would not read its adapter back"),
        )
        if names
    ]
    names = [*towers, *(_any_layer(name) for name in (*product, *passed, *lost))]
    note = f"all-linear but for {' and '.join(said)}" if said else ""
    return "|".join(dict.fromkeys(names)) or None, note


@cache
def _taken_past(owner: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight a class multiplies with itself, not through the child."""
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):  # code without a file
        return frozenset()
    # Slices are taken only where a weight is cut for tensor parallelism; types, devices and shapes multiply nothing.
    return frozenset(re.findall(r"self\.(\w+)\.weight(?!\.(?:dtype|device|shape|data)\b)(?![\w\[])", source))


def _any_layer(name: str) -> str:
    """An expression for a module's name in every layer."""
    return re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))


def _last(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
