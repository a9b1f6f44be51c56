"""Compares an adapter directory's settings with those of a run, from its JSON file alone, when the run is composed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.small_files import read_json_object
from trainer.tuning.adapter_fields import wrong_type_message
from trainer.tuning.base import AdapterConfig, LoraConfig, TuningConfig
from trainer.tuning.config import (
    BoftConfig,
    Ia3Config,
    LohaConfig,
    LokrConfig,
    OftConfig,
    PeftConfig,
    VeraConfig,
    peft_type_of,
)
from trainer.tuning.table import PEFT_METHODS, TUNING_METHODS, method_of

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_KEY_BY_FIELD_BY_METHOD: dict[type, dict[str, str]] = {
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
"""Settings that decide what an adapter computes: peft's key (`r`) of each field of ours (`rank`), by the method's settings
class. All other fields are compared when the model is built."""

_FIELDS_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "peft_version",
    "revision",
    "target_modules",
    "target_parameters",
}
"""Fields of peft's settings that do not decide what the same tensors compute."""


def names_of_differing_settings(expected: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """In which fields two of peft's configs differ so that the same tensors would compute something else: ["lora_alpha", "r"].

    Left out are fields that only one config has, fields on dropout, and fields on initial values.
    """
    differing = []
    for name in sorted(expected.keys() & stored.keys()):
        # Dropout and initial values concern training alone: with other ones, the same tensors compute the same.
        if name in _FIELDS_WITHOUT_EFFECT or name.endswith("dropout") or name.startswith("init_"):
            continue
        if _as_comparable(expected[name]) != _as_comparable(stored[name]):
            differing.append(name)
    return differing


class UnusableAdapter(Exception):
    """A directory holds no adapter that can be used here. The text ends a message: `holds no adapter_config.json ...`."""


def read_adapter_settings(directory: str | Path) -> dict[str, Any]:
    """Read the settings of an adapter directory, the fields of its adapter_config.json: {"peft_type": "LORA", "r": 16}.

    Raises UnusableAdapter if the directory is no adapter's, the file cannot be read, or a field has a value of a wrong type.
    """
    path = Path(directory).expanduser()
    if not (path / SETTINGS_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        raise UnusableAdapter(
            f"holds no {SETTINGS_FILE} and {WEIGHTS_FILE}; give the directory of an adapter, such as runs/x/export"
        )
    try:
        settings = read_json_object(path / SETTINGS_FILE)
    except ConfigError as error:
        raise UnusableAdapter(f"its {SETTINGS_FILE} cannot be read ({error}); write the adapter again") from error
    wrong_type = wrong_type_message(settings)  # such as: r=null, which must be a number
    if wrong_type is not None:
        raise UnusableAdapter(f"its {SETTINGS_FILE} has {wrong_type}; write the adapter again")
    return settings


def adapter_sha256(directory: str | Path) -> str:
    """SHA-256 of the adapter's file of tensors in `directory`, as hex digits. Raises OSError."""
    with (Path(directory).expanduser() / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adopt_adapter_settings(tuning: TuningConfig, cli_keys: set[str]) -> dict[str, str]:
    """Take settings over from the adapter that `tuning.from` names, in place, where the user left them at their defaults.

    `cli_keys`: keys that the user set, such as `tuning.rank`. Returns what changed, by key, for messages: `{"tuning.rank": "8
    -> 16 (of tuning.from)"}`. Nothing changes if `tuning.from` is not set, or if its directory cannot be read or holds an
    adapter of another method: `continuation_problems` reports these two.
    """
    if not isinstance(tuning, AdapterConfig) or tuning.from_ is None:
        return {}
    try:
        stored = read_adapter_settings(tuning.from_)
    except UnusableAdapter:
        return {}
    if not _is_of_same_method(tuning, stored):
        return {}
    if isinstance(tuning, LoraConfig):
        stored = _with_expert_settings(stored)  # `experts` and `router`, which peft has not
    adopted: dict[str, str] = {}
    defaults = type(tuning)()
    # Our field -> the key in adapter_config.json, such as rank -> r.
    peft_keys = {
        **PEFT_KEY_BY_FIELD_BY_METHOD.get(type(tuning), {}),
        "targets": "target_modules",
        "modules_to_save": "modules_to_save",
    }
    for field, peft_key in peft_keys.items():
        current = getattr(tuning, field)
        stored_value: Any = stored.get(peft_key)
        if f"tuning.{field}" in cli_keys or current != getattr(defaults, field):
            continue  # the user chose it
        if stored_value is None or _as_comparable(stored_value) == _as_comparable(current):
            continue  # the adapter has no such setting, or the same value
        if isinstance(stored_value, list):
            stored_value = sorted(stored_value)
        # JSON knows no difference between 16 and 16.0, and a bool field may hold 1.
        new_value = type(current)(stored_value) if isinstance(current, int | float) else stored_value
        setattr(tuning, field, new_value)
        adopted[f"tuning.{field}"] = f"{current} -> {stored_value} (of tuning.from)"
    return adopted


def continuation_problems(tuning: AdapterConfig) -> Iterator[str]:
    """Yield what keeps a run from continuing the adapter that `tuning.from` names, one line each. Cases, in order:

    - `tuning.from` is not set: nothing.
    - the method cannot continue adapters, the directory cannot be read, or its adapter is of another method: this line alone.
    - else: one line for each setting that differs from the adapter's, and one if `tuning.init` asks for initial values, which
      the adapter's values would replace.
    """
    if tuning.from_ is None:
        return
    setting = f"tuning.from={tuning.from_}"
    # Every method of `tuning=peft` can continue, and an unknown `tuning.type` would have no row in the table of methods.
    if not isinstance(tuning, PeftConfig) and (reason := method_of(tuning).continuation_refusal):
        yield f"{setting} with tuning={tuning.name}: {reason}; merge that adapter with export.merge=true, and give model.path"
        return
    try:
        stored = read_adapter_settings(tuning.from_)
    except UnusableAdapter as error:
        yield f"{setting}: {error}"
        return
    if not _is_of_same_method(tuning, stored):
        stored_type = str(stored.get("peft_type")).lower()
        own_type = tuning.type if isinstance(tuning, PeftConfig) else tuning.name
        yield f"{setting}: was made by {stored_type}, not by {own_type}; choose the same method"
        return
    if isinstance(tuning, LoraConfig):
        stored = _with_expert_settings(stored)
    for field, peft_key in PEFT_KEY_BY_FIELD_BY_METHOD.get(type(tuning), {}).items():
        current = getattr(tuning, field)
        stored_value = stored.get(peft_key)
        if stored_value is not None and _as_comparable(stored_value) != _as_comparable(current):
            yield f"{setting}: was made with tuning.{field}={stored_value}, not {current}; set it so, or leave it out"
    if isinstance(tuning, LoraConfig) and tuning.init != "default":
        yield f"tuning.init={tuning.init}: the values come from tuning.from; use tuning.init=default"


def merge_problems(directory: str) -> Iterator[str]:
    """Yield what keeps an adapter directory of `model.adapters` from being merged into the base: one line, or none.

    There is a line if the directory cannot be read, or if its method is unknown here or cannot be merged. A method whose
    training cannot continue from its files cannot be merged from them either.
    """
    setting = f"model.adapters={directory}"
    try:
        stored = read_adapter_settings(directory)
    except UnusableAdapter as error:
        yield f"{setting}: {error}"
        return
    method_name = str(stored.get("peft_type")).lower()
    if method_name == "ln_tuning":  # peft's name for it
        method_name = "ln"
    method = TUNING_METHODS.get(method_name) or PEFT_METHODS.get(method_name)
    if method is None or method.merge_refusal or method.continuation_refusal:
        reason = "which is not proven here"
        if method is not None and method.merge_refusal:
            reason = f"which cannot be merged: {method.merge_refusal}"
        elif method is not None:
            reason = (
                f"which cannot be merged, since its files cannot be loaded into a model: {method.continuation_refusal}"
            )
        yield (
            f"{setting}: was made by {method_name}, {reason}; leave it out, or merge it with peft and give that as model.path"
        )


def _with_expert_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Add the fields `experts` and `router`, which our `LoraConfig` has and peft has not, to a stored LoRA adapter's settings.

    peft has one list of names, `target_parameters`. Each name says what was adapted:
    - without `.weight` at its end (`mlp.experts.gate_up_proj`): experts.
    - `gate.weight` and `router.weight`: a router.
    - else: a linear layer, which is added to `target_modules`.
    """
    has_experts = False
    has_router = False
    linear_layers = []
    target_parameters = stored.get("target_parameters") or []
    for name in target_parameters:
        layer = name.removesuffix(".weight")
        if not name.endswith(".weight"):
            has_experts = True
        elif layer.rsplit(".", 1)[-1] in ("gate", "router"):
            has_router = True
        else:
            linear_layers.append(layer)
    target_modules = stored.get("target_modules")
    if target_parameters and not isinstance(target_modules, str):  # a text is one regular expression
        target_modules = [*(target_modules or ()), *linear_layers]
    return {**stored, "target_modules": target_modules, "experts": has_experts, "router": has_router}


def _is_of_same_method(tuning: AdapterConfig, stored: dict[str, Any]) -> bool:
    """Whether an adapter's stored settings are of the run's method."""
    return str(stored.get("peft_type", "")).lower() == peft_type_of(tuning)


def _as_comparable(value: Any) -> Any:
    """A value that compares as equal for a set and a list of the same names, and for None, false and empty."""
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    return value or None
