"""Writes, syncs, renames, links and reads the files that a run depends on. No other module does.

A file written here survives a power cut once the call has returned: its bytes are synced before it gets its name, and
the directory after. Calls to the operating system go through `disk`, which tests replace by one that fails as disks
and network file systems do. Nothing here communicates.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

VISIBILITY_TIMEOUT_S = 75.0
"""How long a name that another host has made may stay invisible: NFS clients keep what they know of a directory for 60 s."""
CHUNK_BYTES = 2**23
"""Bytes that are read and hashed at a time."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux
NOT_YET_VISIBLE_ERRNOS = (errno.ENOENT, errno.ESTALE)
"""What a network file system answers for something that another host has made a moment ago."""
TRANSIENT_ERRNOS = (errno.EIO, errno.ETIMEDOUT)
"""Errors of a network mount or a disk that stumbles: the next attempt may succeed."""
RETRY_PAUSES_S = (10.0, 20.0)
"""Pauses between three looks at a file that met a passing error."""
RENAME_EXCHANGE_UNSUPPORTED_ERRNOS = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)

Returned = TypeVar("Returned")


class Disk:
    """The calls to the operating system; each raises OSError as the system does."""

    def open(self, path: Path, flags: int) -> int:
        """A file descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Bytes written, which may be less than `data` has."""
        return os.write(descriptor, data)

    def read(self, descriptor: int, into: memoryview, offset: int) -> int:
        """Bytes read from `offset` on, which may be less than `into` has room for; 0 at the end."""
        return os.preadv(descriptor, [into], offset)

    def sync(self, descriptor: int) -> None:
        """Back when all that was written is on the disk."""
        os.fsync(descriptor)

    def names(self, directory: Path) -> list[str]:
        """What a directory lists, which on a network may be what it held a minute ago."""
        return [entry.name for entry in directory.iterdir()]

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target`, of files at once, by `source`."""
        source.rename(target)

    def swap_names(self, first: Path, second: Path) -> None:
        """Swap the names of two files or directories atomically.

        Raises OSError with ENOSYS, EINVAL or ENOTSUP if the system or the file system cannot do that, such as NFS.
        """
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            error_number = errno.ENOSYS
        elif renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
            return
        else:
            error_number = ctypes.get_errno()
        raise OSError(error_number, os.strerror(error_number), str(first), None, str(second))

    def link(self, source: Path, target: Path) -> None:
        """A second name; fails where `target` exists."""
        target.hardlink_to(source)

    def make_directory(self, path: Path) -> None:
        """A directory; fails where `path` exists."""
        path.mkdir()

    def remove_tree(self, path: Path) -> None:
        """The directory and all in it."""
        shutil.rmtree(path)

    def free(self, path: Path) -> int:
        """Bytes that this user may still write to the file system of `path`."""
        filesystem = os.statvfs(path)
        return filesystem.f_bavail * filesystem.f_frsize

    def sleep(self, seconds: float) -> None:
        """Wait before trying again."""
        time.sleep(seconds)


disk = Disk()
"""Asked for by name at each call (`atomic_io.disk`), so that a test can put another in its place."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What a written file must look like when it is read again."""

    name: str
    """Within its directory."""
    size: int
    """Bytes."""
    sha256: str


class NewFile:
    """A file that is being written. It is hashed on the way, and synced when the `with` block ends without an error.

    `exclusive`: the file must not exist yet. Nothing is waited for, and after an error in the block or the sync it is removed.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        self.path = path
        self.size = 0
        self._exclusive = exclusive
        self._hash = hashlib.sha256()

    def __enter__(self) -> NewFile:
        flags = os.O_WRONLY | os.O_CREAT
        if self._exclusive:
            self._descriptor = disk.open(self.path, flags | os.O_EXCL)
        else:
            # Its directory may have been made by another host a moment ago.
            self._descriptor = call_until_visible(lambda: disk.open(self.path, flags | os.O_TRUNC))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Sync the file, unless the `with` block raised an error, and close it. Remove an exclusive file that is not synced.

        `kind`: the class of that error; None without one.
        """
        is_synced = False
        try:
            if kind is None:
                disk.sync(self._descriptor)
                is_synced = True
        finally:
            os.close(self._descriptor)
            if self._exclusive and not is_synced:
                with suppress(OSError):
                    self.path.unlink()

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data`, and add it to the hash. Raises OSError, after which the file is to be given up."""
        remaining = memoryview(data)
        self._hash.update(remaining)
        self.size += len(remaining)
        while len(remaining):
            num_written = disk.write(self._descriptor, remaining)
            if num_written <= 0:
                raise OSError(errno.EIO, "the disk took no more bytes", str(self.path))
            remaining = remaining[num_written:]

    @property
    def written(self) -> WrittenFile:
        """What was written so far."""
        return WrittenFile(self.path.name, self.size, self._hash.hexdigest())


def write_new_file(path: Path, data: bytes) -> WrittenFile:
    """Write `data` into the file `path` and sync it. Its name is durable once its directory is synced. Raises OSError."""
    with NewFile(path) as file:
        file.write(data)
    return file.written


def sync_directory(path: Path) -> None:
    """Sync a directory, so that files which were created or renamed in it survive a power cut. Raises OSError if that fails.

    Does nothing on a file system that has no directories to sync.
    """
    descriptor = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have nothing to sync there
            raise
    finally:
        os.close(descriptor)  # not by `disk`, whose calls may fail in tests: the descriptor must be given back


def sync_file(path: Path) -> None:
    """Make what others wrote into a file durable. Raises OSError if that fails."""
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Create the directory `path` and those above it, durably; nothing happens if it exists. Raises OSError if that fails."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        with suppress(FileExistsError):
            disk.make_directory(directory)
        sync_directory(directory.parent)


def publish_directory(source: Path, target: Path) -> None:
    """Rename the finished directory `source` to `target`. Its files are synced before the name. Raises OSError if that fails."""
    sync_directory(source)
    disk.rename(source, target)
    sync_directory(target.parent)


def publish_directory_replacing(source: Path, target: Path, set_aside: Path) -> None:
    """Replace the directory `target` by the finished directory `source`, so that a power cut leaves one of them, complete.

    The two names are swapped atomically, and the old directory is deleted. If the file system cannot swap names, the old
    directory is first renamed to `set_aside`, then the new one to `target`. After a power cut between the two, the caller finds
    `set_aside` and must rename it back. Raises OSError if a step before the deletion fails.
    """
    sync_directory(source)
    if set_aside.exists():
        disk.remove_tree(set_aside)  # an earlier call was cut short before it deleted this; `target` is complete
    try:
        disk.swap_names(source, target)
    except OSError as error:
        if error.errno not in RENAME_EXCHANGE_UNSUPPORTED_ERRNOS:
            raise
        disk.rename(target, set_aside)
        try:
            disk.rename(source, target)
        except OSError:
            disk.rename(set_aside, target)
            raise
    else:
        disk.rename(source, set_aside)
    sync_directory(target.parent)
    with suppress(OSError):  # if it stays, it is in nobody's way
        disk.remove_tree(set_aside)


def call_until_visible(
    call: Callable[[], Returned],
    retried_errnos: tuple[int, ...] = NOT_YET_VISIBLE_ERRNOS,
    was_deleted: Callable[[], bool] = lambda: False,
) -> Returned:
    """Wait for a file that another host has written, and that a network file system may show late: call until `call` succeeds.

    `call`: opens the file; its result is returned. `retried_errnos`: error codes by which a file is hidden; after another error
    it is not called again. `was_deleted`: whether the file will never come. Raises the last OSError; if the file stays hidden,
    after about `VISIBILITY_TIMEOUT_S`.
    """
    waited_s = 0.0
    pause_s = 0.05
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in retried_errnos or waited_s >= VISIBILITY_TIMEOUT_S or was_deleted():
                raise
        disk.sleep(pause_s)
        waited_s += pause_s
        pause_s = min(2 * pause_s, 5.0)


class FileTooShort(OSError):
    """A file is shorter than what should be read of it. Another attempt would find the same."""


class RetryingReader:
    """Reads the files of one checkpoint, with three attempts over 30 s after a disk error. Several threads may use it.

    After a disk has failed all three attempts, the next files get only one.
    """

    def __init__(
        self, print_line: Callable[[str], None] = lambda text: None, was_deleted: Callable[[], bool] = lambda: False
    ) -> None:
        """`was_deleted`: whether the checkpoint was deleted, so that its files are not waited for."""
        self._print_line = print_line
        self._was_deleted = was_deleted
        self._disk_has_failed = False
        """Whether a file could not be read in three attempts, so that the next files get only one."""

    def read_with_retries(
        self,
        path: Path,
        read_file: Callable[[], Returned],
        invisible_errnos: tuple[int, ...] = NOT_YET_VISIBLE_ERRNOS,
    ) -> Returned:
        """Read a file through `read_file`, and try again after errors that may be temporary; returns its result.

        `read_file`: opens `path` and reads it from its beginning. It is called again if the file is not visible yet, unless the
        checkpoint was deleted; and after a disk error, unless the disk has failed at an earlier file. `invisible_errnos`: errors
        by which a network file system hides a file that another host has just written. Raises the OSError of the last attempt.
        """
        for pause_s in RETRY_PAUSES_S:
            try:
                return call_until_visible(read_file, invisible_errnos, self._was_deleted)
            except FileTooShort:  # has the number of a disk error, but will not become longer
                raise
            except OSError as error:
                if error.errno not in TRANSIENT_ERRNOS or self._disk_has_failed:
                    raise
                self._print_line(f"{path}: {error.strerror}; looking again in {pause_s:.0f} s")
            disk.sleep(pause_s)
        try:
            return call_until_visible(read_file, invisible_errnos, self._was_deleted)
        except OSError as error:
            self._disk_has_failed = error.errno in TRANSIENT_ERRNOS
            raise


@contextmanager
def open_regular_file(path: Path) -> Iterator[tuple[int, int]]:
    """Open a regular file to be read inside the context; yields its descriptor and its size in bytes.

    Raises OSError, also if it is a link, a pipe or a device: somebody else may have put it there to make us read another file,
    or wait.
    """
    # O_NONBLOCK: opening a pipe that nobody writes would wait.
    descriptor = disk.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


class OpenDirectory:
    """Keeps a directory open, so that it can be found after somebody has renamed it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the directory cannot be opened."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Lets go of the directory."""

    def find_directory(self) -> Path | None:
        """Find where the directory is after somebody has renamed it, and set `path` to that; None if it cannot be found.

        Its open descriptor still refers to it, whatever its name. None also if it was deleted. Raises OSError if the directory
        cannot be looked at.
        """
        try:
            own_status = os.fstat(self._descriptor)
        except OSError as error:
            if error.errno == errno.ESTALE:  # a network file system: deleted there
                return None
            raise
        for path in self._candidate_paths():  # whichever of them has the same identity: device and inode
            with suppress(FileNotFoundError, NotADirectoryError):
                status = path.stat()
                is_same_directory = (status.st_dev, status.st_ino) == (own_status.st_dev, own_status.st_ino)
                if is_same_directory:
                    self.path = path
                    return path
        return None

    def _candidate_paths(self) -> Iterator[Path]:
        """Paths at which a renamed directory may be, best guess first: its last path, the one that Linux names, its siblings.

        The siblings are for systems without /proc. Nothing is checked here: the caller compares each with the open directory.
        """
        yield self.path
        parent = self.path.absolute().parent
        with suppress(OSError):
            path_of_system = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            if path_of_system.parent == parent.resolve():
                # Only its name has changed: keep the rest of the path as it was typed.
                yield self.path.with_name(path_of_system.name)
            else:
                yield path_of_system
        with suppress(OSError):
            for entry in parent.iterdir():
                if entry.is_dir():
                    yield self.path.with_name(entry.name)


