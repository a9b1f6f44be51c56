"""Loads the tensors of an existing adapter directory into a model that is wrapped in such an adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import own_buffers
from strategies.errors import ConfigError
from trainer.tuning.initial_adapter import (
    SETTINGS_FILE,
    WEIGHTS_FILE,
    UnusableAdapter,
    names_of_differing_settings,
    read_adapter_settings,
)
from trainer.tuning.key_mapping import replacement_keys
from trainer.tuning.replica import ADAPTER

_WRAPPING_ONLY_FIELDS = ("ensure_weight_tying", "task_type", "trainable_token_indices")
"""Fields of peft's settings that say how a model is wrapped, not what an adapter computes."""


def _keys_stored_by_peft(peft_model: nn.Module) -> dict[str, str]:
    """Find out under what key an adapter file has each parameter and buffer of a PeftModel that peft stores: {name: key}.

    An entry: base_model.model.fc.lora_A.default.weight -> base_model.model.fc.lora_A.weight.
    """
    from peft import get_peft_model_state_dict

    tensors: dict[str, Any] = dict(peft_model.named_parameters(remove_duplicate=False))
    tensors |= dict(peft_model.named_buffers(remove_duplicate=False))
    # An empty tensor for each name, to follow it through peft. Not the parameters: tied ones are a single object.
    markers = {name: torch.empty(0, device="meta") for name in tensors}
    name_of_marker = {id(marker): name for name, marker in markers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A copy of `markers`, since peft takes entries out of the dict that it gets.
        stored_markers = get_peft_model_state_dict(peft_model, state_dict=dict(markers), save_embedding_layers=False)
    # Where plain peft would not load its own key back, the file has another one.
    peft_config = peft_model.peft_config[ADAPTER]  # type: ignore[index,union-attr]
    replaced_keys = replacement_keys(peft_model, peft_config, stored_markers)
    keys_by_name = {}  # by name in the PeftModel
    for key, marker in stored_markers.items():
        keys_by_name[name_of_marker[id(marker)]] = replaced_keys.get(key) or key
    return keys_by_name


def stored_peft_config(directory: str | Path, setting_name: str) -> Any:
    """Read peft's config object of the adapter in `directory` from its adapter_config.json.

    `setting_name`: the setting that names the directory, such as `tuning.from`, for the message of the ConfigError that is
    raised if it cannot be read.
    """
    from peft import PeftConfig

    path = Path(directory).expanduser()
    try:
        read_adapter_settings(path)
    except UnusableAdapter as error:
        raise ConfigError(f"{setting_name}={directory}: {error}") from error
    try:
        return PeftConfig.from_pretrained(str(path))
    except Exception as error:  # a field that no method has, or a value that none takes
        raise ConfigError(
            f"{setting_name}={directory}: peft cannot read its {SETTINGS_FILE} "
            f"({' '.join(str(error).split())[:200]}); write the adapter again"
        ) from error


class StoredAdapter:
    """The tensors of one adapter directory under the plain names of a model that is wrapped in such an adapter."""

    def __init__(self, directory: str | Path, setting_name: str) -> None:
        """Open the file of tensors in `directory`.

        Raises ConfigError, which names the setting `setting_name`, if it cannot be opened.
        """
        from safetensors import safe_open

        self.directory = Path(directory).expanduser()
        self.setting_name = setting_name
        """The setting that named the directory, such as `tuning.from`, for messages."""
        path = self.directory / WEIGHTS_FILE
        try:
            self._file: Any = safe_open(str(path), framework="pt").__enter__()
        except Exception as error:  # a type of safetensors' own, or OSError
            raise ConfigError(
                f"{setting_name}={directory}: {path} cannot be read ({error}); write the adapter again"
            ) from error
        self._keys_in_file = set(self._file.keys())
        self.file_key_by_name: dict[str, str] = {}
        """The key in the file of each stored parameter and buffer, by its name in the PeftModel; `match_names` fills it."""

    def match_names(self, peft_model: nn.Module) -> None:
        """Match the tensors in the file with the parameters of the PeftModel `peft_model`, and fill `file_key_by_name`.

        Raises ConfigError in this order: the file lacks a trained parameter or has a tensor that `peft_model` does not have; a
        shape differs. An entry: base_model.model.fc.lora_A.default.weight -> base_model.model.fc.lora_A.weight.
        """
        # Compare the names.
        keys_by_name = _keys_stored_by_peft(peft_model)
        shapes: dict[str, tuple[int, ...]] = {}
        missing = []
        for name, parameter in peft_model.named_parameters(remove_duplicate=False):
            shapes[name] = tuple(parameter.shape)
            if parameter.requires_grad and name in keys_by_name and keys_by_name[name] not in self._keys_in_file:
                missing.append(name)
        missing.sort()
        unknown = sorted(self._keys_in_file - set(keys_by_name.values()))
        if missing or unknown:
            advice = "set tuning.targets and tuning.modules_to_save to those it was made with"
            if self.setting_name != "tuning.from":  # `model.adapters`: the file decides the targets
                advice = "give the base model and the objective that it was made with"
            differences = []
            if missing:
                differences.append(f"missing in the file: {', '.join(missing[:3])}")
            if unknown:
                differences.append(f"in the file only: {', '.join(unknown[:3])}")
            raise ConfigError(
                f"{self.setting_name}={self.directory}: its adapter does not fit this model and these settings: "
                f"{'; '.join(differences)}; {advice}"
            )

        self.file_key_by_name = {name: key for name, key in keys_by_name.items() if key in self._keys_in_file}
        # Compare the shapes. Buffers have none to compare with: peft makes them anew from the file.
        for name, key in self.file_key_by_name.items():
            stored_shape = tuple(self._file.get_slice(key).get_shape())
            if name in shapes and stored_shape != shapes[name]:
                raise ConfigError(
                    f"{self.setting_name}={self.directory}: {key} has shape {stored_shape} in the file, {shapes[name]} in this "
                    "run; use the settings, the base model and the vocabulary that it was made with"
                )

    def tensor(self, name: str) -> Tensor:
        """The stored value of a parameter or buffer: float32 if it is floating-point, else as it is in the file."""
        tensor = self._file.get_tensor(self.file_key_by_name[name])
        return tensor.float() if tensor.is_floating_point() else tensor

    def fill_buffers(self, peft_model: nn.Module) -> None:
        """Give buffers that peft stores (shared projections) the values in the file."""
        for name, buffer in list(peft_model.named_buffers(remove_duplicate=False)):
            if name in self.file_key_by_name and buffer is not None:
                owner, _, key = name.rpartition(".")
                own_buffers(peft_model.get_submodule(owner))[key] = self.tensor(name)


def check_same_adapter_settings(run_peft_config: Any, directory: str) -> None:
    """Raise ConfigError if the tensors of the adapter that training continues from would compute something else in this run.

    `run_peft_config`: peft's config of this run's adapter. `directory`: of the stored one, the value of `tuning.from`.
    """
    stored = stored_peft_config(directory, "tuning.from").to_dict()
    expected = run_peft_config.to_dict()
    differences = []
    for name in names_of_differing_settings(expected, stored):
        if name not in _WRAPPING_ONLY_FIELDS:
            differences.append(f"{name}={stored[name]} in its adapter_config.json, {expected[name]} here")
    if differences:
        raise ConfigError(f"tuning.from={directory}: {'; '.join(differences)}; use the settings that it was made with")
