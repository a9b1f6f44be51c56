"""Blocks of prepared rows, and how they are joined into the data set.

The result for a block depends on its rows and the settings alone, so any number of workers makes the same data set.
Blocks arrive in input order. Documents and their origins are written to disk once. Memory holds only columns of
numbers, so the data may be larger than memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from strategies.errors import DataError
from trainer.data.document import EXAMPLES, WRONG_KIND, Findings, Rejected, Tally
from trainer.data.fields import MAX_NAMES
from trainer.data.selection.splits import Columns
from trainer.data.store.documents import DOCUMENTS_FILE, schema
from trainer.data.store.sequences import LABEL, MARK_PREFIX, Sequences, StoreWriter, columns_with_prefix

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(slots=True)
class Block:
    """What became of a job."""

    number: int
    split: str
    source: str
    rows: int
    rows_of_file: dict[str, int] = field(default_factory=dict)
    bad: list[Rejected] = field(default_factory=list)
    """Rows in quarantine, lost although no setting asked for it (but a check's `quarantine`): unreadable, refused by the chat
    template, or with nothing left to learn."""
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
    """Per document, see `choose.copies.Signer`."""


LABELS = MARK_PREFIX + LABEL
QUARANTINE, DROPPED = "quarantine.jsonl", "dropped.jsonl"
GIVE_UP = 1000
"""Bad rows after which a run that allows none (or fewer) stops reading."""
LOST = {
    "nothing_to_learn": "no supervised token is left to learn within data.max_length={}",
    "same_answers": "both answers are the same within data.max_length={}",
}
"""Reasons for which tokenising drops a document although nobody asked for it."""
REMEDIES = {
    "nothing_to_learn": "raise data.max_length or set data.over_length=split",
    "same_answers": "raise data.max_length",
    "control_tokens": "set data.control_tokens=text",
    "wrong_format": "give rows of each format as a source of its own (data.sources.one.path=... data.sources.two.path=...)",
}
"""What keeps rows that were lost for a reason, where a setting does."""


@dataclass(slots=True)
class Totals:
    """What the blocks counted, added up."""

    tally: Tally = field(default_factory=Tally)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rows read, by (split, source)."""
    kept: Counter[tuple[str, str]] = field(default_factory=Counter)
    rows_of_file: Counter[str] = field(default_factory=Counter)
    bad: list[Rejected] = field(default_factory=list)
    """The first few."""
    bad_reasons: Counter[str] = field(default_factory=Counter)
    """All of them, by reason."""
    unread: dict[str, dict[str, None]] = field(default_factory=dict)
    """Columns that nothing read, by source, in order of appearance."""


class Assembly:
    """Writes blocks into a directory. `columns` gives what was kept; no more blocks after it.

    `splits`: long documents may be split, and are not. `rejected`: where the quarantine file is kept when the run is refused.
    """

    def __init__(self, directory: Path, max_bad_share: float, rejected: Path, *, splits: bool) -> None:
        self.directory, self.max_bad_share, self.rejected, self.splits = directory, max_bad_share, rejected, splits
        self.totals = Totals()
        import pyarrow as pa

        self.store = StoreWriter(directory)
        self._table = pa.ipc.new_stream(str(directory / DOCUMENTS_FILE), schema())
        self._quarantine = (directory / QUARANTINE).open("w", encoding="utf-8")
        self._dropped = (directory / DROPPED).open("w", encoding="utf-8")
        self._splits, self._sources, self._labels = dict[str, int](), dict[str, int](), dict[str, int]()
        self._columns: dict[str, list[np.ndarray]] = {}
        self._number = 0
        """Documents so far."""

    def append(self, block: Block) -> None:
        """Write one block. Raises DataError as soon as too many rows are bad."""
        totals, key, number = self.totals, (block.split, block.source), len(block.pieces)
        totals.rows[key] += block.rows
        totals.kept[key] += number
        if block.rows != number + len(block.tally.drops):
            raise AssertionError(f"block {block.number}: {block.rows} rows in, {number} kept, the rest unaccounted for")
        totals.rows_of_file.update(block.rows_of_file)
        totals.tally.merge(block.tally)
        if len(names := totals.unread.setdefault(block.source, {})) < MAX_NAMES:
            names.update(dict.fromkeys(block.unread))
        for bad in block.bad:
            self._quarantine.write(json.dumps({"source": block.source, **asdict(bad)}, ensure_ascii=False) + "\n")
        totals.bad_reasons.update(bad.reason for bad in block.bad)
        totals.bad += block.bad[: EXAMPLES - len(totals.bad)]
        for drop in block.tally.drops:
            self.log_drop(*drop)
        num_bad = totals.bad_reasons.total()
        if num_bad > GIVE_UP and num_bad > self.max_bad_share * max(totals.rows.total(), 10 * GIVE_UP):
            self.refuse()
        assert block.sequences is not None and block.documents is not None
        columns, source = block.sequences.columns, self._sources.setdefault(block.source, len(self._sources))
        starts = np.cumsum(block.pieces) - block.pieces
        labels = np.full(number, -1, np.int64)
        if LABELS in columns:
            local = [self._labels.setdefault(name, len(self._labels)) for name in block.labels]
            columns[LABELS] = np.array(local, np.int64)[columns[LABELS]]
            labels = columns[LABELS][starts]
        columns["document"] = np.repeat(np.arange(self._number, self._number + number), block.pieces)
        columns["source"] = np.full(len(block.sequences.lengths), source, np.int64)
        self._number += number
        values = {
            "split": np.full(number, self._splits.setdefault(block.split, len(self._splits)), np.int16),
            "source": np.full(number, source, np.int16),
            "pieces": block.pieces,
            "label": labels,
            **{f"signature.{name}": column for name, column in block.signatures.items()},
        }
        for name, column in values.items():
            self._columns.setdefault(name, []).append(column)
        self.store.append(block.sequences)
        if number:
            self._table.write_batch(block.documents)

    def log_drop(self, stage: str, reason: str, where: str) -> None:
        """Write one dropped document down."""
        self._dropped.write(json.dumps({"where": where, "stage": stage, "reason": reason}) + "\n")

    def refuse(self) -> None:
        """Raise DataError where there are too many bad rows; their list survives the refused data set.

        Whatever `max_bad_share`, also where all rows are of a kind that the objective cannot learn from.
        """
        reasons, num_rows, limit = self.totals.bad_reasons, self.totals.rows.total(), self.max_bad_share
        num_bad = reasons.total()
        if not num_rows or (num_bad / num_rows <= limit and reasons[WRONG_KIND] < num_rows):
            return
        self._quarantine.flush()
        self.rejected.parent.mkdir(parents=True, exist_ok=True)
        self.rejected.write_bytes((self.directory / QUARANTINE).read_bytes())
        by_message = {bad.message: bad for bad in reversed(self.totals.bad)}  # the first row of each message
        lines = [f"  {bad}" for bad in reversed(by_message.values())]
        if num_bad > len(lines):
            like_it = " like it" if len(lines) == len(reasons) == 1 else ""
            lines.append(f"  ... and {num_bad - len(lines):,} more{like_it}")
        advice = [knob for reason, knob in REMEDIES.items() if reason in reasons]
        if not self.splits:
            advice = [knob.removesuffix(" or set data.over_length=split") for knob in advice]
        last = f"all of them are listed in {self.rejected}; {', '.join([*dict.fromkeys(advice), 'mend the data'])}"
        if num_bad < num_rows:
            last += f", or continue without them with data.max_bad_share={math.ceil(100 * num_bad / num_rows) / 100:g}"
        counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
        allowed = f", more than data.max_bad_share={limit:g} allows" if num_bad / num_rows > limit else ""
        shown = "\n".join([*lines, last])
        raise DataError(f"{num_bad} of {num_rows} rows cannot be used ({counts}){allowed}:\n{shown}")

    def columns(self) -> Columns:
        """Everything known of the documents; raises DataError where too many rows were bad. Call once, after the last block."""
        self.refuse()
        self._table.close()
        joined = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if not joined:
            raise DataError("data.path: holds no rows")
        return Columns(
            split=joined["split"],
            source=joined["source"],
            pieces=joined["pieces"],
            label=joined["label"],
            signatures={n.removeprefix("signature."): c for n, c in joined.items() if n.startswith("signature.")},
            splits=list(self._splits),
            sources=list(self._sources),
            labels=list(self._labels),
        )

    def finish(self, label_ids: np.ndarray | None) -> None:
        """Write the tables of the store; `label_ids` (int64 [L]) renumbers the labels. Empty logs are removed."""
        renumbered = {} if label_ids is None else {LABELS: label_ids[self.store.column(LABELS)]}
        self.close()
        self.store.finish(**renumbered)
        for name in (QUARANTINE, DROPPED):
            if not (self.directory / name).stat().st_size:
                (self.directory / name).unlink()

    def close(self) -> None:
        """Close the logs."""
        self._quarantine.close()
        self._dropped.close()


PLAIN = ("number", "split", "source", "rows", "rows_of_file", "unread", "labels")
"""What JSON can have of a block as it is."""


def save(block: Block, path: Path) -> None:
    """Write a block to a file. Raises OSError."""
    assert block.sequences is not None and block.documents is not None
    about = {name: getattr(block, name) for name in (*PLAIN, "bad", "tally")}
    arrays: dict[str, Any] = {
        "about": np.frombuffer(orjson.dumps(about), np.uint8),
        "documents": np.frombuffer(block.documents.serialize(), np.uint8),
        "pieces": block.pieces,
        "tokens": block.sequences.tokens,
        "supervised": block.sequences.supervised,
        **({} if block.sequences.weights is None else {"weights": block.sequences.weights}),
        "lengths": block.sequences.lengths,
        **{f"column.{name}": values for name, values in block.sequences.columns.items()},
        **{f"signature.{name}": values for name, values in block.signatures.items()},
    }
    np.savez(path, **arrays)


def load(path: Path) -> Block:
    """Read a block that `save` wrote."""
    import pyarrow as pa

    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = orjson.loads(arrays["about"].tobytes())
    return Block(
        **{name: about[name] for name in PLAIN},
        bad=[Rejected(**bad) for bad in about["bad"]],
        tally=Tally(**{**about["tally"], "findings": Findings(**about["tally"]["findings"])}),
        documents=pa.ipc.read_record_batch(pa.py_buffer(arrays["documents"]), schema()),
        pieces=arrays["pieces"],
        sequences=Sequences(
            arrays["tokens"],
            arrays["supervised"],
            arrays["lengths"],
            columns_with_prefix(arrays, "column."),
            arrays.get("weights"),
        ),
        signatures=columns_with_prefix(arrays, "signature."),
    )
