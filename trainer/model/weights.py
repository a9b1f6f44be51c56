"""Initial parameter values, read run by run: from a checkpoint, from the tuning method, or drawn.

A rank asks only for the elements it holds; nothing here communicates. What the base checkpoint does not have (a new
classification head, new vocabulary) is drawn from (seed, name), so that it is the same everywhere, and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import persistent_buffers
from strategies.errors import ConfigError
from strategies.parameters import FROZEN_MODEL_PREFIXES
from strategies.runtime import derived_seed
from trainer.model.conversions import Conversions
from trainer.model.files import SafetensorsFiles
from trainer.model.packed_cache import HostRank, QuantisedWeightsCache, cached_weights
from trainer.model.quantisation import QuantisationScheme
from trainer.model.quantised_experts import quantise_experts_slice, round_trip_experts
from trainer.tuning.base import Tuning

if TYPE_CHECKING:
    from trainer.tuning.merged_adapters import MergedAdapters


class PretrainedWeights:
    """The weights of a model directory by their names in the model, whatever the files call and make of them."""

    def __init__(self, directory: Path, meta_model: Any, tied: dict[str, list[str]] | None = None) -> None:
        """`meta_model`: the model on meta, as transformers builds it; `tied`: other names of shared parameters."""
        self.directory = directory
        self.conversions = Conversions(meta_model, SafetensorsFiles(directory))
        self._tied = tied or {}

    def name_in_checkpoint(self, name: str) -> str | None:
        """The name under which the files have a parameter: its own, or another name of a shared one; None if they have neither.

        An output layer that is tied to the embeddings is stored once, under one of both names.
        """
        for spelling in (name, *self._tied.get(name, ())):
            if spelling in self.conversions.groups:
                return spelling
        return None

    def _stored_name(self, name: str) -> str:
        """The name under which the checkpoint has a parameter. Raises ConfigError if it lacks the parameter."""
        stored_name = self.name_in_checkpoint(name)
        if stored_name is None:
            raise ConfigError(f"{name}: needed by the tuning method but not in {self.directory}")
        return stored_name

    def close(self) -> None:
        """Close the files; they are opened again when something is read."""
        self.conversions.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the checkpoint's tensors make a parameter of; raises ConfigError where it is not there."""
        stored_name = self._stored_name(name)
        return self.conversions.groups[stored_name].shapes[stored_name]

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened parameter; reads only the rows they lie in, where that can be."""
        return self.conversions.read_slice(self._stored_name(name), start, stop)

    def full_tensor(self, name: str) -> Tensor:
        """A full parameter; raises ConfigError where the checkpoint does not have it."""
        shape = self.shape(name)
        return self.read_slice(name, 0, math.prod(shape)).view(shape)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """Rows of a matrix, float32; raises ConfigError where the checkpoint does not have it."""
        columns = self.shape(name)[1]
        return torch.stack([self.read_slice(name, i * columns, (i + 1) * columns).float() for i in indices])


def tied_names(model: nn.Module, base_name: Callable[[str], str]) -> dict[str, list[str]]:
    """The other names of each shared parameter, by its first name: {"model.embed_tokens.weight": ["lm_head.weight"]}.

    `base_name`: gives a parameter's name in the model before tuning, as a base checkpoint has it.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(base_name(name))
    return {spellings[0]: spellings[1:] for spellings in names.values() if len(spellings) > 1}


def fill_buffers(model: nn.Module, checkpoint: PretrainedWeights, base_name: Callable[[str], str]) -> None:
    """Load the buffers that a checkpoint holds, such as the bias of BART's logits; new rows of a vocabulary stay as they are.

    `base_name`: gives a buffer's name in the model before tuning.
    """
    for plain_name, buffer in persistent_buffers(model):
        name = base_name(plain_name)
        if checkpoint.name_in_checkpoint(name) is not None:
            values = checkpoint.read_slice(name, 0, math.prod(checkpoint.shape(name)))
            # A buffer with a value for each token is longer than the stored one if tokens were added.
            buffer.view(-1)[: len(values)] = values.to(buffer.dtype)


