"""Adapter directories that exist already: to go on from one (`tuning.from`), or to fold one into the base (`model.adapters`)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.tuning.adapter import PREFIX, Adapter
from trainer.tuning.base import AdapterConfig, BaseReader
from trainer.tuning.replica import ADAPTER
from trainer.tuning.start import WEIGHTS, difference

_OURS = ("ensure_weight_tying", "task_type", "trainable_token_indices")
"""Fields that say how a model is wrapped, not what an adapter computes."""


def file_names(tuned: nn.Module) -> dict[str, str]:
    """The key that peft stores each parameter and buffer of a PeftModel under, by plain name; only of what it stores."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    named: dict[str, Any] = dict(tuned.named_parameters(remove_duplicate=False))
    named |= dict(tuned.named_buffers(remove_duplicate=False))
    # A tensor of its own for each name: tied parameters are one object.
    marks = {name: torch.empty(0, device="meta") for name in named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = get_peft_model_state_dict(tuned, state_dict=dict(marks), save_embedding_layers=False)
    names = {id(mark): name for name, mark in marks.items()}
    return {names[id(mark)]: key for key, mark in stored.items()}


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
                tuned.get_submodule(owner)._buffers[key] = self.tensor(name)


def check_settings(settings: Any, directory: str | Path, key: str) -> None:
    """Refuse a directory whose adapter computes something else than peft's `settings` do. Errors: ConfigError."""
    from peft import PeftConfig

    theirs, ours = PeftConfig.from_pretrained(str(Path(directory).expanduser())).to_dict(), settings.to_dict()
    differing = [
        f"{name}={theirs[name]} in its adapter_config.json, {ours[name]} here"
        for name in difference(ours, theirs)
        if name not in _OURS
    ]
    if differing:
        raise ConfigError(f"{key}={directory}: {'; '.join(differing)}; use the settings that it was made with")


class Folded:
    """Base weights with the adapters of some directories folded in, one after the other, layer by layer."""

    def __init__(self, model: nn.Module, directories: list[str]) -> None:
        self._folds = [_Fold(model, directory) for directory in directories]

    def changed(self) -> set[str]:
        """Base names of the parameters that are not those of the checkpoint."""
        return {name for fold in self._folds for name in fold.changed}

    def whole(self, name: str, base: BaseReader) -> Tensor:
        """The parameter with every adapter folded in, float32; `base` reads the checkpoint."""
        reader: Any = base
        for fold in self._folds:
            reader = _Reader(fold, reader)
        return reader.whole(name)


class _Reader:
    """A base with one adapter folded in, as a base."""

    def __init__(self, fold: _Fold, below: BaseReader) -> None:
        self.fold, self.below = fold, below

    def whole(self, name: str) -> Tensor:
        return self.fold.whole(name, self.below)


class _Fold:
    """One adapter directory on one architecture."""

    def __init__(self, model: nn.Module, directory: str) -> None:
        from peft import PeftConfig

        key, path = "model.adapters", Path(directory).expanduser()
        settings: Any = PeftConfig.from_pretrained(str(path))
        settings.inference_mode = False
        self.tuning = Adapter(AdapterConfig())
        self.model = self.tuning.wrap(copy.deepcopy(model), settings)
        self.stored = StoredAdapter(path, key)
        self.stored.match(self.model)
        self.stored.fill_buffers(self.model)
        layers = self.tuning.layers()
        self.replaced = {
            self.tuning.base_name(name): name for name in self.stored.names if f".modules_to_save.{ADAPTER}." in name
        }
        self.changed = {f"{layer}.{key}" for layer, keys in layers.items() for key in keys} | set(self.replaced)
        self._refuse(directory)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def _refuse(self, directory: str) -> None:
        """Raise ConfigError for what would be folded into another module too, or not at all."""
        word = f"model.adapters={directory}"
        known = set(self.replaced.values())
        if left := sorted(name for name in self.stored.names if not self.tuning.owns(name) and name not in known):
            raise ConfigError(
                f"{word}: holds {self.tuning.base_name(left[0])}, which is no part of an adapter (bias=all or lora_only); "
                "merge it with peft, and give the merged model as model.path"
            )
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            base = self.tuning.base_name(name)
            other = first.setdefault(id(parameter), base)
            if other != base and {other, base} & self.changed:
                raise ConfigError(
                    f"{word}: changes {base}, which {other} shares; the other would change too. Merge it with peft, and give "
                    "the merged model as model.path"
                )

    def whole(self, name: str, below: BaseReader) -> Tensor:
        if name in self.replaced:
            return self.stored.tensor(self.replaced[name])
        if name not in self.changed:
            return below.whole(name)
        layer, _, key = name.rpartition(".")
        if self._last[0] != layer:
            trained = {n: self.stored.tensor(n) for n in self.stored.names if n.startswith(f"{PREFIX}{layer}.")}
            self._last = layer, self.tuning.merged(layer, below, trained, self.model)
        return self._last[1][key]
