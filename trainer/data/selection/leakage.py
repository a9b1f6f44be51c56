"""Finds leaks: training documents that are in a held-out split too.

There are four kinds, from the strictest: the same row; the same words in the same order (normal form); nearly the same words
(Jaccard similarity of word n-grams); and the same prompt with another answer or system turn, which is only reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DataConfig, LeakagePolicy
from trainer.data.document import MAX_EXAMPLES
from trainer.data.selection.near_duplicates import NearIndex

LEAK_KINDS = ("exact", "normalized", "near", "prompt")
"""From the strictest on."""
_DIGEST_COLUMNS = {"exact": "digest", "normalized": "normal", "prompt": "prompt"}
"""The column of `Signer.sign` in which documents are equal that leak; near ones are found by their texts."""


@dataclass(slots=True)
class LeakedDocuments:
    """k training documents that leak, each once, in the order of training input."""

    train: np.ndarray
    """int64[k]: training document."""
    held_out: np.ndarray
    """int64[k]: the first held-out document it agrees with (for near ones: the most similar one found)."""
    kind: np.ndarray
    """uint8[k]: index into `LEAK_KINDS`, the strictest that holds."""
    incomplete: int = 0
    """Training documents whose comparisons for near leaks were cut short: among them, leaks may be unseen."""

    def beyond_prompts(self) -> np.ndarray:
        """The documents that leak by more than their prompt: a task's instruction is the prompt of every document."""
        return self.train[self.kind != LEAK_KINDS.index("prompt")]

    def report(self, location_of: Callable[[int], str]) -> dict[str, Any]:
        """What the report says of documents that are in training and held-out data alike.

        Of the form {"train": {"exact": 2, ...}, "held_out": {"exact": 1, ...}, "examples": {"exact": [...], ...}, "incomplete":
        0}: by kind of `LEAK_KINDS`, how many documents on each side, and the first pairs as "file:line = file:line".

        `location_of`: gives the `file:line` of a document.
        """
        train_counts: dict[str, int] = {}
        held_out_counts: dict[str, int] = {}
        examples: dict[str, list[str]] = {}
        for kind_index, kind in enumerate(LEAK_KINDS):
            is_kind = self.kind == kind_index
            train = self.train[is_kind]
            held_out = self.held_out[is_kind]
            train_counts[kind] = len(train)
            held_out_counts[kind] = len(np.unique(held_out))
            examples[kind] = []
            for train_row, held_out_row in zip(
                train[:MAX_EXAMPLES].tolist(), held_out[:MAX_EXAMPLES].tolist(), strict=True
            ):
                examples[kind].append(f"{location_of(train_row)} = {location_of(held_out_row)}")
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
    directory: Path | None = None,
) -> LeakedDocuments:
    """Find the training documents that are in held-out data too, by the columns of `Signer.sign`.

    `train` (int64[n]) and `held_out` (int64[m]) are numbers of documents, rows of `signatures`. `text_of` is called only if near
    leaks are looked for. That takes the threshold of the search for duplicates and needs the column "verdict". Sources do not
    matter. `directory`: where the search for near leaks keeps its files, see `NearIndex`.
    """
    # The held-out document that each training document agrees with; -1 for none yet.
    partner = np.full(len(train), -1, np.int64)
    # Index into LEAK_KINDS of how they agree.
    kind = np.zeros(len(train), np.uint8)
    incomplete = 0
    # From the strictest kind on: a document that was found by one is not looked for by the next.
    for kind_index, kind_name in enumerate(LEAK_KINDS):
        rows = np.flatnonzero(partner < 0)  # positions in `train`
        documents = train[rows]
        if kind_name == "near":
            if not config.leakage.near:
                continue
            # Positions in the index: held-out documents first.
            both = np.concatenate([held_out, documents])
            index = NearIndex(both, text_of, signatures["verdict"][both], config.duplicates.threshold, directory)
            partners = np.full(len(rows), -1, np.int64)
            # All held-out documents are in the index before the first training document is looked for.
            for position in np.flatnonzero(index.may_be_near).tolist():
                if position < len(held_out):
                    index.add(position)
                    continue
                most_similar = index.find(position)
                if most_similar is not None:
                    partners[position - len(held_out)] = both[most_similar]
            incomplete = index.report["incomplete"]
        else:
            digests = signatures[_DIGEST_COLUMNS[kind_name]]
            partners = first_matching_documents(digests[documents], digests[held_out], held_out)
            if kind_name == "prompt":  # 0 stands for no prompt
                partners[digests[documents] == 0] = -1
        partner[rows] = partners
        kind[rows[partners >= 0]] = kind_index
    leaking = np.flatnonzero(partner >= 0)
    return LeakedDocuments(train[leaking], partner[leaking], kind[leaking], incomplete)


def first_matching_documents(digests: np.ndarray, other_digests: np.ndarray, other_documents: np.ndarray) -> np.ndarray:
    """For each digest (hash of a text) of `digests`, the first document of the other side with the same; -1 if there is none.

    `other_documents[i]`: the number of the document with `other_digests[i]`. Returns int64 [len(digests)]: digests [5, 9] and
    other digests [9, 7] of the documents [30, 31] give [-1, 30].
    """
    if not len(other_digests):
        return np.full(len(digests), -1, dtype=np.int64)
    order = np.argsort(other_digests, kind="stable")  # stable, so that the first of equal ones stays the first
    sorted_digests = other_digests[order]
    positions = np.searchsorted(sorted_digests, digests)
    positions = np.minimum(positions, len(other_digests) - 1)  # one behind the end, for a digest larger than all
    return np.where(sorted_digests[positions] == digests, other_documents[order[positions]], -1)


def apply_leakage_policy(
    leaks: LeakedDocuments, policy: LeakagePolicy, num_train: int, location_of: Callable[[int], str]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Carry out `data.leakage.policy`: (numbers of the training documents to take out, report). `num_train`: all of them.

    Raises DataError if the policy is `fail` and there are leaks, with the counts and the first examples.
    """
    report = leaks.report(location_of)
    leaked = leaks.beyond_prompts()
    if len(leaked) and policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        examples: list[str] = []
        for kind in LEAK_KINDS[:-1]:  # all but shared prompts
            examples += report["examples"][kind]
        raise DataError(
            f"{len(leaked)} of {num_train} training documents are in the held-out data too ({counts}): "
            f"{'; '.join(examples[:MAX_EXAMPLES])}. Take them out of one of the two, or set data.leakage.policy=drop_train, "
            "or data.leakage.policy=report to train nevertheless"
        )
    if policy is LeakagePolicy.drop_train:
        return leaked, report
    return leaked[:0], report
