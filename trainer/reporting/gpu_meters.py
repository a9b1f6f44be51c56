"""Utilisation, memory, power and temperature of each rank's GPU: read by a thread, reported with an interval's rows.

A tracker's own monitor sees the host of rank 0 alone. The numbers of all hosts travel with the reduction that is made
anyway.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from statistics import fmean

import torch

EVERY_S = 5.0
"""Seconds between two looks."""
NAMES = ("utilization_percent", "memory_gib", "power_w", "temperature_c")
"""Memory is that of all processes on the GPU."""
Look = Callable[[torch.device], Iterable[float]]


def look(device: torch.device) -> list[float]:
    """The figures of `NAMES`, now; NaN where the driver or its package (`nvidia-ml-py`) does not tell."""
    asked = (torch.cuda.utilization, torch.cuda.device_memory_used, torch.cuda.power_draw, torch.cuda.temperature)
    watt = 1 if torch.version.hip else 1000  # NVIDIA's driver tells milliwatts, AMD's watts
    return [_asked(one, device) / unit for one, unit in zip(asked, (1, 2**30, watt, 1), strict=True)]


def _asked(one: Callable[[torch.device], float], device: torch.device) -> float:
    try:
        return float(one(device))
    except Exception:  # noqa: BLE001 - whatever the driver's library raises, the run goes on
        return math.nan


class GpuWatcher(threading.Thread):
    """Looks at this rank's GPU until its process ends, or once, where the first look tells nothing."""

    def __init__(self, device: torch.device, look: Look = look) -> None:
        super().__init__(name="gpu", daemon=True)
        self._device, self._look = device, look
        self._seen: list[list[float]] = []

    def run(self) -> None:
        wait = threading.Event()
        wait.wait(EVERY_S)
        if all(map(math.isnan, self.see())):  # the driver's package is missing; later, a driver may fail to answer once
            return
        while not wait.wait(EVERY_S):
            self.see()

    def see(self) -> list[float]:
        """Take a look; what was seen."""
        seen = list(self._look(self._device))
        self._seen.append(seen)
        return seen

    def take(self) -> list[float]:
        """Means since the last call, as `NAMES` has them; NaN where nothing was seen."""
        seen, self._seen = self._seen, []
        return [fmean(values) for values in zip(*seen, strict=True)] if seen else [math.nan] * len(NAMES)


def told(ranks: list[list[float]]) -> dict[str, float]:
    """A row's metrics, out of what each rank took; what is not known is left out."""
    return {
        f"gpu/{rank}/{name}": value
        for rank, values in enumerate(ranks)
        for name, value in zip(NAMES, values, strict=True)
        if not math.isnan(value)
    }
