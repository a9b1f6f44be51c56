"""Linear layers that an adapter must leave alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from trainer.tuning.key_mapping import unloadable_layer_names

LOW_REACH_SHARE = 0.25
"""A user whose targets reach less than this share of the weights of linear layers is told so."""
MAX_SUGGESTED_NAMES = 6
"""How many names of further targets a message suggests."""

ROUTING_CLASS_REGEX = re.compile(r"Router|Gate|Grouped")
"""Found in the class names of linear layers that compute more than a product, such as `Llama4Router`, which returns a choice."""


class ExcludedModules(NamedTuple):
    """Modules that get no adapter."""

    name_regex: str | None
    """Matches their names, such as `visual(\\..*)?|layers\\.\\d+\\.mixer\\.out_proj`; None: there are none."""
    note: str
    """What the user is told of them; empty if nothing."""


def excluded_modules(model: nn.Module, settings: Any, *, every_linear: bool) -> ExcludedModules:
    """Find the modules that get no adapter, as a regular expression for peft, with a note for the user.

    Towers for images and sound never get an adapter: texts give them no gradient. With `every_linear`
    (`tuning.targets=all-linear`), these are left out too:
    - layers that compute more than a product.
    - all layers of a state-space mixer but its input projection: its fused kernels read the other weights directly.
    - other layers whose weight the model reads without calling the layer.
    - layers whose adapter plain peft would not load back.

    `settings`: peft's config.
    """
    # `modules_beside_text`: the names of a multimodal model's towers.
    tower_names = tuple(getattr(model, "modules_beside_text", ()))
    patterns = [rf"{re.escape(name)}(\..*)?" for name in tower_names]
    if not every_linear:
        return ExcludedModules("|".join(patterns) or None, note="")

    unsuitable = _unsuitable_layers(model)
    unloadable = [name for name in unloadable_layer_names(model, settings) if not name.startswith(tower_names)]
    exceptions = []
    if unsuitable.bypassed:
        exceptions.append(f"{_last_name_parts(unsuitable.bypassed)} (the model takes the weight past the layer)")
    if unloadable:
        exceptions.append(f"{_last_name_parts(unloadable)} (peft would not read its adapter back)")
    note = f"all-linear but for {' and '.join(exceptions)}" if exceptions else ""
    # One pattern for all layers of the model, so that the expression stays short.
    excluded_names = (*unsuitable.beyond_product, *unsuitable.bypassed, *unloadable)
    patterns += [_pattern_for_all_layers(name) for name in excluded_names]
    return ExcludedModules("|".join(dict.fromkeys(patterns)) or None, note)


def num_weights_by_linear_layer(model: nn.Module) -> dict[str, int]:
    """How many weights each linear layer of a model has, by name: {"h.0.mlp.up_proj": 589824}.

    For the note on how many the targets reach. `model`: without adapters. The output head, towers for images or sound, and
    routers of experts do not count. Biases do not either.
    """
    tower_names = tuple(getattr(model, "modules_beside_text", ()))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sizes = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer
        is_router = ROUTING_CLASS_REGEX.search(type(module).__name__) is not None
        if is_linear and not is_router and module is not head and not name.startswith(tower_names):
            sizes[name] = next(
                module.parameters()
            ).numel()  # the weight is registered first; if packed, as it is stored
    return sizes


def low_reach_note(
    targets: object, num_weights_by_layer: dict[str, int], adapted: Iterable[str], unsuitable: Iterable[str]
) -> str:
    """What to tell a user whose targets reach few of the linear weights, with names that reach more; empty if they reach many.

    Such as `['q_proj']: reaches 6% of the weights of linear layers; further names would add: up_proj 25%, ...`.
    `num_weights_by_layer`: of each linear layer, by name. `adapted`: names of the layers that got an adapter. `unsuitable`:
    names of the layers that can get none.
    """
    total = sum(num_weights_by_layer.values())
    reached = sum(num_weights_by_layer[name] for name in adapted if name in num_weights_by_layer)
    if total == 0 or reached >= LOW_REACH_SHARE * total:
        return ""
    weights_by_name: dict[str, int] = {}
    for name in num_weights_by_layer.keys() - set(adapted) - set(unsuitable):
        last_part = name.rpartition(".")[2]
        weights_by_name[last_part] = weights_by_name.get(last_part, 0) + num_weights_by_layer[name]
    largest = sorted(weights_by_name, key=lambda name: (-weights_by_name[name], name))[:MAX_SUGGESTED_NAMES]
    further = ", ".join(f"{name} {weights_by_name[name] / total:.0%}" for name in largest)
    all_linear = (reached + sum(weights_by_name.values())) / total
    return (
        f"{targets}: reaches {reached / total:.0%} of the weights of linear layers; further names would add: {further}; "
        f"tuning.targets=all-linear reaches {all_linear:.0%}"
    )


def unsuitable_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that no adapter should be put on, because the model does not call them as a product."""
    unsuitable = _unsuitable_layers(model)
    return [*unsuitable.beyond_product, *unsuitable.bypassed]


class _UnsuitableLayers(NamedTuple):
    """Names of the linear layers that `tuning.targets=all-linear` must leave out."""

    beyond_product: list[str]
    """They compute more than a product, or belong to a state-space mixer and are not its `in_proj`."""
    bypassed: list[str]
    """The model reads their weight without calling them."""


def _unsuitable_layers(model: nn.Module) -> _UnsuitableLayers:
    """Find the linear layers, but for the head, that the model does not call as a plain product: an adapter would miss them."""
    beyond_product = []
    bypassed = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for owner_name, owner in model.named_modules():
        owner_class: Any = type(owner)
        # A state-space mixer: every one that is like Mamba's has these two parameters.
        is_mixer = hasattr(owner, "A_log") and hasattr(owner, "D")
        for name, child in owner.named_children():
            if child is head or not isinstance(child, nn.Linear):
                continue
            full_name = f"{owner_name}.{name}".lstrip(".")  # the root's name is empty
            if ROUTING_CLASS_REGEX.search(type(child).__name__) or (is_mixer and name != "in_proj"):
                beyond_product.append(full_name)
            elif name in _weights_used_directly(owner_class):
                bypassed.append(full_name)
    return _UnsuitableLayers(beyond_product, bypassed)


@cache
def _weights_used_directly(owner: type[nn.Module]) -> frozenset[str]:
    """Names of the children whose weight a class reads itself (`self.child.weight`), as its source code shows.

    An adapter on such a child would have no effect. Empty if the source is not at hand.
    """
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):  # code without a file
        return frozenset()
    # Slices are taken only where a weight is cut for tensor parallelism; types, devices and shapes multiply nothing.
    return frozenset(re.findall(r"self\.(\w+)\.weight(?!\.(?:dtype|device|shape|data)\b)(?![\w\[])", source))


def _pattern_for_all_layers(name: str) -> str:
    """Make a regular expression of a module's name, with any layer number in place of its own: `layers.3.mlp` ->
    `layers\\.\\d+\\.mlp`.
    """
    return re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(name))


def _last_name_parts(names: Iterable[str]) -> str:
    """The last parts of module names, each once, as a list for a message."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
