"""Opens files, plain or compressed, local or remote, as one stream of bytes; tells by the first bytes what they hold.

A file whose name says something else than its bytes is refused before a row is read. Reading streams; compressed
files may have several members or frames, a zip archive has one file. Sources: RFC 1952 (gzip), RFC 8878 (Zstandard).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from strategies.errors import DataError
from strategies.small_files import LFS_POINTER_START
from trainer.data.document import RejectedRow, excerpt
from trainer.data.fields import RowError
from trainer.data.read.remote import HEAD_BYTES, RemoteFile

InputPath = Path | RemoteFile
"""A file that rows are read from."""
READ_BYTES = 2**20
"""Bytes read at a time."""
MAX_ROW_BYTES = 64 * 2**20
"""Longest row in bytes; a longer one is a mistake of whoever wrote the file, and would not fit a context anyway."""
BOM = b"\xef\xbb\xbf"
_DAMAGE_ERRORS = (zlib.error, lzma.LZMAError, zipfile.BadZipFile)
_READ_ERRORS = (OSError, EOFError, *_DAMAGE_ERRORS)
_FILE_TYPES = (  # how contents begin, what they are, and the suffix of those that can be read
    (rb"\x1f\x8b", "gzip-compressed data", ".gz"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard-compressed data", ".zst"),
    (rb"BZh[1-9]1AY&SY", "bzip2-compressed data", ".bz2"),
    (rb"\xfd7zXZ\x00", "xz-compressed data", ".xz"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive (or an office document)", ".zip"),
    (rb"PAR1", "a Parquet file", ".parquet"),
    (rb"ARROW1\x00\x00", "an Arrow file", ".arrow"),
    (rb"\xff\xff\xff\xff.{2}\x00\x00", "an Arrow stream", ".arrow"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", ""),
    (rb".{257}ustar", "a tar archive", ""),
    (rb"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"GIF8[79]a", "a GIF image", ""),
    (rb"%PDF-\d", "a PDF document", ""),
    (rb"SQLite format 3\x00", "an SQLite database", ""),
    (rb"GGUF", "a GGUF model", ""),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32 text", ""),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", ""),
)
_REGEX_AND_CONTENT = tuple((re.compile(pattern, re.DOTALL), content) for pattern, content, _ in _FILE_TYPES)
_SUFFIX_BY_CONTENT = {content: suffix for _, content, suffix in _FILE_TYPES}
"""The suffix of a file with this content; empty for contents that cannot be read."""
COMPRESSION_BY_SUFFIX = {suffix: content for _, content, suffix in _FILE_TYPES[:5]}
"""Of the suffix of compressed files, such as `.gz`, what their first bytes say: "gzip-compressed data"."""


def compression_of(path: InputPath) -> str:
    """The suffix of a file's compression, such as `.gz`; empty if its name has none."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSION_BY_SUFFIX else ""


