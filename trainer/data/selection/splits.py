"""Decides which documents make up each split: drops copies, draws held-out shares, takes out leaks, balances groups.

Decisions are made from columns of numbers; a text is read again only to verify that two documents are nearly the same. Copies
are of three kinds, each including the stricter ones: exact, the same words in the same order (normal form), and near copies
(Jaccard similarity of word n-grams). Of each group of copies the first document in the order of input is kept. Every near copy
was compared with the very document that stands for it: similarity is not passed on along chains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.config import HELD_OUT, BalanceBy, DataConfig, DuplicatePolicy, DuplicatesConfig, LeakagePolicy
from trainer.data.document import MAX_EXAMPLES, Tally, location_text
from trainer.data.selection.balance import resample_groups
from trainer.data.selection.document_hashes import NO_GROUP, compared_text, mix_bits
from trainer.data.selection.leakage import find_leaks, train_documents_to_drop
from trainer.data.selection.near_duplicates import find_near_copies
from trainer.data.store.documents import DocumentTable

LogDrop = Callable[[str, str, str], None]
"""Writes a dropped document down: (stage, reason, `file:line`)."""
SEED_FACTOR = 0x9E3779B97F4A7C15
SEED_OFFSET = 0x632BE59BD9B4E019
"""The seed is multiplied with the one, and the other is added, so that draws of different seeds have nothing in common."""


@dataclass(slots=True)
class DocumentColumns:
    """Numbers of every document kept, in input order: what the global decisions are made from."""

    split_numbers: np.ndarray
    """int16 [D], into `split_names`."""
    source_numbers: np.ndarray
    """int16 [D], into `source_names`."""
    num_sequences_by_document: np.ndarray
    """int64 [D]."""
    label_numbers: np.ndarray
    """int64 [D], into `label_names`; -1 where there is none."""
    document_hashes: dict[str, np.ndarray]
    """uint64 [D] each: the hashes of `DocumentHasher.hash_documents`, and "group" (0 for none) if rows have groups."""
    row_numbers: np.ndarray
    """int32 [D]: `Document.row_number`; 0 for none."""
    split_names: list[str]
    source_names: list[str]
    label_names: list[str]

    def __len__(self) -> int:
        return len(self.split_numbers)

    def location(self, number: int, row: dict[str, Any]) -> str:
        """Where a document is, as `Document.location`. `row`: that of the document in the table, which lacks its row number."""
        return location_text(row["file"], row["line"], int(self.row_numbers[number]) or None)

    def of_split(self, name: str) -> np.ndarray:
        """int64: the documents that were read for a split; none for a split without rows."""
        if name not in self.split_names:
            return np.zeros(0, np.int64)
        return np.flatnonzero(self.split_numbers == self.split_names.index(name))


@dataclass(slots=True)
class Selection:
    """The splits, and what was decided on the way."""

    splits: dict[str, np.ndarray]
    """Document numbers of each split, int64, in input order; a repeated document stands several times."""
    tally: Tally = field(default_factory=Tally)
    report: dict[str, Any] = field(default_factory=dict)
    """Parts of the audit: duplicates, leakage, groups, labels, balance."""


COPY_KINDS = ("exact", "normalized", "near")
"""From the strictest on."""


NO_COPY = 0
"""In place of a kind of copy."""


@dataclass(slots=True)
class DuplicateColumns:
    """Which of n documents are copies of an earlier one, and of what kind."""

    representative: np.ndarray
    """int64[n]: the earlier document that a copy duplicates; a document's own index if it is no copy."""
    copy_kind: np.ndarray
    """uint8[n]: `NO_COPY`, or 1 + the index into `COPY_KINDS` of the strictest kind that holds."""
    search_report: dict[str, int] = field(default_factory=dict)
    """What the search for near duplicates did."""

    def is_copy_of_kind(self, kind: str) -> np.ndarray:
        """bool [n]: which documents are copies of a kind of `COPY_KINDS`, and of no stricter one."""
        return self.copy_kind == 1 + COPY_KINDS.index(kind)


