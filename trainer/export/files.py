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
from trainer.export.plan import ExportFile, ExportPlan, stored_tensors_of_group
from trainer.export.trained_model import ModelValues

RECORDS_DIR_NAME = ".written"
ORIGIN_FILE = "origin.json"
MAX_RECORD_BYTES = 2**24
"""A larger record is not read."""
MAX_HOLDER_BYTES = 200
"""Size of a lock file at most: the text that names its holder."""

UNSUPPORTED_LOCK_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Error numbers of a file system without locks, such as Lustre that was mounted without `flock`."""


class ExportInUse(ConfigError):
    """Another export is being written to the same directory."""


@contextmanager
def exclusive_export_lock(destination: Path) -> Iterator[None]:
    """Inside the context, no other process writes an export to `destination`, on this host or over NFS.

    The kernel releases the lock when its holder dies, so the lock file of a killed process stops nobody. On a file system
    without locks nothing is locked. Raises ExportInUse if another process holds the lock, OSError if the lock file cannot be
    opened.
    """
    path = destination.with_name(f".{destination.name}.lock")
    make_directories(path.parent)
    # Lock the file. Again, if it was removed between opening and locking: a lock on a removed file protects nothing.
    while True:
        descriptor = _open_lock_file(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _lock_holder_text(descriptor)
            os.close(descriptor)
            raise ExportInUse(
                f"{destination}: another export is being written there{holder}; wait until it has ended, or choose another "
                "directory (to=)"
            ) from error
        except OSError as error:
            if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
                os.close(descriptor)
                raise
        # The lock is held. Stop if the locked file is still the one that has this name.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    try:
        _write_lock_holder(descriptor)
        yield
    finally:
        with suppress(OSError):  # in a directory such as /tmp, nobody may remove a file that another user has made
            path.unlink()
        os.close(descriptor)


def _open_lock_file(path: Path) -> int:
    """Open the lock file of an export, or create it so that all users can open it; returns its descriptor.

    Raises ExportInUse if the file belongs to another user and may not be opened, OSError if it cannot be created.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW  # NFS locks only what is open for writing
    while True:  # again, if another process creates or removes the file in between
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
                # Whatever the umask: a file that others cannot open would lock them out.
                os.fchmod(descriptor, 0o666)
            return descriptor


def _user_name(user_id: int) -> str:
    """The name of a user; a user who has none, as in many containers, is called "user 1000"."""
    try:
        return pwd.getpwuid(user_id).pw_name
    except KeyError:
        return f"user {user_id}"


def _write_lock_holder(descriptor: int) -> None:
    """Write into a lock file who holds it, for the message to others: "me on gpu01, process 4711". A failure is no error."""
    holder = f"{_user_name(os.getuid())} on {socket.gethostname()}, process {os.getpid()}"
    with suppress(OSError):
        status = os.fstat(descriptor)
        # A file that somebody has linked to this name is no lock file, and keeps what it says.
        is_lock_file = status.st_nlink == 1 and status.st_size <= MAX_HOLDER_BYTES
        if is_lock_file:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)


def _lock_holder_text(descriptor: int) -> str:
    """Read who holds a lock from its file, for a message: " (me on gpu01, process 4711)"; "" if unknown."""
    with suppress(OSError):
        holder = os.pread(descriptor, MAX_HOLDER_BYTES, 0).decode("utf-8", "replace")
        if holder and holder.isprintable():
            return f" ({holder})"
    return ""


def files_of_writer(files: list[ExportFile], writer_index: int, num_writers: int) -> list[ExportFile]:
    """The files of an export that one of several processes writes, sorted by name; all get about the same number of bytes.

    From the largest file on, each goes to the writer that has the fewest bytes so far. Every writer computes the same shares.
    """
    bytes_by_writer = [0] * num_writers
    own_files = []
    for file in sorted(files, key=lambda file: (-file.num_bytes, file.name)):
        least_loaded_writer = bytes_by_writer.index(min(bytes_by_writer))
        bytes_by_writer[least_loaded_writer] += file.num_bytes
        if least_loaded_writer == writer_index:
            own_files.append(file)
    return sorted(own_files, key=lambda file: file.name)


def open_export_staging(staging_dir: Path, plan: ExportPlan, origin: dict[str, Any]) -> bool:
    """Open the directory in which an export is written before it gets its name; returns whether finished files may be in it.

    - It was begun for this very export, and cut short: its files are kept, and everything that is not of the plan is removed.
    - Anything else, or nothing, lies under this name: it is removed, and a directory is created that has only the record of
      `origin`.

    `origin`: all that the files depend on, as JSON values. Raises OSError.
    """
    origin_text = json.dumps(origin, indent=1, sort_keys=True) + "\n"
    if not _is_staging_of(staging_dir, origin_text):
        remove_leftovers(staging_dir)
        make_directories(staging_dir / RECORDS_DIR_NAME)
        atomic_io.write_new_file(staging_dir / RECORDS_DIR_NAME / ORIGIN_FILE, origin_text.encode())
        return False
    kept_names = {RECORDS_DIR_NAME, *(file.name for file in plan.files)}
    for entry in list(staging_dir.iterdir()):
        if entry.is_dir() and entry.name not in kept_names:
            shutil.rmtree(entry)
        elif entry.name not in kept_names:
            entry.unlink()
    return True


