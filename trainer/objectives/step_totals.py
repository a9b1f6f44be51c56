"""What a loss needs to know of the whole step before its first backward pass, and cannot be a sum of what comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from strategies.runtime import dist_sum

if TYPE_CHECKING:
    from strategies.base import Engine


def look_ahead(
    engine: Engine,
    batches: Iterable[dict[str, Any]],
    count: float,
    *,
    averaged: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Each term of `batches` (this rank's micro-batches), summed over all ranks and divided by `count`: 0-d float32.

    Without gradients and without dropout; `averaged` as in `Engine.inference`. All ranks must call, with equally many
    micro-batches; `check_stop` is called after each.
    """
    sums: dict[str, torch.Tensor] = {}
    with engine.inference(averaged=averaged) as module:
        for batch in batches:
            for term, value in module(batch).items():
                sums[term] = sums[term] + value.double() if term in sums else value.double()
            check_stop()
    if not sums:
        return {}
    names = sorted(sums)
    table = torch.stack([sums[name] for name in names])
    if engine.dp_size > 1:
        table = dist_sum(table)
    return {name: (total / (count or 1)).float() for name, total in zip(names, table, strict=True)}
