"""Loads the tensors of an existing adapter directory into a model that is wrapped in such an adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import own_buffers
from strategies.errors import ConfigError
from trainer.tuning.initial_adapter import SETTINGS, WEIGHTS, difference, read_settings
from trainer.tuning.key_mapping import keys_in_file
from trainer.tuning.replica import ADAPTER

_OURS = ("ensure_weight_tying", "task_type", "trainable_token_indices")
"""Fields that say how a model is wrapped, not what an adapter computes."""


def file_names(tuned: nn.Module) -> dict[str, str]:
    """The key that each parameter and buffer of a PeftModel is stored under, by plain name; only of what peft stores."""
    from peft import get_peft_model_state_dict

    named: dict[str, Any] = dict(tuned.named_parameters(remove_duplicate=False))
    named |= dict(tuned.named_buffers(remove_duplicate=False))
    # A tensor of its own for each name: tied parameters are one object.
    marks = {name: torch.empty(0, device="meta") for name in named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = get_peft_model_state_dict(tuned, state_dict=dict(marks), save_embedding_layers=False)
    names = {id(mark): name for name, mark in marks.items()}
    other = keys_in_file(tuned, tuned.peft_config[ADAPTER], stored)  # type: ignore[index,union-attr]
    return {names[id(mark)]: other.get(key) or key for key, mark in stored.items()}


def peft_settings(directory: str | Path, key: str) -> Any:
    """What peft makes of the adapter_config.json of a directory that the setting `key` names. Errors: ConfigError."""
    from peft import PeftConfig

    path = Path(directory).expanduser()
    if isinstance(wrong := read_settings(path), str):
        raise ConfigError(f"{key}={directory}: {wrong}")
    try:
        return PeftConfig.from_pretrained(str(path))
    except Exception as error:  # a field that no method has, or a value that none takes
        raise ConfigError(
            f"{key}={directory}: peft cannot read its {SETTINGS} ({' '.join(str(error).split())[:200]}); write the adapter again"
        ) from error


class StoredAdapter:
    """The tensors of one adapter directory under the plain names of a model that is wrapped in such an adapter."""

    def __init__(self, directory: str | Path, key: str) -> None:
        from safetensors import safe_open

        self.directory, self.key = Path(directory).expanduser(), key
        """Where it lies, and the setting that named it."""
        path = self.directory / WEIGHTS
        try:
            self._file: Any = safe_open(str(path), framework="pt").__enter__()
        except Exception as error:  # a type of safetensors' own, or OSError
            raise ConfigError(f"{key}={directory}: {path} cannot be read ({error}); write the adapter again") from error
        self._keys = set(self._file.keys())
        self.names: dict[str, str] = {}

    def match(self, tuned: nn.Module) -> None:
        """Find every trained parameter of `tuned` in the file. Raises ConfigError that says what both have."""
        known = file_names(tuned)
        shapes = {name: tuple(p.shape) for name, p in tuned.named_parameters(remove_duplicate=False)}
        trained = {n for n, p in tuned.named_parameters(remove_duplicate=False) if p.requires_grad and n in known}
        missing = sorted(name for name in trained if known[name] not in self._keys)
        foreign = sorted(self._keys - set(known.values()))
        advice = "set tuning.targets and tuning.modules_to_save to those it was made with"
        if self.key != "tuning.from":
            advice = "give the base model and the objective that it was made with"
        if missing or foreign:
            raise ConfigError(
                f"{self.key}={self.directory}: its adapter does not fit this model and these settings: "
                f"{'missing in the file: ' + ', '.join(missing[:3]) if missing else ''}{'; ' if missing and foreign else ''}"
                f"{'in the file only: ' + ', '.join(foreign[:3]) if foreign else ''}; {advice}"
            )
        self.names = {name: key for name, key in known.items() if key in self._keys}
        for name, key in self.names.items():
            found = tuple(self._file.get_slice(key).get_shape())
            if name in shapes and found != shapes[name]:
                raise ConfigError(
                    f"{self.key}={self.directory}: {key} has shape {found} in the file, {shapes[name]} in this run; use the "
                    "settings, the base model and the vocabulary that it was made with"
                )

    def tensor(self, name: str) -> Tensor:
        """The stored value of a parameter or buffer, float32 where it is a number at all."""
        value = self._file.get_tensor(self.names[name])
        return value.float() if value.is_floating_point() else value

    def fill_buffers(self, tuned: nn.Module) -> None:
        """What peft stores beside parameters (shared projections) as it is in the file."""
        for name, buffer in list(tuned.named_buffers(remove_duplicate=False)):
            if name in self.names and buffer is not None:
                owner, _, key = name.rpartition(".")
                own_buffers(tuned.get_submodule(owner))[key] = self.tensor(name)


def check_settings(settings: Any, directory: str | Path, key: str) -> None:
    """Refuse a directory whose adapter computes something else than peft's `settings` do. Errors: ConfigError."""
    theirs, ours = peft_settings(directory, key).to_dict(), settings.to_dict()
    differing = [
        f"{name}={theirs[name]} in its adapter_config.json, {ours[name]} here"
        for name in difference(ours, theirs)
        if name not in _OURS
    ]
    if differing:
        raise ConfigError(f"{key}={directory}: {'; '.join(differing)}; use the settings that it was made with")
