"""`model.adapters`: merges adapters into the base weights layer by layer while these are loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from strategies.errors import ConfigError
from trainer.tuning.adapter import Adapter
from trainer.tuning.adapter_checkpoint import StoredAdapter, peft_settings
from trainer.tuning.base import AdapterConfig, BaseReader
from trainer.tuning.replica import ADAPTER


class Folded:
    """Base weights with the adapters of some directories folded in, one after the other, layer by layer."""

    def __init__(self, model: nn.Module, directories: list[str], key: str = "model.adapters") -> None:
        """`model`: the architecture on meta, without adapters; `key`: the setting that names the directories."""
        self._folds = [_Fold(model, directory, key) for directory in directories]

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

    def __init__(self, model: nn.Module, directory: str, key: str) -> None:
        path = Path(directory).expanduser()
        settings: Any = peft_settings(path, key)
        settings.inference_mode = False
        self.tuning = Adapter(AdapterConfig())
        self.model = self.tuning.wrap(copy.deepcopy(model), settings)
        self.stored = StoredAdapter(path, key)
        self.stored.match(self.model)
        self.stored.fill_buffers(self.model)
        self.replaced = {
            self.tuning.base_name(name): name for name in self.stored.names if f".modules_to_save.{ADAPTER}." in name
        }
        self.changed = self.tuning.changed() | set(self.replaced)
        self._refuse(f"{key}={directory}")
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def _refuse(self, word: str) -> None:
        """Raise ConfigError, with the setting in `word`, for what would be folded into another module too, or not at all."""
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
        layer, key = self.tuning.layer_of(name)
        if self._last[0] != layer:
            trained = {n: self.stored.tensor(n) for n in self.tuning.names_of(layer) if n in self.stored.names}
            self._last = layer, self.tuning.merged(layer, below, trained, self.model)
        return self._last[1][key]
