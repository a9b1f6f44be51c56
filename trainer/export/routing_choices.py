"""Records the routing of one forward pass (experts and keys chosen for each token), and repeats it in another.

Rounding to few bits moves tokens whose experts are nearly tied, and another expert computes something else. So an
export in such a type is also compared with every token routed as in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOPK_FUNCTIONS = (torch.topk, torch.Tensor.topk)


class RoutingRecorder(TorchFunctionMode):
    """Records the indices that every `topk` of a forward pass chooses, in order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.indices_by_call: list[Tensor] = []
        """What each call of `topk` chose, on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if func in TOPK_FUNCTIONS:
            self.indices_by_call.append(output.indices.detach().cpu())
        return output


class RoutingReplay(TorchFunctionMode):
    """Makes every `topk` of the same model return the recorded indices, with the scores of its own pass."""

    def __init__(self, recorder: RoutingRecorder) -> None:
        super().__init__()
        self.remaining_calls = list(recorder.indices_by_call)
        """Recorded indices of the calls that have not been repeated yet."""
        self.num_replaced = 0
        """How many indices this pass would have chosen differently."""
        self.calls_match = True
        """Whether the calls had the same order and shapes as the recorded ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; if it is a `topk`, by which a router chooses experts, make it choose as recorded.

        - another function: its own output;
        - a `topk` without a recorded call of the same shape: its own output, and `calls_match` becomes False;
        - any other `topk`: the recorded indices, with this pass's scores at them; `num_replaced` grows by those that differ,
          whatever their order.
        """
        output = func(*args, **kwargs or {})
        if func not in TOPK_FUNCTIONS:
            return output
        own_indices = output.indices
        if not self.remaining_calls:
            self.calls_match = False
            return output
        recorded_indices = self.remaining_calls.pop(0).to(own_indices.device)
        has_same_size = recorded_indices.numel() == own_indices.numel()
        if not has_same_size or recorded_indices.shape[-1] != own_indices.shape[-1]:
            self.calls_match = False
            return output
        # The same tokens, perhaps with and without a dimension for the sequence.
        recorded_indices = recorded_indices.view_as(own_indices)
        scores, dim = _scores_and_dim(*args, **kwargs or {})
        # Sorted, since the order of the chosen experts does not matter.
        differs = recorded_indices.sort(dim).values != own_indices.sort(dim).values
        self.num_replaced += int(differs.sum())
        return torch.return_types.topk((scores.gather(dim, recorded_indices), recorded_indices))


def _scores_and_dim(scores: Tensor, k: int, dim: int = -1, **_: Any) -> tuple[Tensor, int]:
    """Two of the arguments of a call of `topk`, which may be given by position or by name."""
    return scores, dim
