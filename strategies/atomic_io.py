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
from pathlib import Path
from typing import TypeVar

PATIENCE_S = 75.0
"""How long a name that another host has made may stay invisible: NFS clients keep what they know of a directory for 60 s."""
CHUNK_BYTES = 2**23
"""Bytes that are read and hashed at a time."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux
NOT_YET_VISIBLE = (errno.ENOENT, errno.ESTALE)  # of what, or in what, another host has made a moment ago
TRANSIENT = (errno.EIO, errno.ETIMEDOUT)  # of a network mount or a disk that stumbles: the next look may succeed
PAUSES_S = (10.0, 20.0)
"""Pauses between three looks at a file that met a passing error."""
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)

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

    def exchange(self, first: Path, second: Path) -> None:
        """Swap two names at once; ENOSYS, EINVAL or ENOTSUP where the system or the file system cannot (NFS)."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is None or call(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
            code = errno.ENOSYS if call is None else ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(first), None, str(second))

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
        about = os.statvfs(path)
        return about.f_bavail * about.f_frsize

    def sleep(self, seconds: float) -> None:
        """Wait before trying again."""
        time.sleep(seconds)


disk = Disk()
"""Asked for by name at each call (`atomic_io.disk`), so that a test can put another in its place."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file as it was meant to be on the disk: what it must be found to be."""

    name: str
    """Within its directory."""
    size: int
    """Bytes."""
    sha256: str


class NewFile:
    """A file being written: hashed on the way, synced when the `with` block ends well.

    `exclusive`: it must not exist, nobody is waited for, and there is no file where the block, or its sync, ends badly.
    """

    def __init__(self, path: Path, *, exclusive: bool = False) -> None:
        self.path, self.size, self._exclusive = path, 0, exclusive
        self._hash = hashlib.sha256()

    def __enter__(self) -> NewFile:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if self._exclusive else os.O_TRUNC)
        self._descriptor = retry_until_visible(
            lambda: disk.open(self.path, flags), () if self._exclusive else NOT_YET_VISIBLE
        )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        synced = False
        try:
            if kind is None:
                disk.sync(self._descriptor)
                synced = True
        finally:
            os.close(self._descriptor)
            if self._exclusive and not synced:
                with suppress(OSError):
                    self.path.unlink()

    def write(self, data: bytes | memoryview) -> None:
        """Append all of `data` (bytes). Errors: OSError, after which the file is to be given up."""
        remaining = memoryview(data)
        self._hash.update(remaining)
        self.size += len(remaining)
        while len(remaining):
            done = disk.write(self._descriptor, remaining)
            if done <= 0:
                raise OSError(errno.EIO, "the disk took no more bytes", str(self.path))
            remaining = remaining[done:]

    @property
    def written(self) -> WrittenFile:
        """What was written so far."""
        return WrittenFile(self.path.name, self.size, self._hash.hexdigest())


