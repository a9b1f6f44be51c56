"""Balance of groups (labels or sources): which documents are repeated or left out so that groups have wanted shares.

Nothing but numbers is looked at: the plan is a function of the groups, the settings and the seed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from strategies.errors import ConfigError
from trainer.data.config import BalanceConfig, BalanceTarget

_STREAM = 3  # keeps these draws apart from those of the training order, which uses the same seed


Shares = dict[str, float | str | None]
"""What balancing did to a group: its documents `before` and `after` (repeats counted), `share_before`, `share_after`,
`share_target`, documents `dropped`, the most `repeats` of one, and `limited_by`, the setting that kept it from its target."""


def resample(
    groups: list[str], group_of: np.ndarray, config: BalanceConfig, seed: int
) -> tuple[np.ndarray, dict[str, Shares]]:
    """The documents to use, int64 numbers in the order of the input with repeats side by side, and a report by group.

    `group_of` is int64 [n], numbers into `groups`, n at least 1. Which documents are left out or repeated once more depends
    on the seed and on their numbers alone. The largest group relative to its share stays whole and the others follow; where
    nothing may be repeated, the smallest. `cap` bounds the sizes that the shares are computed from, as in Raffel et al. 2020
    (arXiv:1910.10683, section 3.5.2), and the result. A group with a
    share above 0 keeps at least one document. Raises ConfigError for settings that cannot be met; a target missed because
    of `cap` or `max_repeats` is stated in the report.
    """
    before = np.bincount(group_of, minlength=len(groups)).astype(np.int64)
    capped = before if config.cap is None else np.minimum(before, config.cap)
    target = _targets(groups, capped, config)
    after = _sizes(capped, target, config)
    limited_by: list[str | None] = [None] * len(groups)
    for setting, bound in (("cap", config.cap), ("max_repeats", before * config.max_repeats)):
        if bound is None:
            continue
        for group in np.flatnonzero(after > bound).tolist():
            limited_by[group] = setting
        after = np.minimum(after, bound)
    times = _times(group_of, before, after, seed)
    return np.repeat(np.arange(len(group_of)), times), _report(groups, group_of, times, target, limited_by)


def _targets(groups: list[str], base: np.ndarray, config: BalanceConfig) -> np.ndarray:
    """Share wanted of each group, float64 [groups], sum 1; a group without documents has none."""
    if config.target is BalanceTarget.shares:
        return _share(_requested_shares(groups, base, config.shares))
    if config.target is BalanceTarget.uniform:
        return _share((base > 0).astype(np.float64))
    if config.target is BalanceTarget.temperature:
        return _share(base ** (1.0 / config.temperature))
    return _share(base)


def _requested_shares(groups: list[str], base: np.ndarray, shares: dict[str, float]) -> np.ndarray:
    """`data.balance.shares` in the order of `groups`. Raises ConfigError with all that is wrong with them."""
    problems = []
    for name, share in shares.items():
        if share > 0 and (name not in groups or not base[groups.index(name)]):
            close_names = difflib.get_close_matches(name, groups, 1)
            if close_names and close_names[0] != name:
                hint = f"did you mean {close_names[0]}?"
            else:
                hint = f"groups found: {_listed(groups)}"
            problems.append(f"data.balance.shares.{name}={share:g}: no document is in that group; {hint}")
    unnamed = [name for name, size in zip(groups, base, strict=True) if size and name not in shares]
    if unnamed:
        problems.append(f"data.balance.shares: no share for {_listed(unnamed)}; name every group, 0 leaves a group out")
    if not problems and not any(shares.values()):
        problems.append("data.balance.shares: every share is 0, so nothing is left; give a group more than 0")
    if problems:
        raise ConfigError(problems)
    return np.array([shares.get(name, 0.0) for name in groups], dtype=np.float64)


def _listed(names: Sequence[str], at_most: int = 10) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _sizes(base: np.ndarray, target: np.ndarray, config: BalanceConfig) -> np.ndarray:
    """Documents wanted of each group, int64 [groups], before `cap` and `max_repeats` bound them."""
    if config.target is BalanceTarget.natural:
        return base
    only_shrinks = config.max_repeats == 1
    has_share = target > 0
    # The total at which a group would keep all its documents: the smallest where groups only shrink, else the largest.
    totals = base[has_share] / target[has_share]
    total = totals.min() if only_shrinks else totals.max()
    sizes = np.rint(np.minimum(target * total, 2.0**53)).astype(np.int64)  # a tiny share asks for no more than that
    # Rounding must not take from a group that is only to grow, nor add to one that is only to shrink.
    sizes = np.minimum(sizes, base) if only_shrinks else np.maximum(sizes, base)
    return np.where(has_share, np.maximum(sizes, 1), 0)


def _times(group_of: np.ndarray, before: np.ndarray, after: np.ndarray, seed: int) -> np.ndarray:
    """How often each document is used, int64 [n]: within a group all equally often, but for one more by the draw."""
    # Raw bits, because their stream is promised never to change between versions of numpy.
    keys = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_STREAM,))).random_raw(len(group_of))
    # Sorted by group, and within a group by the draw.
    by_group = np.lexsort((keys, group_of))
    starts = np.cumsum(before) - before
    rank = np.empty(len(group_of), dtype=np.int64)  # place of a document in the draw of its group
    rank[by_group] = np.arange(len(group_of)) - np.repeat(starts, before)
    # Each document `passes` times, and the `extra` first of the draw once more.
    passes, extra = np.divmod(after, np.maximum(before, 1))
    return passes[group_of] + (rank < extra[group_of])


def _share(amounts: np.ndarray) -> np.ndarray:
    return amounts / amounts.sum()


def _report(
    groups: list[str], group_of: np.ndarray, times: np.ndarray, target: np.ndarray, limited_by: list[str | None]
) -> dict[str, Shares]:
    """What balancing did to each group, see `Shares`."""
    before = np.bincount(group_of, minlength=len(groups))
    after = np.bincount(group_of, weights=times, minlength=len(groups)).astype(np.int64)
    dropped = np.bincount(group_of[times == 0], minlength=len(groups))
    repeats = np.zeros(len(groups), dtype=np.int64)
    # The most uses of one document in each group.
    np.maximum.at(repeats, group_of, times)
    share_before = _share(before)
    share_after = _share(after)
    return {
        name: {
            "before": int(before[group]),
            "after": int(after[group]),
            "share_before": float(share_before[group]),
            "share_after": float(share_after[group]),
            "share_target": float(target[group]),
            "dropped": int(dropped[group]),
            "repeats": int(repeats[group]),
            "limited_by": limited_by[group],
        }
        for group, name in enumerate(groups)
    }


def problems(config: BalanceConfig) -> Iterator[str]:
    """What is wrong with the settings of the balance: shares without their target, a target without shares, bad numbers."""
    if config.target is BalanceTarget.shares and not config.shares:
        yield "data.balance.target=shares: data.balance.shares is empty; name every group with its share"
    if config.target is not BalanceTarget.shares and config.shares:
        yield (
            f"data.balance.shares is set but data.balance.target={config.target}; set data.balance.target=shares to use it"
        )
    for name, share in config.shares.items():
        if not (math.isfinite(share) and share >= 0):
            yield f"data.balance.shares.{name}={share:g}: must be a finite number of at least 0"
