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

    def report(self, location: Callable[[int], str]) -> dict[str, Any]:
        """Counts by kind on both sides, and the first places of each kind as "file:line = file:line"."""
        train_counts: dict[str, int] = {}
        held_out_counts: dict[str, int] = {}
        examples: dict[str, list[str]] = {}
        for number, kind in enumerate(LEAKS):
            train = self.train[self.kind == number]
            held_out = self.held_out[self.kind == number]
            train_counts[kind] = len(train)
            held_out_counts[kind] = len(np.unique(held_out))
            pairs = zip(train[:EXAMPLES].tolist(), held_out[:EXAMPLES].tolist(), strict=True)
            examples[kind] = [f"{location(train_row)} = {location(held_out_row)}" for train_row, held_out_row in pairs]
        return {
            "train": train_counts,
            "held_out": held_out_counts,
            "examples": examples,
            "incomplete": self.incomplete,
        }


def find_leaks(
    signatures: Mapping[str, np.ndarray],
    train: np.ndarray,
    held_out: np.ndarray,
    config: DataConfig,
    text_of: Callable[[int], str],
) -> LeakedDocuments:
    """Find the documents of `train` (int64[n]) that `held_out` (int64[m]) has too, by the columns of `Signer.sign`.

    `text_of` is called only if near leaks are looked for. That takes the threshold of the search for duplicates and needs the
    column "verdict". Sources do not matter. Memory: some numbers a training document, and for near leaks 1.6 kB for each
    held-out one.
    """
    # The held-out document that each training document agrees with; -1 for none yet.
    partner = np.full(len(train), -1, np.int64)
    kind = np.zeros(len(train), np.uint8)
    incomplete = 0
    # From the strictest kind on: a document that was found by one is not looked for by the next.
    for number, name in enumerate(LEAKS):
        rows = np.flatnonzero(partner < 0)
        if name == "near":
            if not config.leakage.near:
                continue
            index = NearIndex(text_of, config.duplicates.threshold)
            for document in held_out.tolist():
                index.add(document, text_of(document), int(signatures["verdict"][document]))
            partners = np.full(len(rows), -1, np.int64)
            for place, document in enumerate(train[rows].tolist()):
                likest = index.find(text_of(document), int(signatures["verdict"][document]))
                if likest is not None:
                    partners[place] = likest
            incomplete = index.report["incomplete"]
        else:
            column = signatures[{"exact": "digest", "normalized": "normal"}.get(name, name)]
            partners = first_equal(column[train[rows]], column[held_out], held_out)
            if name == "prompt":  # 0 stands for no prompt
                partners[column[train[rows]] == 0] = -1
        partner[rows] = partners
        kind[rows[partners >= 0]] = number
    leaking = np.flatnonzero(partner >= 0)
    return LeakedDocuments(train[leaking], partner[leaking], kind[leaking], incomplete)


def first_equal(digests: np.ndarray, other_digests: np.ndarray, names: np.ndarray) -> np.ndarray:
    """int64: for each digest the name of the first equal one among `other_digests`; -1 if there is none.

    `names` are those of `other_digests`.
    """
    if not len(other_digests):
        return np.full(len(digests), -1, dtype=np.int64)
    order = np.argsort(other_digests, kind="stable")
    ordered = other_digests[order]
    place = np.minimum(np.searchsorted(ordered, digests), len(other_digests) - 1)
    return np.where(ordered[place] == digests, names[order[place]], -1)


def apply_policy(
    leaks: LeakedDocuments, policy: LeakagePolicy, num_train: int, location: Callable[[int], str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Carry out the policy for `num_train` training documents: (those that are taken out, report).

    Raises DataError where the policy is `fail` and there are leaks, with the counts and the first places.
    """
    report = leaks.report(location)
    leaked = leaks.beyond_prompts()
    if len(leaked) and policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        places: list[str] = []
        for kind in LEAKS[:-1]:  # all but shared prompts
            places += report["examples"][kind]
        raise DataError(
            f"{len(leaked)} of {num_train} training documents are in the held-out data too ({counts}): "
            f"{'; '.join(places[:EXAMPLES])}. Take them out of one of the two, or set data.leakage.policy=drop_train, "
            "or data.leakage.policy=report to train nevertheless"
        )
    return leaked if policy is LeakagePolicy.drop_train else leaked[:0], report
