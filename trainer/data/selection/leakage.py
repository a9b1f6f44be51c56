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
_DOCUMENT_LEAK_KINDS = ("exact", "normalized", "near")
"""Kinds by which more than the prompt is shared. A shared prompt alone may be a fixed instruction, and is only reported."""
_DIGEST_COLUMN_BY_KIND = {"exact": "digest", "normalized": "normal", "prompt": "prompt"}
"""The column of `DocumentHasher.hash_documents` in which documents are equal that leak; near ones are found by their texts."""


@dataclass(slots=True)
class LeakedDocuments:
    """The training documents that leak, k of them: a held-out split has them too. In the order of training input."""

    train: np.ndarray
    """int64[k]: training document."""
    held_out: np.ndarray
    """int64[k]: the first held-out document it agrees with (for near ones: the most similar one found)."""
    kind: np.ndarray
    """uint8[k]: index into `LEAK_KINDS`, the strictest that holds."""
    num_incomplete: int = 0
    """Training documents whose comparisons for near leaks were cut short: among them, leaks may be unseen."""

    def train_documents_sharing_more_than_prompt(self) -> np.ndarray:
        """int64: the training documents that share more than their prompt, which may be an instruction of every document."""
        return self.train[self.kind != LEAK_KINDS.index("prompt")]

    def to_report(self, location_of: Callable[[int], str]) -> dict[str, Any]:
        """Count the leaks for the report of preparation, by kind of `LEAK_KINDS`, with examples:

        {"train": {"exact": 2, ...}, "held_out": {"exact": 1, ...}, "examples": {"exact": ["a.jsonl:3 = b.jsonl:7"], ...},
        "incomplete": 0}.

        That is how many documents leak on each side (several training documents may share one held-out document), the first pairs
        (training document = held-out document), and for how many documents the search was cut short. `location_of`: gives the
        `file:line` of a document.
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
            first_pairs = zip(train[:MAX_EXAMPLES].tolist(), held_out[:MAX_EXAMPLES].tolist(), strict=True)
            examples[kind] = []
            for train_document, held_out_document in first_pairs:
                examples[kind].append(f"{location_of(train_document)} = {location_of(held_out_document)}")
        return {
            "train": train_counts,
            "held_out": held_out_counts,
            "examples": examples,
            "incomplete": self.num_incomplete,
        }


def find_leaks(
    document_hashes: Mapping[str, np.ndarray],
    train: np.ndarray,
    held_out: np.ndarray,
    config: DataConfig,
    text_of: Callable[[int], str],
    directory: Path | None = None,
) -> LeakedDocuments:
    """Find the training documents that are in held-out data too, whatever their source: evaluation would measure memory.

    `document_hashes`: of all documents by name, uint64 each (see `DocumentHasher`): "digest" of the content, "normal" of the
    words, "prompt", "verdict" (label).
    `train` (int64[n]) and `held_out` (int64[m]): numbers of documents.
    `text_of` gives the text of a document; it is called only if near leaks are looked for (`data.leakage.near`), by the threshold
    of the search for duplicates.
    `directory`: where the search for near leaks keeps its files while it works.

    The kinds of leaks are looked for from the strictest on: a document that was found by one is not looked for by the next.
    """
    # The held-out document that each training document agrees with; -1 for none yet.
    partners = np.full(len(train), -1, np.int64)
    # Index into LEAK_KINDS of how they agree.
    kind_indices = np.zeros(len(train), np.uint8)
    num_incomplete = 0
    for kind_index, kind in enumerate(LEAK_KINDS):
        positions = np.flatnonzero(partners < 0)  # in `train`: documents without a partner so far
        documents = train[positions]
        if kind == "near":
            if not config.leakage.near:
                continue
            found_partners, num_incomplete = _find_near_partners(
                documents, held_out, document_hashes["verdict"], text_of, config.duplicates.threshold, directory
            )
        else:
            digests = document_hashes[_DIGEST_COLUMN_BY_KIND[kind]]
            found_partners = first_matching_documents(digests[documents], digests[held_out], held_out)
            if kind == "prompt":
                has_prompt = digests[documents] != 0  # all documents without a prompt have the hash 0
                found_partners[~has_prompt] = -1
        partners[positions] = found_partners
        kind_indices[positions[found_partners >= 0]] = kind_index
    has_leaked = partners >= 0
    return LeakedDocuments(
        train=train[has_leaked],
        held_out=partners[has_leaked],
        kind=kind_indices[has_leaked],
        num_incomplete=num_incomplete,
    )


def _find_near_partners(
    train: np.ndarray,
    held_out: np.ndarray,
    label_hashes: np.ndarray,
    text_of: Callable[[int], str],
    threshold: float,
    directory: Path | None,
) -> tuple[np.ndarray, int]:
    """Find for each training document the most similar held-out one: (its number, int64 [train]; how many searches ended early).

    The number is -1 if no held-out document has a Jaccard similarity of `threshold` or more. `label_hashes` (uint64, by document
    number): only documents with equal labels are compared. `text_of` gives the text of a document.
    """
    # Positions in the index: held-out documents first. So all of them are in it before the first training document is looked for.
    documents = np.concatenate([held_out, train])
    index = NearIndex(documents, text_of, label_hashes[documents], threshold, directory)
    partners = np.full(len(train), -1, np.int64)
    # Only documents that share a band of their sketches with another one are compared.
    for position in np.flatnonzero(index.may_be_near).tolist():
        if position < len(held_out):
            index.add(position)
            continue
        most_similar = index.find_most_similar(position)
        if most_similar is not None:
            partners[position - len(held_out)] = documents[most_similar]
    return partners, index.report["incomplete"]  # searches that ended at `MAX_COMPARISONS`


def first_matching_documents(digests: np.ndarray, other_digests: np.ndarray, other_documents: np.ndarray) -> np.ndarray:
    """Find for each digest (hash of a text) the first document of the other side with an equal one; -1 if there is none.

    `other_documents[i]`: the number of the document with `other_digests[i]`. Returns int64 [len(digests)]: digests [5, 9] and
    other digests [9, 7] of the documents [30, 31] give [-1, 30].
    """
    if not len(other_digests):
        return np.full(len(digests), -1, dtype=np.int64)
    order = np.argsort(other_digests, kind="stable")  # stable, so that the first of equal ones stays the first
    sorted_digests = other_digests[order]
    positions = np.searchsorted(sorted_digests, digests)
    # A digest larger than all gets the position behind the end.
    positions = np.minimum(positions, len(other_digests) - 1)
    return np.where(sorted_digests[positions] == digests, other_documents[order[positions]], -1)


def train_documents_to_drop(
    leaks: LeakedDocuments, policy: LeakagePolicy, num_train_documents: int, report: dict[str, Any]
) -> np.ndarray:
    """Decide which leaking training documents `data.leakage.policy` takes out: their numbers, int64.

    With `drop_train` those that share more than a prompt with a held-out document, with other policies none.
    `num_train_documents`: of the split, for the message. Raises DataError if the policy is `fail` and there are such documents,
    with counts and first examples of `report` (`leaks.to_report`).
    """
    leaked_documents = leaks.train_documents_sharing_more_than_prompt()
    if len(leaked_documents) and policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        examples: list[str] = []
        for kind in _DOCUMENT_LEAK_KINDS:
            examples += report["examples"][kind]
        raise DataError(
            f"{len(leaked_documents)} of {num_train_documents} training documents are in the held-out data too ({counts}): "
            f"{'; '.join(examples[:MAX_EXAMPLES])}. Take them out of one of the two, or set data.leakage.policy=drop_train, "
            "or data.leakage.policy=report to train nevertheless"
        )
    return leaked_documents if policy is LeakagePolicy.drop_train else np.zeros(0, np.int64)
