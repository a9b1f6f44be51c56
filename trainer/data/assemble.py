"""From blocks to a prepared data set: everything that is kept is written once, then the splits are chosen.

Blocks arrive in input order. What each document is, and where it came from, stays on disk; in memory are columns of
numbers only, so that the data may be larger than memory.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import DataError
from trainer.data.block import Bad, Block, refuse_bad
from trainer.data.choose.splits import Columns
from trainer.data.document import EXAMPLES, Tally
from trainer.data.stages.privacy.stage import Findings
from trainer.data.store.documents import TableWriter
from trainer.data.store.sequences import LABEL, MARK_PREFIX, StoreWriter
from trainer.data.unread import MOST_NAMES

LABELS = MARK_PREFIX + LABEL
QUARANTINE, DROPPED = "quarantine.jsonl", "dropped.jsonl"
GIVE_UP = 1000
"""Bad rows after which a run that allows none (or fewer) stops reading."""


@dataclass(slots=True)
class Totals:
    """What the blocks counted, added up."""

    tally: Tally = field(default_factory=Tally)
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    """Rows read, by (split, source)."""
    kept: dict[tuple[str, str], int] = field(default_factory=dict)
    rows_of_file: Counter[str] = field(default_factory=Counter)
    bad: list[Bad] = field(default_factory=list)
    """The first few."""
    bad_reasons: Counter[str] = field(default_factory=Counter)
    """All of them, by reason."""
    unread: dict[str, dict[str, None]] = field(default_factory=dict)
    """Columns that nothing read, by source, in order of appearance."""
    findings: Findings | None = None

    @property
    def num_bad(self) -> int:
        """Rows in quarantine."""
        return self.bad_reasons.total()

    @property
    def num_rows(self) -> int:
        """Rows read, bad ones included."""
        return sum(self.rows.values())


class Assembly:
    """Writes blocks into a directory. `close` gives the columns; no more blocks after it."""

    def __init__(self, directory: Path, max_bad_share: float, rejected: Path, remedies: dict[str, str]) -> None:
        self.directory = directory
        self.totals = Totals()
        self.max_bad_share = max_bad_share
        self.rejected = rejected
        """Where the quarantine file is kept when the run is refused."""
        self.remedies = remedies
        """What keeps lost rows, see `knobs`."""
        self.store = StoreWriter(directory)
        self._table = TableWriter(directory)
        self._quarantine = (directory / QUARANTINE).open("w", encoding="utf-8")
        self._dropped = (directory / DROPPED).open("w", encoding="utf-8")
        self._splits, self._sources = Names(), Names()
        self._labels = Names()
        self._columns: dict[str, list[np.ndarray]] = {}

    def append(self, block: Block) -> None:
        """Write one block. Raises DataError as soon as too many rows are bad."""
        totals, key = self.totals, (block.split, block.source)
        number = len(block.pieces)
        totals.rows[key] = totals.rows.get(key, 0) + block.rows
        totals.kept[key] = totals.kept.get(key, 0) + number
        if block.rows != number + block.tally.num_dropped():
            raise AssertionError(f"block {block.number}: {block.rows} rows in, {number} kept, the rest unaccounted for")
        totals.rows_of_file.update(block.rows_of_file)
        totals.tally.merge(block.tally)
        if len(names := totals.unread.setdefault(block.source, {})) < MOST_NAMES:
            names.update(dict.fromkeys(block.unread))
        self._log(block)
        if totals.num_bad > GIVE_UP and totals.num_bad > self.max_bad_share * max(totals.num_rows, 10 * GIVE_UP):
            self.refuse()
        self._count(block)
        assert block.sequences is not None and block.documents is not None
        columns = block.sequences.columns
        if LABELS in columns:
            local = np.array([self._labels.number(name) for name in block.labels], np.int64)
            columns[LABELS] = local[columns[LABELS]]
        first = sum(len(part) for part in self._columns.get("pieces", ()))
        columns["document"] = np.repeat(np.arange(first, first + number), block.pieces)
        columns["source"] = np.full(len(block.sequences.lengths), self._sources.number(block.source), np.int64)
        self.store.append(block.sequences)
        self._table.append(block.documents)
        self._keep(block, number, columns)

    def _keep(self, block: Block, number: int, columns: dict[str, np.ndarray]) -> None:
        starts = np.concatenate([[0], np.cumsum(block.pieces)[:-1]]).astype(np.int64) if number else np.zeros(0, int)
        label = columns[LABELS][starts] if LABELS in columns else np.full(number, -1, np.int64)
        values = {
            "split": np.full(number, self._splits.number(block.split), np.int16),
            "source": np.full(number, self._sources.number(block.source), np.int16),
            "pieces": block.pieces,
            "label": label,
            **{f"signature.{name}": column for name, column in block.signatures.items()},
        }
        for name, column in values.items():
            self._columns.setdefault(name, []).append(column)

    def _count(self, block: Block) -> None:
        totals = self.totals
        if totals.findings is None:
            totals.findings = block.findings
        elif block.findings is not None:
            totals.findings.merge(block.findings)

    def _log(self, block: Block) -> None:
        for bad in block.bad:
            self._quarantine.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")
        self.totals.bad_reasons.update(bad.reason for bad in block.bad)
        self.totals.bad += block.bad[: EXAMPLES - len(self.totals.bad)]
        for stage, reason, where in block.tally.drops:
            self.log_drop(stage, reason, where)

    def log_drop(self, stage: str, reason: str, where: str) -> None:
        """Write one dropped document down."""
        self._dropped.write(json.dumps({"where": where, "stage": stage, "reason": reason}) + "\n")

    def refuse(self) -> None:
        """Raise DataError where there are too many bad rows; their list survives the refused data set."""
        self._quarantine.flush()
        totals, kept_in = self.totals, str(self.rejected)
        try:
            refuse_bad(totals.bad, totals.bad_reasons, totals.num_rows, self.max_bad_share, kept_in, self.remedies)
        except DataError:
            self.rejected.parent.mkdir(parents=True, exist_ok=True)
            self.rejected.write_bytes((self.directory / QUARANTINE).read_bytes())
            raise

    def columns(self) -> Columns:
        """Everything known of the documents; raises DataError where too many rows were bad. Call once, after the last block."""
        self._table.close()
        self.refuse()
        joined = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if not joined:
            raise DataError("data.path: holds no rows")
        signatures = {n.removeprefix("signature."): c for n, c in joined.items() if n.startswith("signature.")}
        return Columns(
            split=joined["split"],
            source=joined["source"],
            pieces=joined["pieces"],
            label=joined["label"],
            signatures=signatures,
            splits=self._splits.names,
            sources=self._sources.names,
            labels=self._labels.names,
        )

    def finish(self, label_ids: np.ndarray | None) -> None:
        """Write the tables of the store; `label_ids` (int64 [L]) renumbers the labels. Empty logs are removed."""
        replaced: dict[str, Any] = {}
        if label_ids is not None:
            replaced[LABELS] = label_ids[self.store.column(LABELS)]
        self.store.finish(**replaced)
        self.store.__exit__(None, None, None)
        self.close()
        for name in (QUARANTINE, DROPPED):
            if not (self.directory / name).stat().st_size:
                (self.directory / name).unlink()

    def close(self) -> None:
        """Close the logs."""
        self._quarantine.close()
        self._dropped.close()


class Names:
    """Names by number, in the order of their first appearance."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """The number of a name, a new one if need be."""
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]
