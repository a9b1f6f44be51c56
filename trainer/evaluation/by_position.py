"""Held-out loss by the position of a token in its document: whether the model makes use of what lies far back.

Positions are told apart by powers of two: tokens before position 1,024, from there to 2,048, and so on. The loss of a model
that uses its whole context falls from one group to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST_BOUND = 1024
"""Where the second group begins, in tokens."""
LONG_DOCUMENT = 8192
"""Tokens above which a document is long enough that the loss is told by position unasked."""
GROUP = "position/"
"""What names of groups begin with, among the terms of an objective."""
METRIC = "loss_by_position"


def position_bounds(longest: int, *, asked: bool | None) -> list[int]:
    """The token positions at which groups end, such as 1024, 2048, 4096: the held-out loss is reported for each group.

    For documents of at most `longest` tokens; empty if the loss is not reported by position.

    `asked`: `evaluation.loss_by_position`; None: only of long documents.
    """
    if asked is False or (asked is None and longest <= LONG_DOCUMENT):
        return []
    bounds = [FIRST_BOUND]
    while bounds[-1] < longest:
        bounds.append(2 * bounds[-1])
    return bounds


def metric_names(bounds: list[int]) -> list[str]:
    """The metrics of the groups that end at `bounds`."""
    return [f"{METRIC}/{bound}" for bound in bounds]


def with_position_groups(
    batches: Callable[[], Iterable[dict[str, Any]]], bounds: list[int]
) -> Iterator[dict[str, Any]]:
    """The micro-batches that `batches` makes, each with the group of positions that every target belongs to.

    `row_source` (int64, one for each target) is an index into `source_names`, as in training on several sources. Objectives that
    have no loss of single tokens do not look at them.
    """
    names = [f"{GROUP}{bound}" for bound in bounds]
    for batch in batches():
        # The token that a row predicts stands one position further on. Positions restart in each document, and a slice of a
        # row has those of its own tokens.
        positions = batch["position_ids"].reshape(-1)[batch["target_rows"]] + 1
        borders = torch.tensor(bounds[:-1], dtype=positions.dtype, device=positions.device)
        yield {**batch, "row_source": torch.bucketize(positions, borders, right=True), "source_names": names}


def row_counts(batch: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum of target weights in each group of positions, as further terms of the batch: `count/GROUP`.

    `terms`: what the objective returned; if it has no loss by group, the result is empty. A row is a position with a target.
    """
    names = [name for name in batch.get("source_names", ()) if name.startswith(GROUP)]
    if not names or f"loss/{names[0]}" not in terms:
        return {}
    groups = batch["row_source"]
    weights = batch.get("target_weights")
    if weights is None:
        weights = torch.ones_like(groups, dtype=torch.float64)
    counts = weights.new_zeros(len(names), dtype=torch.float64).index_add(0, groups, weights.double())
    return {f"count/{name}": counts[row] for row, name in enumerate(names)}


def take_position_losses(totals: dict[str, Tensor]) -> dict[str, float]:
    """Remove the terms by position from `totals`, the sums of all ranks; returns the mean losses of groups that have tokens.

    Two terms of a group, its `count/...` and `loss/...`, become one metric, such as {"loss_by_position/1024": 2.1}.
    """
    names = [term.removeprefix("count/") for term in totals if term.startswith(f"count/{GROUP}")]
    losses = {}
    for name in names:
        count = totals.pop(f"count/{name}").item()
        loss = totals.pop(f"loss/{name}").item()
        if count:
            losses[f"{METRIC}/{name.removeprefix(GROUP)}"] = loss / count
    return losses