def read_exactly(descriptor: int, into: memoryview, offset: int) -> None:
    """Read exactly `len(into)` bytes from `offset` on. Raises OSError, also if the file ends before."""
    while len(into):
        num_read = disk.read(descriptor, into, offset)
        if num_read <= 0:
            raise FileTooShort(errno.EIO, "the file ends too early")
        into = into[num_read:]
        offset += num_read


def read_bytes(path: Path, *, max_bytes: int, wait_until_visible: bool = False) -> bytes:
    """Read a small file that somebody else may have written.

    `wait_until_visible`: another host may have just written it, so it is waited for. Raises OSError if it cannot be read, has
    more than `max_bytes` bytes, or is no regular file (a link, say).
    """
    if wait_until_visible:
        return RetryingReader().read_with_retries(path, lambda: read_bytes(path, max_bytes=max_bytes))
    with open_regular_file(path) as (descriptor, size):
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than {max_bytes}", str(path))
        data = bytearray(size)
        read_exactly(descriptor, memoryview(data), 0)
    return bytes(data)


def file_difference(directory: Path, expected: WrittenFile, reader: RetryingReader | None = None) -> str | None:
    """Compare a file of a checkpoint with what was noted when it was written; says how it differs, or None if it does not.

    Such as `rank-00003.safetensors has 512 bytes instead of 4096`. Reads the whole file and raises nothing: a file that cannot be
    read differs. `expected`: name, size and SHA-256. `reader`: shared by the files of a checkpoint, so that a disk that has
    failed is waited for once.
    """
    path = directory / expected.name
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, expected.size))))
    try:
        return (reader or RetryingReader()).read_with_retries(path, partial(_read_and_compare, path, expected, buffer))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return f"{expected.name} is missing"
        return f"{expected.name} cannot be read ({error_summary(error)})"


