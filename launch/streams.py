"""Standard streams and their encoding, repaired once before a verb starts.

A cron job or a daemon may start the command with closed standard streams. A minimal container may have a locale of
ASCII alone, and a terminal an encoding that lacks most characters. None of these may end a run.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from strategies.errors import ConfigError

NAMES = ("stdin", "stdout", "stderr")
"""The standard streams in the order of their descriptors, 0 to 2."""
UTF8_MODE = "PYTHONUTF8"
"""The environment variable of Python that makes UTF-8 the encoding of names, files and streams."""


def prepare() -> None:
    """Open the standard streams that are closed, and let each take every character."""
    for descriptor, name in enumerate(NAMES):
        _open_if_closed(descriptor, name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is written as its number. A stream that began as a file, and whose
            # descriptor is a pipe now, refuses to be asked where it is; it stays as it was.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def _open_if_closed(descriptor: int, name: str) -> None:
    """Put the null device in the place of a closed standard stream.

    The next file that is opened would otherwise get the stream's descriptor, and libraries would print into that file.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
    if getattr(sys, name) is None:
        mode = "r" if name == "stdin" else "w"
        stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def restart_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if its file names are ASCII alone; does not return then.

    Python does so by itself in the locale C, unless PYTHONUTF8=0 says otherwise. Libraries and the ranks inherit the mode.
    """
    if sys.getfilesystemencoding().lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968"):
        return
    if os.environ.get(UTF8_MODE) == "1":  # an option such as -X utf8=0 keeps the mode off
        return
    os.environ[UTF8_MODE] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def refuse_unwritable_words(words: list[str]) -> None:
    """Raise ConfigError if a word holds bytes that are no text in the environment's encoding.

    Such a word cannot be written into the files of a run, which are UTF-8.
    """
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise ConfigError(
                f"{word.encode('ascii', 'backslashreplace').decode()}: is not valid {encoding}, the encoding of this "
                "environment; type it in that encoding, or rename the file"
            ) from None


def refuse_stripped_docstrings() -> None:
    """Raise ConfigError if Python removes docstrings: transformers builds its models' documentation from them at import."""
    if sys.flags.optimize >= 2:
        raise ConfigError(
            "PYTHONOPTIMIZE=2 (python -OO) removes docstrings, and transformers cannot load a model without them; "
            "set PYTHONOPTIMIZE=1, or unset it"
        )


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, except tab and line feed: C0, C1, and those that turn the direction of writing."""
_CONTROL_OF_BARS = re.compile(_CONTROL.pattern.replace("\x0b-\x1f", "\x0b\x0c\x0e-\x1f"))
"""The same without the carriage return, with which progress bars of libraries overwrite their line."""


def printable(text: str, pattern: re.Pattern[str] = _CONTROL) -> str:
    """A text without a character that a terminal obeys: each is spelled out, as `\\u001b`, and colours are left out."""
    if pattern.search(text) is None:
        return text
    return pattern.sub(lambda match: f"\\u{ord(match[0]):04x}", _COLOUR.sub("", text))


class PrintableStream:
    """A stream to which texts of somebody else's files may be written: nothing in them moves, colours or names a terminal."""

    def __init__(self, stream: TextIO, pattern: re.Pattern[str]) -> None:
        self.raw = stream
        """Takes everything: for what draws on the terminal itself, of texts that are printable."""
        self._pattern = pattern

    def write(self, text: str) -> int:
        """As that of a stream."""
        self.raw.write(printable(text, self._pattern))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def raw(stream: Any) -> Any:
    """The stream behind a `PrintableStream`, for what draws on the terminal."""
    return stream.raw if isinstance(stream, PrintableStream) else stream


def draw(stream: Any, sequence: str) -> None:
    """Write a sequence that the terminal obeys."""
    raw(stream).write(sequence)


@contextmanager
def only_printable() -> Iterator[None]:
    """Within the block stdout and stderr are `PrintableStream`."""
    out = PrintableStream(sys.stdout, _CONTROL)
    err = PrintableStream(sys.stderr, _CONTROL_OF_BARS)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
