"""The cache of prepared data: the fingerprint that names an entry, the lock of its writer, its hashes, its shards.

Shards are parts of a preparation made by the jobs of an array, one file a block, until a last call merges them. A
block is stored as a `.npz` without pickles. Merging reads what a worker would have returned, so a merged data set
equals, byte for byte, one that was prepared in one go.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from strategies.atomic_io import publish, sync_directory, sync_file
from strategies.errors import ConfigError, DataError, StorageError
from strategies.file_fingerprints import sampled_digest
from strategies.shared_files import claim, read, remedy
from trainer.data.config import Verify
from trainer.data.shards import Block, load, save
from trainer.data.tokens.clock import TemplateDate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


DONE = "manifest.json"
"""The file whose presence under the final name makes an entry complete."""
ARRAY_SUFFIXES = (".bin", ".npy", ".npz", ".arrow")
"""Suffixes of what training reads of an entry."""

SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def file_state(path: Path) -> tuple[str | int, ...]:
    """Path, size, inode, and the times of the last change of a file. Raises DataError."""
    try:
        about = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return str(path.resolve()), about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns


def remembered_digest(path: Path, cache_dir: Path, big: int = 64 << 20) -> str:
    """SHA-256 of a file, remembered for big ones: by path, size, inode, and the times of the last change.

    The inode's change time moves with every write and cannot be set back by a program. Raises DataError.
    """
    state = file_state(path)
    _, size, *_ = state
    if int(size) < big:
        return file_digest(path)
    entry = cache_dir / "digests" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:40]
    with suppress(OSError):
        remembered = entry.read_text(errors="replace", encoding="utf-8")
        if SHA256.fullmatch(remembered):  # a power cut may have emptied the entry
            return remembered
    digest = file_digest(path)
    with suppress(OSError):  # a cache that cannot be written only costs time
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest, encoding="utf-8")
        temporary.replace(entry)
    return digest


@dataclass(slots=True)
class Digests:
    """SHA-256 of files, computed once each; `check` tells whether a file has changed since."""

    cache_dir: Path
    known: dict[Path, tuple[tuple[str | int, ...], str]] = field(default_factory=dict)
    """How each was found, and its digest."""

    def __call__(self, path: Path) -> str:
        """Raises DataError."""
        if path not in self.known:
            self.known[path] = file_state(path), remembered_digest(path, self.cache_dir)
        return self.known[path][1]

    def check(self) -> None:
        """Raise DataError where a file is not what it was: rows would be kept under the name of others."""
        for path, (state, digest) in self.known.items():
            if file_state(path) != state and remembered_digest(path, self.cache_dir) != digest:
                raise DataError(
                    f"{path}: changed while it was prepared; start again when nothing writes it, or prepare a copy"
                )


def fingerprint(inputs: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> str:
    """SHA-256 over the inputs' identities (bytes, not names), the tokenizer with its template, and the options."""
    identity = {
        "inputs": inputs,
        # The content of the tokenizer, not its name: the same files in another directory are the same tokenizer.
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_with_date(fingerprint: str, date: TemplateDate | None) -> str:
    """The fingerprint with the template's date in it; unchanged without a date, and for data from before dates were in it."""
    if date is None or not date.in_fingerprint:
        return fingerprint
    return hashlib.sha256(f"{fingerprint}/{date.day.isoformat()}".encode()).hexdigest()


def first_date(cache_dir: Path, fingerprint: str) -> TemplateDate:
    """The date on which data of this fingerprint (without a date) was first prepared into the cache; today if it never was.

    Today is written down, so that everybody who prepares the same data from now on has the same date. Errors: StorageError.
    """
    name = fingerprint[:32]
    for made_before in (cache_dir / name / DONE, Shards(cache_dir / name, 0).home):
        # Such data was prepared without a date in its fingerprint, and is used on under the day it was made.
        with suppress(OSError):  # an entry of an earlier version, or shards of one
            return TemplateDate(date.fromtimestamp(made_before.stat().st_mtime), in_fingerprint=False)
    path = cache_dir / "dates" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Of several processes that come at once, one writes the date, and all read it.
            claim(path, date.today().isoformat().encode(), uuid.uuid4().hex)
        return TemplateDate(date.fromisoformat(read(path).decode()))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; {remedy(error)}set data.cache_dir") from error
    except ValueError as error:
        raise StorageError(f"{path}: holds no date ({error}); delete it") from error


def build_once(
    directory: Path,
    build: Callable[[Path], None],
    *,
    stop: Callable[[], None] = lambda: None,
    head_start_s: float | None = None,
) -> bool:
    """Make `directory` by `build(temporary directory)` unless it is there; True if this process made it.

    One process builds, others wait for it. The result appears under its name by one rename; whatever a dead or failed
    builder left is removed. `stop` is called while waiting, and may raise. Another that comes within `head_start_s` seconds (by
    default, those that rank 0 may take) goes first. Raises StorageError where the cache cannot be written or locked.
    """
    if (directory / DONE).exists():
        return False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        wait_s = _head_start_s() if head_start_s is None else head_start_s
        with _lock(directory.parent / f".{directory.name}.lock", directory, stop, wait_s):
            if (directory / DONE).exists():
                return False
            with _publish_when_filled(directory) as temporary:
                build(temporary)
    except OSError as error:
        raise StorageError(
            f"data.cache_dir={directory.parent}: {error.strerror or error}; {remedy(error)}choose another directory"
        ) from error
    return True


@contextmanager
def _publish_when_filled(directory: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name and the place of `directory` by one rename, or is removed.

    All of it is on the disk before its name is.
    """
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(directory, ignore_errors=True)  # an entry without its manifest is not one
        for path in temporary.rglob("*"):
            sync_directory(path) if path.is_dir() else sync_file(path)
        # The rename is the last step, so nobody ever sees half an entry.
        publish(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _head_start_s() -> float:
    """Seconds in which rank 0, whose lines a user sees, may come and prepare; a host with a cache of its own begins soon."""
    if os.environ.get("RANK", "0") == "0":
        return 0
    return 2 if os.environ.get("LOCAL_RANK") == "0" else 30


def hashes_of(directory: Path) -> dict[str, dict[str, str]]:
    """By relative path: the sampled and the whole SHA-256 of everything that training reads. Errors: OSError."""
    hashes = {}
    for path in sorted(path for path in directory.rglob("*") if path.suffix in ARRAY_SUFFIXES):
        name = path.relative_to(directory).as_posix()
        hashes[name] = {"sampled": sampled_digest(path), "sha256": file_digest(path)}
    return hashes


def compare_hashes(directory: Path, hashes: dict[str, dict[str, str]], how: Verify) -> None:
    """Compare what lies in `directory` with its hashes. Raises DataError naming the first file that differs."""
    for name, written in hashes.items():
        path = directory / name
        try:
            same = sampled_digest(path) == written["sampled"]
            if same and how is Verify.all:
                same = file_digest(path) == written["sha256"]
        except (OSError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be compared with what was prepared ({error}); {_remedy(directory)}"
            ) from error
        if not same:
            raise DataError(f"{path}: does not have the bytes that were prepared; {_remedy(directory)}")


def _remedy(directory: Path) -> str:
    return f"look after the disk, delete {directory} and start again: it is prepared anew"


@contextmanager
def _lock(path: Path, directory: Path, stop: Callable[[], None], head_start_s: float) -> Iterator[None]:
    """An exclusive lock between processes; the kernel releases it when its holder dies.

    For `head_start_s` seconds this process does not ask for it, so that another one may take it first.
    """
    with path.open("a+", encoding="utf-8") as file:  # NFS gives no shared lock of what is open for writing alone
        started_at = time.monotonic()
        while time.monotonic() - started_at < head_start_s:
            if (directory / DONE).exists() or _is_locked(file):
                break
            stop()
            time.sleep(0.05)
        has_warned = False
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not has_warned and time.monotonic() - started_at > 2:
                log.warning("waiting for another process that prepares the data in %s", directory)
                has_warned = True
            stop()
            time.sleep(0.05)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Whether another process has the lock; one that asks at this moment asks again."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


class Shards:
    """The `count` shards of one cache entry, in a directory beside the entry."""

    def __init__(self, directory: Path, count: int) -> None:
        self.home = directory.parent / f".{directory.name}.shards"
        self.count = count

    def path(self, number: int) -> Path:
        """Directory of a finished shard."""
        return self.home / f"{number}-of-{self.count}"

    @contextmanager
    def writing(self, number: int, stop: Callable[[], None]) -> Iterator[Callable[[Block], None] | None]:
        """Gives a function that keeps a block, None where the shard is there; it appears under its name when all are kept.

        One process writes a shard, others wait for it and call `stop`, which may raise. Errors: StorageError.
        """
        path = self.path(number)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with _lock(self.home / f".{path.name}.lock", path, stop, 0):
                if path.exists():
                    yield None
                    return
                with _publish_when_filled(path) as temporary:
                    yield lambda block: save(block, temporary / f"{block.number:09d}.npz")
        except OSError as error:
            raise StorageError(
                f"{self.home}: cannot write the shard: {error.strerror or error}; free space or set data.cache_dir"
            ) from error

    @classmethod
    def finished(cls, directory: Path) -> Shards | None:
        """The shards of an entry if there are any; raises DataError where some are missing."""
        home = directory.parent / f".{directory.name}.shards"
        counts = sorted({int(path.name.split("-of-")[1]) for path in home.glob("[0-9]*-of-*")})
        if not counts:
            return None
        for count in counts:
            shards = cls(directory, count)
            missing = [number for number in range(count) if not shards.path(number).exists()]
            if not missing:
                return shards
        raise DataError(
            f"{home}: shards {', '.join(map(str, missing))} of {counts[-1]} are missing; run them with "
            f"`shardtune prepare --shard i/{counts[-1]}` (i from 0), or delete the directory to prepare in one go"
        )

    def blocks(self) -> Generator[Block]:
        """All blocks in input order."""
        files: list[Path] = []
        for number in range(self.count):
            files += self.path(number).glob("*.npz")
        # Named by their numbers, which are those of the whole input.
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
