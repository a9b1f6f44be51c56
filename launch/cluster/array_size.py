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
    """Refuse points, as words, if more of them ask for the same job than an array may have tasks. Errors: ConfigError.

    Asks SLURM only if the words say `launcher=slurm` and have no chain (which is no array).
    """
    if not points or "launcher=slurm" not in points[0]:
        return
    if any(word.startswith("launcher.pipeline=[") for word in points[0]):
        return
    # Points with the same words about the launcher become the tasks of one array.
    tasks: Counter[tuple[str, ...]] = Counter()
    for point in points:
        tasks[tuple(word for word in point if word.startswith("launcher."))] += 1
    refuse_large_array(repeats * max(tasks.values()))


def refuse_large_array(tasks: int) -> None:
    """Refuse an array of so many tasks if SLURM takes fewer. Errors: ConfigError."""
    if tasks < 2:
        return
    largest = max_array_size()
    if largest is not None and tasks > largest:
        raise ConfigError(
            f"{tasks} runs are one job array, and SLURM takes {largest} at most here (MaxArraySize); nothing was composed or "
            "submitted. Give fewer values a command, for example each half of an axis"
        )


def max_array_size() -> int | None:
    """SLURM's `MaxArraySize`; None if it cannot be asked."""
    try:
        answer = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, errors="replace", timeout=CALL_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    limit = LIMIT.search(answer.stdout)
    return int(limit[1]) if limit else None
