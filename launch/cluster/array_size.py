"""The largest job array that SLURM allows. It is asked for before hundreds of points are composed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

from strategies.errors import ConfigError

CALL_S = 10.0
"""Seconds that scontrol may take."""
LIMIT = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


def refuse_large_arrays(points: list[list[str]], *, repeats: int = 1) -> None:
    """Refuse points, as words, of which more ask for the same job than an array may have tasks. Errors: ConfigError.

    Asks nobody unless the words say `launcher=slurm`, and have no chain (which is no array).
    """
    if (
        not points
        or "launcher=slurm" not in points[0]
        or any(word.startswith("launcher.pipeline=[") for word in points[0])
    ):
        return
    requests = Counter(tuple(word for word in point if word.startswith("launcher.")) for point in points)
    refuse_large_array(repeats * max(requests.values()))


def refuse_large_array(tasks: int) -> None:
    """Refuse an array of so many tasks if SLURM takes fewer. Errors: ConfigError."""
    if tasks < 2:
        return
    most = max_array_size()
    if most is not None and tasks > most:
        raise ConfigError(
            f"{tasks} runs are one job array, and SLURM takes {most} at most here (MaxArraySize); nothing was composed or "
            "submitted. Give fewer values a command, for example each half of an axis"
        )


def max_array_size() -> int | None:
    """SLURM's `MaxArraySize`; None if it cannot be asked."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, errors="replace", timeout=CALL_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    shown = LIMIT.search(done.stdout)
    return int(shown[1]) if shown else None
