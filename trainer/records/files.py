"""The file system as ownership and publishing use it: one seam, where faults of network file systems are put in by tests."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What a file system without hard links answers."""


class Files:
    """Calls of the operating system that must hold on NFS and Lustre. Errors: OSError."""

    def read(self, path: Path) -> bytes:
        """The content, opened anew: opening is what makes an NFS client ask the server. A stale handle is opened once more."""
        for attempt in (1, 2):
            try:
                with os.fdopen(self.open(path, os.O_RDONLY), "rb") as file:
                    return file.read()
            except OSError as error:
                if error.errno != errno.ESTALE or attempt == 2:
                    raise
        raise AssertionError("the loop returns or raises")

    def create(self, path: Path, content: bytes) -> None:
        """A new file with this content, durably; the whole content, or an error and no file."""
        descriptor = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            left = memoryview(content)
            while left:
                left = left[self.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(descriptor)

    def replace(self, path: Path, content: bytes, token: str) -> None:
        """Put this content under the name, at once and durably; `token` tells apart who writes at the same time."""
        aside = path.with_name(f".{path.name}.{token}")
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()
        self.create(aside, content)
        try:
            self.rename(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise

    def claim(self, path: Path, content: bytes, token: str) -> bool:
        """Whether the name is now this caller's; False where it is somebody's already. Exclusive, also on NFS.

        NFS may report an error for a link that was made, and the reverse; the number of links tells. Where there are no links,
        the name is created exclusively instead.
        """
        aside = path.with_name(f".{path.name}.{token}")
        self.create(aside, content)
        try:
            try:
                self.link(aside, path)
            except OSError as error:
                if error.errno in NO_LINKS:
                    return self._create_first(path, content)
            return aside.stat().st_nlink == 2
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def _create_first(self, path: Path, content: bytes) -> bool:
        try:
            self.create(path, content)
        except FileExistsError:
            return False
        return True

    def names(self, directory: Path) -> list[str]:
        """What the directory lists, which on a network may be what it held a minute ago."""
        return [entry.name for entry in directory.iterdir()]

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, content: memoryview) -> int:
        return os.write(descriptor, content)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)
