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
SEED_FACTOR = 0x9E3779B97F4A7C15
SEED_OFFSET = 0x632BE59BD9B4E019
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
    """What is done about each kind that is looked for: at least what is done about the kinds after it.

    A near copy includes the exact copies, so that a policy for near ones holds for all.
    """
    severities = list(DuplicatePolicy)  # from `none` on
    settings = [severities.index(policy) for policy in (config.exact, config.normalized, config.near)]
    policies = {}
    for place, kind in enumerate(KINDS):
        severity = max(settings[place:])
        if severity:
            policies[kind] = severities[severity]
    return policies


def find_duplicates(
    config: DuplicatesConfig, columns: Mapping[str, np.ndarray], text_of: Callable[[int], str]
) -> Duplicates:
    """Decide over the joined columns of all blocks (see `Signer.sign`), in input order.

    `text_of(row)` gives `compared_text(document, config.text)`.
    """
    rows = np.arange(len(columns["digest"]), dtype=np.int64)
    duplicates = Duplicates(rows.copy(), np.zeros(len(rows), np.uint8))
    for kind in policies_of(config):
        alive = duplicates.kind == 0
        if kind == "near":
            representative, duplicates.search = near_copies(alive, text_of, columns["verdict"], config.threshold)
        else:
            representative = rows.copy()
            digests = columns["digest" if kind == "exact" else "normal"][alive]
            _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
            # `first` is the first document of each digest, so copies point to the earliest one.
            representative[alive] = rows[alive][first[inverse]]
        is_copy = representative != rows
        duplicates.representative[is_copy] = representative[is_copy]
        duplicates.kind[is_copy] = 1 + KINDS.index(kind)
    # A copy was compared with its first exemplar only; where that one turned out a duplicate, so is the copy.
    for _ in KINDS[1:]:
        duplicates.representative = duplicates.representative[duplicates.representative]
    return duplicates


