"""Replaces the real tensors that a model and its batches still hold by fake ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.compat.modules import replace_buffers
from trainer.data.batches.collate import map_tensors
from trainer.step import Built


def faked(built: Built, sizes: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Fake tensors in place of the real ones in a model's buffers and in micro-batches; within `fake_tensors`."""
    shape_of = _Shapes()
    replace_buffers(built.step_module, shape_of)
    return [[map_tensors(batch, shape_of) for batch in batches] for batches in sizes]


class _Shapes:
    """Fake tensors in place of real ones, the same for the same."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        return self._made.setdefault(id(tensor), (tensor, torch.empty_like(tensor)))[1]
