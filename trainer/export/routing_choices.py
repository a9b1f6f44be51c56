"""Records the routing of one forward pass (experts and keys chosen for each token), and repeats it in another.

Rounding to few bits moves tokens whose experts are nearly tied, and another expert computes something else. So an
export in such a type is also compared with every token routed as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, torch.Tensor.topk)


class RoutingRecorder(TorchFunctionMode):
    """Records the indices that every `topk` of a forward pass chooses, in order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func in TOPK:
            self.recorded.append(output.indices.detach().cpu())
        return output


class RoutingReplay(TorchFunctionMode):
    """Makes every `topk` of the same model return the recorded indices, with the scores of its own pass."""

    def __init__(self, choices: RoutingRecorder) -> None:
        super().__init__()
        self.remaining = list(choices.recorded)
        self.replaced = 0
        """How many indices this pass would have chosen differently."""
        self.calls_match = True
        """Whether the calls had the same order and shapes as the recorded ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; of a `topk`, return the recorded indices instead of its own, with the scores at these indices."""
        output = func(*args, **kwargs or {})
        if func not in TOPK:
            return output
        own_indices = output.indices
        if not self.remaining:
            self.calls_match = False
            return output
        # The recorded choice of this call, if it is one of the same shape.
        recorded = self.remaining.pop(0).to(own_indices.device)
        if recorded.numel() != own_indices.numel() or recorded.shape[-1] != own_indices.shape[-1]:
            self.calls_match = False
            return output
        # The same tokens, perhaps with and without a dimension for the sequence.
        recorded = recorded.view_as(own_indices)
        scores, dim = _scores_and_dim(*args, **kwargs or {})
        # Sorted, since the order of the chosen experts does not matter.
        differs = recorded.sort(dim).values != own_indices.sort(dim).values
        self.replaced += int(differs.sum())
        return torch.return_types.topk((scores.gather(dim, recorded), recorded))


def _scores_and_dim(scores: Tensor, k: int, dim: int = -1, **_: Any) -> tuple[Tensor, int]:
    """Two of the arguments of a call of `topk`, which may be given by position or by name."""
    return scores, dim
