"""Duplicate documents: columns of signatures made block by block, and one global decision over these columns.

Three kinds, each including the stricter ones: exact copies, the same words in the same order (normal form), and near
duplicates (Jaccard similarity of word n-grams). Of each group the first document in the order of input is kept, and
every near duplicate was compared with the very document that stands for it: likeness is not passed on along chains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from trainer.data.choose.near import near_copies
from trainer.data.choose.ngrams import digest64, mix, normal_digest, normalize
from trainer.data.config import Across, ComparedText, DuplicatePolicy, DuplicatesConfig
from trainer.data.document import Document, texts_in


def compared_text(document: Document, which: ComparedText) -> str:
    """The text `which` asks for; the whole document where it has no such text, or an empty one.

    The whole document is its texts in reading order. The words of a rejected answer are marked, because two preference
    pairs with the answers the other way round teach opposite things.
    """
    part = prompt_of(document) if which is ComparedText.prompt else None
    if which is ComparedText.completion and document.label is None:
        part = _completion_of(document)
    if part is not None and part.strip():
        return part
    rejected = document.rejected or []
    marked = [" ".join("~" + word for word in text.split()) for message in rejected for text in texts_in(message)]
    return "\n".join(document.texts() if not rejected else [*_unrejected(document), *marked])


def _unrejected(document: Document) -> list[str]:
    turns = [text for message in (*(document.messages or []), *(document.chosen or [])) for text in texts_in(message)]
    return turns + [text for text in (document.prompt, document.completion, document.text) if text is not None]


def prompt_of(document: Document) -> str | None:
    """What an answer is given to: the turns before the last answer without system turns; None for plain text."""
    if document.messages is not None:
        end = len(document.messages)
        if document.chosen is None:
            answers = [place for place, turn in enumerate(document.messages) if turn["role"] == "assistant"]
            end = answers[-1] if answers else end
        asked = [turn for turn in document.messages[:end] if turn["role"] != "system"]
        return "\n".join(text for turn in asked for text in texts_in(turn))
    if document.prompt is not None:
        return document.prompt
    return document.text if document.label is not None else None


def _completion_of(document: Document) -> str | None:
    if document.chosen is not None:
        return "\n".join(text for turn in document.chosen for text in texts_in(turn))
    for turn in reversed(document.messages or []):
        if turn["role"] == "assistant":
            return "\n".join(texts_in(turn))
    return document.completion


class Signer:
    """Makes the columns by which documents are compared. Pure: built in every worker, the same for every block."""

    def __init__(self, config: DuplicatesConfig, *, near: bool | None = None, held_out: bool = True) -> None:
        """`near` says whether near copies are looked for; as a rule they are when `config.near` is not off.

        `held_out`: there may be held-out data to compare with. Without, "prompt" is 0 for all, and where only exact
        copies are looked for, "normal" is "digest".
        """
        self.config = config
        self.held_out = held_out
        self.near = config.near is not DuplicatePolicy.none if near is None else near

    def sign(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """Columns of n documents, uint64[n] each.

        "digest" stands for the text itself, "normal" for its words, "prompt" for the words of its prompt (0: none),
        "source" for the name of its source, and "verdict", where near copies are looked for, for its label (0: none).
        Whole documents differ in "normal" when their label does.
        """
        digests, normals, prompts, sources = list[int](), list[int](), list[int](), list[int]()
        keys = np.zeros(len(documents), dtype=np.uint64)
        whole = self.config.text is ComparedText.document
        worded = self.held_out or self.near or self.config.normalized is not DuplicatePolicy.none
        for row, document in enumerate(documents):
            text = compared_text(document, self.config.text) if worded or not whole else ""
            digests.append(document.digest() if whole else digest64(text.encode("utf-8", "surrogatepass")))
            verdict = (document.label, document.desirable)
            if whole and verdict != (None, None):
                keys[row] = digest64(json.dumps(verdict).encode())
            normal = normal_digest(normalize(text)) if worded else None
            normals.append(digests[-1] if normal is None else normal)
            prompt = prompt_of(document) if self.held_out else None
            prompts.append(0 if prompt is None else normal_digest(normalize(prompt)) or 0)
            sources.append(_source_digest(document.source))
        found = {"digest": digests, "normal": normals, "prompt": prompts, "source": sources}
        columns = {name: np.array(values, dtype=np.uint64) for name, values in found.items()}
        columns["normal"] ^= keys
        return {**columns, "verdict": keys} if self.near else columns


@cache
def _source_digest(name: str) -> int:
    return digest64(name.encode("utf-8", "surrogatepass"))


def exact_groups(digest: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """Index of the first document with the same digest: int64[n] from uint64[n]. Where not `alive`, a row's own index."""
    first = np.arange(len(digest), dtype=np.int64)
    rows = first if alive is None else np.flatnonzero(alive)
    _, index, inverse = np.unique(digest[rows], return_index=True, return_inverse=True)
    first[rows] = rows[index[inverse]]
    return first


@dataclass(slots=True)
class Duplicates:
    """The decision over n documents."""

    kept: np.ndarray
    """bool[n]: False where the policy drops the document."""
    stands: np.ndarray
    """int64[n]: the earlier document it duplicates; its own index where it is none."""
    kind: np.ndarray
    """uint8[n]: 0 none, else 1 + the place in `KINDS`."""
    report: dict[str, Any] = field(default_factory=dict)
    """Documents by kind, and what the search for near duplicates did."""


KINDS = ("exact", "normalized", "near")


def find_duplicates(
    config: DuplicatesConfig, columns: Mapping[str, np.ndarray], text_of: Callable[[int], str]
) -> Duplicates:
    """Decide over the joined columns of all blocks (see `Signer.sign`), in input order.

    `text_of(row)` gives `compared_text(document, config.text)`. A document counts under the strictest kind that holds.
    """
    number = len(columns["digest"])
    scope = mix(columns["source"]) if config.across is Across.source else np.zeros(number, np.uint64)
    result = Duplicates(np.ones(number, bool), np.arange(number, dtype=np.int64), np.zeros(number, np.uint8))
    order = list(DuplicatePolicy)
    given = [order.index(policy) for policy in (config.exact, config.normalized, config.near)]
    alive = np.ones(number, dtype=bool)
    for place, kind in enumerate(KINDS):
        policy = order[max(given[place:])]
        if policy is DuplicatePolicy.none:
            continue
        if kind == "near":
            stands, result.report["near_search"] = near_copies(
                alive, text_of, columns["verdict"] ^ scope, threshold=config.threshold, ngram=config.ngram
            )
        else:
            stands = exact_groups(columns[("digest", "normal")[place]] ^ scope, alive)
        found = stands != np.arange(number)
        result.stands[found], result.kind[found] = stands[found], place + 1
        alive &= ~found
        if policy is DuplicatePolicy.drop:
            result.kept &= ~found
        result.report[kind] = int(found.sum())
    # A copy was compared with its first exemplar only; where that one turned out a duplicate, so is the copy.
    for _ in KINDS[1:]:
        result.stands = result.stands[result.stands]
    return result
