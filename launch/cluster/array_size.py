"""The largest job array that SLURM allows. It is asked for before hundreds of points are composed."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

from strategies.errors import ConfigError

SCONTROL_TIMEOUT_S = 10.0
"""Seconds that scontrol may take."""
LIMIT = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


def refuse_large_arrays(points: list[list[str]], *, repeats: int = 1) -> None:
    """Refuse a sweep whose job array would have more tasks than SLURM allows. Errors: ConfigError.

    `points`: the settings of each run, such as [["launcher=slurm", "seed=1"], ["launcher=slurm", "seed=2"]]. `repeats`: how often
    each run is repeated with another seed. SLURM is asked only if the settings have `launcher=slurm`, and no `launcher.pipeline`,
    which makes a chain of jobs and no array.
    """
    if not points or "launcher=slurm" not in points[0]:
        return
    if any(argument.startswith("launcher.pipeline=[") for argument in points[0]):
        return
    # Runs with the same settings of the launcher become the tasks of one array.
    tasks_by_request: Counter[tuple[str, ...]] = Counter()
    for point in points:
        launcher_arguments = tuple(argument for argument in point if argument.startswith("launcher."))
        tasks_by_request[launcher_arguments] += 1
    refuse_large_array(repeats * max(tasks_by_request.values()))


def refuse_large_array(tasks: int) -> None:
    """Refuse a job array with more tasks than SLURM's MaxArraySize. Errors: ConfigError."""
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
    command = ["scontrol", "show", "config"]
    try:
        scontrol = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    limit = LIMIT.search(scontrol.stdout)
    return int(limit[1]) if limit else None
