"""How several workers share the tests (`pytest -n auto`): what belongs together stays on one worker, the longest begins first.

The tests of a file share its fixtures, so a file is a unit; a room whose files share what one session starts is one too.
Names of tests stay what they are without workers.
"""

from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadScopeScheduling

from strategies.runtime import cgroup_memory_limit, num_usable_cores

TOGETHER = ("tests/slurm", "tests/parity")
"""Rooms that start one thing for all their files: a cluster, and ranks that stay up."""
FIRST = (
    *TOGETHER,
    "tests/checkpoints",
    "tests/docs",
    "tests/faults",
    "tests/launch/runs",
    "tests/launch",
    "tests/models",
    "tests/planner",
    "tests/simulated",
    "tests/tuning",
)
"""What takes long: begun last, it would leave the other workers without work."""
BYTES_EACH = 4 << 30
"""Memory for a worker and the ranks that its tests start."""
MOST = 8
"""Workers at most: ranks of tests want cores too, and the longest unit bounds what more would bring."""


def unit_of(nodeid: str) -> str:
    """What the test stays together with: its file, or the room of its file."""
    path = nodeid.partition("::")[0]
    return next((room for room in TOGETHER if path.startswith(f"{room}/")), path)


def place_of(nodeid: str) -> int:
    """Sort key of the order in which units are handed out."""
    path = nodeid.partition("::")[0]
    return next((place for place, room in enumerate(FIRST) if path.startswith(f"{room}/")), len(FIRST))


def memory() -> int:
    """Bytes that are free, or that the cgroup allows where those are fewer."""
    available = psutil.virtual_memory().available
    return min(available, cgroup_memory_limit() or available)


def num_workers() -> int:
    """One a core as far as memory goes; 0, which is pytest alone, where that is one."""
    found = min(num_usable_cores(), memory() // BYTES_EACH, MOST)
    return found if found > 1 else 0


class Rooms(LoadScopeScheduling):
    """xdist's scheduler of units, with ours."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # the number of a unit's tests says little of what they take

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
