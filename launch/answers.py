"""`--json` of verbs that also talk: stdout is for the answer alone, and what is said meanwhile goes to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

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


def give(answer: dict[str, Any]) -> None:
    """Print the answer for a script."""
    print(json.dumps(answer, indent=1, ensure_ascii=False), flush=True)
