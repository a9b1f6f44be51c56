"""Rotary embeddings that depend on the longest document, where a rank holds a slice of the row.

LongRoPE and dynamic RoPE choose their frequencies by the largest position of the tensor that they are given. On a slice that
is the slice's largest position, so that ranks of one row could rotate by different frequencies. Within
`frequencies_of_whole_row` such a module is given one position more, the row's largest, and what it computes for that position
is cut off again.

transformers calls these modules once, before the first block. A module inside a block would be called again when the block is
recomputed, which is after it: `whole_row_problem` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.tuning.compat.transformers import block_class_names

LENGTH_DEPENDENT = re.compile(r"longrope|dynamic|suscaled", re.IGNORECASE)
"""Types of rotary embeddings (`rope_type`), or names of classes in a model's own code, that depend on the longest document."""


@contextmanager
def frequencies_of_whole_row(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Within it the rotary embeddings of `model` choose frequencies by the whole row, if `inputs` are a rank's slice of one.

    Hooks give such an embedding the row's largest position as one more, and cut off what it computes for that. `inputs`: those
    of the model, with `row_slices` (token borders of all slices, [0, 5, 16] for two) and `max_length_q` (the tokens of the
    row's longest document).
    """
    num_slices = len(inputs.get("row_slices") or ()) - 1
    # Without `row_slices` this is -1; the borders [0, T] are one slice.
    if num_slices <= 1:  # the row is whole
        yield
        return
    largest_position = int(inputs["max_length_q"]) - 1

    def append_position(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """A hook before the forward pass: adds the row's largest position to `position_ids`, by name or the second argument."""
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": _with_position(kwargs["position_ids"], largest_position)}
        hidden, position_ids, *more_args = args
        return (hidden, _with_position(position_ids, largest_position), *more_args), kwargs

    handles = []
    for module in model.modules():
        if _is_length_dependent(module):
            handles.append(module.register_forward_pre_hook(append_position, with_kwargs=True))
            handles.append(module.register_forward_hook(_without_last_position))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def whole_row_problem(model: Any) -> str | None:
    """Why `frequencies_of_whole_row` cannot serve a model, in words that can follow its name; None if it can."""
    blocks = block_class_names(model)
    for block in model.modules():
        if type(block).__name__ in blocks and any(_is_length_dependent(module) for module in block.modules()):
            return "a rotary embedding inside its blocks depends on the longest document"
    return None


def _is_length_dependent(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose frequencies depend on the largest position that it is given."""
    if not any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
        return False
    rope_type = getattr(module, "rope_type", None)
    # Models whose layers rotate in several ways have a type for each of them.
    names = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return any(LENGTH_DEPENDENT.search(str(name)) for name in (*names, type(module).__name__))


def _with_position(position_ids: Tensor, position: int) -> Tensor:
    """`position_ids [..., T]` with one position more at the end."""
    return torch.cat([position_ids, position_ids.new_full((*position_ids.shape[:-1], 1), position)], dim=-1)


def _without_last_position(_module: nn.Module, _args: Any, output: Any) -> Any:
    """The module's output without its last position: one tensor `[..., T + 1, D]`, or a tuple of them."""
    if torch.is_tensor(output):
        return output[..., :-1, :]
    return tuple(part[..., :-1, :] if torch.is_tensor(part) else part for part in output)
