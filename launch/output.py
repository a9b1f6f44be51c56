"""What verbs say: answers of `--json` alone on stdout, and nothing that ends a run when whoever read it has gone away."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

FLAG = "--json"


class said_to_stderr:
    """Within it what is printed, by children too, goes to stderr, where `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.kept = quiet, -1

    def __enter__(self) -> None:
        if self.quiet:
            sys.stdout.flush()
            self.kept = os.dup(1)
            os.dup2(2, 1)
            self._stdout, sys.stdout = sys.stdout, sys.stderr

    def __exit__(self, *_: object) -> None:
        if self.quiet:
            sys.stdout = self._stdout
            sys.stderr.flush()
            os.dup2(self.kept, 1)
            os.close(self.kept)


def give(answer: dict[str, Any], *, one_line: bool = False) -> None:
    """Print the answer for a script. A stream that is not UTF-8 gets JSON's own escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = encoding.lower().replace("-", "").replace("_", "") == "utf8"
    print(json.dumps(answer, indent=None if one_line else 1, ensure_ascii=not is_utf8), flush=True)


class Lasting:
    """A stream of which nobody need be there to read: what cannot be written goes nowhere from then on, and is no error.

    A terminal may be closed, and Ctrl-C ends the `tee` behind a command before that has saved.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As that of a stream."""
        try:
            return self._stream.write(text)
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        """As that of a stream."""
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def close(self) -> None:
        """Only flushes: a library that has kept it (absl's logging, which rouge-score brings) must not close the process's."""
        self.flush()

    def _leave(self) -> None:
        with suppress(OSError):  # what is buffered, too: it would be tried again at the end, and change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting() -> Iterator[None]:
    """Within it stdout and stderr are `Lasting`."""
    out, err = Lasting(sys.stdout), Lasting(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        yield
