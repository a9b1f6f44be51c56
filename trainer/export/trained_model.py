"""What an export is made of: a model on meta, and where the values of its parameters come from, one at a time.

Trained parameters come from a checkpoint. Frozen ones come from the base, since training never touched them and a run in
bfloat16 holds them rounded. What neither has (a head that does not train, rows of a grown vocabulary) comes from the
source that filled the run. No engine is needed, and nothing here communicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.compat.modules import persistent_buffers
from strategies.parameters import named_parameters, trainable_parameters
from strategies.saved_parameters import MeanOfCheckpoints, SavedParameters
from trainer.model.weights import BaseWeights, WeightSource
from trainer.step import Built
from trainer.tuning.adapter_files import AdapterMerger


@dataclass(kw_only=True, slots=True)
class TrainedModel:
    """A model that a run has trained, without an engine."""

    built: Built
    """Described on the meta device, and not sharded."""
    source: WeightSource
    """What fills the parameters of such a run at its start."""
    trained: SavedParameters | MeanOfCheckpoints
    """The parameters that trained, by plain name."""
    tokenizer: Any
    base_directory: Path
    """Where this host reads the weights of the base: a copy of it under `launcher.stage`."""
    base_path: str
    """Directory of the base model as the run names it, which the export's files name too."""
    seed: int
    """`run.seed`, from which adapters were drawn."""
    frozen_dtype: torch.dtype
    """The type in which the run holds parameters that do not train."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What these values depend on: hashes of checkpoints, digests of the base's files. Another export has another origin."""

    @property
    def plain_model(self) -> Any:
        """The model without the adapter around it."""
        model: Any = self.built.step_module.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def base_weights(self) -> BaseWeights:
        """A reader of the base as it is trained on."""
        return self.built.base_weights(self.base_directory)


def trained_shapes(built: Built) -> dict[str, torch.Size]:
    """The shapes of the parameters that train, by plain name. `built`: not sharded."""
    return {name: parameter.shape for name, parameter in trainable_parameters(built.step_module)}


class TrainedValues:
    """`strategies.base.ParameterSource` of a model as it was trained, to compute with it."""

    def __init__(self, source: WeightSource, trained: Mapping[str, Tensor]) -> None:
        """`source`: of the model as the run began. `trained`: the parameters that trained, by plain name."""
        self.source = source
        self.trained = trained

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU."""
        if name in self.trained:
            return self.trained[name].reshape(-1)[start:stop]
        return self.source.read_slice(name, shape, start, stop)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes with one thread: products and sums then round alike, whatever the host and its other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class ModelValues:
    """The parameters and persistent buffers of a whole model by their base names, adapters merged in.

    Keeps the adapted layer and the group of stored tensors that were read last, and nothing else.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        self.base = model.base_weights()
        """Also the reader of stored weights that the architecture ignores."""
        self._merger: AdapterMerger | None = None
        tuning: Any = model.built.tuning
        if tuning.adapter:
            tuning.seed = model.seed  # which an engine sets when it asks for initial values
            self._merger = AdapterMerger(tuning, model.built.step_module.model, model.trained, self.base)
        self._plain_names: dict[str, str] = {}
        """Plain names of parameters by base name, in the order in which the model holds them."""
        for name, _ in named_parameters(model.built.step_module):
            is_replaced = self._merger is not None and ".original_module." in name  # by a copy that trained in full
            if not tuning.owns(name) and not is_replaced:
                self._plain_names[tuning.base_name(name)] = name
        self._parameters = dict(named_parameters(model.built.step_module))
        self._buffers: dict[str, Tensor] = {}
        """Persistent buffers by base name."""
        for name, buffer in persistent_buffers(model.built.step_module.model):
            if not tuning.owns(name):
                self._buffers[tuning.base_name(name)] = buffer.detach()

    def names(self) -> list[str]:
        """Base names of all values: parameters, then buffers, in the order in which the model holds them."""
        return [*self._plain_names, *self._buffers]

    def on_meta(self, name: str) -> Tensor:
        """A tensor with the shape of a value, and with a floating-point type if the value has one. Reads nothing."""
        if name in self._buffers:
            return self._buffers[name].to("meta")
        if name in self.base.quantised:
            return torch.empty(self.base.quantised[name], device="meta")
        parameter = self._parameters[self._plain_names[name]]
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        return torch.empty(parameter.shape, dtype=dtype, device="meta")

    def value(self, name: str) -> Tensor:
        """A value in full, on the CPU. Errors: StorageError, ConfigError, and those of reading the base."""
        if name in self._buffers:
            return self._buffers[name].cpu()
        plain_name = self._plain_names[name]
        if plain_name in self.model.trained:
            return self.model.trained[plain_name]
        frozen = self._frozen(name, plain_name)
        if self._merger is None:
            return frozen
        with one_thread():
            merged = self._merger.tensor(plain_name, frozen)
        assert merged is not None, "modules that trained in full are left out above"
        return merged

    def close(self) -> None:
        """Close the base's files."""
        self.base.close()
        self.model.source.close()

    def _frozen(self, name: str, plain_name: str) -> Tensor:
        """The base's own value of a parameter that does not train, or the run's of one that the base does not have."""
        if name in self.base.quantised:
            return self.base.full_tensor(name)
        shape = self._parameters[plain_name].shape
        if self.base.resolve(name) is None or self.base.shape(name) != tuple(shape):
            values = self.model.source.read_slice(plain_name, shape, 0, shape.numel())
            return values.view(shape).to(self.model.frozen_dtype)
        return self.base.read_slice(name, 0, math.prod(shape)).view(shape)
