"""Leakage: training documents that the held-out data (evaluation or test) contains too, found by their signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.choose.copies import NearIndex
from trainer.data.config import LeakageConfig, LeakagePolicy
from trainer.data.document import EXAMPLES

KINDS = ("exact", "normalized", "near", "prompt")
"""From the strictest: the same row; the same words; overlapping n-grams; the same prompt with another answer."""


@dataclass(slots=True)
class Leaks:
    """k training documents that leak, each once, in the order of training input."""

    train: np.ndarray
    """int64[k]: training document."""
    held_out: np.ndarray
    """int64[k]: the first held-out document it agrees with (for near ones: the likest found)."""
    kind: np.ndarray
    """uint8[k]: place in `KINDS`, the strictest that holds."""
    incomplete: int = 0
    """Training documents whose comparisons for near leaks were cut short: among them, leaks may be unseen."""

    def report(self, where_train: Callable[[int], str], where_held_out: Callable[[int], str]) -> dict[str, Any]:
        """Counts by kind on both sides, and the first places of each kind as "file:line = file:line"."""
        result: dict[str, Any] = {"train": {}, "held_out": {}, "examples": {}, "incomplete": self.incomplete}
        for place, kind in enumerate(KINDS):
            rows = np.flatnonzero(self.kind == place)
            result["train"][kind] = len(rows)
            result["held_out"][kind] = len(np.unique(self.held_out[rows]))
            pairs = [(int(self.train[row]), int(self.held_out[row])) for row in rows[:EXAMPLES]]
            result["examples"][kind] = [f"{where_train(one)} = {where_held_out(other)}" for one, other in pairs]
        return result


def find_leaks(
    train: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    *,
    config: LeakageConfig,
    threshold: float,
    ngram: int,
    train_text: Callable[[int], str],
    held_out_text: Callable[[int], str],
    alive: np.ndarray | None = None,
) -> Leaks:
    """Compare the columns of `duplicates.Signer.sign` of both parts, which must come from the same settings.

    The texts are asked for only where near leaks are looked for (Jaccard similarity of at least `threshold` over word
    n-grams), which needs the column "verdict". Training rows not `alive`, dropped before, are left out. Sources do not
    matter. Memory: some numbers a training document, and for near leaks 1.6 kB for each held-out one.
    """
    number = len(train["digest"])
    partner = np.full(number, -1, dtype=np.int64)
    kind = np.zeros(number, dtype=np.uint8)
    open_rows = np.ones(number, dtype=bool) if alive is None else alive.copy()
    incomplete = 0
    for place, name in enumerate(KINDS):
        found = np.full(number, -1, dtype=np.int64)
        rows = np.flatnonzero(open_rows)
        if name == "near":
            if config.near:
                index = NearIndex(held_out_text, threshold=threshold, ngram=ngram)
                for row, apart in enumerate(held_out["verdict"].tolist()):
                    index.add(row, held_out_text(row), apart)
                for row in rows.tolist():
                    likest = index.find(train_text(row), int(train["verdict"][row]))
                    found[row] = -1 if likest is None else likest
                incomplete = index.report["incomplete"]
        elif name != "prompt":
            column = "digest" if name == "exact" else "normal"
            found[rows] = _first_equal(train[column][rows], held_out[column])
        elif config.prompts:
            found[rows] = _first_equal(train["prompt"][rows], held_out["prompt"])
            found[train["prompt"] == 0] = -1
        hit = found >= 0
        partner[hit], kind[hit] = found[hit], place
        open_rows &= ~hit
    leaking = np.flatnonzero(partner >= 0)
    return Leaks(leaking, partner[leaking], kind[leaking], incomplete)


def settle(
    leaks: Leaks,
    config: LeakageConfig,
    number: int,
    *,
    where_train: Callable[[int], str],
    where_held_out: Callable[[int], str],
    setting: str = "data.leakage.policy",
) -> tuple[np.ndarray, dict[str, Any]]:
    """Carry out the policy for `number` training documents: (bool[number] kept, report).

    Raises DataError where the policy is `fail` and there are leaks, with the counts and the first places.
    """
    report = leaks.report(where_train, where_held_out)
    kept = np.ones(number, dtype=bool)
    # A task's fixed instruction, or one that redaction made equal, is a prompt of every document: no leak by itself.
    telling = leaks.train[leaks.kind != KINDS.index("prompt")]
    if len(telling) and config.policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        places = [place for kind in KINDS[:-1] for place in report["examples"][kind]][:EXAMPLES]
        raise DataError(
            f"{len(telling)} of {number} training documents are in the held-out data too ({counts}): "
            f"{'; '.join(places)}. Take them out of one of the two, or set {setting}=drop_train, "
            f"or {setting}=report to train nevertheless"
        )
    if config.policy is LeakagePolicy.drop_train:
        kept[telling] = False
    return kept, report


def _first_equal(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the first place of an equal one in `others`, -1 where there is none: int64."""
    if not len(others):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    place = np.minimum(np.searchsorted(ordered, values), len(others) - 1)
    return np.where(ordered[place] == values, order[place], -1)