class _SplitChooser:
    """The documents still in, and what happened to the others."""

    def __init__(self, config: DataConfig, columns: Columns, table: DocumentTable, seed: int, log: Log) -> None:
        self.config = config
        self.columns = columns
        self.table = table
        self.seed = seed
        self.log = log
        self.alive = np.ones(len(columns), bool)
        self.content = columns.signatures["digest"].copy()
        """What draws go by: near copies take the digest of the one they copy."""
        self.groups = columns.signatures.get("group")
        """uint64 [D]: digest of each document's group; 0 where it has none."""
        self.selection = Selection({})

    def drop(self, documents: np.ndarray, stage: str, reason: str) -> None:
        """Take documents out, each counted and written down."""
        # A document is dropped once, under the first reason.
        for number in documents[self.alive[documents]].tolist():
            location = self.location(number)
            self.selection.tally.drop(stage, reason, location)
            self.log(stage, reason, location)
        self.alive[documents] = False

    def location(self, number: int) -> str:
        row = self.table.row(number)
        return f"{row['file']}:{row['line']}"

    def text(self, number: int) -> str:
        """The text by which near copies are compared."""
        return compared_text(self.table.document(number), self.config.duplicates.text)

    def drop_copies(self) -> None:
        """Report, and by policy drop, exact, normalised and near copies within the training documents."""
        config = self.config.duplicates
        train = self.columns.of_split("train")
        if not len(train):
            return
        signatures = {name: column[train] for name, column in self.columns.signatures.items()}
        duplicates = find_duplicates(config, signatures, lambda number: self.text(int(train[number])))
        representatives = train[duplicates.representative]
        self.content[train] = self.content[representatives]
        report: dict[str, Any] = {}
        for kind, policy in policies_of(config).items():
            copies = np.flatnonzero(duplicates.kind == 1 + KINDS.index(kind))
            examples = []
            for copy in copies[:EXAMPLES].tolist():
                examples.append({"a": self.location(int(representatives[copy])), "b": self.location(int(train[copy]))})
            report[kind] = {
                "policy": str(policy),
                "documents": len(copies),
                "groups": len(np.unique(duplicates.representative[copies])),
                "examples": examples,
            }
            if kind == "near":
                report[kind] |= {"threshold": config.threshold, "search": duplicates.search}
            if policy is DuplicatePolicy.drop:
                self.drop(train[copies], "duplicates", kind)
        self.selection.report["duplicates"] = report

    def hold_out(self) -> None:
        """Draw the held-out shares from the training documents by their content, so that copies fall on the same side.

        With groups it goes by group, and copies in two groups may fall apart, which the search for leaks then tells.
        """
        columns = self.columns
        splits = self.selection.splits
        for split in HELD_OUT:
            if split in columns.splits:
                splits[split] = columns.of_split(split)
        train = columns.of_split("train")
        train = splits["train"] = train[self.alive[train]]
        if not (self.config.eval_share or self.config.test_share):
            return
        drawn_by = self.content if self.groups is None else self.groups
        draws = mix(drawn_by[train] + np.uint64((self.seed * SEED_FACTOR + SEED_OFFSET) % 2**64))
        is_held_out = np.zeros(len(train), bool)
        for split in HELD_OUT:
            share = getattr(self.config, f"{split}_share")
            if not share or not len(train):
                continue
            free = np.flatnonzero(~is_held_out)
            if not len(free):
                break
            number = min(len(free), max(1, round(share * len(train))))
            if self.groups is None:
                # The documents with the smallest draws; copies have equal draws, so they come together.
                largest_draw = np.partition(draws[free], number - 1)[number - 1]
                held_out = free[draws[free] <= largest_draw]
            else:
                held_out = free[take_whole_groups(draws[free], number)]
            is_held_out[held_out] = True
            splits[split] = train[held_out]
        if len(train) and is_held_out.all():
            self._refuse_empty_training(len(train), len(np.unique(draws)))
        splits["train"] = train[~is_held_out]

    def _refuse_empty_training(self, num_documents: int, num_draws: int) -> None:
        """Raise DataError where the held-out shares leave nothing: copies, or members of a group, are never parted."""
        settings = []
        for split in HELD_OUT:
            share = getattr(self.config, f"{split}_share")
            if share:
                settings.append(f"data.{split}_share={share:g}")
        different = "of them different" if self.groups is None else f"groups by data.group_by={self.config.group_by}"
        raise DataError(
            f"{' and '.join(settings)} leaves no training document: {num_documents} documents, {num_draws} {different}; "
            "add data, or set it to 0"
        )

    def drop_leaks(self) -> None:
        """Report, and by policy drop, training documents that are in a held-out split too."""
        splits = self.selection.splits
        policy = self.config.leakage.policy
        report: dict[str, Any] = {}
        for split, held_out in self._held_out_sets():
            train = splits["train"]
            if not len(train) or not len(held_out):
                continue
            leaks = find_leaks(self.columns.signatures, train, held_out, self.config, self.text)
            dropped, leak_report = apply_policy(leaks, policy, len(train), self.location)
            report[split] = {"policy": str(policy), **leak_report}
            self.drop(dropped, "leakage", f"in_{split}")
            # Later held-out splits are compared with what is left.
            splits["train"] = np.setdiff1d(train, dropped)
        if report:
            self.selection.report["leakage"] = report

    def drop_shared_groups(self) -> None:
        """Training documents whose group is in a held-out split too, which only files of held-out rows can bring about."""
        if self.groups is None:
            return
        splits = self.selection.splits
        policy = self.config.leakage.policy
        report: dict[str, Any] = {}
        held_out_sets = dict(self._held_out_sets())
        for split, held_out in held_out_sets.items():
            train = splits["train"]
            is_shared = np.isin(self.groups[train], self.groups[held_out]) & (self.groups[train] != 0)
            report[split] = {"in_training": int(is_shared.sum())}
            if policy is LeakagePolicy.fail and is_shared.any():
                raise DataError(
                    f"{int(is_shared.sum())} of {len(train)} training documents are of groups (data.group_by="
                    f"{self.config.group_by}) that the {split} split has too: {self.location(int(train[is_shared][0]))} and "
                    "others; take them out of one of the two, or set data.leakage.policy=drop_train, or report to continue"
                )
            if policy is LeakagePolicy.drop_train:
                self.drop(train[is_shared], "leakage", f"group_in_{split}")
                splits["train"] = train[~is_shared]
        for split, documents in {"train": splits["train"], **held_out_sets}.items():
            groups = self.groups[np.unique(documents)]
            counts = {"documents": len(groups), "groups": len(np.unique(groups[groups != 0]))}
            report[split] = counts | report.get(split, {"in_training": 0})
        self.selection.report["groups"] = report

    def _held_out_sets(self) -> Iterator[tuple[str, np.ndarray]]:
        """The held-out splits with their documents, that of evaluation by its sets where these have names."""
        columns = self.columns
        splits = self.selection.splits
        evaluation_sets = self.config.eval_path
        for split in HELD_OUT:
            if split not in splits:
                continue
            if split != "eval" or not isinstance(evaluation_sets, Mapping):
                yield split, splits[split]
                continue
            sources = columns.source[splits[split]]
            for name in evaluation_sets:
                if name in columns.sources:
                    yield f"{split}/{name}", splits[split][sources == columns.sources.index(name)]

    def balance(self) -> None:
        """Resample the training documents; label counts before and after."""
        columns = self.columns
        splits = self.selection.splits
        config = self.config.balance
        train = splits["train"]
        labels_before = self._count_labels(train)
        if config.by is not BalanceBy.none and len(train):
            if config.by is BalanceBy.label:
                names = columns.labels
                group_of = columns.label[train]
            else:
                names = columns.sources
                group_of = columns.source[train]
            if not names or (group_of < 0).any():
                raise DataError(f"data.balance.by={config.by}: not every training document has a label")
            kept, report = resample(names, group_of.astype(np.int64), config, self.seed)
            left_out = np.setdiff1d(np.arange(len(train)), kept)
            self.drop(train[left_out], "balance", "left_out")
            splits["train"] = train[kept]
            self.selection.report["balance"] = report
        if labels_before:
            self.selection.report["labels"] = {"before": labels_before, "after": self._count_labels(splits["train"])}

    def _count_labels(self, documents: np.ndarray) -> dict[str, int]:
        if not self.columns.labels:
            return {}
        counts = np.bincount(self.columns.label[documents], minlength=len(self.columns.labels))
        return dict(zip(self.columns.labels, counts.tolist(), strict=True))


def choose(config: DataConfig, columns: Columns, table: DocumentTable, *, seed: int, log: Log) -> Selection:
    """The splits. A function of the columns, the texts, the settings and the seed. Raises DataError, ConfigError."""
    chooser = _SplitChooser(config, columns, table, seed, log)
    chooser.drop_copies()
    chooser.hold_out()
    chooser.drop_leaks()
    chooser.drop_shared_groups()
    chooser.balance()
    selection = chooser.selection
    # In the order that reports use.
    selection.splits = {name: selection.splits[name] for name in ("train", *HELD_OUT) if name in selection.splits}
    return selection


def take_whole_groups(draws: np.ndarray, number: int) -> np.ndarray:
    """bool [n]: which documents to take so that about `number` are; those of one draw (uint64 [n]) all or none.

    Groups are taken in the order of their draws, one that would be too much passed over; at least one is taken.
    """
    _, group, sizes = np.unique(draws, return_inverse=True, return_counts=True)
    is_taken = np.zeros(len(sizes), bool)
    missing = number
    for place, size in enumerate(sizes.tolist()):
        if size <= missing:
            is_taken[place] = True
            missing -= size
        if not missing:
            break
    if not is_taken.any():
        is_taken[sizes.argmin()] = True
    return is_taken[group]
