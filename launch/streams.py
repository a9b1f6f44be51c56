"""Standard streams and their encoding, repaired once before a verb starts.

A cron job or a daemon may start the command with closed standard streams. A minimal container may have a locale of
ASCII alone, and a terminal an encoding that lacks most characters. None of these may end a run.
"""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from strategies.errors import ConfigError

STREAM_NAMES = ("stdin", "stdout", "stderr")
"""The standard streams in the order of their descriptors, 0 to 2."""
UTF8_MODE_VARIABLE = "PYTHONUTF8"
"""The environment variable of Python that makes UTF-8 the encoding of names, files and streams."""


def prepare_streams() -> None:
    """Repair the standard streams before a verb starts, so that none of its prints can end it.

    Streams that are closed, as in a cron job, are opened. stdout and stderr spell out characters that their encoding lacks.
    """
    for descriptor, name in enumerate(STREAM_NAMES):
        _open_if_closed(descriptor, name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is written as its number. A stream that began as a file, and whose
            # descriptor is a pipe now, refuses to be asked where it is; it stays as it was.
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")


def _open_if_closed(descriptor: int, name: str) -> None:
    """Open the null device in place of a standard stream that the process was started without.

    The next file that is opened would otherwise get the stream's descriptor, and libraries would print into that file.
    `descriptor`: 0 to 2, and `name`: its stream, such as `stdout`.
    """
    try:
        os.fstat(descriptor)
    except OSError:
        null_fd = os.open(os.devnull, os.O_RDWR)
        if null_fd != descriptor:
            os.dup2(null_fd, descriptor)
            os.close(null_fd)
        os.set_inheritable(descriptor, True)
    # Python has no stream object either for a descriptor that was closed when it started.
    if getattr(sys, name) is None:
        mode = "r" if name == "stdin" else "w"
        stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def restart_in_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if its encoding of file names is ASCII alone; then it does not return.

    Otherwise a text with any other character could name no file. Python does so by itself in the locale C, unless PYTHONUTF8=0
    says otherwise. Libraries and the ranks inherit the mode.
    """
    if sys.getfilesystemencoding().lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968"):
        return
    if os.environ.get(UTF8_MODE_VARIABLE) == "1":  # an option such as -X utf8=0 keeps the mode off
        return
    os.environ[UTF8_MODE_VARIABLE] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def refuse_undecodable_arguments(arguments: list[str]) -> None:
    """Raise ConfigError for a command-line argument with bytes that are no text in the environment's encoding.

    Such an argument cannot be written into the files of a run, which are UTF-8.
    """
    for argument in arguments:
        # Python stands for such bytes with surrogates, which UTF-8 does not encode.
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            raise ConfigError(
                f"{argument.encode('ascii', 'backslashreplace').decode()}: is not valid {encoding}, the encoding of this "
                "environment; type it in that encoding, or rename the file"
            ) from None


def refuse_stripped_docstrings() -> None:
    """Raise ConfigError under `python -OO`, which removes docstrings: transformers reads them when it is imported."""
    if sys.flags.optimize >= 2:
        raise ConfigError(
            "PYTHONOPTIMIZE=2 (python -OO) removes docstrings, and transformers cannot load a model without them; "
            "set PYTHONOPTIMIZE=1, or unset it"
        )


_COLOUR_REGEX = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL_REGEX = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, except tab and line feed: C0, C1, and those that turn the direction of writing."""
_CONTROL_EXCEPT_CARRIAGE_RETURN_REGEX = re.compile(_CONTROL_REGEX.pattern.replace("\x0b-\x1f", "\x0b\x0c\x0e-\x1f"))
"""The same without the carriage return, with which progress bars of libraries overwrite their line."""


def printable_text(text: str, pattern: re.Pattern[str] = _CONTROL_REGEX) -> str:
    r"""Spell out the control characters in a text of others, which a terminal would obey: each as `\u001b`; colours are removed.

    `pattern`: the characters that are spelled out.
    """
    if pattern.search(text) is None:
        return text
    return pattern.sub(lambda match: f"\\u{ord(match[0]):04x}", _COLOUR_REGEX.sub("", text))


class PrintableStream:
    """Wraps an output stream so that control characters in texts of others cannot move, colour or rename the terminal."""

    def __init__(self, stream: TextIO, pattern: re.Pattern[str]) -> None:
        self.wrapped_stream = stream
        """The wrapped stream, for code that draws on the terminal itself and has made its texts printable."""
        self._pattern = pattern

    def write(self, text: str) -> int:
        """Write the text, with control characters spelled out; returns its length."""
        self.wrapped_stream.write(printable_text(text, self._pattern))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped_stream, name)


def unwrap_stream(stream: Any) -> Any:
    """The stream behind a `PrintableStream`, for code that draws on the terminal; any other stream as it is."""
    return stream.wrapped_stream if isinstance(stream, PrintableStream) else stream


def write_control_sequence(stream: Any, sequence: str) -> None:
    """Write a control sequence to a stream, for the terminal to obey."""
    unwrap_stream(stream).write(sequence)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within the block stdout and stderr are `PrintableStream`."""
    out = PrintableStream(sys.stdout, _CONTROL_REGEX)
    err = PrintableStream(sys.stderr, _CONTROL_EXCEPT_CARRIAGE_RETURN_REGEX)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
