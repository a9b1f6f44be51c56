"""The largest job array that SLURM allows. It is asked for before hundreds of points are composed."""

import re
import subprocess
from collections import Counter

from strategies.errors import ConfigError

SCONTROL_TIMEOUT_S = 10.0
"""Seconds that scontrol may take."""
MAX_ARRAY_SIZE_REGEX = re.compile(r"^MaxArraySize\s*=\s*(\d+)", re.MULTILINE)


def refuse_large_arrays(overrides_by_run: list[list[str]], *, num_repeats: int = 1) -> None:
    """Raise ConfigError if a sweep would be a job array with more tasks than SLURM allows; asked before runs are composed.

    SLURM is asked only if the runs have `launcher=slurm`, and no `launcher.pipeline`, which makes a chain of jobs and no array.

    `overrides_by_run`: the overrides of each run, such as [["launcher=slurm", "seed=1"], ["launcher=slurm", "seed=2"]].
    `num_repeats`: how often each run is repeated with another seed.
    """
    # The launcher and the pipeline are the same for all runs of a sweep, so that the first one stands for all.
    if not overrides_by_run or "launcher=slurm" not in overrides_by_run[0]:
        return
    if any(override.startswith("launcher.pipeline=[") for override in overrides_by_run[0]):
        return
    # Runs with the same launcher settings become the tasks of one array.
    num_tasks_by_launcher: Counter[tuple[str, ...]] = Counter()
    for overrides in overrides_by_run:
        launcher_overrides = tuple(override for override in overrides if override.startswith("launcher."))
        num_tasks_by_launcher[launcher_overrides] += 1
    refuse_large_array(num_repeats * max(num_tasks_by_launcher.values()))


def refuse_large_array(num_tasks: int) -> None:
    """Raise ConfigError if a job array has more tasks than SLURM's MaxArraySize. SLURM is not asked about a single task."""
    if num_tasks < 2:
        return
    largest = max_array_size()
    if largest is not None and num_tasks > largest:
        raise ConfigError(
            f"{num_tasks} runs are one job array, and SLURM takes {largest} at most here (MaxArraySize); nothing was composed or "
            "submitted. Give fewer values a command, for example each half of an axis"
        )


def max_array_size() -> int | None:
    """The most tasks that a job array may have in this cluster (SLURM's `MaxArraySize`); None if SLURM does not say."""
    command = ["scontrol", "show", "config"]
    try:
        scontrol = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    limit = MAX_ARRAY_SIZE_REGEX.search(scontrol.stdout)
    return int(limit[1]) if limit else None
