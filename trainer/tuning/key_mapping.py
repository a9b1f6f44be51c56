"""Chooses the keys under which an adapter is stored, so that plain peft loads each tensor into its place again.

transformers renames keys while it loads a base's checkpoint, and peft applies the same renames to the keys of a LoRA
file. If a renamed key would no longer name its layer, the checkpoint's name of the layer is stored instead. For some
layers neither name is loaded back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from strategies.errors import ConfigError
from trainer.tuning.compat.peft import loaded_key_by_stored_key
from trainer.tuning.compat.transformers import published_name
from trainer.tuning.replica import ADAPTER

_PREFIX = "base_model.model."


def replacement_keys(model: nn.Module, settings: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """Find the keys of an adapter file that plain peft would not load back, and what to store instead.

    Returns {peft's own key: the key to store instead, or None if none would do}. peft renames keys as it loads them, by the
    renames of the base's checkpoint. Keys that are loaded back are left out, so that an empty dict is the usual result.
    `model`: with or without adapters. `settings`: peft's config.
    """
    keys = list(keys)
    loaded_key_by_key = loaded_key_by_stored_key(model, settings, keys, ADAPTER)
    lost_keys = [key for key in keys if loaded_key_by_key[key] != key]
    if not lost_keys:
        return {}
    # Try the checkpoint's name of the layer: peft may rename that one to the model's.
    checkpoint_keys = {key: _checkpoint_key(model, key) for key in lost_keys}
    loaded_key_by_checkpoint_key = loaded_key_by_stored_key(model, settings, checkpoint_keys.values(), ADAPTER)
    replacements: dict[str, str | None] = {}
    for key, checkpoint_key in checkpoint_keys.items():
        replacements[key] = checkpoint_key if loaded_key_by_checkpoint_key[checkpoint_key] == key else None
    return replacements


def unloadable_layer_names(model: nn.Module, settings: Any) -> list[str]:
    """Names of the linear layers of a model without adapters whose LoRA adapters plain peft would not load back under any key."""
    layer_of_key = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            layer_of_key[f"{_PREFIX}{name}.lora_A.weight"] = name
    replaced_keys = replacement_keys(model, settings, layer_of_key)
    return [layer_of_key[key] for key, replacement in replaced_keys.items() if replacement is None]


def check_adapters_loadable(model: Any) -> None:
    """Raise ConfigError if plain peft would not load all of a tuned model's LoRA adapters back from its export.

    peft applies a base's renaming of keys to adapters too, and so may find no layer for some key. Does nothing for a model
    without adapters of peft.
    """
    settings = getattr(model, "peft_config", {}).get(ADAPTER)
    if settings is None:
        return
    keys = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.requires_grad:
            keys.append(name.replace(f".{ADAPTER}", ""))  # files do not have the adapter's name
    replaced_keys = replacement_keys(model, settings, keys)  # None for a key that is lost whatever it is called
    lost = [key for key, replacement in replaced_keys.items() if replacement is None]
    if lost:
        layer = lost[0].removeprefix(_PREFIX).split(".lora_")[0]
        raise ConfigError(
            f"tuning.targets: plain peft would not read the adapter of {layer} back, under whatever key it is stored (the base's "
            "checkpoint has other names, which peft applies to adapters too); leave it out of tuning.targets, or set "
            "export.merge=true"
        )


def _checkpoint_key(model: Any, key: str) -> str:
    """The adapter's key with the name that the layer has in published checkpoints, in place of its name in the model."""
    plain_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _PREFIX + published_name(plain_model, key.removeprefix(_PREFIX))
