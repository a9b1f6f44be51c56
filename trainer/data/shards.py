"""Parts of a preparation made by the jobs of an array, one file a block, until a last call merges them.

A block is stored as a `.npz` without pickles, so that merging reads what a worker would have handed over: a merged data
set is the same, byte for byte, as one prepared in one go.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.block import Bad, Block
from trainer.data.document import Tally
from trainer.data.stages.privacy.stage import Findings
from trainer.data.store.documents import batch_from_bytes, batch_to_bytes
from trainer.data.store.sequences import Sequences, storage_error

COMPLETE = "complete"


class Shards:
    """The shards of one entry of the cache, `count` of them, beside it."""

    def __init__(self, directory: Path, count: int) -> None:
        self.home = directory.parent / f".{directory.name}.shards"
        self.count = count

    def path(self, number: int) -> Path:
        """Directory of a finished shard."""
        return self.home / f"{number}-of-{self.count}"

    @contextmanager
    def writing(self, number: int) -> Iterator[Callable[[Block], None]]:
        """Gives a function that keeps a block; the shard appears under its name when all are kept."""
        final = self.path(number)
        temporary = final.with_name(final.name + ".partial")
        if (final / COMPLETE).exists():
            yield lambda block: None
            return
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield lambda block: save(block, temporary / f"{block.number:09d}.npz")
            (temporary / COMPLETE).touch()
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except OSError as error:
            raise storage_error(self.home, error) from error

    @classmethod
    def finished(cls, directory: Path) -> Shards | None:
        """The shards of an entry if there are any; raises DataError where some are missing."""
        home = directory.parent / f".{directory.name}.shards"
        found = [path.name for path in home.glob("*-of-*") if (path / COMPLETE).exists()]
        if not found:
            return None
        counts = sorted({int(name.split("-of-")[1]) for name in found})
        for count in counts:
            shards = cls(directory, count)
            missing = [n for n in range(count) if not (shards.path(n) / COMPLETE).exists()]
            if not missing:
                return shards
        raise DataError(
            f"{home}: shards {', '.join(map(str, missing))} of {counts[-1]} are missing; run them with "
            f"`shardtune prepare --shard i/{counts[-1]}` (i from 0), or delete the directory to prepare in one go"
        )

    def blocks(self) -> Iterator[Block]:
        """All blocks in input order."""
        files = [path for number in range(self.count) for path in self.path(number).glob("*.npz")]
        for path in sorted(files, key=lambda path: path.name):
            yield load(path)

    def remove(self) -> None:
        """Delete them, once merged."""
        shutil.rmtree(self.home, ignore_errors=True)


def parse_shard(text: str) -> tuple[int, int]:
    """`i/n` as numbers. Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard {text}: must be i/n with i from 0 to n-1, as in --shard 0/8")
    return int(number), int(count)


def save(block: Block, path: Path) -> None:
    """Write a block to a file. Raises OSError."""
    assert block.sequences is not None and block.documents is not None
    about = {
        "number": block.number,
        "split": block.split,
        "source": block.source,
        "rows": block.rows,
        "rows_of_file": block.rows_of_file,
        "bad": [asdict(bad) for bad in block.bad],
        "tally": {
            "dropped": block.tally.dropped,
            "noted": block.tally.noted,
            "examples": block.tally.examples,
            "drops": block.tally.drops,
        },
        "unread": block.unread,
        "labels": block.labels,
        "findings": None if block.findings is None else block.findings.state(),
    }
    arrays: dict[str, Any] = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "documents": np.frombuffer(batch_to_bytes(block.documents), np.uint8),
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
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays["about"].tobytes())
    tally = Tally(examples=about["tally"]["examples"], drops=[tuple(drop) for drop in about["tally"]["drops"]])
    tally.add_counts(about["tally"]["dropped"], about["tally"]["noted"])
    return Block(
        number=about["number"],
        split=about["split"],
        source=about["source"],
        rows=about["rows"],
        rows_of_file=about["rows_of_file"],
        bad=[Bad(**bad) for bad in about["bad"]],
        tally=tally,
        documents=batch_from_bytes(arrays["documents"].tobytes()),
        pieces=arrays["pieces"],
        sequences=Sequences(
            arrays["tokens"],
            arrays["supervised"],
            arrays["lengths"],
            _named(arrays, "column."),
            arrays.get("weights"),
        ),
        unread=about["unread"],
        labels=about["labels"],
        signatures=_named(arrays, "signature."),
        findings=None if about["findings"] is None else Findings.of_state(about["findings"]),
    )


def _named(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
