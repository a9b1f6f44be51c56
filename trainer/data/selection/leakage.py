"""Leakage: training documents that are in a held-out split too, or of a group that is.

Four kinds, from the strictest: the same row; the same words in the same order (normal form); nearly the same words (Jaccard
similarity of word n-grams); and the same prompt with another answer or system turn, which is told only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DataConfig, LeakagePolicy
from trainer.data.document import EXAMPLES
from trainer.data.selection.near_duplicates import NearIndex

LEAKS = ("exact", "normalized", "near", "prompt")


@dataclass(slots=True)
class LeakedDocuments:
    """k training documents that leak, each once, in the order of training input."""

    train: np.ndarray
    """int64[k]: training document."""
    held_out: np.ndarray
    """int64[k]: the first held-out document it agrees with (for near ones: the likest found)."""
    kind: np.ndarray
    """uint8[k]: place in `LEAKS`, the strictest that holds."""
    incomplete: int = 0
    """Training documents whose comparisons for near leaks were cut short: among them, leaks may be unseen."""

    def beyond_prompts(self) -> np.ndarray:
        """The documents that leak by more than their prompt: a task's instruction is the prompt of every document."""
        return self.train[self.kind != LEAKS.index("prompt")]

    def report(self, where: Callable[[int], str]) -> dict[str, Any]:
        """Counts by kind on both sides, and the first places of each kind as "file:line = file:line"."""
        result: dict[str, Any] = {"train": {}, "held_out": {}, "examples": {}, "incomplete": self.incomplete}
        for place, kind in enumerate(LEAKS):
            one, other = self.train[self.kind == place], self.held_out[self.kind == place]
            result["train"][kind], result["held_out"][kind] = len(one), len(np.unique(other))
            pairs = zip(one[:EXAMPLES].tolist(), other[:EXAMPLES].tolist(), strict=True)
            result["examples"][kind] = [f"{where(a)} = {where(b)}" for a, b in pairs]
        return result


def find_leaks(
    signatures: Mapping[str, np.ndarray],
    train: np.ndarray,
    held_out: np.ndarray,
    config: DataConfig,
    text_of: Callable[[int], str],
) -> LeakedDocuments:
    """The documents of `train` (int64[n]) that `held_out` (int64[m]) has too, by the columns of `Signer.sign`.

    Texts are asked for only where near leaks are looked for, with the threshold of the search for duplicates, which needs the
    column "verdict". Sources do not matter. Memory: some numbers a training document, and for near leaks 1.6 kB for each
    held-out one.
    """
    partner, kind, incomplete = np.full(len(train), -1, np.int64), np.zeros(len(train), np.uint8), 0
    for place, name in enumerate(LEAKS):
        rows = np.flatnonzero(partner < 0)
        if name == "near":
            if not config.leakage.near:
                continue
            index = NearIndex(text_of, config.duplicates.threshold)
            for number in held_out.tolist():
                index.add(number, text_of(number), int(signatures["verdict"][number]))
            likest = [index.find(text_of(n), int(signatures["verdict"][n])) for n in train[rows].tolist()]
            found = np.array([-1 if number is None else number for number in likest], np.int64)
            incomplete = index.report["incomplete"]
        else:
            column = signatures[{"exact": "digest", "normalized": "normal"}.get(name, name)]
            found = first_equal(column[train[rows]], column[held_out], held_out)
            if name == "prompt":
                found[column[train[rows]] == 0] = -1
        partner[rows] = found
        kind[rows[found >= 0]] = place
    leaking = np.flatnonzero(partner >= 0)
    return LeakedDocuments(train[leaking], partner[leaking], kind[leaking], incomplete)


def first_equal(values: np.ndarray, others: np.ndarray, names: np.ndarray) -> np.ndarray:
    """For each value the one of `names` that stands beside the first equal one in `others`, -1 where there is none: int64."""
    if not len(others):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(others, kind="stable")
    ordered = others[order]
    place = np.minimum(np.searchsorted(ordered, values), len(others) - 1)
    return np.where(ordered[place] == values, names[order[place]], -1)


def apply_policy(
    leaks: LeakedDocuments, policy: LeakagePolicy, number: int, where: Callable[[int], str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Carry out the policy for `number` training documents: (those that are taken out, report).

    Raises DataError where the policy is `fail` and there are leaks, with the counts and the first places.
    """
    report, telling = leaks.report(where), leaks.beyond_prompts()
    if len(telling) and policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        places = [place for kind in LEAKS[:-1] for place in report["examples"][kind]][:EXAMPLES]
        raise DataError(
            f"{len(telling)} of {number} training documents are in the held-out data too ({counts}): "
            f"{'; '.join(places)}. Take them out of one of the two, or set data.leakage.policy=drop_train, "
            "or data.leakage.policy=report to train nevertheless"
        )
    return telling if policy is LeakagePolicy.drop_train else telling[:0], report
