"""The cache of prepared data: the fingerprint that names an entry, the lock of its writer, its hashes, its shards.

Shards are parts of a preparation made by the jobs of an array, one file a block, until a last call merges them. A block is
stored as a `.npz` without pickles. Merging reads exactly what a worker would have returned, so a merged data set equals, byte
for byte, one that was prepared in one go.
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
from trainer.data.shards import Block, load_block, save_block
from trainer.data.tokens.clock import TemplateDate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


MANIFEST_FILE = "manifest.json"
"""The file whose presence under the final name makes an entry complete."""
ARRAY_SUFFIXES = (".bin", ".npy", ".npz", ".arrow")
"""Suffixes of what training reads of an entry."""

SHA256 = re.compile(r"[0-9a-f]{64}")
BIG_FILE_BYTES = 64 << 20
"""Files from this size on have their digest remembered: reading them again takes longer than a look into the cache."""
POLL_S = 0.05
"""Seconds between two looks whether a lock is free."""

log = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def file_state(path: Path) -> tuple[str | int, ...]:
    """(path, size in bytes, inode, time of the last write, time of the last change) of a file. Raises DataError.

    A file with the same state has the same bytes: the inode's change time moves with every write, and no program can set it back.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return str(path.resolve()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def cached_digest(path: Path, cache_dir: Path, big_bytes: int = BIG_FILE_BYTES) -> str:
    """SHA-256 of a file. Writes that of a file of at least `big_bytes` into `cache_dir`, to be found again by the file's state.

    The state is its path, size, inode and times. Raises DataError.
    """
    state = file_state(path)
    _, size_bytes, *_ = state
    if int(size_bytes) < big_bytes:
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
    """SHA-256 of files, computed once each. `check` tells whether a file has changed since."""

    cache_dir: Path
    state_and_digest: dict[Path, tuple[tuple[str | int, ...], str]] = field(default_factory=dict)
    """The `file_state` of each file when it was first asked for, and its digest."""

    def __call__(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal. Raises DataError."""
        if path not in self.state_and_digest:
            self.state_and_digest[path] = file_state(path), cached_digest(path, self.cache_dir)
        _, digest = self.state_and_digest[path]
        return digest

    def check(self) -> None:
        """Raise DataError if a file has changed: prepared rows would stand under the fingerprint of others."""
        for path, (state, digest) in self.state_and_digest.items():
            if file_state(path) != state and cached_digest(path, self.cache_dir) != digest:
                raise DataError(
                    f"{path}: changed while it was prepared; start again when nothing writes it, or prepare a copy"
                )


def data_fingerprint(inputs: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> str:
    """Names an entry of the cache: SHA-256 over the inputs' bytes (not names), the tokenizer with its template, the options."""
    identity = {
        "inputs": inputs,
        # The content of the tokenizer, not its name: the same files in another directory are the same tokenizer.
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_with_date(data_fingerprint: str, date: TemplateDate | None) -> str:
    """The fingerprint with the template's date in it; unchanged without a date, and for data from before dates were in it."""
    if date is None or not date.in_fingerprint:
        return data_fingerprint
    return hashlib.sha256(f"{data_fingerprint}/{date.day.isoformat()}".encode()).hexdigest()


def load_or_record_first_date(cache_dir: Path, data_fingerprint: str) -> TemplateDate:
    """The date on which data of this fingerprint (without a date) was first prepared into the cache; today if it never was.

    Writes today's date into the cache then, so that everybody who prepares the same data from now on has the same date. Errors:
    StorageError.
    """
    name = data_fingerprint[:32]
    for earlier_entry in (cache_dir / name / MANIFEST_FILE, Shards(cache_dir / name, 0).home):
        # Data of an earlier version, or shards of it, has no date in its fingerprint. It is used with the day it was made.
        with suppress(OSError):
            made_at = earlier_entry.stat().st_mtime
            return TemplateDate(date.fromtimestamp(made_at), in_fingerprint=False)
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
    builder left is removed. `stop` is called while waiting, and may raise. A process that comes within `head_start_s` seconds (by
    default, those that rank 0 may take) goes first. Raises StorageError if the cache cannot be written or locked.
    """
    if (directory / MANIFEST_FILE).exists():
        return False
    if head_start_s is None:
        head_start_s = _head_start_of_rank_0_s()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.parent / f".{directory.name}.lock", directory, stop, head_start_s):
            if (directory / MANIFEST_FILE).exists():  # the process that had the lock made it
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
    """A directory to fill. It is renamed to `directory` when the body ends, and removed if the body raises.

    All of it is on the disk before it has its name.
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


def _head_start_of_rank_0_s() -> float:
    """Seconds for which this process lets rank 0, whose lines a user sees, go first.

    The first process of another host waits only briefly: if the host has a cache of its own, rank 0 does not come.
    """
    if os.environ.get("RANK", "0") == "0":
        return 0
    return 2 if os.environ.get("LOCAL_RANK") == "0" else 30


def file_hashes(directory: Path) -> dict[str, dict[str, str]]:
    """{"sampled", "sha256"} of every file that training reads, by its path in `directory`. Errors: OSError.

    "sampled" is a hash of some blocks of the file, "sha256" one of all its bytes.
    """
    hashes = {}
    array_files = [path for path in directory.rglob("*") if path.suffix in ARRAY_SUFFIXES]
    for path in sorted(array_files):
        name = path.relative_to(directory).as_posix()
        hashes[name] = {"sampled": sampled_digest(path), "sha256": file_digest(path)}
    return hashes


def verify_hashes(directory: Path, hashes: dict[str, dict[str, str]], verify: Verify) -> None:
    """Raise DataError for the first file in `directory` that differs from its hashes, which `file_hashes` made."""
    remedy = f"look after the disk, delete {directory} and start again: it is prepared anew"
    for name, expected in hashes.items():
        path = directory / name
        try:
            is_same = sampled_digest(path) == expected["sampled"]
            if is_same and verify is Verify.all:
                is_same = file_digest(path) == expected["sha256"]
        except (OSError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be compared with what was prepared ({error}); {remedy}") from error
        if not is_same:
            raise DataError(f"{path}: does not have the bytes that were prepared; {remedy}")


@contextmanager
def _lock(path: Path, directory: Path, stop: Callable[[], None], head_start_s: float) -> Iterator[None]:
    """An exclusive lock between processes, on the file `path`; the kernel releases it when its holder dies.

    For `head_start_s` seconds this process does not ask for it, so that another one may take it first. It stops waiting if the
    entry `directory` is done. `stop` is called while waiting, and may raise.
    """
    with path.open("a+", encoding="utf-8") as file:  # NFS gives no shared lock of what is open for writing alone
        # The head start: stand back until another process has the lock, or has made the entry.
        started_at = time.monotonic()
        while time.monotonic() - started_at < head_start_s:
            if (directory / MANIFEST_FILE).exists() or _is_locked(file):
                break
            stop()
            time.sleep(POLL_S)

        # Ask for the lock until this process has it; closing the file gives it back.
        has_warned = False
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not has_warned and time.monotonic() - started_at > 2:
                log.warning("waiting for another process that prepares the data in %s", directory)
                has_warned = True
            stop()
            time.sleep(POLL_S)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Whether another process has the lock of a file.

    To find out, this process takes a shared lock for a moment. One that asks for the lock just then has to ask again.
    """
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
        """Gives a function that keeps a block in shard `number`; None if the shard is there already.

        The shard appears under its name when the body ends. One process writes a shard, others wait for it and call `stop`, which
        may raise. Errors: StorageError.
        """
        path = self.path(number)
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with _lock(self.home / f".{path.name}.lock", path, stop, head_start_s=0):
                if path.exists():
                    yield None
                    return
                with _publish_when_filled(path) as temporary:
                    yield lambda block: save_block(block, temporary / f"{block.number:09d}.npz")
        except OSError as error:
            raise StorageError(
                f"{self.home}: cannot write the shard: {error.strerror or error}; free space or set data.cache_dir"
            ) from error

    @classmethod
    def finished(cls, directory: Path) -> Shards | None:
        """The shards of an entry; None if there are none. Raises DataError if only some of them are there."""
        home = directory.parent / f".{directory.name}.shards"
        # Finished shards are directories such as 0-of-4; an array of jobs may have been run with several counts.
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
            yield load_block(path)

    def remove(self) -> None:
        """Delete the shards, which were merged."""
        shutil.rmtree(self.home, ignore_errors=True)


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `--shard i/n`. Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard {text}: must be i/n with i from 0 to n-1, as in --shard 0/8")
    return int(number), int(count)