def duplicate_policies(config: DuplicatesConfig) -> dict[str, DuplicatePolicy]:
    """Decide what to do with each kind of copy that is looked for, from strict to loose: {"exact": drop, "normalized": report}.

    A near copy may be an exact one, so that the policy of a looser kind holds at least for all stricter ones: with near=drop
    alone all three kinds are dropped. A kind that nobody asked for is not in the result. `config`: `data.duplicates`, with a
    policy for each kind.
    """
    policies_by_severity = (DuplicatePolicy.none, DuplicatePolicy.report, DuplicatePolicy.drop)
    # In the order of `COPY_KINDS`, from strict to loose.
    severities = [policies_by_severity.index(policy) for policy in (config.exact, config.normalized, config.near)]
    policy_by_kind: dict[str, DuplicatePolicy] = {}
    for index, kind in enumerate(COPY_KINDS):
        severity_of_this_or_looser = max(severities[index:])
        policy = policies_by_severity[severity_of_this_or_looser]
        if policy is not DuplicatePolicy.none:
            policy_by_kind[kind] = policy
    return policy_by_kind


def find_duplicates(
    config: DuplicatesConfig,
    document_hashes: Mapping[str, np.ndarray],
    text_of: Callable[[int], str],
    directory: Path | None = None,
) -> DuplicateColumns:
    """Find which of n documents, in input order, are copies of an earlier one, and of what kind: exact, normalised or near.

    `document_hashes`: by name, uint64 [n] each: "digest" of the content, "normal" of its words, "verdict" of its label (documents
    with different labels are no near copies). `text_of(row)` gives the text of a document by which near copies are compared.
    `directory`: where the search for near copies keeps its files while it works. `config`: `data.duplicates`, which says what
    kinds of copies are looked for.
    """
    documents = np.arange(len(document_hashes["digest"]), dtype=np.int64)
    duplicates = DuplicateColumns(representative=documents.copy(), copy_kind=np.full(len(documents), NO_COPY, np.uint8))
    # From the strictest kind on: what is a copy already is not looked at again.
    for kind in duplicate_policies(config):
        is_original_so_far = duplicates.copy_kind == NO_COPY
        if kind == "near":
            representative, duplicates.search_report = find_near_copies(
                is_original_so_far, text_of, document_hashes["verdict"], config.threshold, directory
            )
        else:
            digests = document_hashes["digest"] if kind == "exact" else document_hashes["normal"]
            representative = _first_documents_with_equal_digest(digests, is_original_so_far)
        is_copy = representative != documents
        duplicates.representative[is_copy] = representative[is_copy]
        duplicates.copy_kind[is_copy] = 1 + COPY_KINDS.index(kind)
    # A copy points to the document that it was found to equal. If a later kind found that one to be a copy itself, follow it.
    for _ in COPY_KINDS[1:]:
        duplicates.representative = duplicates.representative[duplicates.representative]
    return duplicates


def _first_documents_with_equal_digest(digests: np.ndarray, is_compared: np.ndarray) -> np.ndarray:
    """Find for each of n documents the first one with the same digest, itself included: int64 [n].

    Digests [7, 5, 7] give [0, 1, 0]. `is_compared` (bool [n]): the others get themselves.
    """
    first_documents = np.arange(len(digests), dtype=np.int64)
    compared_documents = np.flatnonzero(is_compared)
    _, first_positions, digest_numbers = np.unique(digests[is_compared], return_index=True, return_inverse=True)
    first_documents[is_compared] = compared_documents[first_positions[digest_numbers]]
    return first_documents