class BaseWeights(PretrainedWeights):
    """The weights that a run trains on: adapters of `model.adapters` merged in, and rounded where they are stored quantised."""

    def __init__(
        self,
        directory: Path,
        meta_model: Any,
        tied: dict[str, list[str]] | None = None,
        *,
        merged_adapters: MergedAdapters | None = None,
        scheme: QuantisationScheme | None = None,
        quantised: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        """`directory`: of the checkpoint.

        `meta_model`: the model as transformers builds it, on meta. `tied`: other names of shared parameters.
        `merged_adapters`: adapters to merge into the weights as they are read; None: none. `scheme`: how frozen weights are
        quantised; None: not at all. `quantised`: shapes of the weights that are, by base name. Raises ConfigError if an adapter
        changes a parameter that the checkpoint lacks.
        """
        super().__init__(directory, meta_model, tied)
        self.merged_adapters = merged_adapters
        self.scheme = scheme
        self.quantised_shapes = quantised or {}
        """Shapes of the weights that are stored quantised, by base name."""
        changed = merged_adapters.changed_base_names() if merged_adapters is not None else set()
        if missing := sorted(name for name in changed if self.name_in_checkpoint(name) is None):
            raise ConfigError(
                f"model.adapters: change {missing[0]}, which {directory} does not have; merge them with peft, and give the "
                "merged model as model.path"
            )
        self._adapted = {self._stored_name(name): name for name in changed}
        self._last_quantised: tuple[str, Tensor] | None = None
        """(name, bytes) of the matrix that was quantised last: its slices are asked for one by one."""
        self.packed_cache: QuantisedWeightsCache | None = None
        """Where quantised weights are kept on this host, if they are."""

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened parameter, adapters merged in, but not rounded."""
        stored_name = self._stored_name(name)
        if stored_name not in self._adapted:
            return super().read_slice(stored_name, start, stop)
        assert self.merged_adapters is not None
        # Merged by the whole parameter: its base value without adapters, plus their updates.
        return self.merged_adapters.full_tensor(self._adapted[stored_name], _WithoutAdapters(self)).reshape(-1)[
            start:stop
        ]

    def full_tensor(self, name: str) -> Tensor:
        """A full parameter as the model computes with it: adapters merged in; rounded, in float32, if it is stored quantised."""
        parameter = super().full_tensor(name)
        if name not in self.quantised_shapes or self.scheme is None:
            return parameter
        # A matrix, or a stack of one matrix for each expert.
        return self.scheme.round_trip(parameter) if parameter.dim() == 2 else round_trip_experts(self.scheme, parameter)

    def close(self) -> None:
        super().close()
        self._last_quantised = None

    def quantise_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Quantise a weight, and return the bytes `[start, stop)` of its codes and scales, uint8.

        A weight is a matrix, or `[experts, ., .]` with a matrix for each expert, of which only those in the bytes are read.
        """
        assert self.scheme is not None
        shape = self.quantised_shapes[name]
        if len(shape) != 3:
            return self.quantise_matrix(name)[start:stop]
        expert_elements = shape[1] * shape[2]

        def read_expert(expert: int) -> Tensor:
            values = self.read_slice(name, expert * expert_elements, (expert + 1) * expert_elements)
            return values.view(shape[1:])

        return quantise_experts_slice(self.scheme, shape, start, stop, read_expert)

    def quantise_matrix(self, name: str) -> Tensor:
        """Quantise a matrix: the bytes of its codes and scales, `[num_bytes]` uint8. The last one is kept for the next call."""
        assert self.scheme is not None
        if self._last_quantised is None or self._last_quantised[0] != name:
            self._last_quantised = name, self.scheme.quantise(super().full_tensor(name))
        return self._last_quantised[1]

    def use_packed_cache(self, adapters: list[str], host_rank: HostRank) -> None:
        """Let the ranks of this host quantise each matrix once between them, into a cache that later runs read too.

        `adapters`: directories of those that are merged into the base, since other adapters give other bytes.
        """
        assert self.scheme is not None
        directories = [self.directory, *(Path(adapter).expanduser() for adapter in adapters)]
        self.packed_cache = cached_weights(
            directories, self.scheme, self.quantised_shapes, self.quantise_matrix, host_rank
        )

    def read_quantised(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes `[start, stop)` of a quantised weight, uint8: from this host's cache if it is there, else quantised now.

        The cache has matrices only. Experts are quantised anew by the ranks that hold them.
        """
        if self.packed_cache is None or name not in self.packed_cache.num_bytes_by_name:
            return self.quantise_slice(name, start, stop)
        return self.packed_cache.read_slice(name, start, stop)


class _WithoutAdapters:
    """A checkpoint without the adapters that are merged into it, as a base."""

    def __init__(self, checkpoint: BaseWeights) -> None:
        self.checkpoint = checkpoint

    def full_tensor(self, name: str) -> Tensor:
        shape = self.checkpoint.shape(name)
        return PretrainedWeights.read_slice(self.checkpoint, name, 0, math.prod(shape)).view(shape)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        return torch.stack([self.full_tensor(name)[i].float() for i in indices])


class StartingWeights:
    """`strategies.base.ParameterSource` of the model that a run begins with, as a plain model without adapters.

    These are the base's values with the adapter of `tuning.from` merged in. A base that is stored quantised counts as rounded.
    """

    def __init__(self, source: WeightSource, merged_adapters: MergedAdapters | None) -> None:
        """`source`: where the tuned model's values come from; `merged_adapters`: the adapter that it begins with, or None."""
        self.source = source
        self.merged_adapters = merged_adapters
        self.adapted = set[str]() if merged_adapters is None else merged_adapters.changed_base_names()

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU.

        An adapter with which training begins is merged in: a frozen copy of the model, which reads here, has none.
        """
        checkpoint = self.source.checkpoint
        if self.merged_adapters is not None and name in self.adapted:
            return self.merged_adapters.full_tensor(name, checkpoint).reshape(-1)[start:stop]
        if name in checkpoint.quantised_shapes:  # the tuned model has its bytes, and this one its values
            return checkpoint.full_tensor(name).reshape(-1)[start:stop]
        return self.source.read_slice(name, shape, start, stop)

    def close(self) -> None:
        """Close the base's files."""
        self.source.checkpoint.close()


class WeightSource:
    """Gives an engine the initial value of each parameter: from a checkpoint, from the tuning method, or drawn from a seed."""

    def __init__(
        self,
        checkpoint: BaseWeights,
        tuning: Tuning,
        *,
        seed: int,
        init_std: float,
        new_token_ids: list[int] | None = None,
        vocabulary_parameter_names: frozenset[str] = frozenset(),
        computed_values: dict[str, Tensor] | None = None,
    ) -> None:
        """`checkpoint`: the base's weights. `tuning`: the method, which gives the values of parameters that it adds.

        `seed`: from which values are drawn that neither has. `init_std`: standard deviation of drawn matrices. `new_token_ids`:
        of added tokens, whose embeddings start at the mean of the others. `vocabulary_parameter_names`: base names of the
        parameters with a row for each token. `computed_values`: values of base parameters that are computed and need not be in
        the checkpoint, by base name.
        """
        self.checkpoint = checkpoint
        self.tuning = tuning
        self.seed = seed
        self.init_std = init_std
        self.new_token_ids = new_token_ids or []
        self.vocabulary_parameter_names = vocabulary_parameter_names
        """Base names of the parameters that have a row for each token."""
        self.computed_values = computed_values or {}
        """Values of base parameters that are computed and need not be in the checkpoint."""
        self.zero_row_by_name: dict[str, int] = {}
        """Row that is zero whatever the checkpoint has there, by base name."""
        self.initialised: list[str] = []
        """Base parameters that the checkpoint does not have and that were drawn instead."""
        self.frozen_sources: dict[str, WeightSource | StartingWeights] = {}
        """Where the parameters of frozen models beside the tuned one come from, by the beginning of their names."""
        self._mean_rows: dict[str, Tensor] = {}

    def check_names_and_shapes(
        self, shape_by_name: dict[str, tuple[int, ...]], *, head_prefixes: tuple[str, ...]
    ) -> None:
        """Compare the model's parameters with the checkpoint by name and shape, before anything is allocated.

        Sets `initialised` to new heads.
        - the tuning method has added the parameter: nothing to compare.
        - the checkpoint lacks it: right if its value is given by the run (`computed_values`) or by the tuning method, or if it
          is of a new head (a name under `head_prefixes`), which is then drawn.
        - else its shape must be the checkpoint's, unless it grows with added tokens.

        `shape_by_name`: of the model's parameters; a weight that is stored quantised has another shape there than in the
        checkpoint. Raises ConfigError with the first five differences.
        """
        problems = []
        for name, model_shape in shape_by_name.items():
            if self.tuning.is_added_parameter(name):
                continue
            base_name = self.tuning.base_name(name)
            if self.checkpoint.name_in_checkpoint(base_name) is not None:
                problems += self._shape_problem(base_name, model_shape)
                continue
            if base_name in self.computed_values or self.tuning.rewrites(name):
                continue
            if not base_name.startswith(head_prefixes):
                problems.append(f"{base_name} is not in the checkpoint")
            elif base_name not in self.initialised:
                self.initialised.append(base_name)
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ConfigError(
                f"model.path={self.checkpoint.directory}: the weights do not fit the architecture: "
                f"{'; '.join(problems[:5])}{more}"
            )

    def _shape_problem(self, base_name: str, model_shape: tuple[int, ...]) -> list[str]:
        """Compare the shape of a stored parameter with the architecture's; returns one line of text if they differ, else [].

        `model_shape`: in the model; for a quantised weight that of its bytes, so its shape before quantisation counts.
        """
        if self.new_token_ids and base_name in self.vocabulary_parameter_names:  # rows are added to the stored ones
            return []
        shape = self.checkpoint.quantised_shapes.get(base_name, model_shape)
        stored_shape = self.checkpoint.shape(base_name)
        if stored_shape == shape:
            return []
        return [f"{base_name} has shape {stored_shape}, the architecture wants {shape}"]

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of the flattened full parameter `name`, on the CPU, where a rank holds this range.

        The first case that holds:
        - of a frozen model beside the tuned one (a teacher, a reward model): from its own source.
        - the tuning method owns or rewrites it: the method's initial value.
        - quantised: the quantised bytes.
        - not in the checkpoint: a fixed value, or drawn from the seed.
        - the vocabulary grows: the stored rows, then new ones.
        - else: as stored.

        In the last two a row that is always zero (`zero_row_by_name`; as a rule the padding token's) is set to zero.
        """
        if name.startswith(FROZEN_MODEL_PREFIXES):
            for prefix, frozen_source in self.frozen_sources.items():
                if name.startswith(prefix):
                    return frozen_source.read_slice(name.removeprefix(prefix), shape, start, stop)
        if self.tuning.is_added_parameter(name) or self.tuning.rewrites(name):
            return self.tuning.initial_value(name, tuple(shape), self, self.seed).reshape(-1)[start:stop]
        base_name = self.tuning.base_name(name)
        stored_name = self.checkpoint.name_in_checkpoint(base_name)
        if base_name in self.checkpoint.quantised_shapes:
            return self.checkpoint.read_quantised(base_name, start, stop)
        if stored_name is None:
            if base_name in self.computed_values:
                initial = self.computed_values[base_name]
            else:
                initial = self._draw(base_name, tuple(shape))
            return initial.reshape(-1)[start:stop]
        if self.new_token_ids and base_name in self.vocabulary_parameter_names:
            values = self._with_new_rows(stored_name, tuple(shape), start, stop)
        else:
            values = self.checkpoint.read_slice(stored_name, start, stop)
        if base_name in self.zero_row_by_name:
            row_size = math.prod(shape[1:])
            row_start = self.zero_row_by_name[base_name] * row_size  # in the flattened parameter
            # The slice may be a view of a file. Of the row, only what lies in [start, stop) is set: perhaps nothing.
            values = values.clone()
            values[max(0, row_start - start) : max(0, row_start + row_size - start)] = 0
        return values

    def close(self) -> None:
        """Free what was read: the model has its values."""
        self.checkpoint.close()
        for frozen in self.frozen_sources.values():
            frozen.close()

    def full_tensor(self, name: str) -> Tensor:
        """A full base parameter, for methods that read base weights."""
        return self.checkpoint.full_tensor(name)

    def rows(self, name: str, indices: list[int]) -> Tensor:
        """Rows of a base matrix, for methods that start at them."""
        return self.checkpoint.rows(name, indices)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw a parameter that the checkpoint lacks: biases 0, norms 1, matrices normal with `init_std`; alike on every rank."""
        if name.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) < 2:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, name))
        return torch.randn(shape, generator=generator) * self.init_std

    def _with_new_rows(self, stored: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a flattened vocabulary matrix; the row of an added token is the mean of the known rows.

        `stored`: its name in the checkpoint. `shape`: in the model, with the new rows.
        """
        row_size = math.prod(shape[1:])
        known_rows = self.new_token_ids[0]
        if stored not in self._mean_rows:
            known = self.checkpoint.read_slice(stored, 0, known_rows * row_size).view(known_rows, row_size)
            self._mean_rows[stored] = known.float().mean(dim=0)
        # Elements [first_new, end_new) are new rows. Behind them lie rows that no token uses.
        first_new = known_rows * row_size
        end_new = (self.new_token_ids[-1] + 1) * row_size
        pieces = []
        if start < first_new:
            pieces.append(self.checkpoint.read_slice(stored, start, min(stop, first_new)).float())
        if stop > first_new and start < end_new:
            columns = torch.arange(max(start, first_new), min(stop, end_new)) % row_size
            pieces.append(self._mean_rows[stored][columns])
        if stop > end_new:
            pieces.append(self.checkpoint.read_slice(stored, max(start, end_new), stop).float())
        return torch.cat(pieces)
