"""Runs a program that stores models in an environment of its own, whose packages are other versions than ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def run_in_own_environment(command: list[str], directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command offline, without our packages, in `directory`. Raises OSError if it cannot be started."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # Our packages must not be imported there.
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, cwd=directory, check=False
    )


def last_output_lines(finished: subprocess.CompletedProcess[str]) -> str:
    """The last two lines that a failed program wrote (to stderr, else to stdout), joined by " / ", for an error message."""
    output = finished.stderr or finished.stdout
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " / ".join(lines[-2:])[:400]
