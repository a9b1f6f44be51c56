"""Writes the files of a planned model into a staging directory, and finds those that an export that was killed left there.

Each process writes the files that are dealt to it. `.written/` in the staging directory says what the export is made of,
and has a record of each file that is complete: the next start of the same export keeps these files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from strategies import atomic_io
from strategies.atomic_io import (
    CHUNK_BYTES,
    WrittenFile,
    file_difference,
    make_directories,
    open_regular_file,
    read_exactly,
)
from strategies.errors import ConfigError
from trainer.export.plan import ExportPlan, PlannedFile, make_group
from trainer.export.trained_model import ModelValues

RECORDS = ".written"
ORIGIN = "origin.json"
MAX_RECORD_BYTES = 2**24
"""Bytes of such a record; more is not read."""
MAX_HOLDER_BYTES = 200
"""Bytes that a lock file says about its holder."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers, such as Lustre that was mounted without `flock`."""


class ExportInUse(ConfigError):
    """Another export is being written to the same directory."""


@contextmanager
def sole_export(destination: Path) -> Iterator[None]:
    """Inside the context, no other process writes an export to `destination`, on this host or over NFS.

    The kernel releases the lock when its holder dies, so the file of a process that was killed stops nobody, whoever made it.
    A file system without locks is gone without. Errors: ExportInUse; OSError.
    """
    path = destination.with_name(f".{destination.name}.lock")
    make_directories(path.parent)
    # Lock the file; again, if it was removed between opening and locking.
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise ExportInUse(
                f"{destination}: another export is being written there{holder}; wait until it has ended, or choose another "
                "directory (to=)"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        # Locked: is the file still the one that has this name?
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)  # the holder before has removed it: nobody else would meet this one
    try:
        _write_holder(descriptor)
        yield
    finally:
        with suppress(OSError):  # in a directory such as /tmp, nobody may remove a file that another user has made
            path.unlink()
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Open a lock file for locking; a new one can be opened by all users. Returns its descriptor.

    Errors: ExportInUse if it is another user's, and may not be opened; OSError.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # NFS locks only what is open for writing
    while True:
        # First without O_CREAT: in /tmp, Linux refuses to "create" what another user has made.
        with suppress(FileNotFoundError):
            try:
                return os.open(path, flags)
            except PermissionError as error:
                owner = _user_name(path.lstat().st_uid)
                raise ExportInUse(
                    f"{path}: this lock file of {owner} cannot be opened: an export of {owner} may be writing there; if none is, "
                    "have the file removed, or choose another directory (to=)"
                ) from error
        with suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            with suppress(OSError):
                os.fchmod(descriptor, 0o666)  # whatever the umask: a file that others cannot open would lock them out
            return descriptor


