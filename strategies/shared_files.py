"""Small files through which attempts at a run inform each other. Each appears complete or not at all, also on network disks.

They are written through `strategies/atomic_io.py`, whose errors are OSError.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

from strategies import atomic_io

NO_HARD_LINK_ERRNOS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Error codes of a call of `link` on a file system without hard links."""
MAX_BYTES = 2**20
"""Limit of the size of such a file."""


def read_shared_file(path: Path) -> bytes:
    """The content of a file. Opening it makes an NFS client ask the server. If the handle is stale, it is opened once more."""
    try:
        return atomic_io.read_bytes(path, max_bytes=MAX_BYTES)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return atomic_io.read_bytes(path, max_bytes=MAX_BYTES)


def replace_shared_file(path: Path, content: bytes, writer_id: str) -> None:
    """Replace the content of a file in one step. `writer_id`: differs between writers, for the name of the temporary file."""
    temporary = _write_temporary_file(path, content, writer_id)
    try:
        atomic_io.disk.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def claim_shared_file(path: Path, content: bytes, writer_id: str) -> bool:
    """Create the file `path`, unless it exists, also on a network disk: of several processes that claim it, one succeeds.

    Returns whether this call has created it. The content is complete from the first moment, because the file is written under
    another name and linked. `writer_id`: differs between writers, for that name. Raises OSError if it cannot be written.
    """
    # NFS may report an error for a hard link that was made, or success for one that was not. The number of links tells the
    # truth.
    temporary = _write_temporary_file(path, content, writer_id)
    try:
        try:
            atomic_io.disk.link(temporary, path)
        except OSError as error:
            # Without hard links, readers may see the file before its content is complete.
            if error.errno in NO_HARD_LINK_ERRNOS:
                return _create_exclusively(path, content)
        return temporary.stat().st_nlink == 2  # it has both names
    finally:
        with suppress(OSError):
            temporary.unlink()


def _write_temporary_file(path: Path, content: bytes, writer_id: str) -> Path:
    """Write `content` into a new file beside `path`, whose name has the `writer_id`; returns its path."""
    temporary = path.with_name(f".{path.name}.{writer_id}")
    # A process that was killed here may have left one: in a container process ids, and so writer ids, come again.
    with suppress(FileNotFoundError):
        temporary.unlink()
    _create(temporary, content)
    return temporary


def _create(path: Path, content: bytes) -> None:
    """Create the file `path` with `content` and sync it. Raises FileExistsError if it exists."""
    with atomic_io.NewFile(path, exclusive=True) as file:
        file.write(content)


def _create_exclusively(path: Path, content: bytes) -> bool:
    """Create the file `path`; returns False if it exists already."""
    try:
        _create(path, content)
    except FileExistsError:
        return False
    return True


def free_space_advice(error: OSError) -> str:
    """`free space, or ` if a write failed because the disk or the quota is full, to begin a remedy with; else empty."""
    disk_is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free space, or " if disk_is_full else ""
