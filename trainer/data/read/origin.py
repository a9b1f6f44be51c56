"""One origin of rows: the files that a setting names, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.document import Rejected
from trainer.data.read.dispatch import inputs_of, read
from trainer.data.read.opening import File
from trainer.data.read.paths import expand, is_hub
from trainer.data.read.remote import Remote
from trainer.data.read.row import Row

BIG = 1 << 30
"""Size in bytes that stands for a hub data set."""


@dataclass(slots=True)
class Origin:
    """Files and hub data sets in reading order, with what a hub data set needs to be told."""

    key: str
    paths: list[File]
    subset: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, value: Any, key: str, *, remote: bool = False, **hub: str | None) -> Origin:
        """What a path setting names; `remote`: addresses too. Raises DataError, naming `key`, for what does not exist."""
        return cls(key, expand(value, key, remote=remote), **hub)

    def rows(self, wanted: Collection[str] | None = None) -> Iterator[Row | Rejected]:
        """All rows, from the first, streamed; of tables the columns `wanted`. Raises DataError for broken files."""
        hub = {"config": self.subset, "split": self.split, "revision": self.revision}
        return read(self.paths, key=self.key, wanted=wanted, **hub)

    def identity(self, digest: Callable[[Path], str]) -> list[tuple[str, str]]:
        """What the fingerprint covers: kinds and contents, not names. `digest` gives the SHA-256 of a file."""
        found = inputs_of(self.paths, config=self.subset, split=self.split, revision=self.revision)
        return [(kind, digest(content) if isinstance(content, Path) else content) for kind, content in found]

    def size(self) -> int:
        """Bytes, roughly."""
        return sum(BIG if is_hub(path) else _size(path) for path in self.paths)

    def files(self, digest: Callable[[Path], str]) -> list[dict[str, Any]]:
        """Names, sizes and digests, for the records."""
        found: list[dict[str, Any]] = []
        for path in self.paths:
            about: dict[str, Any] = {} if is_hub(path) else {"bytes": _size(path)}
            if isinstance(path, Path) and not is_hub(path):
                about["sha256"] = digest(path)
            found.append({"path": str(path), **about})
        return found


def _size(path: File) -> int:
    return path.size() if isinstance(path, Remote) else path.stat().st_size
