"""Which documents make up each split: copies dropped, held-out shares drawn, leaks taken out, groups balanced.

Decisions are made from columns of numbers; a text is read again only to verify that two documents are nearly the same. Copies
are of three kinds, each including the stricter ones: exact, the same words in the same order (normal form), and near copies
(Jaccard similarity of word n-grams). Of each group the first document in the order of input is kept, and every near copy was
compared with the very document that stands for it: likeness is not passed on along chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.config import HELD_OUT, BalanceBy, DataConfig, DuplicatePolicy, DuplicatesConfig, LeakagePolicy
from trainer.data.document import EXAMPLES, Tally
from trainer.data.selection.balance import resample
from trainer.data.selection.leakage import apply_policy, find_leaks
from trainer.data.selection.near_duplicates import near_copies
from trainer.data.selection.signatures import compared_text, mix
from trainer.data.store.documents import DocumentTable

Log = Callable[[str, str, str], None]
STEP, OFFSET = 0x9E3779B97F4A7C15, 0x632BE59BD9B4E019
"""What the seed is multiplied with and added to, so that draws of different seeds have nothing in common."""


@dataclass(slots=True)
class Columns:
    """Numbers of every document kept, in input order: what the global decisions are made from."""

    split: np.ndarray
    """int16 [D], into `splits`."""
    source: np.ndarray
    """int16 [D], into `sources`."""
    pieces: np.ndarray
    """int64 [D]: sequences of each document."""
    label: np.ndarray
    """int64 [D], into `labels`; -1 where there is none."""
    signatures: dict[str, np.ndarray]
    splits: list[str]
    sources: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.split)

    def of_split(self, name: str) -> np.ndarray:
        """int64: the documents that were read for a split."""
        return np.flatnonzero(self.split == self.splits.index(name)) if name in self.splits else np.zeros(0, np.int64)


@dataclass(slots=True)
class Selection:
    """The splits, and what was decided on the way."""

    splits: dict[str, np.ndarray]
    """Document numbers of each split, int64, in input order; a repeated document stands several times."""
    tally: Tally = field(default_factory=Tally)
    report: dict[str, Any] = field(default_factory=dict)
    """Parts of the audit: duplicates, leakage, groups, labels, balance."""


KINDS = ("exact", "normalized", "near")


@dataclass(slots=True)
class Duplicates:
    """The decision over n documents."""

    representative: np.ndarray
    """int64[n]: the earlier document it duplicates; its own index where it is none."""
    kind: np.ndarray
    """uint8[n]: 0 none, else 1 + the place in `KINDS`, the strictest that holds."""
    search: dict[str, int] = field(default_factory=dict)
    """What the search for near duplicates did."""


def policies_of(config: DuplicatesConfig) -> dict[str, DuplicatePolicy]:
    """What is done about each kind that is looked for: at least what is done about the kinds after it."""
    order = list(DuplicatePolicy)
    given = [order.index(policy) for policy in (config.exact, config.normalized, config.near)]
    return {kind: order[most] for place, kind in enumerate(KINDS) if (most := max(given[place:]))}


def find_duplicates(
    config: DuplicatesConfig, columns: Mapping[str, np.ndarray], text_of: Callable[[int], str]
) -> Duplicates:
    """Decide over the joined columns of all blocks (see `Signer.sign`), in input order.

    `text_of(row)` gives `compared_text(document, config.text)`.
    """
    rows = np.arange(len(columns["digest"]), dtype=np.int64)
    result = Duplicates(rows.copy(), np.zeros(len(rows), np.uint8))
    for kind in policies_of(config):
        alive = result.kind == 0
        if kind == "near":
            stands, result.search = near_copies(alive, text_of, columns["verdict"], config.threshold)
        else:
            digests, stands = columns["digest" if kind == "exact" else "normal"][alive], rows.copy()
            _, first, which = np.unique(digests, return_index=True, return_inverse=True)
            stands[alive] = rows[alive][first[which]]
        found = stands != rows
        result.representative[found], result.kind[found] = stands[found], 1 + KINDS.index(kind)
    # A copy was compared with its first exemplar only; where that one turned out a duplicate, so is the copy.
    for _ in KINDS[1:]:
        result.representative = result.representative[result.representative]
    return result


class _SplitChooser:
    """The documents still in, and what happened to the others."""

    def __init__(self, config: DataConfig, columns: Columns, table: DocumentTable, seed: int, log: Log) -> None:
        self.config, self.columns, self.table, self.seed, self.log = config, columns, table, seed, log
        self.alive = np.ones(len(columns), bool)
        self.content = columns.signatures["digest"].copy()
        """What draws go by: near copies take the digest of the one they copy."""
        self.groups = columns.signatures.get("group")
        """uint64 [D]: digest of each document's group; 0 where it has none."""
        self.selection = Selection({})

    def drop(self, documents: np.ndarray, stage: str, reason: str) -> None:
        """Take documents out, each counted and written down."""
        for number in documents[self.alive[documents]].tolist():
            where = self.where(number)
            self.selection.tally.drop(stage, reason, where)
            self.log(stage, reason, where)
        self.alive[documents] = False

    def where(self, number: int) -> str:
        row = self.table.row(number)
        return f"{row['file']}:{row['line']}"

    def text(self, number: int) -> str:
        """What near copies are compared by."""
        return compared_text(self.table.document(number), self.config.duplicates.text)

    def copies(self) -> None:
        """Exact, normalised and near copies within the training documents."""
        config, train = self.config.duplicates, self.columns.of_split("train")
        if not len(train):
            return
        signatures = {name: column[train] for name, column in self.columns.signatures.items()}
        found = find_duplicates(config, signatures, lambda number: self.text(int(train[number])))
        self.content[train] = self.content[train[found.representative]]
        report: dict[str, Any] = {}
        for kind, policy in policies_of(config).items():
            copies = np.flatnonzero(found.kind == 1 + KINDS.index(kind))
            pairs = [(int(train[found.representative[copy]]), int(train[copy])) for copy in copies[:EXAMPLES].tolist()]
            report[kind] = {
                "policy": str(policy),
                "documents": len(copies),
                "groups": len(np.unique(found.representative[copies])),
                "examples": [{"a": self.where(a), "b": self.where(b)} for a, b in pairs],
            }
            if kind == "near":
                report[kind] |= {"threshold": config.threshold, "search": found.search}
            if policy is DuplicatePolicy.drop:
                self.drop(train[copies], "duplicates", kind)
        self.selection.report["duplicates"] = report

    def hold_out(self) -> None:
        """Split the training documents by content: copies fall on the same side, their place in the files is no matter.

        With groups it goes by group, and copies in two groups may fall apart, which the search for leaks then tells.
        """
        columns, splits = self.columns, self.selection.splits
        for split in HELD_OUT:
            if split in columns.splits:
                splits[split] = columns.of_split(split)
        train = columns.of_split("train")
        train = splits["train"] = train[self.alive[train]]
        if not (self.config.eval_share or self.config.test_share):
            return
        drawn_by = self.content if self.groups is None else self.groups
        draws = mix(drawn_by[train] + np.uint64((self.seed * STEP + OFFSET) % 2**64))
        taken = np.zeros(len(train), bool)
        for split in HELD_OUT:
            share = getattr(self.config, f"{split}_share")
            if not share or not len(train):
                continue
            free = np.flatnonzero(~taken)
            if not len(free):
                break
            wanted = min(len(free), max(1, round(share * len(train))))
            if self.groups is None:
                chosen = free[draws[free] <= np.partition(draws[free], wanted - 1)[wanted - 1]]
            else:
                chosen = free[take_whole_groups(draws[free], wanted)]
            taken[chosen] = True
            splits[split] = train[chosen]
        if len(train) and taken.all():
            shares = [(f"data.{s}_share", getattr(self.config, f"{s}_share")) for s in HELD_OUT]
            named = " and ".join(f"{key}={share:g}" for key, share in shares if share)
            different = (
                "of them different" if self.groups is None else f"groups by data.group_by={self.config.group_by}"
            )
            raise DataError(
                f"{named} leaves no training document: {len(train)} documents, {len(np.unique(draws))} {different}; "
                "add data, or set it to 0"
            )
        splits["train"] = train[~taken]

    def leaks(self) -> None:
        """Training documents that are in a held-out split too."""
        splits, report, policy = self.selection.splits, dict[str, Any](), self.config.leakage.policy
        for split, held_out in self._sets():
            train = splits["train"]
            if not len(train) or not len(held_out):
                continue
            found = find_leaks(self.columns.signatures, train, held_out, self.config, self.text)
            taken, about = apply_policy(found, policy, len(train), self.where)
            report[split] = {"policy": str(policy), **about}
            self.drop(taken, "leakage", f"in_{split}")
            splits["train"] = np.setdiff1d(train, taken)
        if report:
            self.selection.report["leakage"] = report

    def shared_groups(self) -> None:
        """Training documents whose group is in a held-out split too, which only files of held-out rows can bring about."""
        if self.groups is None:
            return
        splits, policy, report = self.selection.splits, self.config.leakage.policy, dict[str, Any]()
        held_out_sets = dict(self._sets())
        for split, held_out in held_out_sets.items():
            train = splits["train"]
            shared = np.isin(self.groups[train], self.groups[held_out]) & (self.groups[train] != 0)
            report[split] = {"in_training": int(shared.sum())}
            if policy is LeakagePolicy.fail and shared.any():
                raise DataError(
                    f"{int(shared.sum())} of {len(train)} training documents are of groups (data.group_by="
                    f"{self.config.group_by}) that the {split} split has too: {self.where(int(train[shared][0]))} and others; "
                    "take them out of one of the two, or set data.leakage.policy=drop_train, or report to continue"
                )
            if policy is LeakagePolicy.drop_train:
                self.drop(train[shared], "leakage", f"group_in_{split}")
                splits["train"] = train[~shared]
        for split, documents in {"train": splits["train"], **held_out_sets}.items():
            groups = self.groups[np.unique(documents)]
            counts = {"documents": len(groups), "groups": len(np.unique(groups[groups != 0]))}
            report[split] = counts | report.get(split, {"in_training": 0})
        self.selection.report["groups"] = report

    def _sets(self) -> Iterator[tuple[str, np.ndarray]]:
        """The held-out splits with their documents, that of evaluation by its sets where these have names."""
        columns, splits, named = self.columns, self.selection.splits, self.config.eval_path
        for split in [split for split in HELD_OUT if split in splits]:
            if split != "eval" or not isinstance(named, Mapping):
                yield split, splits[split]
                continue
            sources = columns.source[splits[split]]
            for name in [name for name in named if name in columns.sources]:
                yield f"{split}/{name}", splits[split][sources == columns.sources.index(name)]

    def balance(self) -> None:
        """Resample the training documents; label counts before and after."""
        columns, splits, config = self.columns, self.selection.splits, self.config.balance
        train = splits["train"]
        before = self._labels(train)
        if config.by is not BalanceBy.none and len(train):
            names = columns.labels if config.by is BalanceBy.label else columns.sources
            group_of = columns.label[train] if config.by is BalanceBy.label else columns.source[train]
            if not names or (group_of < 0).any():
                raise DataError(f"data.balance.by={config.by}: not every training document has a label")
            chosen, report = resample(names, group_of.astype(np.int64), config, self.seed)
            left_out = np.setdiff1d(np.arange(len(train)), chosen)
            self.drop(train[left_out], "balance", "left_out")
            splits["train"] = train[chosen]
            self.selection.report["balance"] = report
        if before:
            self.selection.report["labels"] = {"before": before, "after": self._labels(splits["train"])}

    def _labels(self, documents: np.ndarray) -> dict[str, int]:
        if not self.columns.labels:
            return {}
        counts = np.bincount(self.columns.label[documents], minlength=len(self.columns.labels))
        return dict(zip(self.columns.labels, counts.tolist(), strict=True))


def choose(config: DataConfig, columns: Columns, table: DocumentTable, *, seed: int, log: Log) -> Selection:
    """The splits. A function of the columns, the texts, the settings and the seed. Raises DataError, ConfigError."""
    chooser = _SplitChooser(config, columns, table, seed, log)
    chooser.copies()
    chooser.hold_out()
    chooser.leaks()
    chooser.shared_groups()
    chooser.balance()
    selection = chooser.selection
    selection.splits = {name: selection.splits[name] for name in ("train", *HELD_OUT) if name in selection.splits}
    return selection


def take_whole_groups(draws: np.ndarray, wanted: int) -> np.ndarray:
    """Which documents to take, as bool [n], so that about `wanted` are: those of one draw (uint64 [n]) all or none.

    Groups are taken in the order of their draws, one that would be too much passed over; at least one is taken.
    """
    _, group, sizes = np.unique(draws, return_inverse=True, return_counts=True)
    taken, left = np.zeros(len(sizes), bool), wanted
    for place, size in enumerate(sizes.tolist()):
        if size <= left:
            taken[place], left = True, left - size
        if not left:
            break
    if not taken.any():
        taken[sizes.argmin()] = True
    return taken[group]
