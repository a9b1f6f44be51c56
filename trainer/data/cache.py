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
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from strategies.atomic_io import publish_directory, sync_directory, sync_file
from strategies.errors import ConfigError, DataError, StorageError
from strategies.file_fingerprints import sampled_digest
from strategies.shared_files import claim_shared_file, free_space_advice, read_shared_file
from trainer.data.config import Verify
from trainer.data.shards import PreparedBlock, load_block, save_block
from trainer.data.tokens.clock import TemplateDate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


MANIFEST_FILE = "manifest.json"
"""The file whose presence under the final name makes an entry complete."""
ARRAY_SUFFIXES = (".bin", ".npy", ".npz", ".arrow")
"""Suffixes of what training reads of an entry."""

SHA256_REGEX = re.compile(r"[0-9a-f]{64}")
BIG_FILE_BYTES = 64 << 20
"""Files from this size on have their digest remembered: reading them again takes longer than a look into the cache."""
POLL_S = 0.05
"""Seconds between two looks whether a lock is free."""
WARN_AFTER_S = 2
"""Seconds of waiting after which the user is told that another process prepares the data."""

log = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class FileState(NamedTuple):
    """By what a file is known to be unchanged: a file with the same state has the same bytes.

    The inode's change time moves with every write, and no program can set it back.
    """

    path: str
    """With links resolved."""
    size_bytes: int
    inode: int
    modified_ns: int
    changed_ns: int


def file_state(path: Path) -> FileState:
    """Look at what tells whether a file is unchanged since it was hashed. Raises DataError if it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return FileState(
        path=str(path.resolve()),
        size_bytes=status.st_size,
        inode=status.st_ino,
        modified_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
    )


def cached_digest(path: Path, cache_dir: Path, big_bytes: int = BIG_FILE_BYTES) -> str:
    """SHA-256 of a file, in hexadecimal, by which prepared data is found again. Large files are hashed once only.

    A file smaller than `big_bytes` is hashed each time. For a larger file, the digest is read from `cache_dir` if the file has
    the same state (size, times, inode) as before; else the file is hashed, and the digest is written there. Raises DataError if
    the file cannot be read.
    """
    state = file_state(path)
    if state.size_bytes < big_bytes:
        return file_digest(path)
    digest_file = cache_dir / "digests" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:40]
    with suppress(OSError):
        earlier_digest = digest_file.read_text(errors="replace", encoding="utf-8")
        if SHA256_REGEX.fullmatch(earlier_digest):  # a power cut may have emptied the file
            return earlier_digest
    digest = file_digest(path)
    with suppress(OSError):  # a cache that cannot be written only costs time
        digest_file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that another process never reads half a digest.
        temporary_file = digest_file.with_suffix(f".{os.getpid()}")
        temporary_file.write_text(digest, encoding="utf-8")
        temporary_file.replace(digest_file)
    return digest


@dataclass(slots=True)
class DigestCache:
    """SHA-256 of the input files of a preparation, each computed once; `check_files_unchanged` tells if one changed."""

    cache_dir: Path
    state_and_digest_by_path: dict[Path, tuple[FileState, str]] = field(default_factory=dict)
    """The `file_state` of each file when it was first asked for, and its digest."""

    def __call__(self, path: Path) -> str:
        """SHA-256 of a file, in hexadecimal. Raises DataError if the file cannot be read."""
        if path not in self.state_and_digest_by_path:
            self.state_and_digest_by_path[path] = file_state(path), cached_digest(path, self.cache_dir)
        _, digest = self.state_and_digest_by_path[path]
        return digest

    def check_files_unchanged(self) -> None:
        """Raise DataError if an input file has changed since it was hashed; called when all rows are read.

        Otherwise prepared rows would be found under the fingerprint of other rows.
        """
        for path, (state, digest) in self.state_and_digest_by_path.items():
            # The state is size, time and inode. A file that was only touched has another state, but the same bytes.
            if file_state(path) != state and cached_digest(path, self.cache_dir) != digest:
                raise DataError(
                    f"{path}: changed while it was prepared; start again when nothing writes it, or prepare a copy"
                )


def data_fingerprint(input_identities: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> str:
    """Name what decides the bytes of prepared data: SHA-256 over inputs, tokenizer and options. It names the entry of the cache.

    `input_identities`: what identifies the bytes of the inputs, as JSON values; their names are not in it. `options`: settings
    that change prepared bytes. The tokenizer counts with its vocabulary, special tokens and chat template.
    """
    identity = {
        "inputs": input_identities,
        # The content of the tokenizer, not its name: the same files in another directory are the same tokenizer.
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def entry_name(fingerprint: str) -> str:
    """The name of a cache entry's directory: the first 32 of the 64 digits of its fingerprint, to keep paths short."""
    return fingerprint[:32]


