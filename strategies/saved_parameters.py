"""Reads the trained parameters out of a checkpoint one at a time: without an engine, and without the optimizer's moments.

An export needs `<name>/weight` of each parameter, or its average, and nothing else of the state. The index says where each
element lies, so a process reads the bytes of the parameters that it asks for. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from strategies.atomic_io import error_summary
from strategies.base import Progress
from strategies.ema import EMA_KEY
from strategies.errors import ConfigError, StorageError
from strategies.state import read_index, read_state_header
from strategies.tensor_files import LocalElements, MalformedFile, num_elements_of_parts, read_tensors

WEIGHT_KEY = "weight"
SCHEDULE_FREE_KEY = "z"
"""Key of the sequence z that schedule-free AdamW keeps beside each weight (Defazio et al. 2024, arXiv:2405.15682)."""


class SavedParameters(Mapping[str, Tensor]):
    """The parameters of one checkpoint in full, float32 on the CPU, by plain name: averaged if the run averages its weights.

    Nothing is kept: each access reads its parameter from the files. Errors of an access: StorageError.
    """

    def __init__(
        self, checkpoint: Path, shapes: Mapping[str, torch.Size], *, schedule_free_beta: float | None = None
    ) -> None:
        """Open a checkpoint to read its trained parameters for an export; reads the index of its tensors, but no tensor.

        `shapes`: of every parameter that the run trains. `schedule_free_beta`: beta 1 of a schedule-free optimizer; None for
        others. Raises StorageError if the index cannot be read, ConfigError if the checkpoint is of a run that trains other
        parameters.
        """
        self.checkpoint = checkpoint
        self._shapes = dict(shapes)
        self._schedule_free_beta = schedule_free_beta
        # Where each saved tensor lies, by its name on disk.
        self._index = read_index(checkpoint, wait_until_visible=True)
        for name, shape in self._shapes.items():
            parts = self._index.get(f"{name}/{WEIGHT_KEY}")
            if parts is None or num_elements_of_parts(parts) != shape.numel():
                found = "does not hold it" if parts is None else f"has {num_elements_of_parts(parts)} elements of it"
                raise ConfigError(
                    f"{checkpoint}: the run trains {name}, {shape.numel()} elements, and this checkpoint {found}; it was written "
                    "by a run with another model or tuning method"
                )

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes  # `Mapping` would read the parameter to find out

    def __getitem__(self, name: str) -> Tensor:
        """The value of a parameter that an export writes: its average, if the checkpoint has one, else its weight.

        Read from the files at each access. Raises StorageError if that fails.
        """
        if name not in self._shapes:
            raise KeyError(name)
        if f"{name}/{EMA_KEY}" in self._index:
            return self.saved_tensor(name, EMA_KEY)
        weight = self.saved_tensor(name, WEIGHT_KEY)
        if self._schedule_free_beta is None or f"{name}/{SCHEDULE_FREE_KEY}" not in self._index:
            return weight
        # Training continues at y = (1 - beta) z + beta x, which is saved. The model is x, as the optimizer's `eval` computes it.
        return weight.lerp_(self.saved_tensor(name, SCHEDULE_FREE_KEY), 1 - 1 / self._schedule_free_beta)

    def saved_tensor(self, name: str, key: str) -> Tensor:
        """A tensor that the checkpoint has of the parameter `name`, in the parameter's shape, float32.

        `key`: `weight`, `ema`, or the optimizer's name of a moment, such as `exp_avg`. Raises StorageError if it cannot be read.
        """
        shape = self._shapes[name]
        try:
            values = self._read_full_tensor(f"{name}/{key}", shape.numel())
        except OSError as error:
            raise StorageError(f"{self.checkpoint}: {name} cannot be read ({error_summary(error)})") from error
        except (MalformedFile, KeyError) as error:
            raise StorageError(f"{self.checkpoint}: {name}/{key} is not in it ({error})") from error
        return values.view(shape)

    def _read_full_tensor(self, name_on_disk: str, numel: int) -> Tensor:
        """A saved tensor in full, 1-d float32. Raises OSError, MalformedFile, or KeyError if the index does not have it."""
        # `read_tensors` reads ranges that a rank holds; here the range is the full tensor, whose size a meta tensor gives.
        full_range = LocalElements(name_on_disk, full_numel=numel, start=0, values=torch.empty(numel, device="meta"))
        (values,) = read_tensors(self.checkpoint, self._index, [full_range])
        return values

    @property
    def title(self) -> str:
        """The name of the checkpoint, for messages."""
        return self.checkpoint.name

    def progress(self) -> Progress:
        """How far the run was. Raises StorageError if that fails."""
        return read_state_header(self.checkpoint, wait_until_visible=True).progress


class MeanOfCheckpoints(Mapping[str, Tensor]):
    """The mean of what several checkpoints of a run would export, parameter by parameter, float32."""

    def __init__(self, checkpoints: Sequence[SavedParameters]) -> None:
        """`checkpoints`: the oldest first."""
        self.checkpoints = list(checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoints[-1])

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoints[-1]

    def __getitem__(self, name: str) -> Tensor:
        total = self.checkpoints[0][name].double()  # in float64, against rounding
        for checkpoint in self.checkpoints[1:]:
            total.add_(checkpoint[name].double())
        return total.div_(len(self.checkpoints)).float()

    def saved_tensor(self, name: str, key: str) -> Tensor:
        """The newest checkpoint's tensor of a parameter under `key`. Not a mean: it may be a choice, such as AdaLoRA's ranks."""
        return self.checkpoints[-1].saved_tensor(name, key)

    @property
    def title(self) -> str:
        """What these parameters are, for messages."""
        return f"the mean of {', '.join(checkpoint.title for checkpoint in self.checkpoints)}"

    def progress(self) -> Progress:
        """How far the newest checkpoint was."""
        return self.checkpoints[-1].progress()
