"""Which layers a small copy of a model keeps, so that every kind of layer is there, and how per-layer settings change.

The kind of a layer is read from the built modules, not from the configuration. Settings that divide layers into
stretches (those that run in a loop, or share the keys of others) tell layers apart that look alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
"""Names of the number of layers."""
FROM_FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "max_window_layers",
    "n_input_layers",
    "loop_layer_index_start",
    "loop_layer_index_end",
)
"""Settings that say before which layer something changes."""
FROM_LAST = ("num_kv_shared_layers", "n_output_layers")
"""Settings that say how many of the last layers are of some sort."""
STRETCHES = (*FROM_LAST, "n_input_layers", "loop_layer_index_start", "loop_layer_index_end")
"""Those of them that layers do not show."""
PLACES = ("cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers")
"""Lists of layers by their index."""
FROM_ONE = ("ple_layer_ids",)
"""Such lists that count from one."""
FEWEST, MANY = 2, 12
"""Layers of a small copy at least, and where another choice of them is tried first."""


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Layers of a model by their index, in order, of `depth`."""

    indices: tuple[int, ...]
    depth: int

    def before(self, index: int) -> int:
        """How many of them lie before a layer."""
        return sum(kept < index for kept in self.indices)

    def by_layer(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What those settings become that speak of layers: their number, lists of one entry each, lists and maps by index."""
        made: dict[str, Any] = {}
        for name, value in settings.items():
            if name in DEPTHS and isinstance(value, int):
                made[name] = len(self.indices) if value == self.depth else min(FEWEST, value)
            elif name in FROM_FIRST and isinstance(value, int):
                made[name] = self.before(value)
            elif name in FROM_LAST and isinstance(value, int):
                made[name] = len(self.indices) - self.before(self.depth - value)
            elif name == "moe_layer_end_index" and isinstance(value, int) and value >= 0:
                made[name] = self.before(value + 1) - 1
            elif name in PLACES and isinstance(value, list):
                made[name] = [place for place, index in enumerate(self.indices) if index in value]
            elif name in FROM_ONE and isinstance(value, list):
                made[name] = [place for place, index in enumerate(self.indices, 1) if index + 1 in value]
            elif name == "per_layer_config" and isinstance(value, dict):
                places = {index: str(place) for place, index in enumerate(self.indices)}
                made[name] = {places[int(k)]: copy.deepcopy(v) for k, v in value.items() if int(k) in places}
            elif isinstance(value, list | tuple) and self.depth > 1 and len(value) == self.depth:
                made[name] = [value[index] for index in self.indices]
        if {"n_input_layers", "n_output_layers", "n_recurrent_layers"} <= set(made) | set(settings):
            made["n_recurrent_layers"] = len(self.indices) - made["n_input_layers"] - made["n_output_layers"]
        return made


def choices(plain: nn.Module, settings: dict[str, Any]) -> Iterator[KeptLayers]:
    """Ways to keep every kind of layer of `plain`, a model on meta of these settings, the likeliest first.

    A prefix keeps what recurs with a period; one of each kind is shorter where they are far apart.
    """
    depth = depth_of(settings)
    kinds = kinds_of(plain, settings, depth)
    if not kinds:
        yield KeptLayers(tuple(range(min(FEWEST, depth))), depth)
        return
    prefix = next(n for n in range(1, depth + 1) if set(kinds[:n]) == set(kinds))
    twice = next((n for n in range(1, depth + 1) if all(kinds[:n].count(k) > 1 for k in set(kinds))), depth)
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    chosen = sorted(first.values())
    chosen = sorted([*chosen, *[i for i in range(depth) if i not in chosen][: max(0, FEWEST - len(chosen))]])
    ways = [tuple(range(max(prefix, min(FEWEST, depth)))), tuple(chosen)]
    for way in (
        *(ways if prefix <= MANY else reversed(ways)),
        tuple(range(twice)),
    ):  # layers may share with one of their kind
        yield KeptLayers(way, depth)


def depth_of(settings: dict[str, Any]) -> int:
    """How many layers settings say; 0 where they say nothing."""
    return max((settings[name] for name in DEPTHS if isinstance(settings.get(name), int)), default=0)


def layer_kinds(plain: nn.Module, depth: int) -> list[tuple[Any, ...]]:
    """What each of `depth` layers is, of every list of so many that a model has, or that lie in it one after another."""
    found = []
    for module in plain.modules():
        lists = [list(m) for m in module.children() if isinstance(m, nn.ModuleList) and len(m) and _repeats(m)]
        together = [layer for layers in lists for layer in layers]
        found += [layers for layers in (lists if len(lists) == 1 else [*lists, together]) if len(layers) == depth > 1]
    return [tuple(_kind(layers[index]) for layers in found) for index in range(depth)] if found else []


def kinds_of(plain: nn.Module, settings: dict[str, Any], depth: int) -> list[tuple[Any, ...]]:
    """What each layer is by its modules, by what settings call it, and by the stretch that it lies in."""
    kinds = layer_kinds(plain, depth) or [()] * depth
    called = [v for v in settings.values() if isinstance(v, list) and len(v) == depth and isinstance(v[0], str)]
    own = {int(index): str(value) for index, value in (settings.get("per_layer_config") or {}).items()}
    return [
        (kind, *(names[index] for names in called), own.get(index), _stretch(settings, depth, index))
        for index, kind in enumerate(kinds)
    ]


def _stretch(settings: dict[str, Any], depth: int, index: int) -> tuple[bool, ...]:
    """On which side of each border a layer lies."""
    borders = {name: settings[name] for name in STRETCHES if isinstance(settings.get(name), int)}
    return tuple(index >= (depth - border if name in FROM_LAST else border) for name, border in borders.items())


def _repeats(modules: nn.ModuleList) -> bool:
    """Whether these are layers: modules of many parts, not experts or single projections."""
    return sum(1 for _ in modules[0].modules()) > 3


def _kind(layer: nn.Module) -> frozenset[Any]:
    """What tells a layer from another: its parts, their classes, their switches, and whether they have a window."""
    found = {
        (re.sub(r"\d+", "#", name), type(module).__name__, _switches(module)) for name, module in layer.named_modules()
    }  # however many experts there are
    return frozenset(found)


def _switches(module: nn.Module) -> tuple[Any, ...]:
    found = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, bool | str):
            found.append((name, value))
        elif value is None or (isinstance(value, int) and ("window" in name or "chunk" in name)):
            found.append((name, value is None))
    return tuple(found)
