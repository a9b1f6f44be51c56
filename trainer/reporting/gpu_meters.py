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

MEASURE_EVERY_S = 5.0
"""Seconds between two looks."""
GPU_FIGURE_NAMES = ("utilization_percent", "memory_gib", "power_w", "temperature_c")
"""What is measured of a GPU; memory is that of all processes on it."""
ReadGpu = Callable[[torch.device], Iterable[float]]


def read_gpu(device: torch.device) -> list[float]:
    """Ask the driver what a GPU does now: [utilization in percent, GiB of memory, watts, degrees], as in `GPU_FIGURE_NAMES`.

    A figure is NaN if the driver or its package (`nvidia-ml-py`) does not tell it.
    """
    units_per_watt = 1 if torch.version.hip else 1000  # NVIDIA's driver gives milliwatts, AMD's watts
    return [
        _driver_figure_or_nan(torch.cuda.utilization, device),
        _driver_figure_or_nan(torch.cuda.device_memory_used, device) / 2**30,
        _driver_figure_or_nan(torch.cuda.power_draw, device) / units_per_watt,
        _driver_figure_or_nan(torch.cuda.temperature, device),
    ]


def _driver_figure_or_nan(ask_driver: Callable[[torch.device], float], device: torch.device) -> float:
    """One figure from the driver; NaN if it gives none."""
    try:
        return float(ask_driver(device))
    except Exception:  # noqa: BLE001 - whatever the driver's library raises, the run trains on
        return math.nan


class GpuWatcher(threading.Thread):
    """Measures this rank's GPU until its process ends. If the first measurement has no figure at all, it is the only one."""

    def __init__(self, device: torch.device, read: ReadGpu = read_gpu) -> None:
        super().__init__(name="gpu", daemon=True)
        self._device = device
        self._read = read
        self._samples: list[list[float]] = []

    def run(self) -> None:
        wait = threading.Event()
        wait.wait(MEASURE_EVERY_S)
        # Only the first measurement decides: the driver's package is missing. Later, a driver may fail to answer once.
        if all(map(math.isnan, self.sample())):
            return
        while not wait.wait(MEASURE_EVERY_S):
            self.sample()

    def sample(self) -> list[float]:
        """Measure once, and keep the figures for `means`; returns them in the order of `GPU_FIGURE_NAMES`."""
        figures = list(self._read(self._device))
        self._samples.append(figures)
        return figures

    def means(self) -> list[float]:
        """Mean figures since the last call, in the order of `GPU_FIGURE_NAMES`; NaN if nothing was measured."""
        samples = self._samples
        self._samples = []
        if not samples:
            return [math.nan] * len(GPU_FIGURE_NAMES)
        return [fmean(values) for values in zip(*samples, strict=True)]


def gpu_metrics_of_row(means_by_rank: list[list[float]]) -> dict[str, float]:
    """The metrics `gpu/RANK/NAME` of a row, from each rank's `GpuWatcher.means`; what is not known is left out."""
    metrics = {}
    for rank, means in enumerate(means_by_rank):
        for name, mean in zip(GPU_FIGURE_NAMES, means, strict=True):
            if not math.isnan(mean):
                metrics[f"gpu/{rank}/{name}"] = mean
    return metrics