class _SplitChooser:
    """Chooses the documents of each split step by step: `choose_splits` calls `drop_copies`, `hold_out` and so on in turn.

    It works on columns of numbers about all documents (`columns`). Texts are read again only to find near copies and near leaks.
    """

    def __init__(
        self, config: DataConfig, columns: DocumentColumns, table: DocumentTable, seed: int, log_drop: LogDrop
    ) -> None:
        """Set up the choice of splits. `columns`: what is known of each document, in numbers. `table`: the documents themselves.

        `log_drop`: writes down a document that is dropped.
        """
        self.config = config
        self.columns = columns
        self.table = table
        self.seed = seed
        self.log_drop = log_drop
        self.is_kept = np.ones(len(columns), bool)
        """bool [D]: whether a document is still in."""
        self.content_hashes = columns.document_hashes["digest"].copy()
        """uint64 [D]: what held-out shares are drawn by. A copy has the hash of the document that it copies."""
        self.group_hashes = columns.document_hashes.get("group")
        """uint64 [D]: hash of each document's group, `NO_GROUP` for none; None without `data.group_by`."""
        self.selection = Selection({})

    def drop(self, documents: np.ndarray, stage: str, reason: str) -> None:
        """Take documents out of the data set: clear them in `is_kept`, and count and log each one that was still in.

        `stage` and `reason` say why, in the report: ("duplicates", "exact").
        """
        for number in documents[self.is_kept[documents]].tolist():  # a document is dropped once, under the first reason
            location = self.location_of(number)
            self.selection.tally.drop(stage, reason, location)
            self.log_drop(stage, reason, location)
        self.is_kept[documents] = False

    def location_of(self, number: int) -> str:
        """Where a document is, as `Document.location`."""
        return self.columns.location(number, self.table.row(number))

    def compared_text(self, number: int) -> str:
        """The text by which near copies are compared."""
        return compared_text(self.table.document(number), self.config.duplicates.text)

    def drop_copies(self) -> None:
        """Report, and by policy drop, exact, normalised and near copies within the training documents.

        Copies also get the content hash of their original, so that `hold_out` puts all of them on the same side. Sets
        `selection.report["duplicates"]`, such as {"exact": {"policy": "drop", "documents": 12, ...}}.
        """
        config = self.config.duplicates
        train = self.columns.of_split("train")
        if not len(train):
            return
        document_hashes = {name: column[train] for name, column in self.columns.document_hashes.items()}
        duplicates = find_duplicates(
            config, document_hashes, lambda row: self.compared_text(int(train[row])), self.table.directory
        )
        # `duplicates` counts from the first training document; `train` gives the document's number.
        originals = train[duplicates.representative]
        self.content_hashes[train] = self.content_hashes[originals]  # an original is its own
        report: dict[str, Any] = {}
        for kind, policy in duplicate_policies(config).items():
            is_copy = duplicates.is_copy_of_kind(kind)
            report[kind] = {"policy": str(policy), **self._copies_report(train[is_copy], originals[is_copy])}
            if kind == "near":
                report[kind] |= {"threshold": config.threshold, "search": duplicates.search_report}
            # `report` leaves the copies in.
            if policy is DuplicatePolicy.drop:
                self.drop(train[is_copy], "duplicates", kind)
        self.selection.report["duplicates"] = report

    def _copies_report(self, copies: np.ndarray, originals: np.ndarray) -> dict[str, Any]:
        """Count copies for the report, with the first examples: {"documents": 12, "groups": 5, "examples": [{"a": ...}]}.

        `copies` and `originals`: numbers of documents, int64 [n] each, a copy beside the document that it copies.
        """
        examples = []
        for copy, original in zip(copies[:MAX_EXAMPLES].tolist(), originals[:MAX_EXAMPLES].tolist(), strict=True):
            examples.append({"a": self.location_of(original), "b": self.location_of(copy)})
        return {"documents": len(copies), "groups": len(np.unique(originals)), "examples": examples}

    def hold_out(self) -> None:
        """Divide the documents: set `selection.splits` to the held-out splits and the training documents that are left.

        Held-out documents come from files of their own (`data.eval_path`), or are a share of the training data
        (`data.eval_share`).
        """
        columns = self.columns
        splits = self.selection.splits
        for split in HELD_OUT:
            if split in columns.split_names:  # it has files of its own
                splits[split] = columns.of_split(split)
        train = columns.of_split("train")
        splits["train"] = train[self.is_kept[train]]
        if self.config.eval_share or self.config.test_share:
            self._draw_held_out_shares(splits["train"])

    def _draw_held_out_shares(self, train: np.ndarray) -> None:
        """Move `data.eval_share` and `data.test_share` of the training documents `train` to splits of their own.

        They are the documents with the smallest draws. A draw is a hash of the document's content and the seed, so that copies
        fall on the same side. If rows have groups (`data.group_by`), it is a hash of the group; copies in two groups may then
        fall apart, and the search for leaks reports them. Raises DataError if no training document is left.
        """
        splits = self.selection.splits
        hashes = self.content_hashes if self.group_hashes is None else self.group_hashes
        seed_term = np.uint64((self.seed * SEED_FACTOR + SEED_OFFSET) % 2**64)
        draws = mix_bits(hashes[train] + seed_term)
        is_held_out = np.zeros(len(train), bool)
        for split in HELD_OUT:
            share = getattr(self.config, f"{split}_share")
            if not share or not len(train):
                continue
            free = np.flatnonzero(~is_held_out)
            if not len(free):
                break
            num_wanted = min(len(free), max(1, round(share * len(train))))  # at least one document
            held_out = free[self._has_smallest_draw(draws[free], num_wanted)]
            is_held_out[held_out] = True
            splits[split] = train[held_out]
        if len(train) and is_held_out.all():
            raise self._empty_training_error(num_documents=len(train), num_distinct_draws=len(np.unique(draws)))
        splits["train"] = train[~is_held_out]

    def _has_smallest_draw(self, draws: np.ndarray, num_wanted: int) -> np.ndarray:
        """Choose about `num_wanted` documents to hold out, those with the smallest draws: bool [n].

        `draws` (uint64 [n]): seeded hashes of documents or groups. Documents with equal draws are taken together. Without groups
        these are copies of each other, and all copies of the last one are taken. With groups they are a group, and one that is
        larger than what is missing is passed over.
        """
        if self.group_hashes is not None:
            return choose_whole_groups(draws, num_wanted)
        largest_draw = np.partition(draws, num_wanted - 1)[num_wanted - 1]
        return draws <= largest_draw

    def _empty_training_error(self, num_documents: int, num_distinct_draws: int) -> DataError:
        """Make the error for held-out shares that leave no training document, since copies and members of a group stay together.

        `num_distinct_draws`: how many of the documents differ, or with `data.group_by` how many groups there are. Example:
        "data.eval_share=0.5 leaves no training document: 9 documents, 1 of them different; ..."
        """
        share_settings = []
        for split in HELD_OUT:
            share = getattr(self.config, f"{split}_share")
            if share:
                share_settings.append(f"data.{split}_share={share:g}")
        different = (
            "of them different" if self.group_hashes is None else f"groups by data.group_by={self.config.group_by}"
        )
        return DataError(
            f"{' and '.join(share_settings)} leaves no training document: {num_documents} documents, "
            f"{num_distinct_draws} {different}; add data, or set it to 0"
        )

    def drop_leaks(self) -> None:
        """Report, and by `data.leakage.policy` drop, training documents that are in a held-out split too.

        Sets `selection.report["leakage"]`, by held-out set, and takes the dropped documents out of the training split. Raises
        DataError if the policy is `fail` and a document leaks.
        """
        splits = self.selection.splits
        policy = self.config.leakage.policy
        report: dict[str, Any] = {}
        for set_name, held_out in self._held_out_sets():
            train = splits["train"]  # what earlier held-out sets have left
            if not len(train) or not len(held_out):
                continue
            document_hashes = self.columns.document_hashes
            leaks = find_leaks(document_hashes, train, held_out, self.config, self.compared_text, self.table.directory)
            leak_counts = leaks.to_report(self.location_of)
            report[set_name] = {"policy": str(policy), **leak_counts}
            dropped = train_documents_to_drop(leaks, policy, len(train), leak_counts)
            self.drop(dropped, "leakage", f"in_{set_name}")
            splits["train"] = np.setdiff1d(train, dropped)
        if report:
            self.selection.report["leakage"] = report

    def drop_shared_groups(self) -> None:
        """Report, and by policy drop, training documents whose group (`data.group_by`) is in a held-out split too.

        A group is what rows belong to together, such as a patient. It can only be shared if the held-out split has files of its
        own: drawn shares never part a group. Sets `selection.report["groups"]`, by split. Raises DataError if the policy is
        `fail` and a group is shared.
        """
        if self.group_hashes is None:
            return
        splits = self.selection.splits
        held_out_sets = dict(self._held_out_sets())  # splits, or the named sets of the eval split
        num_shared_by_set: dict[str, int] = {}
        for set_name, held_out in held_out_sets.items():
            train = splits["train"]  # what earlier held-out sets have left
            train_groups = self.group_hashes[train]
            is_shared = np.isin(train_groups, self.group_hashes[held_out]) & (train_groups != NO_GROUP)
            num_shared_by_set[set_name] = int(is_shared.sum())
            self._apply_leakage_policy_to_groups(train, is_shared, set_name)
        report: dict[str, Any] = {}
        for set_name, documents in {**held_out_sets, "train": splits["train"]}.items():
            groups = self.group_hashes[np.unique(documents)]
            report[set_name] = {
                "documents": len(groups),
                "groups": len(np.unique(groups[groups != NO_GROUP])),
                "in_training": num_shared_by_set.get(set_name, 0),
            }
        self.selection.report["groups"] = report

    def _apply_leakage_policy_to_groups(self, train: np.ndarray, is_shared: np.ndarray, set_name: str) -> None:
        """Carry out `data.leakage.policy` on training documents whose group the held-out set `set_name` has too.

        `train` (int64 [n]): numbers of the training documents; `is_shared` (bool [n]): whether the group is in both. `drop_train`
        takes these out of the training split; `fail` raises DataError if there are any; `report` leaves them in.
        """
        policy = self.config.leakage.policy
        if policy is LeakagePolicy.fail and is_shared.any():
            raise DataError(
                f"{int(is_shared.sum())} of {len(train)} training documents are of groups (data.group_by="
                f"{self.config.group_by}) that the {set_name} split has too: {self.location_of(int(train[is_shared][0]))} and "
                "others; take them out of one of the two, or set data.leakage.policy=drop_train, or report to continue"
            )
        if policy is LeakagePolicy.drop_train:
            self.drop(train[is_shared], "leakage", f"group_in_{set_name}")
            self.selection.splits["train"] = train[~is_shared]

    def _held_out_sets(self) -> Iterator[tuple[str, np.ndarray]]:
        """The sets of held-out documents that are looked at by themselves: (name, document numbers) of each.

        That is each held-out split; but evaluation by its named sets if it has some, called `eval/<name>`.
        """
        columns = self.columns
        splits = self.selection.splits
        evaluation_sets = self.config.eval_path
        for split in HELD_OUT:
            if split not in splits:
                continue
            if split != "eval" or not isinstance(evaluation_sets, Mapping):
                yield split, splits[split]
                continue
            # Each named set was read as a source of its own.
            source_numbers = columns.source_numbers[splits[split]]
            for name in evaluation_sets:
                if name in columns.source_names:
                    yield f"{split}/{name}", splits[split][source_numbers == columns.source_names.index(name)]

    def balance(self) -> None:
        """Resample the training documents as `data.balance` says, such as equally many of each label.

        Documents that are not used any more are dropped. Sets `selection.report["balance"]` if balance is on, and for data with
        labels `selection.report["labels"]`, their counts before and after. Raises DataError if a document has no label by which
        to balance.
        """
        splits = self.selection.splits
        train = splits["train"]
        labels_before = self._count_labels(train)
        if self.config.balance.by is not BalanceBy.none and len(train):
            group_names, group_of_document = self._balanced_groups(train)
            resampled = resample_groups(group_names, group_of_document, self.config.balance, self.seed)
            positions_in_train = resampled.documents  # a document may stand there several times
            unused_positions = np.setdiff1d(np.arange(len(train)), positions_in_train)
            self.drop(train[unused_positions], "balance", "left_out")
            splits["train"] = train[positions_in_train]
            self.selection.report["balance"] = resampled.report_by_group
        if labels_before:
            self.selection.report["labels"] = {"before": labels_before, "after": self._count_labels(splits["train"])}

    def _balanced_groups(self, train: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The groups that `data.balance` brings to their shares: (their names, of each training document the index of its group).

        Groups are sources or labels (`data.balance.by`). `train`: document numbers. Raises DataError if a document has no label.
        """
        group_names = self.columns.source_names
        group_of_document = self.columns.source_numbers[train]
        if self.config.balance.by is BalanceBy.label:
            group_names = self.columns.label_names
            group_of_document = self.columns.label_numbers[train]
        has_group = group_of_document >= 0  # -1 stands for no label
        if not group_names or not has_group.all():
            raise DataError(f"data.balance.by={self.config.balance.by}: not every training document has a label")
        return group_names, group_of_document.astype(np.int64)

    def _count_labels(self, documents: np.ndarray) -> dict[str, int]:
        """Documents by label; empty for data without labels."""
        if not self.columns.label_names:
            return {}
        counts = np.bincount(self.columns.label_numbers[documents], minlength=len(self.columns.label_names))
        return dict(zip(self.columns.label_names, counts.tolist(), strict=True))


def choose_splits(
    config: DataConfig, columns: DocumentColumns, table: DocumentTable, *, seed: int, log_drop: LogDrop
) -> Selection:
    """Choose the documents of each split, after all were tokenised: drop copies and leaks, hold out, balance.

    The result depends on the columns, the texts, the settings and the seed alone. `log_drop` is called for every document that is
    dropped. Raises DataError, ConfigError.
    """
    chooser = _SplitChooser(config, columns, table, seed, log_drop)
    chooser.drop_copies()
    chooser.hold_out()
    chooser.drop_leaks()
    chooser.drop_shared_groups()
    chooser.balance()
    selection = chooser.selection
    # In the order that reports use.
    selection.splits = {name: selection.splits[name] for name in ("train", *HELD_OUT) if name in selection.splits}
    return selection


def choose_whole_groups(draws: np.ndarray, num_wanted: int) -> np.ndarray:
    """Choose which of n documents to hold out, bool [n]: about `num_wanted` of them, and of a group all members or none.

    Draws [7, 3, 7, 5] and 2 wanted give [False, True, False, True]: groups 3 and 5 have one member each.

    `draws` (uint64 [n]): documents with the same draw are a group. Groups are taken in the order of their draws. A group that is
    larger than what is missing is passed over. If all are too large, the smallest group is taken.
    """
    _, group_of, sizes = np.unique(draws, return_inverse=True, return_counts=True)
    is_taken = np.zeros(len(sizes), bool)
    num_missing = num_wanted
    for group, size in enumerate(sizes.tolist()):
        if size <= num_missing:
            is_taken[group] = True
            num_missing -= size
        if not num_missing:
            break
    if not is_taken.any():
        is_taken[sizes.argmin()] = True
    return is_taken[group_of]