def fingerprint_with_date(undated_fingerprint: str, date: TemplateDate | None) -> str:
    """The fingerprint of prepared data in which the chat template writes `date`: templates may ask for today's date.

    It is `undated_fingerprint` itself if there is no date, or if the data is of an earlier version, whose fingerprints had none.
    """
    if date is None or not date.in_fingerprint:
        return undated_fingerprint
    return hashlib.sha256(f"{undated_fingerprint}/{date.day.isoformat()}".encode()).hexdigest()


def load_or_record_first_date(cache_dir: Path, undated_fingerprint: str) -> TemplateDate:
    """Find the date that the chat template is to write for today: that on which this data was first prepared into the cache.

    So data prepared on two days is the same.
    - Data of an earlier version is in the cache, or shards of it: the day on which these were written.
    - The cache has recorded a date: that date.
    - Neither: today. Writes today's date into the cache, so that everybody who prepares the data later uses the same date.

    Raises StorageError if the cache cannot be read or written.
    """
    undated_entry = cache_dir / entry_name(undated_fingerprint)
    for earlier_data in (undated_entry / MANIFEST_FILE, shards_directory(undated_entry)):
        with suppress(OSError):  # mostly there is none
            written_at = earlier_data.stat().st_mtime
            # Earlier versions had no date in the fingerprint, so that this data is found without one.
            return TemplateDate(date.fromtimestamp(written_at), in_fingerprint=False)
    date_file = cache_dir / "dates" / undated_entry.name
    try:
        date_file.parent.mkdir(parents=True, exist_ok=True)
        if not date_file.exists():
            # If several processes come at once, one of them writes the date, and all read it.
            claim_shared_file(date_file, date.today().isoformat().encode(), uuid.uuid4().hex)
        return TemplateDate(date.fromisoformat(read_shared_file(date_file).decode()))
    except OSError as error:
        raise StorageError(
            f"{date_file}: {error.strerror or error}; {free_space_advice(error)}set data.cache_dir"
        ) from error
    except ValueError as error:
        raise StorageError(f"{date_file}: holds no date ({error}); delete it") from error


def build_once(
    directory: Path,
    build: Callable[[Path], None],
    *,
    raise_if_stopped: Callable[[], None] = lambda: None,
    wait_first_s: float | None = None,
) -> bool:
    """Make sure that the cache entry `directory` exists: call `build(temporary directory)` unless it is complete already.

    One process builds, the others wait for it. The result appears under its name by one rename. What a dead or failed builder
    left is removed. Returns whether this process built it.

    `raise_if_stopped`: called while waiting. `wait_first_s`: for how many seconds this process first waits, so that another one
    may build; by default 0 on rank 0, and more on other ranks. Raises StorageError if the cache cannot be written or locked.
    """
    if (directory / MANIFEST_FILE).exists():
        return False
    if wait_first_s is None:
        wait_first_s = _wait_before_preparing_s()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock_file = directory.parent / f".{directory.name}.lock"
        with _exclusive_lock(lock_file, directory, raise_if_stopped, wait_first_s):
            if (directory / MANIFEST_FILE).exists():  # the process that had the lock built it
                return False
            with _publish_when_filled(directory) as temporary_directory:
                build(temporary_directory)
    except OSError as error:
        raise StorageError(
            f"data.cache_dir={directory.parent}: {error.strerror or error}; {free_space_advice(error)}choose another directory"
        ) from error
    return True


