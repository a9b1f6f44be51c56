"""Balances groups of documents (labels or sources): repeats some and leaves others out, so that groups have the wanted shares.

It looks at numbers alone: the plan is a function of the groups, the settings and the seed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from strategies.errors import ConfigError
from trainer.data.config import BalanceConfig, BalanceTarget

_RANDOM_STREAM_KEY = 3
"""Keeps these draws apart from those of the training order, which uses the same seed."""
MAX_LISTED_NAMES = 10
"""Most names of groups in a message."""


GroupReport = dict[str, float | str | None]
"""What balancing did to a group: its documents `before` and `after` (repeats counted), `share_before`, `share_after`,
`share_target`, documents `dropped`, the most `repeats` of one, and `limited_by`, the setting that kept it from its target."""


class ResampledDocuments(NamedTuple):
    """Which documents are used after balancing, and a report of it."""

    documents: np.ndarray
    """int64: numbers of the documents to use, in the order of the input, with repeats side by side."""
    report_by_group: dict[str, GroupReport]


def resample_groups(
    groups: list[str], group_of_document: np.ndarray, config: BalanceConfig, seed: int
) -> ResampledDocuments:
    """Repeat or leave out training documents until groups (labels or sources) have the shares of `data.balance`.

    `groups`: their names. `group_of_document`: the index of each document's group in `groups`, int64 [n], n at least 1.

    Which documents are left out or repeated once more depends on the seed and on their numbers alone. Raises ConfigError for
    settings that cannot be met; a target missed because of `cap` or `max_repeats` is stated in the report.
    """
    sizes_before = np.bincount(group_of_document, minlength=len(groups)).astype(np.int64)
    # `cap` bounds the sizes that the shares are computed from, as in Raffel et al. 2020 (arXiv:1910.10683, section 3.5.2); and
    # below, the sizes after balancing.
    capped_sizes = sizes_before if config.cap is None else np.minimum(sizes_before, config.cap)
    target_shares = _target_shares(groups, capped_sizes, config)
    sizes = _target_sizes(capped_sizes, target_shares, config)
    # The last setting that bounds a group is the one that is reported.
    limited_by: list[str | None] = [None] * len(groups)
    for setting, largest_sizes in (("cap", config.cap), ("max_repeats", sizes_before * config.max_repeats)):
        if largest_sizes is None:
            continue
        for group in np.flatnonzero(sizes > largest_sizes).tolist():
            limited_by[group] = setting
        sizes = np.minimum(sizes, largest_sizes)
    num_uses = _num_uses_of_documents(group_of_document, sizes_before, sizes, seed)
    used_documents = np.repeat(np.arange(len(group_of_document)), num_uses)
    report_by_group = _report_by_group(groups, group_of_document, num_uses, target_shares, limited_by)
    return ResampledDocuments(used_documents, report_by_group)


def _target_shares(groups: list[str], sizes: np.ndarray, config: BalanceConfig) -> np.ndarray:
    """The share of the documents that each group shall have, float64 [groups], sum 1; 0 for a group without documents.

    `sizes`: how many documents each group has. `config`: `data.balance`, whose `target` says how shares are chosen.
    """
    if config.target is BalanceTarget.shares:
        return _shares_of_sum(_requested_shares(groups, sizes, config.shares))
    if config.target is BalanceTarget.uniform:
        return _shares_of_sum((sizes > 0).astype(np.float64))
    if config.target is BalanceTarget.temperature:
        return _shares_of_sum(sizes ** (1.0 / config.temperature))
    return _shares_of_sum(sizes)  # natural: the shares that the groups have


def _requested_shares(groups: list[str], sizes: np.ndarray, shares: dict[str, float]) -> np.ndarray:
    """The shares that the user set (`data.balance.shares`), in the order of `groups`; `sizes`: documents of each group.

    Raises ConfigError with everything that is wrong: a share for a group without documents, a group without a share, all 0.
    """
    problems = []
    for name, share in shares.items():
        if share > 0 and (name not in groups or not sizes[groups.index(name)]):
            close_names = difflib.get_close_matches(name, groups, 1)
            if close_names and close_names[0] != name:
                hint = f"did you mean {close_names[0]}?"
            else:
                hint = f"groups found: {_join_names(groups)}"
            problems.append(f"data.balance.shares.{name}={share:g}: no document is in that group; {hint}")
    unnamed = [name for name, size in zip(groups, sizes, strict=True) if size and name not in shares]
    if unnamed:
        problems.append(
            f"data.balance.shares: no share for {_join_names(unnamed)}; name every group, 0 leaves a group out"
        )
    if not problems and not any(shares.values()):
        problems.append("data.balance.shares: every share is 0, so nothing is left; give a group more than 0")
    if problems:
        raise ConfigError(problems)
    return np.array([shares.get(name, 0.0) for name in groups], dtype=np.float64)


def _join_names(names: Sequence[str]) -> str:
    """Names as a list for a message: the first ones, and how many more there are."""
    listed = ", ".join(names[:MAX_LISTED_NAMES])
    if len(names) > MAX_LISTED_NAMES:
        listed += f" and {len(names) - MAX_LISTED_NAMES} more"
    return listed


def _target_sizes(sizes: np.ndarray, target_shares: np.ndarray, config: BalanceConfig) -> np.ndarray:
    """Decide how many documents each group (label or source) should have, before `cap` and `max_repeats` bound that.

    `sizes` (int64 [groups]): documents that it has. If repeats are allowed, the largest group relative to its share stays whole,
    and the others grow to match it: sizes [10, 100] with equal shares become [100, 100]. With `max_repeats=1` the smallest group
    relative to its share stays whole, and the others shrink: [10, 10]. A group with a share above 0 keeps at least one document.
    `target_shares` (float64 [groups], sum 1): the shares that they shall have.
    """
    if config.target is BalanceTarget.natural:  # the target shares are those of `sizes`
        return sizes
    only_shrinks = config.max_repeats == 1
    has_share = target_shares > 0
    # By group, the total at which it would keep all its documents. The smallest counts if groups only shrink, else the largest.
    totals = sizes[has_share] / target_shares[has_share]
    total = totals.min() if only_shrinks else totals.max()
    # A tiny share would ask for more documents than a float counts exactly.
    target_sizes = np.rint(np.minimum(target_shares * total, 2.0**53)).astype(np.int64)
    # Rounding must not take from a group that is only to grow, nor add to one that is only to shrink.
    target_sizes = np.minimum(target_sizes, sizes) if only_shrinks else np.maximum(target_sizes, sizes)
    return np.where(has_share, np.maximum(target_sizes, 1), 0)


def _num_uses_of_documents(
    group_of_document: np.ndarray, sizes_before: np.ndarray, sizes: np.ndarray, seed: int
) -> np.ndarray:
    """Decide how often each document is used, int64 [n], so that groups of `sizes_before` documents come to have `sizes`.

    `group_of_document` (int64 [n]): the index of each document's group in the two sizes. Within a group, all are used equally
    often; a random draw decides which are used once more. A group of 2 documents that is to have 5 uses one of them twice and the
    other three times.
    """
    # Raw bits, because their stream is promised never to change between versions of numpy.
    random = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_RANDOM_STREAM_KEY,)))
    draws = random.random_raw(len(group_of_document))
    # Sorted by group, and within a group by the draw.
    by_group = np.lexsort((draws, group_of_document))
    group_begins = np.cumsum(sizes_before) - sizes_before
    rank_in_group = np.empty(len(group_of_document), dtype=np.int64)
    rank_in_group[by_group] = np.arange(len(group_of_document)) - np.repeat(group_begins, sizes_before)
    # By group: how often each document is used, and how many of the lowest draws are used once more.
    num_uses, num_used_once_more = np.divmod(sizes, np.maximum(sizes_before, 1))
    return num_uses[group_of_document] + (rank_in_group < num_used_once_more[group_of_document])


def _shares_of_sum(amounts: np.ndarray) -> np.ndarray:
    """Each amount divided by the sum of all: [1, 3] -> [0.25, 0.75]."""
    return amounts / amounts.sum()


def _report_by_group(
    groups: list[str],
    group_of_document: np.ndarray,
    num_uses: np.ndarray,
    target_shares: np.ndarray,
    limited_by: list[str | None],
) -> dict[str, GroupReport]:
    """Say for the report what balancing did to each group (label or source), by its name.

    `group_of_document` (int64 [n]): indices into `groups`. `num_uses` (int64 [n]): how often each document is used.
    `target_shares`: the shares that were aimed at. `limited_by`: by group, the setting (`cap`, `max_repeats`) because of which it
    misses its target share; None if none.
    """
    sizes_before = np.bincount(group_of_document, minlength=len(groups))
    sizes_after = np.bincount(group_of_document, weights=num_uses, minlength=len(groups)).astype(np.int64)
    num_dropped = np.bincount(group_of_document[num_uses == 0], minlength=len(groups))
    most_uses = np.zeros(len(groups), dtype=np.int64)
    np.maximum.at(most_uses, group_of_document, num_uses)  # by group, the highest number among its documents
    shares_before = _shares_of_sum(sizes_before)
    shares_after = _shares_of_sum(sizes_after)
    report_by_group: dict[str, GroupReport] = {}
    for group, name in enumerate(groups):
        report_by_group[name] = {
            "before": int(sizes_before[group]),
            "after": int(sizes_after[group]),
            "share_before": float(shares_before[group]),
            "share_after": float(shares_after[group]),
            "share_target": float(target_shares[group]),
            "dropped": int(num_dropped[group]),
            "repeats": int(most_uses[group]),
            "limited_by": limited_by[group],
        }
    return report_by_group


def balance_problems(config: BalanceConfig) -> Iterator[str]:
    """Find what is wrong with `data.balance`: shares without their target, a target without shares, bad numbers."""
    if config.target is BalanceTarget.shares and not config.shares:
        yield "data.balance.target=shares: data.balance.shares is empty; name every group with its share"
    if config.target is not BalanceTarget.shares and config.shares:
        yield (
            f"data.balance.shares is set but data.balance.target={config.target}; set data.balance.target=shares to use it"
        )
    for name, share in config.shares.items():
        if not (math.isfinite(share) and share >= 0):
            yield f"data.balance.shares.{name}={share:g}: must be a finite number of at least 0"
