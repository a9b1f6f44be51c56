"""Small files by which attempts at a run inform each other. Each appears whole or not at all, also on network disks.

They are written through `strategies/atomic_io.py`. Errors: OSError.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

from strategies import atomic_io

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links answers."""
MAX_BYTES = 2**20
"""Bytes that such a file has at most."""


def read(path: Path) -> bytes:
    """The content, opened anew: opening is what makes an NFS client ask the server. A stale handle is opened once more."""
    try:
        return atomic_io.read_bytes(path, most=MAX_BYTES)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return atomic_io.read_bytes(path, most=MAX_BYTES)


def replace(path: Path, content: bytes, token: str) -> None:
    """Put this content under the name, at once; `token` tells apart who writes at the same time."""
    temporary = _written_aside(path, content, token)
    try:
        atomic_io.disk.rename(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def claim(path: Path, content: bytes, token: str) -> bool:
    """Whether the name is now this caller's; False where it is somebody's already. Exclusive, also on NFS.

    NFS may report an error for a link that was made, and the reverse; the number of links tells. Where there are no links,
    the name is created exclusively instead.
    """
    temporary = _written_aside(path, content, token)
    try:
        try:
            atomic_io.disk.link(temporary, path)
        except OSError as error:
            if error.errno in NO_HARD_LINKS:
                return _create_first(path, content)
        return temporary.stat().st_nlink == 2
    finally:
        with suppress(OSError):
            temporary.unlink()


def _written_aside(path: Path, content: bytes, token: str) -> Path:
    temporary = path.with_name(f".{path.name}.{token}")
    with suppress(FileNotFoundError):  # of one that was killed amid this; in a container the next has its number again
        temporary.unlink()
    _create(temporary, content)
    return temporary


def _create(path: Path, content: bytes) -> None:
    with atomic_io.NewFile(path, exclusive=True) as file:
        file.write(content)


def _create_first(path: Path, content: bytes) -> bool:
    try:
        _create(path, content)
    except FileExistsError:
        return False
    return True


def remedy(error: OSError) -> str:
    """The first half of what to do about a write that failed: empty where free space would not help."""
    return "free space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
