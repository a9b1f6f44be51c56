"""The part of a layer's experts that a rank holds, if they are dealt over ranks, and how it lies in the whole parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from strategies.expert_counts import ExpertCounts
from strategies.parameters import BESIDE, PREFIX


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """The part of a layer's experts that this rank's place in its expert group holds."""

    ranks: int
    """Ranks over which the experts of a layer are dealt."""
    place: int
    """The index of this rank among them."""
    group: Any
    counts: ExpertCounts
    """How many rows the ranks of the group send each other."""

    def whole_shape(self, own_shape: torch.Size) -> torch.Size:
        """The shape of a parameter of all experts, of which this place holds `own_shape`."""
        return torch.Size((own_shape[0] * self.ranks, *own_shape[1:]))

    def first_element(self, own_shape: torch.Size) -> int:
        """Index of this place's first element in the flattened parameter of all experts."""
        return self.place * own_shape.numel()

    @torch.no_grad()
    def gather(self, own_part: Tensor) -> Tensor:
        """The parameter of all experts, out of each place's `own_part`. All ranks of the group must call."""
        whole = own_part.new_empty(self.whole_shape(own_part.shape))
        dist.all_gather(list(whole.chunk(self.ranks)), own_part.contiguous(), group=self.group)
        return whole


def share_of(step_module: nn.Module, name: str) -> ExpertShare | None:
    """The share that this rank has of the parameter with the plain name `name`; None if it is not dealt."""
    owner_name = name.rpartition(".")[0]
    if not name.startswith(BESIDE):
        owner_name = (PREFIX + owner_name).removesuffix(".")
    share: ExpertShare | None = getattr(step_module.get_submodule(owner_name), "expert_share", None)
    return share
