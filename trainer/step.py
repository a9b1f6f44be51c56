"""The root module that strategies shard: a model and an objective, from batch to summed terms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from strategies.base import ActivationCheckpointing, AroundUpdate
from trainer.objectives.base import Objective


class TrainStep(nn.Module):
    """`forward(batch)` returns {term: sum over the micro-batch}. Parameters are touched only in modules' own forwards."""

    def __init__(
        self, model: nn.Module, objective: Objective, block_classes: set[str], teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        """A frozen model that the objective compares with: sharded beside the other, and in no checkpoint or export."""
        self.objective = objective
        self._block_classes = block_classes
        self.checkpointing: list[ActivationCheckpointing] | None = None
        """What each block recomputes, where that was planned."""
        self.around_update: AroundUpdate | None = None
        """What the tuning method does around each optimizer step, where it does anything."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.objective.terms(self.model, batch)

    def add_block_classes(self, classes: set[str]) -> None:
        """Further classes of repeated blocks: the teacher's."""
        self._block_classes = self._block_classes | classes

    def shard_units(self) -> list[nn.Module]:
        """The architecture's repeated blocks, in forward order; outermost only."""
        found: list[nn.Module] = []
        inside: set[int] = set()
        for module in self.modules():
            if id(module) not in inside and type(module).__name__ in self._block_classes:
                found.append(module)
                inside.update(id(m) for m in module.modules())
        return found
