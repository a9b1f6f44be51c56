"""The cache of prepared data: the fingerprint that names an entry, and the lock under which one process makes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError, StorageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DONE = "manifest.json"
"""The file whose presence under the final name makes an entry complete."""

log = logging.getLogger(__name__)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class DigestCache:
    """SHA-256 of files, remembered for big ones: by path, size, inode, and the times of the last change.

    The inode's change time moves with every write and cannot be set back by a program.
    """

    def __init__(self, cache_dir: Path, big: int = 64 << 20) -> None:
        self.directory = cache_dir / "digests"
        self.big = big

    def __call__(self, path: Path) -> str:
        """The digest of a file. Raises DataError for one that cannot be read."""
        try:
            about = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        if about.st_size < self.big:
            return file_digest(path)
        identity = [str(path.resolve()), about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
        entry = self.directory / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:40]
        with suppress(OSError):
            return entry.read_text()
        digest = file_digest(path)
        with suppress(OSError):  # a cache that cannot be written only costs time
            self.directory.mkdir(parents=True, exist_ok=True)
            temporary = entry.with_suffix(f".{os.getpid()}")
            temporary.write_text(digest)
            temporary.replace(entry)
        return digest


def fingerprint(inputs: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> str:
    """SHA-256 over the inputs' identities (bytes, not names), the tokenizer with its template, and the options."""
    identity = {
        "inputs": inputs,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def build_once(directory: Path, build: Callable[[Path], None], *, stop: Callable[[], None] = lambda: None) -> bool:
    """Make `directory` by `build(temporary directory)` unless it is there; True if this process made it.

    One process builds, others wait for it. The result appears under its name by one rename; whatever a dead or failed
    builder left is removed. `stop` is called while waiting, and may raise. Raises StorageError where the cache cannot
    be written or locked.
    """
    if (directory / DONE).exists():
        return False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.parent / f".{directory.name}.lock", directory, stop):
            if (directory / DONE).exists():
                return False
            shutil.rmtree(directory, ignore_errors=True)  # an entry without its manifest is not one
            temporary = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                build(temporary)
                temporary.rename(directory)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        raise StorageError(
            f"data.cache_dir={directory.parent}: {error.strerror or error}; free space or choose another directory"
        ) from error
    return True


@contextmanager
def _lock(path: Path, directory: Path, stop: Callable[[], None]) -> Iterator[None]:
    """An exclusive lock between processes; the kernel releases it when its holder dies."""
    with path.open("a") as file:
        began, told = time.monotonic(), False
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not told and time.monotonic() - began > 2:
                log.warning("waiting for another process that prepares the data in %s", directory)
                told = True
            stop()
            time.sleep(0.05)
        yield
