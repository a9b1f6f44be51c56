"""Whether prepared data is still what was prepared: hashes of its arrays, kept in its manifest and compared when it is opened."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path

from strategies.errors import DataError
from trainer.records.sampled import sampled_digest

ARRAYS = (".bin", ".npy", ".npz", ".arrow")


class Verify(StrEnum):
    """`sampled` compares sizes and blocks spread over each file, which costs nothing; `all` compares every byte."""

    sampled = "sampled"
    all = "all"


def hashes_of(directory: Path) -> dict[str, dict[str, str]]:
    """By relative path: the sampled and the whole SHA-256 of everything that training reads. Errors: OSError."""
    files = sorted(path for path in directory.rglob("*") if path.suffix in ARRAYS)
    return {
        path.relative_to(directory).as_posix(): {"sampled": sampled_digest(path), "sha256": _whole(path)}
        for path in files
    }


def verify(directory: Path, hashes: dict[str, dict[str, str]], how: Verify) -> None:
    """Compare what lies in `directory` with its hashes. Raises DataError naming the first file that differs."""
    for name, written in hashes.items():
        path = directory / name
        try:
            same = sampled_digest(path) == written["sampled"]
            if same and how is Verify.all:
                same = _whole(path) == written["sha256"]
        except (OSError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be compared with what was prepared ({error}); {_remedy(directory)}"
            ) from error
        if not same:
            raise DataError(f"{path}: does not have the bytes that were prepared; {_remedy(directory)}")


def _remedy(directory: Path) -> str:
    return f"look after the disk, delete {directory} and start again: it is prepared anew"


def _whole(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