def _user_name(number: int) -> str:
    """The name of a user; a user who has none, as in many containers, is called by the number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _write_holder(descriptor: int) -> None:
    """Write into a lock file who holds it, as far as that goes: it only tells others whom to ask."""
    text = f"{_user_name(os.getuid())} on {socket.gethostname()}, process {os.getpid()}"
    with suppress(OSError):
        status = os.fstat(descriptor)
        # A file that somebody has linked to this name is no lock file, and keeps what it says.
        if status.st_nlink == 1 and status.st_size <= MAX_HOLDER_BYTES:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    """Who wrote into a lock file that it holds the lock, in brackets for a message; empty if nobody did."""
    with suppress(OSError):
        written = os.pread(descriptor, MAX_HOLDER_BYTES, 0).decode("utf-8", "replace")
        if written and written.isprintable():
            return f" ({written})"
    return ""


def share_of(files: list[PlannedFile], writer: int, writers: int) -> list[PlannedFile]:
    """The files that one of several writers writes, so that every writer has about as many bytes.

    From the largest file on, each goes to the writer that has the fewest bytes so far. All writers come to the same shares.
    """
    bytes_of_writer = [0] * writers
    share = []
    for file in sorted(files, key=lambda file: (-file.size, file.name)):
        chosen = bytes_of_writer.index(min(bytes_of_writer))
        bytes_of_writer[chosen] += file.size
        if chosen == writer:
            share.append(file)
    return sorted(share, key=lambda file: file.name)


def open_staging(staging_dir: Path, plan: ExportPlan, origin: dict[str, Any]) -> bool:
    """Make the staging directory of an export. Returns whether files of an earlier start of this very export are kept in it.

    `origin`: all that the files depend on, as JSON. Anything else that lies under this name is removed. Errors: OSError.
    """
    text = json.dumps(origin, indent=1, sort_keys=True) + "\n"
    if not _holds(staging_dir, text):
        clear(staging_dir)
        make_directories(staging_dir / RECORDS)
        atomic_io.write_new(staging_dir / RECORDS / ORIGIN, text.encode())
        return False
    kept_names = {RECORDS, *(file.name for file in plan.files)}
    for entry in list(staging_dir.iterdir()):
        if entry.is_dir() and entry.name not in kept_names:
            shutil.rmtree(entry)
        elif entry.name not in kept_names:
            entry.unlink()
    return True


def clear(directory: Path) -> None:
    """Remove what an earlier export left under this name, as far as that goes; of a link nothing but the link.

    A downloaded run can hold a link there, and the export would be written over the files that it leads to.
    """
    if directory.is_symlink():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _holds(staging_dir: Path, origin: str) -> bool:
    """Whether a staging directory was begun for the same export, and holds nothing but ordinary files."""
    if staging_dir.is_symlink() or not staging_dir.is_dir():
        return False
    entries = list(staging_dir.rglob("*"))
    # A downloaded run can hold links, and the export would be written over the files that they lead to.
    if any(entry.is_symlink() or not (entry.is_file() or entry.is_dir()) for entry in entries):
        return False
    try:
        recorded = atomic_io.read_bytes(staging_dir / RECORDS / ORIGIN, max_bytes=MAX_RECORD_BYTES)
    except OSError:
        return False
    return recorded == origin.encode()


def is_complete(staging_dir: Path, file: PlannedFile) -> bool:
    """Whether a file is in the staging directory with the size and the SHA-256 that its record has. Reads all of it."""
    try:
        record = json.loads(atomic_io.read_bytes(_record_of(staging_dir, file), max_bytes=MAX_RECORD_BYTES))
        written = WrittenFile(file.name, int(record["bytes"]), str(record["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return file_difference(staging_dir, written) is None


def write_file(plan: ExportPlan, file: PlannedFile, values: ModelValues, staging_dir: Path) -> None:
    """Write one file of a plan, durably, and its record. Holds one file and one group of tensors at a time.

    Errors: OSError, SafetensorError, and those of `make_group`.
    """
    from safetensors.torch import save_file

    save_file(dict(_tensors_of(plan, file, values)), staging_dir / file.name, {"format": "pt"})
    atomic_io.sync_file(staging_dir / file.name)
    written = _hashed(staging_dir / file.name)
    record = json.dumps({"bytes": written.size, "sha256": written.sha256}) + "\n"
    atomic_io.write_new(_record_of(staging_dir, file), record.encode())


def _tensors_of(plan: ExportPlan, file: PlannedFile, values: ModelValues) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor as it is stored) of a file. A group may have tensors in other files too, which are dropped."""
    number: int | None = None
    stored: dict[str, Tensor] = {}
    for planned in file.tensors:
        if planned.group != number:
            number = planned.group
            stored = {}  # free the group before: two at once would take twice the memory
            stored = make_group(plan, number, values)
        tensor = stored.pop(planned.name)
        if tensor.is_floating_point():
            tensor = tensor.to(plan.dtype)
        tensor = tensor.contiguous()
        # A view into a larger buffer would be refused, or keep the buffer alive.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        assert tensor.nbytes == planned.size, (planned, tensor.shape, tensor.dtype)
        yield planned.name, tensor


def _record_of(staging_dir: Path, file: PlannedFile) -> Path:
    """The record of a complete file."""
    return staging_dir / RECORDS / f"{file.name}.json"


def _hashed(path: Path) -> WrittenFile:
    """Size and SHA-256 of a file. Errors: OSError."""
    digest = hashlib.sha256()
    with open_regular_file(path) as (descriptor, size):
        buffer = memoryview(bytearray(max(1, min(CHUNK_BYTES, size))))
        for offset in range(0, size, CHUNK_BYTES):
            chunk = buffer[: min(len(buffer), size - offset)]
            read_exactly(descriptor, chunk, offset)
            digest.update(chunk)
    return WrittenFile(path.name, size, digest.hexdigest())


def remove_records(staging_dir: Path) -> None:
    """Remove the records of a finished export, which are nobody's but ours."""
    with suppress(OSError):
        shutil.rmtree(staging_dir / RECORDS)
