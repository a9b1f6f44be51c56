"""Compares an adapter directory's settings with those of a run, from its JSON file alone, when the run is composed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.small_files import read_object
from trainer.tuning.adapter_fields import wrong_field
from trainer.tuning.base import AdapterConfig, LoraConfig, TuningConfig
from trainer.tuning.config import BoftConfig, Ia3Config, LohaConfig, LokrConfig, OftConfig, PeftConfig, VeraConfig
from trainer.tuning.table import METHODS, TYPES, method_of

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEYS: dict[type, dict[str, str]] = {
    LoraConfig: {
        "rank": "r",
        "alpha": "lora_alpha",
        "rslora": "use_rslora",
        "dora": "use_dora",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
        "experts": "experts",
        "router": "router",
    },
    Ia3Config: {"feedforward": "feedforward_modules"},
    VeraConfig: {"rank": "r", "projection_seed": "projection_prng_key", "save_projection": "save_projection"},
    LohaConfig: {"rank": "r", "alpha": "alpha"},
    LokrConfig: {"rank": "r", "alpha": "alpha", "decompose_both": "decompose_both"},
    OftConfig: {"block_size": "oft_block_size", "block_share": "block_share"},
    BoftConfig: {"block_size": "boft_block_size", "num_factors": "boft_n_butterfly_factor"},
}
"""What decides what an adapter computes, by our names and peft's; the rest is compared when the model is built."""

_FREE = (
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "target_modules"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "exclude_modules", "corda_config", "eva_config"),
    "target_parameters",
)
"""Fields of peft's settings that do not decide what the same tensors compute."""


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of the fields of two of peft's settings that make the same tensors compute something else."""
    names = (n for n in sorted(ours.keys() & theirs.keys()) if n not in _FREE and not n.endswith("dropout"))
    return [n for n in names if not n.startswith("init_") and _plain(ours[n]) != _plain(theirs[n])]


def read_settings(directory: str | Path) -> dict[str, Any] | str:
    """The adapter_config.json of a directory, or what is wrong with it."""
    path = Path(directory).expanduser()
    if not (path / SETTINGS).is_file() or not (path / WEIGHTS).is_file():
        return f"holds no {SETTINGS} and {WEIGHTS}; give the directory of an adapter, such as runs/x/export"
    try:
        settings = read_object(path / SETTINGS)
    except ConfigError as error:
        return f"its {SETTINGS} cannot be read ({error}); write the adapter again"
    if (wrong := wrong_field(settings)) is not None:
        return f"its {SETTINGS} has {wrong}; write the adapter again"
    return settings


def adapter_hash(directory: str | Path) -> str:
    """SHA-256 of an adapter's tensors as they lie in the file. Errors: OSError."""
    with (Path(directory).expanduser() / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(tuning: TuningConfig, typed: set[str]) -> dict[str, str]:
    """Let settings that the user left at their defaults follow the adapter that `tuning.from` names.

    Changes `tuning`; returns what was taken, by key. A directory that cannot be read is left to `problems`.
    """
    if not isinstance(tuning, AdapterConfig) or tuning.from_ is None:
        return {}
    file = read_settings(tuning.from_)
    if isinstance(file, str) or not _same_method(tuning, file):
        return {}
    if isinstance(tuning, LoraConfig):
        file = _with_parts(file)
    taken = {}
    defaults = type(tuning)()
    wanted = {**KEYS.get(type(tuning), {}), "targets": "target_modules", "modules_to_save": "modules_to_save"}
    for ours, theirs in wanted.items():
        value = getattr(tuning, ours)
        found: Any = file.get(theirs)
        untouched = f"tuning.{ours}" not in typed and value == getattr(defaults, ours)
        if untouched and found is not None and _plain(found) != _plain(value):
            found = sorted(found) if isinstance(found, list) else found
            setattr(tuning, ours, type(value)(found) if isinstance(value, int | float) else found)
            taken[f"tuning.{ours}"] = f"{value} -> {found} (of tuning.from)"
    return taken


def problems(tuning: AdapterConfig) -> Iterator[str]:
    """What keeps a run from going on from the adapter that it names, one line each."""
    if tuning.from_ is None:
        return
    word = f"tuning.from={tuning.from_}"
    if not isinstance(tuning, PeftConfig) and (reason := method_of(tuning).no_start):
        yield f"{word} with tuning={tuning.name}: {reason}; fold that adapter with export.merge=true, and give model.path"
        return
    file = read_settings(tuning.from_)
    if isinstance(file, str):
        yield f"{word}: {file}"
        return
    if not _same_method(tuning, file):
        kind = str(file.get("peft_type")).lower()
        mine = tuning.type if isinstance(tuning, PeftConfig) else tuning.name
        yield f"{word}: was made by {kind}, not by {mine}; choose the same method"
        return
    if isinstance(tuning, LoraConfig):
        file = _with_parts(file)
    for ours, theirs in KEYS.get(type(tuning), {}).items():
        value, found = getattr(tuning, ours), file.get(theirs)
        if found is not None and _plain(found) != _plain(value):
            yield f"{word}: was made with tuning.{ours}={found}, not {value}; set it so, or leave it out"
    if isinstance(tuning, LoraConfig) and tuning.init != "default":
        yield f"tuning.init={tuning.init}: the values come from tuning.from; use tuning.init=default"


def fold_problems(directory: str) -> Iterator[str]:
    """What keeps an adapter from being folded into the base, one line each."""
    word, file = f"model.adapters={directory}", read_settings(directory)
    if isinstance(file, str):
        yield f"{word}: {file}"
        return
    kind = str(file.get("peft_type")).lower()
    kind = {"ln_tuning": "ln"}.get(kind, kind)
    method = METHODS.get(kind) or TYPES.get(kind)
    if method is None or method.no_merge or method.no_start:
        reason = "which is not proven here"
        if method is not None:
            reason = f"which cannot be folded: {method.no_merge or method.no_start}"
        yield f"{word}: was made by {kind}, {reason}; leave it out, or merge it with peft and give that as model.path"


def _with_parts(file: dict[str, Any]) -> dict[str, Any]:
    """LoRA's settings with `experts` and `router` as here; linear layers among peft's parameters are modules again."""
    parameters, modules = file.get("target_parameters") or [], file.get("target_modules")
    owners = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    linear = [name for name in owners if name.rsplit(".", 1)[-1] not in ("gate", "router")]
    if parameters and not isinstance(modules, str):
        modules = [*(modules or ()), *linear]
    experts, router = len(owners) < len(parameters), len(linear) < len(owners)
    return {**file, "target_modules": modules, "experts": experts, "router": router}


def _same_method(tuning: AdapterConfig, file: dict[str, Any]) -> bool:
    kind = tuning.type if isinstance(tuning, PeftConfig) and tuning.type else str(tuning.name)
    return str(file.get("peft_type", "")).lower() == {"ln": "ln_tuning"}.get(kind, kind)


def _plain(value: Any) -> Any:
    """Sets and lists alike; nothing, false and empty alike."""
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return value or None
