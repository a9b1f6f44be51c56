"""`model.adapters`: merges adapters into the base weights layer by layer while these are loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.tuning.adapter import Adapter
from trainer.tuning.adapter_checkpoint import StoredAdapter, stored_peft_config
from trainer.tuning.base import AdapterConfig, BaseWeightsReader
from trainer.tuning.replica import ADAPTER


class MergedAdapters:
    """Base weights with the adapters of some directories merged in, in their order, layer by layer as they are read."""

    def __init__(self, model: nn.Module, directories: list[str], setting_name: str = "model.adapters") -> None:
        """`model`: the architecture on meta, without adapters; `setting_name`: of the setting that names the directories."""
        self._adapters = [_MergedAdapter(model, directory, setting_name) for directory in directories]

    def changed_base_names(self) -> set[str]:
        """Base names of the parameters that an adapter changes."""
        names: set[str] = set()
        for adapter in self._adapters:
            names |= adapter.changed_base_names
        return names

    def full_tensor(self, name: str, base: BaseWeightsReader) -> Tensor:
        """The base parameter `name` with every adapter merged in, float32. `base` reads the checkpoint."""
        # Each adapter merges into what the readers before it give.
        reader: Any = base
        for adapter in self._adapters:
            reader = _MergedReader(adapter, reader)
        return reader.full_tensor(name)


class _MergedReader:
    """Reads a base with one adapter merged in, as if it were a base itself."""

    def __init__(self, adapter: _MergedAdapter, base: BaseWeightsReader) -> None:
        self.adapter = adapter
        self.base = base

    def full_tensor(self, name: str) -> Tensor:
        return self.adapter.full_tensor(name, self.base)


class _MergedAdapter:
    """The adapter of one directory on one architecture. Keeps the layer that it merged last."""

    def __init__(self, model: nn.Module, directory: str, setting_name: str) -> None:
        """Open the adapter of `directory`, and match its tensors with a copy of the model that peft wraps. Reads no values.

        `model`: the architecture on meta. `setting_name`: of the setting that names the directory. Raises ConfigError if the
        adapter does not fit the model, or cannot be merged exactly.
        """
        path = Path(directory).expanduser()
        settings: Any = stored_peft_config(path, setting_name)
        settings.inference_mode = False
        self.tuning = Adapter(AdapterConfig())
        self.model = self.tuning.wrap_in_peft(copy.deepcopy(model), settings)
        self.stored_adapter = StoredAdapter(path, setting_name)
        self.stored_adapter.match_names(self.model)
        self.stored_adapter.fill_buffers(self.model)
        self.full_name_by_fully_trained_base_name: dict[str, str] = {}
        """Name in the PeftModel of each parameter that trained in full, by its base name: it replaces the base's."""
        for name in self.stored_adapter.file_key_by_name:
            if f".modules_to_save.{ADAPTER}." in name:
                self.full_name_by_fully_trained_base_name[self.tuning.base_name(name)] = name
        self.changed_base_names = self.tuning.changed_base_names() | set(self.full_name_by_fully_trained_base_name)
        self._refuse_other_tensors(f"{setting_name}={directory}")
        self._refuse_shared_parameters(f"{setting_name}={directory}")
        self._cached_layer = ""
        self._cached_parameters: dict[str, Tensor] = {}
        """The merged parameters of `_cached_layer`, the layer that was merged last: they are asked for one by one."""

    def _refuse_other_tensors(self, setting: str) -> None:
        """Raise ConfigError if the files hold more than adapters and modules that trained in full: merging would lose it.

        peft stores no others but biases, with `bias=all` or `bias=lora_only`. `setting`: key and directory, which begin the
        message, such as `model.adapters=/path`.
        """
        fully_trained = set(self.full_name_by_fully_trained_base_name.values())
        other_names = []
        for name in self.stored_adapter.file_key_by_name:
            if not self.tuning.is_added_parameter(name) and name not in fully_trained:
                other_names.append(name)
        if other_names:
            base_name = self.tuning.base_name(min(other_names))
            raise ConfigError(
                f"{setting}: holds {base_name}, which is no part of an adapter (bias=all or lora_only); "
                "merge it with peft, and give the merged model as model.path"
            )

    def _refuse_shared_parameters(self, setting: str) -> None:
        """Raise ConfigError if the adapter changes a parameter that another module shares, such as tied embeddings.

        A shared parameter is one object under several names, so the other module would change too. `setting`: begins the
        message.
        """
        first_names: dict[int, str] = {}  # by the id of the parameter
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            base_name = self.tuning.base_name(name)
            first_name = first_names.setdefault(id(parameter), base_name)
            if first_name != base_name and {first_name, base_name} & self.changed_base_names:
                raise ConfigError(
                    f"{setting}: changes {base_name}, which {first_name} shares; the other would change too. Merge it with "
                    "peft, and give the merged model as model.path"
                )

    def full_tensor(self, name: str, base: BaseWeightsReader) -> Tensor:
        """The full base parameter `name` with this adapter merged in. `base` reads the weights without it.

        - trained in full with the adapter: the stored value.
        - not changed by the adapter: the base's value.
        - else: its layer is merged, and kept for the layer's next parameter.
        """
        if name in self.full_name_by_fully_trained_base_name:
            return self.stored_adapter.tensor(self.full_name_by_fully_trained_base_name[name])
        if name not in self.changed_base_names:
            return base.full_tensor(name)
        layer, key = self.tuning.layer_and_key_of(name)
        if self._cached_layer != layer:
            trained = {}
            for full_name in self.tuning.added_parameter_names(layer):
                if full_name in self.stored_adapter.file_key_by_name:
                    trained[full_name] = self.stored_adapter.tensor(full_name)
            self._cached_parameters = self.tuning.merged_parameters(layer, base, trained, self.model)
            self._cached_layer = layer
        return self._cached_parameters[key]
