"""Files on other machines (s3://, gs://, hf://, https:// and so on), through fsspec.

Nothing here is reached unless `data.remote` says so.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from errno import EIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

from strategies.errors import DataError

Answer = TypeVar("Answer")
_CONTENT_TAGS = ("ETag", "Content-MD5", "Digest")
"""What a web server may say about a file's content."""
BLOCK_BYTES = 8 << 20
"""Bytes asked for at a time."""
HEAD_BYTES = 4096
"""Bytes that tell what a file is."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on another machine, with the attributes of a `Path` that reading needs."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the address, without a query."""
        without_query = urlsplit(self.url).path if self.url.startswith("http") else self.url
        return PurePosixPath(without_query).name

    @property
    def suffixes(self) -> list[str]:
        """The suffixes of its name."""
        return PurePosixPath(self.name).suffixes

    @property
    def suffix(self) -> str:
        """The last suffix of its name."""
        return PurePosixPath(self.name).suffix

    def open(self) -> BinaryIO:
        """Open the file's bytes as a stream. Raises DataError if it cannot be reached; reading raises OSError."""
        file = _query_file_system(self.url, lambda files, path: files.open(path, "rb", block_size=BLOCK_BYTES))
        return cast("BinaryIO", io.BufferedReader(_RemoteReader(file), BLOCK_BYTES))

    def size_bytes(self) -> int:
        """Size in bytes, as the other machine tells; 0 if it does not. Raises DataError."""
        return int(_query_file_system(self.url, lambda files, path: files.info(path)).get("size") or 0)

    def content_identity(self) -> str:
        """A text that changes with the file's content, such as its address with its ETag, for the fingerprint of prepared data.

        - Not on a web server: what its file system tells of the content (`ukey` of fsspec).
        - On a web server that says something of the content: size and tags.
        - On any other web server: the SHA-256 of its bytes, which are read for it.
        Raises DataError.
        """
        if not self.url.startswith("http"):
            return f"{self.url}:{_query_file_system(self.url, lambda files, path: files.ukey(path))}"
        file_info = _query_file_system(self.url, lambda files, path: files.info(path))
        tags = [str(file_info[tag]) for tag in _CONTENT_TAGS if file_info.get(tag)]
        if tags:
            return f"{self.url}:{file_info.get('size')}:{':'.join(tags)}"
        digest = hashlib.sha256()
        with self.open() as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()


def remote_files(address: str, setting: str, kind_of: Callable[[RemoteFile], str | None]) -> list[RemoteFile]:
    """Find the files that an address names: one file, those that match a pattern with `*`, or all below a directory.

    `setting`: the name of the setting that has the address, for messages. `kind_of`: the suffix that says how a file is read;
    None if it cannot be read, as for a directory. Raises DataError.
    """
    is_pattern = "*" in address
    if kind_of(RemoteFile(address)) and not is_pattern:
        RemoteFile(address).size_bytes()  # raises if there is none
        return [RemoteFile(address)]

    def list_urls(files: Any, path: str) -> list[str]:
        """Addresses of the files that match, or that are below the directory. `files`: the file system of fsspec."""
        names = files.glob(path) if is_pattern else files.find(path)
        return [files.unstrip_protocol(name) for name in sorted(names)]

    candidates = [RemoteFile(url) for url in _query_file_system(address, list_urls)]
    readable = [file for file in candidates if kind_of(file) and not file.name.startswith(".")]
    if not readable:
        raise DataError(f"{setting}={address} names no file that can be read")
    return readable


class _RemoteReader(io.RawIOBase):
    """A file of fsspec; whatever its library raises becomes an OSError."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._call_or_os_error(self.file.seek, offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as the file goes; returns the number of bytes. Called by `io.BufferedReader`."""
        received = self._call_or_os_error(self.file.read, len(buffer))
        # A first look at a file must see enough of it to tell its format, however little the network gives at a time.
        while received and len(received) < min(HEAD_BYTES, len(buffer)):
            following = self._call_or_os_error(self.file.read, len(buffer) - len(received))
            if not following:
                break
            received += following
        buffer[: len(received)] = received
        return len(received)

    def _call_or_os_error(self, method: Callable[..., Any], *arguments: int) -> Any:
        """Call a method of the file; any failure of its library becomes an OSError."""
        try:
            return method(*arguments)
        except OSError:
            raise
        except Exception as error:
            # Readers expect an OSError from a file that fails, and name the file in their message.
            raise OSError(EIO, f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def _query_file_system(url: str, query: Callable[[Any, str], Answer]) -> Answer:
    """Ask the file system of an address, by `query(file system of fsspec, path)`, and return what that returns.

    Raises DataError for whatever fails, also for a package that is missing.
    """
    from fsspec.core import url_to_fs

    try:
        file_system, path = url_to_fs(url)
        return query(file_system, str(path))
    except ImportError as error:
        package = re.search(r"\b(s3fs|gcsfs|adlfs|ossfs|paramiko|aiohttp|huggingface_hub|\w+fs)\b", str(error))
        name = package.group() if package else str(error)
        raise DataError(f"{url}: reading it needs the package {name}: pip install {name}") from error
    except FileNotFoundError as error:
        raise DataError(f"{url}: does not exist, or nobody answers there") from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        cause = f": {lines[0][:300]}" if lines else ""
        raise DataError(
            f"{url}: cannot be read: {type(error).__name__}{cause}; check the address, the network "
            "and your credentials, or download the file and give its path"
        ) from error
