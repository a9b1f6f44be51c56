"""Which layers a small copy of a model keeps, so that every kind of layer is there, and how per-layer settings change.

The kind of a layer is read from the built modules, not from the configuration. Settings that divide layers into
stretches (those that run in a loop, or share the keys of others) tell layers apart that look alike.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

DEPTH_SETTING_NAMES = (
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
BORDER_SETTINGS_FROM_START = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "max_window_layers",
    "n_input_layers",
    "loop_layer_index_start",
    "loop_layer_index_end",
)
"""Settings that say before which layer something changes."""
BORDER_SETTINGS_FROM_END = ("num_kv_shared_layers", "n_output_layers")
"""Settings that say how many of the last layers are of some sort."""
UNSEEN_BORDER_SETTINGS = (*BORDER_SETTINGS_FROM_END, "n_input_layers", "loop_layer_index_start", "loop_layer_index_end")
"""Those of them that divide layers which are built alike, so that the modules do not show the border."""
LAYER_INDEX_SETTINGS = (
    "cross_attention_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
)
"""Lists of layers by their index."""
ONE_BASED_LAYER_INDEX_SETTINGS = ("ple_layer_ids",)
"""Such lists that count from one."""
MIN_LAYERS = 2
"""The fewest layers of a small copy."""
MAX_PREFIX_TRIED_FIRST = 12
"""The longest prefix of layers that is tried before one layer of each kind: a longer one takes longer to compute."""


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Which layers of a model its small copy keeps, for tests of the model's behaviour on few layers."""

    indices: tuple[int, ...]
    """Of the kept layers in the full model, ascending: (0, 1, 31)."""
    depth: int
    """Number of layers of the full model."""

    def num_kept_before(self, index: int) -> int:
        """How many kept layers lie before the layer `index` of the full model."""
        return sum(kept < index for kept in self.indices)

    def settings_of_kept_layers(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that depend on the number or order of layers, with new values for a copy with only these layers.

        If layers 0, 1 and 31 of 32 are kept: `num_hidden_layers` 32 -> 3, `first_k_dense_replace` 1 -> 1 (a number of first
        layers), `mlp_only_layers` [0, 31] -> [0, 2] (indices of layers), and of a list of 32 entries these three stay.

        `settings`: the full model's, by name.
        """
        changed: dict[str, Any] = {}
        for name, value in settings.items():
            new_value = self._value_for_kept_layers(name, value)
            if new_value is not None:
                changed[name] = new_value
        # The recurrent layers are those between the input and the output layers.
        if {"n_input_layers", "n_output_layers", "n_recurrent_layers"} <= set(changed) | set(settings):
            changed["n_recurrent_layers"] = len(self.indices) - changed["n_input_layers"] - changed["n_output_layers"]
        return changed

    def _value_for_kept_layers(self, name: str, value: Any) -> Any:
        """The value of the setting `name` in a copy with only the kept layers; None if it does not depend on layers.

        `value`: in the full model.
        """
        if name in DEPTH_SETTING_NAMES and isinstance(value, int):
            # Another number of layers is that of another part (an encoder, say), of which the first layers stay.
            return len(self.indices) if value == self.depth else min(MIN_LAYERS, value)
        if name in BORDER_SETTINGS_FROM_START and isinstance(value, int):
            return self.num_kept_before(value)
        if name in BORDER_SETTINGS_FROM_END and isinstance(value, int):
            return len(self.indices) - self.num_kept_before(self.depth - value)
        if name == "moe_layer_end_index" and isinstance(value, int) and value >= 0:  # the last layer with experts
            return self.num_kept_before(value + 1) - 1
        if name in LAYER_INDEX_SETTINGS and isinstance(value, list):
            return [position for position, index in enumerate(self.indices) if index in value]
        if name in ONE_BASED_LAYER_INDEX_SETTINGS and isinstance(value, list):
            return [position for position, index in enumerate(self.indices, 1) if index + 1 in value]
        if name == "per_layer_config" and isinstance(value, dict):
            return self._kept_entries(value)
        if isinstance(value, list | tuple) and self.depth > 1 and len(value) == self.depth:  # an entry for each layer
            return [value[index] for index in self.indices]
        return None

    def _kept_entries(self, by_index: dict[Any, Any]) -> dict[str, Any]:
        """Renumber `per_layer_config` for the copy: with layers 0 and 31 kept, the entry of 31 becomes that of "1".

        `by_index`: settings of all layers, by index as a number or a text.
        """
        position_by_index = {index: str(position) for position, index in enumerate(self.indices)}
        settings_by_position = {}
        for index, settings in by_index.items():
            if int(index) in position_by_index:
                settings_by_position[position_by_index[int(index)]] = copy.deepcopy(settings)
        return settings_by_position


def layer_choices(full_model: nn.Module, settings: dict[str, Any]) -> Iterator[KeptLayers]:
    """Yield which layers a small copy of a model could keep, so that every kind of layer is there; the likeliest to work first:

    - the shortest prefix with all kinds, which keeps a pattern that repeats (three local layers, then a global one).
    - one layer of each kind: tried before the prefix if that has more than `MAX_PREFIX_TRIED_FIRST` layers.
    - the shortest prefix with two of each kind.

    If nothing tells layers apart, only the first layers. `full_model`: on meta. `settings`: those of the model, by name.
    """
    depth = num_layers_of(settings)
    kinds = layer_kinds_with_settings(full_model, settings, depth)
    if not kinds:
        yield KeptLayers(tuple(range(min(MIN_LAYERS, depth))), depth)
        return
    prefix = _shortest_prefix_length(kinds, times=1)
    short_prefix = tuple(range(max(prefix, min(MIN_LAYERS, depth))))
    # A layer may share weights with another one of its kind: then two of each are needed.
    long_prefix = tuple(range(_shortest_prefix_length(kinds, times=2)))
    if prefix <= MAX_PREFIX_TRIED_FIRST:
        candidates = (short_prefix, _first_layer_of_each_kind(kinds), long_prefix)
    else:
        candidates = (_first_layer_of_each_kind(kinds), short_prefix, long_prefix)
    for indices in candidates:
        yield KeptLayers(indices, depth)


def _shortest_prefix_length(kinds: list[tuple[Any, ...]], times: int) -> int:
    """How many layers from the start contain every kind at least `times` times; all of them, if no shorter prefix does."""
    for length in range(1, len(kinds)):
        counts = Counter(kinds[:length])
        if all(counts[kind] >= times for kind in kinds):
            return length
    return len(kinds)


def _first_layer_of_each_kind(kinds: list[tuple[Any, ...]]) -> tuple[int, ...]:
    """The fewest layers with every kind: indices of the first of each, and further ones up to `MIN_LAYERS` layers.

    For 4 layers of which the last is of another kind: (0, 3).

    `kinds`: a description of each layer, equal for layers of one kind.
    """
    first_of_kind: dict[Any, int] = {}
    for index, kind in enumerate(kinds):
        first_of_kind.setdefault(kind, index)
    indices = set(first_of_kind.values())
    for index in range(len(kinds)):
        if len(indices) >= MIN_LAYERS:
            break
        indices.add(index)
    return tuple(sorted(indices))


def num_layers_of(settings: dict[str, Any]) -> int:
    """The number of layers in `settings` of a configuration, the largest if there are several; 0 if it has none."""
    return max((settings[name] for name in DEPTH_SETTING_NAMES if isinstance(settings.get(name), int)), default=0)


def layer_kinds(full_model: nn.Module, depth: int) -> list[tuple[Any, ...]]:
    """Describe what each layer of a model is built of, by index; layers with equal entries are of one kind.

    Empty if no layers are found. An entry has a part for each list of `depth` layers that the model has: one for Llama, two for
    T5 (encoder and decoder).
    """
    layer_lists = []
    for module in full_model.modules():
        lists = []
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and _is_layer_list(child):
                lists.append(list(child))
        # Some models divide their layers into lists side by side (dense ones, then those with experts): these count as one list
        # too.
        if len(lists) != 1:
            joined_list = [layer for layers in lists for layer in layers]
            lists.append(joined_list)
        layer_lists += [layers for layers in lists if len(layers) == depth > 1]
    if not layer_lists:
        return []
    kinds = []
    for index in range(depth):
        kinds.append(tuple(_kind_of_layer(layers[index]) for layers in layer_lists))
    return kinds


def layer_kinds_with_settings(full_model: nn.Module, settings: dict[str, Any], depth: int) -> list[tuple[Any, ...]]:
    """Describe what tells each layer of a model from the others, by index; of layers with equal entries one is enough.

    An entry has what the layer is built of, its name in lists such as `layer_types`, its own settings, and its side of each
    border. A border is drawn by a setting such as `n_input_layers`, between layers that are built alike but used differently.
    """
    kinds_by_modules = layer_kinds(full_model, depth) or [()] * depth
    per_layer_lists = []  # such as `layer_types`
    for setting in settings.values():
        if isinstance(setting, list) and len(setting) == depth and isinstance(setting[0], str):
            per_layer_lists.append(setting)
    # As texts, so that entries can be compared and hashed.
    own_settings = {int(index): str(value) for index, value in (settings.get("per_layer_config") or {}).items()}
    kinds = []
    for index, kind_by_modules in enumerate(kinds_by_modules):
        names = [layer_names[index] for layer_names in per_layer_lists]
        is_behind_borders = _is_behind_each_border(settings, depth, index)
        kinds.append((kind_by_modules, *names, own_settings.get(index), is_behind_borders))
    return kinds


def _is_behind_each_border(settings: dict[str, Any], depth: int, index: int) -> tuple[bool, ...]:
    """On which side of the borders between layers that are built alike a layer lies: True at or behind the border.

    There is an entry for each setting of `UNSEEN_BORDER_SETTINGS` that `settings` has. With 8 layers and `n_output_layers` 2
    the border is 6: layers 6 and 7 give True.
    """
    is_behind = []
    for name in UNSEEN_BORDER_SETTINGS:
        border = settings.get(name)
        if not isinstance(border, int):
            continue
        if name in BORDER_SETTINGS_FROM_END:
            border = depth - border
        is_behind.append(index >= border)
    return tuple(is_behind)


def _is_layer_list(modules: nn.ModuleList) -> bool:
    """Whether a list of modules is one of layers: these have more than three modules each, unlike experts or projections."""
    return sum(1 for _ in modules[0].modules()) > 3


def _kind_of_layer(layer: nn.Module) -> frozenset[Any]:
    """Describe what a layer is built of, to compare it with others: name, class and behaviour of each of its modules.

    Numbers in names do not count, so that a layer with more experts is of the same kind.
    """
    module_kinds = set()
    for name, module in layer.named_modules():
        numberless_name = re.sub(r"\d+", "#", name)
        module_kinds.add((numberless_name, type(module).__name__, _behaviour_attributes(module)))
    return frozenset(module_kinds)


def _behaviour_attributes(module: nn.Module) -> tuple[tuple[str, bool | str], ...]:
    """Attributes that change what a module computes: flags, texts, and whether it has a window or chunks of attention.

    Such as `(("is_causal", True), ("sliding_window", False))`. An attribute None counts as True, and the size of a window or
    chunk as False: sizes differ between a model and its small copy, whose layers are compared.
    """
    attributes: list[tuple[str, bool | str]] = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":
            continue
        if isinstance(value, bool | str):
            attributes.append((name, value))
        elif value is None or (isinstance(value, int) and ("window" in name or "chunk" in name)):
            attributes.append((name, value is None))
    return tuple(attributes)
