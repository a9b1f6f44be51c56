"""Blocks of rows: jobs that rows are dealt into, what became of each, and the data set that blocks are put together to.

A block's result depends on its rows and the settings alone, so that any number of workers makes the same data set. Blocks
arrive in input order. What each document is, and where it came from, is written to disk once; in memory are columns of
numbers only, so that the data may be larger than memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import DataError
from trainer.data.choose.splits import Columns
from trainer.data.document import EXAMPLES, WRONG_KIND, Rejected, Tally
from trainer.data.fields import MOST_NAMES
from trainer.data.read.row import Row
from trainer.data.stages.privacy.stage import Findings
from trainer.data.store.documents import TableWriter
from trainer.data.store.sequences import LABEL, MARK_PREFIX, Sequences, StoreWriter

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)
class Job:
    """Rows of one source and one split, in input order."""

    number: int
    split: str
    source: str
    offset: int
    """Number of rows of the same split and source before this job."""
    rows: list[Row | Rejected]


@dataclass(slots=True)
class Bad:
    """A row in quarantine, lost although no setting asked for it (but a check's `quarantine`): unreadable, refused by the
    chat template, or with nothing left to learn."""

    source: str
    file: str
    line: int
    reason: str
    message: str
    excerpt: str


@dataclass(slots=True)
class Block:
    """What became of a job."""

    number: int
    split: str
    source: str
    rows: int
    rows_of_file: dict[str, int] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    documents: pa.RecordBatch | None = None
    """What is kept, as rows of `documents.arrow`, with `pieces[i]` sequences of document i."""
    pieces: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sequences: Sequences | None = None
    unread: list[str] = field(default_factory=list)
    """Columns that nothing read."""
    labels: list[str] = field(default_factory=list)
    """Label names in the block's own numbering."""
    signatures: dict[str, np.ndarray] = field(default_factory=dict)
    """Per document, see `curation.duplicates.Signer`."""
    findings: Findings | None = None


def jobs(
    rows: Iterator[tuple[tuple[str, str], Row | Rejected]], *, most_rows: int = 512, most_bytes: int = 4 << 20
) -> Iterator[Job]:
    """Group ((split, source), row) into jobs; where a job ends depends on the input alone."""
    number, size, current = 0, 0, Job(0, "", "", 0, [])
    for (split, source), row in rows:
        same = (split, source) == (current.split, current.source)
        if not same or len(current.rows) >= most_rows or size >= most_bytes:
            if current.rows:
                yield current
                number += 1
            current = Job(number, split, source, current.offset + len(current.rows) if same else 0, [])
            size = 0
        current.rows.append(row)
        size += len(row.raw) if isinstance(row, Row) and row.raw is not None else 1024
    if current.rows:
        yield current


def knobs(*, splits: bool) -> dict[str, str]:
    """What keeps rows that were lost for a reason, where a setting does; `splits`: long documents may be split, and are not."""
    return {
        "nothing_to_learn": "raise data.max_length" + (" or set data.over_length=split" if splits else ""),
        "same_answers": "raise data.max_length",
        "control_tokens": "set data.control_tokens=text",
    }


def refuse_bad(
    bad: list[Bad], reasons: Counter[str], num_rows: int, limit: float, quarantine: str, remedies: dict[str, str]
) -> None:
    """Raise DataError where more than the share `limit` of the rows is in quarantine; `bad` holds the first of them.

    `remedies` are `knobs`. Whatever the limit, also where all rows are of a kind that the objective cannot learn from.
    """
    if not num_rows or ((num_bad := reasons.total()) / num_rows <= limit and reasons[WRONG_KIND] < num_rows):
        return
    shown = "\n".join(f"  {b.file}:{b.line}: {b.message}" for b in bad)
    more = f"\n  ... and {num_bad - len(bad)} more" if num_bad > len(bad) else ""
    counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
    advice = "".join(f"{knob}, " for knob in dict.fromkeys(remedies[r] for r in remedies if r in reasons))
    share = math.ceil(100 * num_bad / num_rows) / 100
    more += f"\nall of them are listed in {quarantine}; {advice}mend the data"
    if num_bad < num_rows:
        more += f", or go on without them with data.max_bad_share={share:g}"
    allowed = f", more than data.max_bad_share={limit:g} allows" if num_bad / num_rows > limit else ""
    raise DataError(f"{num_bad} of {num_rows} rows cannot be used ({counts}){allowed}:\n{shown}{more}")


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
        self._splits, self._sources, self._labels = dict[str, int](), dict[str, int](), dict[str, int]()
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
        if block.findings is not None:
            totals.findings = totals.findings or Findings()
            totals.findings.merge(block.findings)
        assert block.sequences is not None and block.documents is not None
        columns = block.sequences.columns
        if LABELS in columns:
            local = np.array([_number(self._labels, name) for name in block.labels], np.int64)
            columns[LABELS] = local[columns[LABELS]]
        first = sum(len(part) for part in self._columns.get("pieces", ()))
        columns["document"] = np.repeat(np.arange(first, first + number), block.pieces)
        columns["source"] = np.full(len(block.sequences.lengths), _number(self._sources, block.source), np.int64)
        self.store.append(block.sequences)
        self._table.append(block.documents)
        self._keep(block, number, columns)

    def _keep(self, block: Block, number: int, columns: dict[str, np.ndarray]) -> None:
        starts = np.concatenate([[0], np.cumsum(block.pieces)[:-1]]).astype(np.int64) if number else np.zeros(0, int)
        label = columns[LABELS][starts] if LABELS in columns else np.full(number, -1, np.int64)
        values = {
            "split": np.full(number, _number(self._splits, block.split), np.int16),
            "source": np.full(number, _number(self._sources, block.source), np.int16),
            "pieces": block.pieces,
            "label": label,
            **{f"signature.{name}": column for name, column in block.signatures.items()},
        }
        for name, column in values.items():
            self._columns.setdefault(name, []).append(column)

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
            splits=list(self._splits),
            sources=list(self._sources),
            labels=list(self._labels),
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


def _number(names: dict[str, int], name: str) -> int:
    """The number of a name in the order of their first appearance."""
    return names.setdefault(name, len(names))
