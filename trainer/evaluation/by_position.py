"""Held-out loss by the position of a token in its document: whether the model makes use of what lies far back.

Positions are told apart by powers of two: tokens before position 1,024, from there to 2,048, and so on. The loss of a model
that uses its whole context falls from one group to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FIRST_GROUP_END = 1024
"""The token position at which the second group begins."""
LONG_DOCUMENT_TOKENS = 8192
"""If a document has more tokens than this, the loss is reported by position unless a setting says otherwise."""
POSITION_GROUP_PREFIX = "position/"
"""The names of position groups begin with it, among the terms of an objective: `position/1024`."""
POSITION_METRIC_PREFIX = "loss_by_position/"
GROUP_NAMES_KEY = "source_names"
GROUP_OF_TARGET_KEY = "row_source"
"""Keys of a micro-batch by which objectives sum the loss by data source, or here by position group."""


def position_group_bounds(longest_document: int, *, loss_by_position: bool | None) -> list[int]:
    """The token positions at which position groups end, for each of which the held-out loss is reported.

    A longest document of 3,000 tokens -> [1024, 2048, 4096]. Empty if the loss is not reported by position.

    `longest_document`: tokens of the longest evaluated sequence. `loss_by_position`: the setting of that name; None: report by
    position only if that document is long.
    """
    is_wanted = longest_document > LONG_DOCUMENT_TOKENS if loss_by_position is None else loss_by_position
    if not is_wanted:
        return []
    bounds = [FIRST_GROUP_END]
    while bounds[-1] < longest_document:
        bounds.append(2 * bounds[-1])
    return bounds


def position_metric_names(bounds: list[int]) -> list[str]:
    """The names of the metrics of the position groups that end at `bounds`: [1024] -> ["loss_by_position/1024"]."""
    return [f"{POSITION_METRIC_PREFIX}{bound}" for bound in bounds]


def with_position_groups(
    batches: Callable[[], Iterable[dict[str, Any]]], bounds: list[int]
) -> Iterator[dict[str, Any]]:
    """Yield micro-batches whose target tokens have position groups, by which the objective then sums the loss too.

    Objectives can sum the loss by data source; here their two keys of a batch name position groups instead:

    - `GROUP_NAMES_KEY`: the names of the groups, such as ["position/1024", "position/2048"].
    - `GROUP_OF_TARGET_KEY`: int64, for each target the index of its group among them.

    Objectives without a loss of single tokens ignore both. `batches`: called once for each evaluation, yields the
    micro-batches. `bounds`: where the groups end.
    """
    group_names = [f"{POSITION_GROUP_PREFIX}{bound}" for bound in bounds]
    for batch in batches():
        # A row of hidden states predicts the token one position further on. Positions restart in each document. If ranks share
        # a row of documents, `position_ids` are those of this rank's slice.
        target_positions = batch["position_ids"].reshape(-1)[batch["target_rows"]] + 1
        # The last group takes all positions from its beginning on.
        inner_bounds = torch.tensor(bounds[:-1], dtype=target_positions.dtype, device=target_positions.device)
        group_of_target = torch.bucketize(target_positions, inner_bounds, right=True)
        yield {**batch, GROUP_OF_TARGET_KEY: group_of_target, GROUP_NAMES_KEY: group_names}


def position_group_counts(batch: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denominators of the losses by position: the target weights of each group, {"count/position/1024": scalar, ...}.

    `batch`: of `with_position_groups`. `terms`: what the objective returned for it. Empty if the batch has no position groups,
    or if the objective computes no loss of single tokens, and so has none by group among its terms. The scalars are float64.
    """
    group_names = [name for name in batch.get(GROUP_NAMES_KEY, ()) if name.startswith(POSITION_GROUP_PREFIX)]
    if not group_names or f"loss/{group_names[0]}" not in terms:
        return {}
    group_of_target = batch[GROUP_OF_TARGET_KEY]
    target_weights = batch.get("target_weights")
    if target_weights is None:  # every target counts once
        target_weights = torch.ones_like(group_of_target, dtype=torch.float64)
    counts = target_weights.new_zeros(len(group_names), dtype=torch.float64)
    counts = counts.index_add(0, group_of_target, target_weights.double())
    return {f"count/{name}": counts[group] for group, name in enumerate(group_names)}


def pop_position_losses(totals: dict[str, Tensor]) -> dict[str, float]:
    """Turn the summed losses of position groups into metrics: removes them from `totals`, and returns the mean of each group.

    `totals`: terms of the objective, summed over all ranks. Two terms of a group become one metric: {"count/position/1024":
    10.0, "loss/position/1024": 21.0} -> {"loss_by_position/1024": 2.1}. A group without tokens has none.
    """
    group_names = [term.removeprefix("count/") for term in totals if term.startswith(f"count/{POSITION_GROUP_PREFIX}")]
    mean_losses = {}
    for name in group_names:
        count = totals.pop(f"count/{name}").item()
        summed_loss = totals.pop(f"loss/{name}").item()
        if count:
            mean_losses[POSITION_METRIC_PREFIX + name.removeprefix(POSITION_GROUP_PREFIX)] = summed_loss / count
    return mean_losses
