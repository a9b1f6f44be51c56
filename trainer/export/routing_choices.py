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


class Choices(TorchFunctionMode):
    """Notes what every `topk` of a forward pass chooses, in order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func in TOPK:
            self.noted.append(found.indices.detach().cpu())
        return found


class KeptChoices(TorchFunctionMode):
    """Has every `topk` of the same model choose what was noted; scores are its own."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.left = list(choices.noted)
        self.moved = 0
        """How many of the choices it would have made otherwise."""
        self.same = True
        """Whether the calls were those that were noted."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func not in TOPK:
            return found
        noted = self.left.pop(0).to(found.indices.device) if self.left else None
        if noted is None or noted.numel() != found.indices.numel() or noted.shape[-1] != found.indices.shape[-1]:
            self.same = False
            return found
        noted = noted.view_as(found.indices)
        scores, dim = _scores(*args, **kwargs or {})
        self.moved += int((noted.sort(dim).values != found.indices.sort(dim).values).sum())
        return torch.return_types.topk((scores.gather(dim, noted), noted))


def _scores(scores: Tensor, k: int, dim: int = -1, **_: Any) -> tuple[Tensor, int]:
    return scores, dim