def require_regular_file(path: Path) -> None:
    """Raise DataError unless `path` is a file that can be read twice: no pipe or device, on which reading may hang."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable_file(path, error) from error
    if not stat.S_ISREG(mode):
        file_type = "a named pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise DataError(f"{path}: is {file_type}; data is read more than once, so write it to a regular file first")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read the JSON object in a file. Raises DataError, which ends with `remedy`, for a file that has none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object; {remedy}")
    return value


def check_no_lfs_pointer(path: InputPath, head: bytes) -> None:
    """Raise DataError if a file is only a pointer of git-lfs, a few lines in place of the contents. `head`: its first bytes."""
    if head.startswith(LFS_POINTER_START):
        raise DataError(
            f"{path}: is a pointer that git-lfs left in the place of the file; run `git lfs pull` in its directory, or "
            "download the file again"
        )


def identify_content(head: bytes) -> str | None:
    """Tell what a file is by its first bytes, such as "a Parquet file"; None for UTF-8 or other 8-bit text.

    Also None if nothing known begins like that.
    """
    for pattern, content in _REGEX_AND_CONTENT:
        if pattern.match(head):
            return content
    # UTF-16 without a byte order mark: in Latin text every other byte is 0.
    if len(head) < 4:
        return None
    fewer_zeros, more_zeros = sorted((head[0::2].count(0), head[1::2].count(0)))
    num_characters = len(head) / 2
    if fewer_zeros == 0 and more_zeros > 0.3 * num_characters:
        return "UTF-16 text"
    return None


def open_binary(path: InputPath) -> io.BufferedReader:
    """Open a local or remote file for its bytes as they are. Raises DataError and OSError."""
    if isinstance(path, RemoteFile):
        return cast("io.BufferedReader", path.open())
    require_regular_file(path)
    return cast("io.BufferedReader", path.open("rb", buffering=READ_BYTES))


@contextmanager
def open_text_bytes(path: InputPath) -> Iterator[io.BufferedReader]:
    """Open a text file as a stream of bytes, decompressed, positioned after a UTF-8 byte order mark.

    Raises DataError if the file is empty, cannot be read, is compressed in another way than its name says, or holds no text but
    an image, UTF-16 and so on. Also, while the caller reads, if it is cut off or damaged.
    """
    try:
        with open_binary(path) as file:
            # `peek` shows the first bytes and leaves the position where it is.
            head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
            if not head:
                raise DataError(f"{path}:1: the file is empty (0 bytes)")
            check_no_lfs_pointer(path, head)
            compression = compression_of(path)
            _check_compression_matches_name(path, compression, head)
            with _open_decompressed(path, file, compression) as stream:
                # Again after decompression: a compressed image is an image.
                head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]
                content = identify_content(head)
                if content:
                    raise DataError(f"{path}: holds {content}{_content_remedy(path, content)}")
                if head.startswith(BOM):
                    stream.read(len(BOM))
                yield stream
    except _READ_ERRORS as error:
        raise unreadable_file(path, error) from error


def _check_compression_matches_name(path: InputPath, compression: str, head: bytes) -> None:
    """Raise DataError if a file is not compressed as its name says. `compression`: the suffix, such as `.gz`, or empty.

    `head`: its first bytes.
    """
    content = identify_content(head)
    if compression and content != COMPRESSION_BY_SUFFIX[compression]:
        fault = f"it holds {content}" if content else "it is not compressed"
        raise DataError(
            f"{path}: the name says that it is {COMPRESSION_BY_SUFFIX[compression]}, but {fault}; rename it"
        )


def _open_decompressed(path: InputPath, file: io.BufferedReader, compression: str) -> io.BufferedReader:
    """Open the decompressed bytes of a file as a stream; `compression` is a suffix such as `.gz`, or empty.

    Raises DataError for a zip archive of several files.
    """
    raw_stream: Any
    if not compression:
        return file
    if compression == ".gz":
        raw_stream = gzip.GzipFile(fileobj=file)
    elif compression == ".zst":
        import pyarrow as pa  # its reader joins frames and, unlike others, notices a frame that is cut off

        raw_stream = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    elif compression == ".zip":
        archive = zipfile.ZipFile(file)
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        if len(names) != 1:
            raise DataError(f"{path}: the archive holds {len(names)} files, and one can be read; unpack it")
        raw_stream = archive.open(names[0])
    elif compression == ".bz2":
        raw_stream = _MemberReader(file, bz2.BZ2Decompressor)
    else:  # .xz
        raw_stream = _MemberReader(file, lzma.LZMADecompressor)
    return io.BufferedReader(raw_stream, READ_BYTES)


def decompression_ratio(path: Path) -> float:
    """Estimate how many decompressed bytes a byte of the file stands for; 1 for a file that is not compressed.

    Used to estimate how much there is to read. A zip archive says it; of other files, the first MiB is decompressed. Raises
    DataError.
    """
    suffix = compression_of(path)
    if not suffix:
        return 1.0
    decompressed_bytes = 0
    try:
        with open_binary(path) as file:
            # The directory of an archive counts too, so that small files may be larger in it: the ratio is then below 1.
            if suffix == ".zip":
                sizes = [entry.file_size for entry in zipfile.ZipFile(file).infolist()]
                return sum(sizes) / max(1, path.stat().st_size)
            head = file.read(READ_BYTES)
        # The head ends amid the data, which the decompressor reports as an error at last.
        with suppress(*_READ_ERRORS), _open_decompressed(path, io.BufferedReader(io.BytesIO(head)), suffix) as stream:
            while chunk := stream.read1(1 << 16):
                decompressed_bytes += len(chunk)
    except _READ_ERRORS as error:
        raise unreadable_file(path, error) from error
    return max(1.0, decompressed_bytes / max(1, len(head)))


class _MemberReader(io.RawIOBase):
    """Reads a bzip2 or xz file, which may have several compressed members one behind the other.

    Unlike the library's own reader it refuses other bytes behind them.
    """

    def __init__(self, file: io.BufferedReader, make_decompressor: Callable[[], Any]) -> None:
        self.file = file
        self.make_decompressor = make_decompressor
        self.decompressor = make_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one step of decompression goes; returns the bytes written, 0 at the end of the file.

        Called by `io.BufferedReader`. A member is a compressed stream of its own; files may have several. Raises EOFError for one
        that is cut off.
        """
        while True:
            compressed = b""
            # The member has ended; the next one begins in what it did not use.
            if self.decompressor.eof:
                compressed = self._next_member()  # the bytes that it begins with; empty if there is none
                if not compressed:
                    return 0
                self.decompressor = self.make_decompressor()
            elif self.decompressor.needs_input:
                compressed = self.file.read(READ_BYTES)
                if not compressed:
                    raise EOFError
            decompressed = self.decompressor.decompress(compressed, len(buffer))
            if decompressed:
                buffer[: len(decompressed)] = decompressed
                return len(decompressed)

    def _next_member(self) -> bytes:
        """Find the first bytes of the next compressed member, behind the padding of the one that has ended.

        Empty at the end of the file.
        """
        following = self.decompressor.unused_data.lstrip(b"\0")
        while not following:
            block = self.file.read(READ_BYTES)
            if not block:
                return b""
            following = block.lstrip(b"\0")
        return following