def write_new(path: Path, data: bytes) -> WrittenFile:
    """The file `path` with these bytes, synced. Its name is durable once its directory is synced. Errors: OSError."""
    with NewFile(path) as file:
        file.write(data)
    return file.written


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Errors: OSError."""
    descriptor = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have nothing to sync there
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make what others wrote into a file durable. Errors: OSError."""
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """The directory `path` with those above it, durably; nothing where it exists. Errors: OSError."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        with suppress(FileExistsError):
            disk.make_directory(directory)
        sync_directory(directory.parent)


def publish(source: Path, target: Path) -> None:
    """Give a finished directory its name: what it holds is durable before the name is. Errors: OSError."""
    sync_directory(source)
    disk.rename(source, target)
    sync_directory(target.parent)


def publish_replacing(source: Path, target: Path, replaced: Path) -> None:
    """As `publish`, in the place of a directory that has the name already: a cut leaves one of the two, whole. Errors: OSError.

    Both change names at once. Where the file system cannot do that, the old one is called `replaced` before the new one has the
    name: a cut between the two leaves it to be put back.
    """
    sync_directory(source)
    if replaced.exists():
        disk.remove_tree(replaced)  # what an earlier call had not finished: `target` is there
    try:
        disk.exchange(source, target)
    except OSError as error:
        if error.errno not in NO_EXCHANGE:
            raise
        disk.rename(target, replaced)
        try:
            disk.rename(source, target)
        except OSError:
            disk.rename(replaced, target)
            raise
    else:
        disk.rename(source, replaced)
    sync_directory(target.parent)
    with suppress(OSError):  # in nobody's way
        disk.remove_tree(replaced)


def retry_until_visible(
    call: Callable[[], Returned],
    codes: tuple[int, ...] = NOT_YET_VISIBLE,
    was_deleted: Callable[[], bool] = lambda: False,
) -> Returned:
    """What `call`, which opens, returns, tried again while a network file system has not heard of what another host wrote.

    Nobody waits for what `was_deleted` says was deleted.
    """
    waited, pause = 0.0, 0.05
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno not in codes or waited >= PATIENCE_S or was_deleted():
                raise
        disk.sleep(pause)
        waited, pause = waited + pause, min(2 * pause, 5.0)


class EndsTooEarly(OSError):
    """A file ends before what should be read of it: another look would find the same."""


class RetryingReader:
    """Reads files of one checkpoint, three times over 30 s if the disk stumbles. For use by several threads.

    A disk that failed for that long is not waited for again at the next file.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda text: None, was_deleted: Callable[[], bool] = lambda: False
    ) -> None:
        """`was_deleted`: whether the checkpoint was deleted, and nobody waits for its files."""
        self._report, self._exhausted = say, False
        self._was_deleted = was_deleted

    def read(self, path: Path, read: Callable[[], Returned], codes: tuple[int, ...] = NOT_YET_VISIBLE) -> Returned:
        """What `read` returns, a function that opens `path` and reads it from its beginning.

        `codes`: errors that are waited out, as in `retry_until_visible`. Errors: OSError, that of the last attempt.
        """
        for pause in PAUSES_S:
            try:
                return retry_until_visible(read, codes, self._was_deleted)
            except EndsTooEarly:
                raise
            except OSError as error:
                if error.errno not in TRANSIENT or self._exhausted:
                    raise
                self._report(f"{path}: {error.strerror}; looking again in {pause:.0f} s")
            disk.sleep(pause)
        try:
            return retry_until_visible(read, codes, self._was_deleted)
        except OSError as error:
            self._exhausted = error.errno in TRANSIENT
            raise


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, size in bytes) of a regular file, to be read.

    Errors: OSError, also for what is no regular file: links, pipes and devices of others are not followed.
    """
    descriptor = disk.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


class OpenDirectory:
    """A directory that stays open, so that it is found again after it was renamed."""

    def __init__(self, path: Path) -> None:
        """Errors: OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        """Lets go of the directory."""

    def find(self) -> Path | None:
        """Where the directory is now; None if it was deleted, or is where this process cannot find it. Errors: OSError."""
        try:
            own_status = os.fstat(self._descriptor)
        except OSError as error:
            if error.errno == errno.ESTALE:  # a network file system: deleted there
                return None
            raise
        for candidate in self._candidates():
            with suppress(FileNotFoundError, NotADirectoryError):
                status = candidate.stat()
                if (status.st_dev, status.st_ino) == (own_status.st_dev, own_status.st_ino):
                    self.path = candidate
                    return candidate
        return None

    def _candidates(self) -> Iterator[Path]:
        """The last known path, what Linux says of the open directory, and, for other systems, what lies beside it."""
        yield self.path
        parent = self.path.absolute().parent
        with suppress(OSError):
            current = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            # As it was typed, if it was only given another name.
            yield self.path.with_name(current.name) if current.parent == parent.resolve() else current
        with suppress(OSError):
            yield from (self.path.with_name(entry.name) for entry in parent.iterdir() if entry.is_dir())


def fill(descriptor: int, into: memoryview, offset: int) -> None:
    """Read exactly `len(into)` bytes from `offset` on. Errors: OSError, also where the file ends before."""
    while len(into):
        done = disk.read(descriptor, into, offset)
        if done <= 0:
            raise EndsTooEarly(errno.EIO, "the file ends too early")
        into, offset = into[done:], offset + done


def read_bytes(path: Path, *, most: int, patient: bool = False) -> bytes:
    """All of a regular file of at most `most` bytes; `patient` where another host may have just written it. Errors: OSError."""
    if patient:
        return RetryingReader().read(path, lambda: read_bytes(path, most=most))
    with open_regular(path) as (descriptor, size):
        if size > most:
            raise OSError(errno.EFBIG, f"has {size} bytes, more than {most}", str(path))
        data = bytearray(size)
        fill(descriptor, memoryview(data), 0)
    return bytes(data)


def file_difference(directory: Path, expected: WrittenFile, reader: RetryingReader | None = None) -> str | None:
    """How a file that was seen there differs from what was written, None where it does not. Reads all of it. No errors.

    `reader` are those of the checkpoint that it belongs to.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, expected.size))))

    def compare() -> str | None:
        digest = hashlib.sha256()
        with open_regular(directory / expected.name) as (descriptor, size):
            if size != expected.size:
                return f"{expected.name} has {size} bytes instead of {expected.size}"
            for offset in range(0, size, len(buffer)):
                chunk = buffer[: min(len(buffer), size - offset)]
                fill(descriptor, chunk, offset)
                digest.update(chunk)
        same = digest.hexdigest() == expected.sha256
        return None if same else f"{expected.name} does not have the bytes that were written"

    try:
        return (reader or RetryingReader()).read(directory / expected.name, compare)
    except OSError as error:
        how = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({reason(error)})"
        return f"{expected.name} {how}"


def missing_space(directory: Path, needed: int) -> str | None:
    """Why `needed` bytes do not fit into an existing directory; None where they do, or where nobody can say."""
    try:
        free = disk.free(directory)
    except OSError:
        return None
    full = f"No space left on {directory}: {size_text(needed)} are needed and {size_text(free)} are free"
    return None if free >= needed else full


def size_text(size: float) -> str:
    """A number of bytes for people, in units of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def reason(error: BaseException) -> str:
    """Why something failed, the cause first: what the system says, then where; else the error's first line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if "No space left on device" in str(error):  # of libraries with errors of their own
        return os.strerror(errno.ENOSPC)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