def _read_and_compare(path: Path, expected: WrittenFile, buffer: memoryview) -> str | None:
    """Say in a sentence how the size or the hash of a file differs from `expected`; None if they are equal.

    `buffer`: memory that is filled chunk by chunk, reused when the file is read again. Raises OSError if it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular_file(path) as (descriptor, size):
        if size != expected.size:
            return f"{expected.name} has {size} bytes instead of {expected.size}"
        for offset in range(0, size, len(buffer)):
            chunk = buffer[: min(len(buffer), size - offset)]
            read_exactly(descriptor, chunk, offset)  # fills the chunk
            digest.update(chunk)
    if digest.hexdigest() != expected.sha256:
        return f"{expected.name} does not have the bytes that were written"
    return None


def disk_space_problem(directory: Path, needed: int) -> str | None:
    """A sentence that says that `needed` bytes do not fit on the disk of `directory`; None if they do, or if it is unknown."""
    try:
        free = disk.free(directory)
    except OSError:
        return None
    if free >= needed:
        return None
    return f"No space left on {directory}: {size_text(needed)} are needed and {size_text(free)} are free"


def size_text(size: float) -> str:
    """A number of bytes for people, in units of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def error_summary(error: BaseException) -> str:
    """Put an error into one line for a message: `No space left on device: /x/y` of an OSError, else its class and first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if "No space left on device" in str(error):  # libraries wrap it in errors of their own
        return os.strerror(errno.ENOSPC)
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0][:300]}"
