"""Replaces the real tensors that a model and its batches still hold by fake ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.compat.modules import replace_buffers
from trainer.data.batches.collate import map_tensors
from trainer.step import BuiltModel


def replace_tensors_by_fakes(
    built: BuiltModel, batches_by_size: list[list[dict[str, Any]]]
) -> list[list[dict[str, Any]]]:
    """Replace the real tensors that a simulated step would read by fake ones, since the two cannot be mixed in an operation.

    `batches_by_size`: the micro-batches of one or more steps, each a list; they come back in the same order, with fake tensors.
    The model's buffers are replaced in place. Its parameters are left: they are on meta, and the engine makes its own of them.
    Must be called within `fake_tensors`.
    """
    # By the id of the real tensor, which is kept too: its id must not go to another one.
    fake_by_id: dict[int, tuple[Tensor, Tensor]] = {}

    def fake_of(tensor: Tensor) -> Tensor:
        """The fake tensor in place of a real one: the same for the same."""
        _, fake = fake_by_id.setdefault(id(tensor), (tensor, torch.empty_like(tensor)))
        return fake

    replace_buffers(built.step_module, fake_of)
    fake_batches = []
    for batches in batches_by_size:
        fake_batches.append([map_tensors(batch, fake_of) for batch in batches])
    return fake_batches
