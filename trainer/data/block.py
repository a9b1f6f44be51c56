"""A block of rows and what became of it: what worker processes (or the jobs of an array) take and hand on.

A block's result depends on its rows and the settings alone, so that any number of workers makes the same data set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import DataError
from trainer.data.document import WRONG_KIND, Rejected, Tally
from trainer.data.read.row import Row
from trainer.data.stages.privacy.stage import Findings
from trainer.data.store.sequences import Sequences

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
