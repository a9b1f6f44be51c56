"""Copies among the training documents, and of held-out documents (leakage), from columns of signatures made block by block.

Three kinds, each including the stricter ones: exact copies, the same words in the same order (normal form), and near copies
(Jaccard similarity of word n-grams). Of each group the first document in the order of input is kept, and every near copy was
compared with the very document that stands for it: likeness is not passed on along chains. Leakage has a fourth kind, the same
prompt with another answer, which is told only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.choose.compare import NearIndex, digest64, near_copies, normal_digest, normalize
from trainer.data.config import ComparedText, DuplicatePolicy, DuplicatesConfig, LeakageConfig, LeakagePolicy
from trainer.data.document import EXAMPLES, Document, texts_in


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


@dataclass(frozen=True, slots=True)
class Signer:
    """Makes the columns by which documents are compared. Pure: the same for every block."""

    config: DuplicatesConfig
    near: bool = False
    """Whether near leaks are looked for, too."""
    held_out: bool = True
    """Whether there may be held-out data to compare with. Without, "prompt" is 0 for all, and where only exact copies are looked
    for, "normal" is "digest"."""

    def sign(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """Columns of n documents, uint64[n] each.

        "digest" stands for the text itself, "normal" for its words, "prompt" for the words of its prompt (0: none),
        and "verdict", where near copies are looked for, for its label (0: none).
        Whole documents differ in "normal" when their label does.
        """
        digests, normals, prompts = list[int](), list[int](), list[int]()
        keys = np.zeros(len(documents), dtype=np.uint64)
        whole = self.config.text is ComparedText.document
        near = self.near or self.config.near is not DuplicatePolicy.none
        worded = self.held_out or near or self.config.normalized is not DuplicatePolicy.none
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
        found = {"digest": digests, "normal": normals, "prompt": prompts}
        columns = {name: np.array(values, dtype=np.uint64) for name, values in found.items()}
        columns["normal"] ^= keys
        return {**columns, "verdict": keys} if near else columns


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
    policies: dict[str, DuplicatePolicy] = field(default_factory=dict)
    """What is done about each kind that was looked for."""
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
                alive, text_of, columns["verdict"], threshold=config.threshold, ngram=config.ngram
            )
        else:
            stands = exact_groups(columns[("digest", "normal")[place]], alive)
        found = stands != np.arange(number)
        result.stands[found], result.kind[found] = stands[found], place + 1
        alive &= ~found
        result.policies[kind] = policy
        if policy is DuplicatePolicy.drop:
            result.kept &= ~found
        result.report[kind] = int(found.sum())
    # A copy was compared with its first exemplar only; where that one turned out a duplicate, so is the copy.
    for _ in KINDS[1:]:
        result.stands = result.stands[result.stands]
    return result


LEAKS = ("exact", "normalized", "near", "prompt")
"""From the strictest: the same row; the same words; overlapping n-grams; the same prompt with another answer."""


@dataclass(slots=True)
class Leaks:
    """k training documents that leak, each once, in the order of training input."""

    train: np.ndarray
    """int64[k]: training document."""
    held_out: np.ndarray
    """int64[k]: the first held-out document it agrees with (for near ones: the likest found)."""
    kind: np.ndarray
    """uint8[k]: place in `LEAKS`, the strictest that holds."""
    incomplete: int = 0
    """Training documents whose comparisons for near leaks were cut short: among them, leaks may be unseen."""

    def report(self, where_train: Callable[[int], str], where_held_out: Callable[[int], str]) -> dict[str, Any]:
        """Counts by kind on both sides, and the first places of each kind as "file:line = file:line"."""
        result: dict[str, Any] = {"train": {}, "held_out": {}, "examples": {}, "incomplete": self.incomplete}
        for place, kind in enumerate(LEAKS):
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
    for place, name in enumerate(LEAKS):
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
        else:
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
    telling = leaks.train[leaks.kind != LEAKS.index("prompt")]
    if len(telling) and config.policy is LeakagePolicy.fail:
        counts = ", ".join(f"{kind} {count}" for kind, count in report["train"].items() if count)
        places = [place for kind in LEAKS[:-1] for place in report["examples"][kind]][:EXAMPLES]
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
