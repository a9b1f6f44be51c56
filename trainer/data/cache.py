"""The cache of prepared data: the fingerprint that names an entry, and the lock under which one process makes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
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


def fingerprint(files: dict[str, list[Path]], tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> str:
    """SHA-256 over source bytes (not names), the tokenizer with its template, and the options."""
    identity = {
        "files": {
            split: [(path.suffix.lower(), file_digest(path)) for path in paths] for split, paths in files.items()
        },
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "options": options,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def build_once(directory: Path, build: Callable[[Path], None]) -> bool:
    """Make `directory` by `build(temporary directory)` unless it is there; True if this process made it.

    One process builds, others wait for it. The result appears under its name by one rename; whatever a dead or failed
    builder left is removed. Raises StorageError where the cache cannot be written or locked.
    """
    if (directory / DONE).exists():
        return False
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(directory.parent / f".{directory.name}.lock", directory):
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
def _lock(path: Path, directory: Path) -> Iterator[None]:
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
            time.sleep(0.05)
        yield
