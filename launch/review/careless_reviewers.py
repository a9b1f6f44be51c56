"""Flags reviewers who may have answered without reading, each with the rule that applies. Nobody is left out for it.

docs/review.md says how often the rules are right and wrong about simulated reviewers.
"""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from launch.review.answers import Reviewer
from trainer.config.review import OVERALL

MIN_REPEATS, MIN_ITEMS = 4, 20
SAME_SIDE = 0.9
WORDS_A_SECOND = 15.0
"""900 words a minute: nearly four times as fast as people read."""
RULES = {
    "repeats": f"agrees with itself in half of the repeated items or fewer, of {MIN_REPEATS} at least",
    "side": f"says the same side, or tie, in more than {SAME_SIDE:.0%} of {MIN_ITEMS} items or more",
    "time": f"reads more than {WORDS_A_SECOND:g} words a second in the middle one of its items, of {MIN_ITEMS} at least",
    "others": f"agrees with the majority of the others no better than by chance (kappa 0 or below), on {MIN_ITEMS} items or more",
}


def flags(reviewer: Reviewer, key: dict[str, Any], others: dict[str, str]) -> list[str]:
    """What stands out in one reviewer's answers, in words. `others`: the majority vote of the others by item, sides undone."""
    items = {item["id"]: item for item in key["items"]}
    said = {name: given.answers[OVERALL] for name, given in reviewer.items.items() if OVERALL in given.answers}
    found = []
    again = [(said[name], said[first]) for name in said if (first := items[name]["repeats"]) in said]
    agrees = sum(one == {"a": "b", "b": "a", "tie": "tie"}[before] for one, before in again)
    if len(again) >= MIN_REPEATS and agrees <= len(again) / 2:
        found.append(f"repeats: agrees with itself in {agrees} of {len(again)} repeated items")
    if len(said) >= MIN_ITEMS:
        (choice, most), *_ = Counter(said.values()).most_common(1)
        if most > SAME_SIDE * len(said):
            found.append(f"side: says {choice} in {most} of {len(said)} items")
    paces = [
        items[name]["words"] / max(given.seconds, 1e-3)
        for name, given in reviewer.items.items()
        if given.seconds is not None and OVERALL in given.answers
    ]
    if len(paces) >= MIN_ITEMS and median(paces) > WORDS_A_SECOND:
        found.append(f"time: {median(paces):.0f} words a second in the middle one of {len(paces)} items")
    if len(shared := [name for name in said if name in others]) >= MIN_ITEMS:
        from launch.review.agreement import kappa, winner

        mine = [winner(said[name], items[name]) for name in shared]
        if (value := kappa(mine, [others[name] for name in shared])) is not None and value <= 0:
            found.append(f"others: kappa {value:.2f} with the majority of the others on {len(shared)} items")
    return found