@contextmanager
def _publish_when_filled(directory: Path) -> Iterator[Path]:
    """Give the body of the `with` statement a temporary directory to fill, which appears as `directory` when the body ends.

    It is written to the disk first and then renamed, so that nobody sees half of it. If the body raises, it is removed.
    """
    temporary_directory = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary_directory, ignore_errors=True)
    try:
        temporary_directory.mkdir(parents=True)
        yield temporary_directory
        shutil.rmtree(directory, ignore_errors=True)  # what is there has no manifest, so it is an unfinished entry
        for path in temporary_directory.rglob("*"):
            sync_directory(path) if path.is_dir() else sync_file(path)
        # The rename is the last step, so nobody ever sees half an entry.
        publish_directory(temporary_directory, directory)
    except BaseException:
        shutil.rmtree(temporary_directory, ignore_errors=True)
        raise


def _wait_before_preparing_s() -> float:
    """Seconds for which this process first waits, so that rank 0 prepares the data: a user sees the progress of rank 0.

    - rank 0: none;
    - the first process of another host: 2, because rank 0 never comes if that host has a cache of its own;
    - any other process: 30, so that these come first.
    """
    if os.environ.get("RANK", "0") == "0":
        return 0
    return 2 if os.environ.get("LOCAL_RANK") == "0" else 30


def file_hashes(directory: Path) -> dict[str, dict[str, str]]:
    """Hash every file of a prepared data set that training reads, so that damage is noticed later. Raises OSError.

    By path in `directory`: {"tokens.bin": {"sampled": ..., "sha256": ...}}. "sampled" is a hash of some blocks of the file, which
    is quick to compare, "sha256" one of all its bytes.
    """
    hashes = {}
    array_files = [path for path in directory.rglob("*") if path.suffix in ARRAY_SUFFIXES]
    for path in sorted(array_files):
        name = path.relative_to(directory).as_posix()
        hashes[name] = {"sampled": sampled_digest(path), "sha256": file_digest(path)}
    return hashes


def verify_hashes(directory: Path, expected_hashes: dict[str, dict[str, str]], verify: Verify) -> None:
    """Raise DataError for the first file of a prepared data set that is not as it was written, as after damage to the disk.

    `expected_hashes`: what `file_hashes` returned then. The sampled hash of each file is compared; with `Verify.all`, that of all
    its bytes too.
    """
    remedy = f"look after the disk, delete {directory} and start again: it is prepared anew"
    for name, expected in expected_hashes.items():
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
def _exclusive_lock(
    lock_file: Path, entry: Path, raise_if_stopped: Callable[[], None], wait_first_s: float
) -> Iterator[None]:
    """Hold an exclusive lock between processes while the body runs, so that one process alone builds a cache entry.

    The kernel releases the lock if its holder dies. Before it asks for the lock, this process stands back for up to
    `wait_first_s` seconds, see `_stand_back`. `entry`: the directory that the holder of the lock builds. `raise_if_stopped` is
    called while waiting.
    """
    started_at = time.monotonic()
    with lock_file.open("a+", encoding="utf-8") as file:  # NFS gives no shared lock of what is open for writing alone
        _stand_back(file, entry, raise_if_stopped, wait_first_s)
        has_warned = False
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not has_warned and time.monotonic() - started_at > WARN_AFTER_S:
                log.warning("waiting for another process that prepares the data in %s", entry)
                has_warned = True
            raise_if_stopped()
            time.sleep(POLL_S)
        yield  # closing the file releases the lock


def _stand_back(file: IO[str], entry: Path, raise_if_stopped: Callable[[], None], wait_first_s: float) -> None:
    """Let another process begin first, for at most `wait_first_s` seconds; return once it has begun or is done.

    It has begun if it has locked `file`, and is done if `entry` is complete. `raise_if_stopped` is called while waiting.
    """
    started_at = time.monotonic()
    while time.monotonic() - started_at < wait_first_s:
        if (entry / MANIFEST_FILE).exists() or _is_locked(file):
            return
        raise_if_stopped()
        time.sleep(POLL_S)


