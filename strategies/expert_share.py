"""The part of a layer's experts that a rank holds under expert parallelism, and where it is in the full parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.expert_counts import RowCountSource
from strategies.parameters import FROZEN_MODEL_PREFIXES, MODEL_PREFIX


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """The experts that this rank holds of each layer: an equal, contiguous part for each rank of its expert group."""

    group_size: int
    """Ranks of the expert group, over which the experts of a layer are distributed."""
    group_rank: int
    """The index of this rank within the group."""
    group: Any
    """The process group; None on meta, where nothing is exchanged."""
    row_count_source: RowCountSource
    """How many rows the ranks of the group send each other."""

    def full_shape(self, own_shape: torch.Size) -> torch.Size:
        """The shape of the parameter of all experts, of which this rank holds a part of shape `own_shape`."""
        return torch.Size((own_shape[0] * self.group_size, *own_shape[1:]))

    def first_own_element(self, own_shape: torch.Size) -> int:
        """Index of this rank's first element in the flattened parameter of all experts."""
        return self.group_rank * own_shape.numel()

    @torch.no_grad()
    def gather(self, own_part: Tensor) -> Tensor:
        """All-gather the parameter of all experts from the `own_part` of each rank. All ranks of the group must call."""
        full = own_part.new_empty(self.full_shape(own_part.shape))
        dist.all_gather(list(full.chunk(self.group_size)), own_part.contiguous(), group=self.group)
        return full


def expert_share_of_parameter(step_module: nn.Module, name: str) -> ExpertShare | None:
    """Look up which experts' part of the parameter `name` is this rank's; None if it is no parameter of distributed experts.

    Under expert parallelism, the module that has the parameter has the share as `expert_share`. `name`: as in checkpoints, such
    as `layers.0.mlp.experts.gate_up_proj`; of a frozen model as in the step module, `teacher.layers.0.mlp.experts.gate_up_proj`.
    """
    module_name = name.rpartition(".")[0]
    if not name.startswith(FROZEN_MODEL_PREFIXES):  # names of frozen models are those within the step module
        module_name = (MODEL_PREFIX + module_name).removesuffix(".")
    share: ExpertShare | None = getattr(step_module.get_submodule(module_name), "expert_share", None)
    return share
