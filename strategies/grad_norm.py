"""The squared norm of the gradients that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies.compat.optimizers import norm_of_each
from strategies.runtime import device_kind

_PIECE_NUM_ELEMENTS = 2**14


def squared_norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum the squares of all elements of the gradients that this rank holds (at least one tensor), for the norm over all ranks.

    Returns a 0-d float32 tensor on their device.
    """
    # On CPUs torch's norm adds up element by element, and is 3e-4 off at eight million elements. Norms of short pieces are exact
    # enough, and take an eighth of the time of squares summed pairwise.
    tensors = [grad.detach().float() for grad in grads]
    if device_kind(tensors[0].device) != "cpu":
        return torch.stack(norm_of_each(tensors)).square().sum()
    pieces: list[Tensor] = []
    for tensor in tensors:
        pieces += tensor.reshape(-1).split(_PIECE_NUM_ELEMENTS)
    return torch.stack(norm_of_each(pieces)).square().sum()