def _is_locked(file: IO[str]) -> bool:
    """Whether another process holds an exclusive lock of a file, and so builds the cache entry that it stands for.

    To find out, this process takes a shared lock for a moment. Another process that asks for the exclusive lock in that moment is
    refused, and has to ask again.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def shards_directory(entry: Path) -> Path:
    """The directory of the shards of a cache entry, beside the entry: cache/abc -> cache/.abc.shards."""
    return entry.parent / f".{entry.name}.shards"


class Shards:
    """The shards of one cache entry: parts of its first pass that the jobs of an array prepare, in a directory beside the entry.

    There are `num_shards` of them, if all jobs have finished.
    """

    def __init__(self, entry: Path, num_shards: int) -> None:
        self.directory = shards_directory(entry)
        self.num_shards = num_shards

    def shard_path(self, number: int) -> Path:
        """The directory of shard `number`, such as `0-of-4`. It exists once the shard is complete."""
        return self.directory / f"{number}-of-{self.num_shards}"

    @contextmanager
    def writing_shard(
        self, number: int, raise_if_stopped: Callable[[], None]
    ) -> Iterator[Callable[[PreparedBlock], None] | None]:
        """Give the body a function that writes a block of prepared rows into shard `number`; None if that is complete already.

        The shard appears under its name when the body ends. One process writes a shard; others wait for it, and call
        `raise_if_stopped` meanwhile. Raises StorageError if the shard cannot be written.
        """
        shard_path = self.shard_path(number)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock_file = self.directory / f".{shard_path.name}.lock"
            # Another job may have been given the same number.
            with _exclusive_lock(lock_file, shard_path, raise_if_stopped, wait_first_s=0):
                if shard_path.exists():
                    yield None
                    return
                with _publish_when_filled(shard_path) as temporary_directory:
                    yield lambda block: save_block(block, temporary_directory / f"{block.number:09d}.npz")
        except OSError as error:
            raise StorageError(
                f"{self.directory}: cannot write the shard: {error.strerror or error}; free space or set data.cache_dir"
            ) from error

    @classmethod
    def find_complete(cls, entry: Path) -> Shards | None:
        """Find the shards that the jobs of an array have prepared for a cache entry; None if there are none.

        Of several complete sets, the one of the fewest shards. Raises DataError if there are some shards, but no complete set of
        them.
        """
        directory = shards_directory(entry)
        # An array of jobs may have been run several times, with different numbers of shards: 0-of-4, 1-of-4, 0-of-8.
        found_num_shards = sorted({int(path.name.split("-of-")[1]) for path in directory.glob("[0-9]*-of-*")})
        if not found_num_shards:
            return None
        for num_shards in found_num_shards:
            shards = cls(entry, num_shards)
            if not shards.missing_numbers():
                return shards
        largest_count = found_num_shards[-1]
        missing = ", ".join(map(str, cls(entry, largest_count).missing_numbers()))
        raise DataError(
            f"{directory}: shards {missing} of {largest_count} are missing; run them with "
            f"`shardtune prepare --shard i/{largest_count}` (i from 0), or delete the directory to prepare in one go"
        )

    def missing_numbers(self) -> list[int]:
        """The numbers of the shards that are not complete."""
        return [number for number in range(self.num_shards) if not self.shard_path(number).exists()]

    def load_blocks(self) -> Generator[PreparedBlock]:
        """Read the blocks of all shards, in the order of the input, as a preparation in one go would make them."""
        block_files: list[Path] = []
        for number in range(self.num_shards):
            block_files += self.shard_path(number).glob("*.npz")
        # A file is named by the number of its block in the whole input.
        for path in sorted(block_files, key=lambda path: path.name):
            yield load_block(path)

    def remove(self) -> None:
        """Delete the shards, which were merged."""
        shutil.rmtree(self.directory, ignore_errors=True)


def parse_shard(text: str) -> tuple[int, int]:
    """(number of the shard, number of all shards) from the value of `--shard`: "0/8" -> (0, 8). Raises ConfigError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--shard {text}: must be i/n with i from 0 to n-1, as in --shard 0/8")
    return int(number), int(count)
