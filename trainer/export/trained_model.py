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
from trainer.step import BuiltModel
from trainer.tuning.adapter_files import AdapterMerger


@dataclass(kw_only=True, slots=True)
class TrainedModel:
    """A model that a run has trained, without an engine."""

    built: BuiltModel
    """Described on the meta device, and not sharded."""
    source: WeightSource
    """Reader of the values that parameters had when the run began."""
    trained: SavedParameters | MeanOfCheckpoints
    """The parameters that trained, by plain name."""
    tokenizer: Any
    base_directory: Path
    """Where this host reads the weights of the base: a copy of it under `launcher.stage`."""
    base_path: str
    """Directory of the base model as the run names it, which the export's files name too."""
    seed: int
    """`run.seed`, from which the initial values of adapters were sampled."""
    frozen_dtype: torch.dtype
    """The type in which the run holds parameters that do not train."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What these values depend on: hashes of checkpoints, digests of the base's files. Another export has another origin."""

    @property
    def model_without_adapter(self) -> Any:
        """The model of transformers, without peft's model around it if there is one."""
        model: Any = self.built.step_module.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def base_weights(self) -> BaseWeights:
        """A reader of the base as it is trained on."""
        return self.built.base_weights(self.base_directory)


def trained_shapes(built: BuiltModel) -> dict[str, torch.Size]:
    """The shapes of the parameters that train, by name in the run's module. `built`: not sharded."""
    return {name: parameter.shape for name, parameter in trainable_parameters(built.step_module)}


class TrainedValues:
    """Values of a model as it was trained, for an engine that computes with it (`strategies.base.ParameterSource`)."""

    def __init__(self, source: WeightSource, trained: Mapping[str, Tensor]) -> None:
        """`source`: of the model as the run began. `trained`: the parameters that trained, by plain name."""
        self.source = source
        self.trained = trained

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a parameter as if flattened, on the CPU, for a rank that computes with its share.

        The trained value if the parameter trained, else the one with which the run began. `name`: in the run's module.
        """
        if name in self.trained:
            return self.trained[name].reshape(-1)[start:stop]
        return self.source.read_slice(name, shape, start, stop)


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which torch computes with one thread: sums round alike, so every host writes the same bytes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


class ModelValues:
    """The parameters and persistent buffers of a whole model by their base names, adapters merged in.

    A base name is a parameter's name in the base model (`model.layers.0.mlp.up_proj.weight`). Its plain name is that in the
    run's module, where an adapter may be around it (`base_model.model.model.layers.0.mlp.up_proj.base_layer.weight`). Keeps
    the adapted layer and the group of stored tensors that were read last.
    """

    def __init__(self, model: TrainedModel) -> None:
        """Open the base's files, and note under which names the parameters and buffers of the model are exported.

        Reads no tensor yet. Sets `seed` of an adapter's tuning.
        """
        self.model = model
        self.base = model.base_weights()
        """Also the reader of stored weights that the architecture ignores."""
        self._merger: AdapterMerger | None = None
        """Merges the adapter into one parameter after another; None without an adapter."""
        tuning: Any = model.built.tuning
        if tuning.adapter:
            tuning.seed = model.seed  # which an engine sets when it asks for initial values
            self._merger = AdapterMerger(tuning, model.built.step_module.model, model.trained, self.base)
        self._plain_name_by_base_name: dict[str, str] = {}
        """The name of a parameter in the run's module, by its name in the base, in the order in which the model holds them."""
        for plain_name, _ in named_parameters(model.built.step_module):
            # peft keeps the original of a module that trains as a full copy; the copy is exported in its place.
            is_replaced = self._merger is not None and ".original_module." in plain_name
            if not tuning.is_added_parameter(plain_name) and not is_replaced:
                self._plain_name_by_base_name[tuning.base_name(plain_name)] = plain_name
        self._parameters = dict(named_parameters(model.built.step_module))
        """By plain name, on the meta device."""
        self._buffers: dict[str, Tensor] = {}
        """Persistent buffers by base name."""
        for plain_name, buffer in persistent_buffers(model.built.step_module.model):
            if not tuning.is_added_parameter(plain_name):
                self._buffers[tuning.base_name(plain_name)] = buffer.detach()

    def base_names(self) -> list[str]:
        """Names of all tensors that an export has, as in the base model: parameters, then buffers, each in the model's order."""
        return [*self._plain_name_by_base_name, *self._buffers]

    def meta_tensor(self, base_name: str) -> Tensor:
        """What shape and type an exported tensor will have, as an empty tensor on the meta device; nothing is read.

        `base_name`: the name in the base model, such as "model.norm.weight". The type is

        - of a buffer: its own;
        - of a parameter that the base holds quantised: float32, with its full shape;
        - of any other: float32, in which adapters are merged, if it is floating-point, else its own type.
        """
        if base_name in self._buffers:
            return self._buffers[base_name].to("meta")
        if base_name in self.base.quantised_shapes:
            return torch.empty(self.base.quantised_shapes[base_name], device="meta")
        parameter = self._parameters[self._plain_name_by_base_name[base_name]]
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        return torch.empty(parameter.shape, dtype=dtype, device="meta")

    def full_tensor(self, base_name: str) -> Tensor:
        """Read one whole tensor of the export, on the CPU.

        - A buffer: that of the model.
        - A parameter that trained in full: from the checkpoint.
        - A frozen parameter: `_frozen_tensor`, with the adapter merged in if there is one. One thread merges, so that every
          host gets the same bits.

        Raises StorageError if the checkpoint cannot be read, ConfigError if a conversion of the base's files fails.
        """
        if base_name in self._buffers:
            return self._buffers[base_name].cpu()
        plain_name = self._plain_name_by_base_name[base_name]
        if plain_name in self.model.trained:
            return self.model.trained[plain_name]
        frozen = self._frozen_tensor(base_name, plain_name)
        if self._merger is None:
            return frozen
        with one_thread():
            merged = self._merger.merged_tensor(plain_name, frozen)
        # None only for the original of a module that trained in full, which `__init__` leaves out.
        assert merged is not None
        return merged

    def close(self) -> None:
        """Close the base's files."""
        self.base.close()
        self.model.source.close()

    def _frozen_tensor(self, base_name: str, plain_name: str) -> Tensor:
        """The value of a parameter that did not train, before an adapter is merged in.

        - The base's files hold it quantised: its full-precision values.
        - They do not have it (a new head), or have it in another shape (a grown vocabulary): its value when the run began.
        - Else: the value of the files in their type. The run's memory may hold it rounded.

        `base_name`: its name in the base model; `plain_name`: in the run's module.
        """
        if base_name in self.base.quantised_shapes:
            return self.base.full_tensor(base_name)
        shape = self._parameters[plain_name].shape
        # The base may store it under this name, or under one that transformers renames.
        base_has_it = self.base.name_in_checkpoint(base_name) is not None
        if not base_has_it or self.base.shape(base_name) != tuple(shape):
            initial_values = self.model.source.read_slice(plain_name, shape, 0, shape.numel())
            return initial_values.view(shape).to(self.model.frozen_dtype)
        return self.base.read_slice(base_name, 0, math.prod(shape)).view(shape)