def decode_utf8(raw: bytes) -> str:
    """Decode the text of a row or a line. Raises RowError (`nul_byte`, `not_utf8`) with the column and the byte."""
    if b"\0" in raw:
        raise RowError("nul_byte", f"NUL byte in column {raw.index(0) + 1}; the file is damaged or is not text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        message = f"byte 0x{byte:02x} in column {error.start + 1} is not UTF-8; save the file as UTF-8"
        raise RowError("not_utf8", message) from None


def reject_too_long_row(file: str, line: int, beginning: bytes | str, size_bytes: int) -> RejectedRow:
    """Make the rejected row for a row of more than `MAX_ROW_BYTES`. `beginning`: its first characters, for messages."""
    message = f"the row has {size_bytes / 2**20:.0f} MiB, the most is {MAX_ROW_BYTES >> 20} MiB; split it"
    return RejectedRow(file, line, reason="too_long", message=message, excerpt=excerpt(beginning))


def _content_remedy(path: InputPath, content: str) -> str:
    """Say what to do about a file that should be text and holds `content`, such as "a Parquet file": part of an error message.

    - UTF-16 or UTF-32: save it as UTF-8;
    - compressed data: decompress it, or give it its suffix;
    - a table: give it its suffix;
    - anything else cannot be read.
    """
    if content.startswith(("UTF-16", "UTF-32")):
        return "; save the file as UTF-8"
    is_compressed = bool(compression_of(path))
    suffix = _SUFFIX_BY_CONTENT[content]
    if suffix in COMPRESSION_BY_SUFFIX:
        return " inside the compression; decompress it once" if is_compressed else f"; name it {path.name}{suffix}"
    if suffix:
        return f"; name it {suffix}"
    suffix_of_text = path.suffixes[-2] if is_compressed else path.suffix
    return f", not the text that {suffix_of_text} promises; export it as text first, or remove it"


def unreadable_file(path: InputPath, error: BaseException) -> DataError:
    """Make the error for a file that the operating system or a decompressor cannot read, with what to do about it."""
    if isinstance(error, EOFError) or "Truncated compressed stream" in str(error):
        return DataError(f"{path}: the compressed file is cut off before its end; copy or make it again")
    # The system's errors have a message in `strerror`; without one, an OSError comes from a decompressor.
    is_from_decompressor = isinstance(error, OSError) and not error.strerror
    if isinstance(error, (gzip.BadGzipFile, *_DAMAGE_ERRORS)) or is_from_decompressor:
        return DataError(f"{path}: the compressed data is damaged ({error}); copy or make the file again")
    if isinstance(error, PermissionError):
        return DataError(f"{path}: cannot be read: {error.strerror}; give yourself the right to read it")
    return DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