def remove_leftovers(directory: Path) -> None:
    """Remove a directory that an earlier export left. Files that cannot be removed stay, which is no error.

    Of a link only the link is removed: a downloaded run can hold one, and it may lead to the user's files.
    """
    if directory.is_symlink():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def _is_staging_of(staging_dir: Path, origin_text: str) -> bool:
    """Whether a staging directory was begun for this very export, so that its finished files can be kept.

    `origin_text`: all that the files depend on, as JSON: checkpoints, files of the base, the plan and torch's version. False
    if the directory holds anything but ordinary files and directories.
    """
    if staging_dir.is_symlink() or not staging_dir.is_dir():
        return False
    entries = list(staging_dir.rglob("*"))
    # A downloaded run can hold links, and the export would be written over the files that they lead to.
    if any(entry.is_symlink() or not (entry.is_file() or entry.is_dir()) for entry in entries):
        return False
    try:
        recorded_origin = atomic_io.read_bytes(staging_dir / RECORDS_DIR_NAME / ORIGIN_FILE, max_bytes=MAX_RECORD_BYTES)
    except OSError:
        return False
    return recorded_origin == origin_text.encode()


def is_file_complete(staging_dir: Path, file: ExportFile) -> bool:
    """Whether an earlier start has finished this file: it has the size and the SHA-256 of its record. Reads all of it."""
    try:
        record = json.loads(atomic_io.read_bytes(_record_path(staging_dir, file), max_bytes=MAX_RECORD_BYTES))
        recorded_file = WrittenFile(file.name, int(record["bytes"]), str(record["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return file_difference(staging_dir, recorded_file) is None


def write_export_file(plan: ExportPlan, file: ExportFile, model_values: ModelValues, staging_dir: Path) -> None:
    """Write one weight file of an export durably, and then its record, by which a later start knows that it is complete.

    Holds one file and one group of tensors in memory. Raises OSError and SafetensorError for the file, StorageError and
    ConfigError for the values that it is made from.
    """
    from safetensors.torch import save_file

    tensor_by_name = dict(_convert_tensors_of_file(plan, file, model_values))
    save_file(tensor_by_name, staging_dir / file.name, {"format": "pt"})
    atomic_io.sync_file(staging_dir / file.name)
    written = _size_and_sha256(staging_dir / file.name)
    # Written last: a file without it counts as incomplete.
    record = json.dumps({"bytes": written.size, "sha256": written.sha256}) + "\n"
    atomic_io.write_new_file(_record_path(staging_dir, file), record.encode())


def _convert_tensors_of_file(
    plan: ExportPlan, file: ExportFile, model_values: ModelValues
) -> Iterator[tuple[str, Tensor]]:
    """Read and convert the tensors of one file: yields (name, tensor as it is stored).

    Parameters are converted in groups, such as those of all experts of a layer; the tensors of a group follow one another in
    the plan. Tensors of a group that belong to another file are dropped.
    """
    group_index: int | None = None
    tensors_of_group: dict[str, Tensor] = {}
    for planned in file.tensors:
        if planned.group_index != group_index:
            group_index = planned.group_index
            # Free the group before: two at once would take twice the memory.
            tensors_of_group = {}
            tensors_of_group = stored_tensors_of_group(plan, group_index, model_values)
        tensor = tensors_of_group.pop(planned.name)
        if tensor.is_floating_point():
            tensor = tensor.to(plan.dtype)
        tensor = tensor.contiguous()
        # A view into a larger buffer would be refused, or keep the buffer alive.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        assert tensor.nbytes == planned.num_bytes, (planned, tensor.shape, tensor.dtype)
        yield planned.name, tensor


def _record_path(staging_dir: Path, file: ExportFile) -> Path:
    """The path of the record that a file of the export is complete."""
    return staging_dir / RECORDS_DIR_NAME / f"{file.name}.json"


def _size_and_sha256(path: Path) -> WrittenFile:
    """Size and SHA-256 of a file that was just written, read from the disk in chunks. Errors: OSError."""
    digest = hashlib.sha256()
    with open_regular_file(path) as (descriptor, size):
        buffer = memoryview(bytearray(max(1, min(CHUNK_BYTES, size))))
        for offset in range(0, size, CHUNK_BYTES):
            chunk = buffer[: min(len(buffer), size - offset)]
            read_exactly(descriptor, chunk, offset)
            digest.update(chunk)
    return WrittenFile(path.name, size, digest.hexdigest())


def remove_records(staging_dir: Path) -> None:
    """Remove the records of a finished export, which its users do not need. A failure is no error."""
    with suppress(OSError):
        shutil.rmtree(staging_dir / RECORDS_DIR_NAME)
