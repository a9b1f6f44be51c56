"""The keys under which an adapter is stored, so that plain peft finds each tensor's place again.

transformers loads a base's checkpoint with renames, and peft applies these to the keys of a LoRA file too. If peft
would not find a layer again under the model's own name, the checkpoint's name is stored instead. For some layers
neither name leads back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from strategies.errors import ConfigError
from trainer.tuning.compat.peft import keys_after_loading
from trainer.tuning.compat.transformers import checkpoint_name
from trainer.tuning.replica import ADAPTER

_PREFIX = "base_model.model."


def keys_in_file(model: nn.Module, settings: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """The key to store, by peft's own key of a tensor, of those that plain peft would not find again; None: there is none.

    `model`: wrapped or plain; `settings`: peft's config.
    """
    keys = list(keys)
    back = keys_after_loading(model, settings, keys, ADAPTER)
    lost = [key for key in keys if back[key] != key]
    if not lost:
        return {}
    other = {key: _as_stored(model, key) for key in lost}
    back = keys_after_loading(model, settings, other.values(), ADAPTER)
    return {key: stored if back[stored] == key else None for key, stored in other.items()}


def lost_layers(model: nn.Module, settings: Any) -> list[str]:
    """Names of the linear layers of a plain model whose adapters no stored key leads back to."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    keys = {f"{_PREFIX}{name}.lora_A.weight": name for name in names}
    return [keys[key] for key, stored in keys_in_file(model, settings, keys).items() if stored is None]


def check_read_back(model: Any) -> None:
    """Raise ConfigError where plain peft would not find all of a tuned model's adapters in its export again."""
    settings = getattr(model, "peft_config", {}).get(ADAPTER)
    if settings is None:
        return
    keys = [
        name.replace(f".{ADAPTER}", "") for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad
    ]
    if lost := [key for key, stored in keys_in_file(model, settings, keys).items() if stored is None]:
        layer = lost[0].removeprefix(_PREFIX).split(".lora_")[0]
        raise ConfigError(
            f"tuning.targets: plain peft would not read the adapter of {layer} back, under whatever key it is stored (the base's "
            "checkpoint has other names, which peft applies to adapters too); leave it out of tuning.targets, or set "
            "export.merge=true"
        )


def _as_stored(model: Any, key: str) -> str:
    """The key with the checkpoint's name of the layer in place of the model's."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _PREFIX + checkpoint_name(plain, key.removeprefix(_PREFIX))
