"""Times the parts of a step (`logging.step_parts`): an engine whose passes are timed.

On GPUs the times are those between events of the compute stream, and the host waits for nothing before the flush.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch

from strategies.base import Engine

Moment = Any
"""A mark of `moment_on_device`: a recorded event on a GPU, else seconds of the clock."""
STEP_PARTS = ("forward_s", "backward_s", "optimizer_s")
"""Seconds of all micro-batches of a step, and of its update with clipping; communication is part of where it is waited for."""


def moment_on_device(device: torch.device) -> Moment:
    """Mark this moment of the computation, to measure the seconds between two such marks without waiting for the GPU.

    On a GPU, an event that is reached when what was queued before it has been computed; elsewhere the clock's seconds.
    """
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(device: torch.device, start: Moment, end: Moment) -> float:
    """Seconds between two moments of `moment_on_device`. Waits until the device has reached `end`."""
    if device.type != "cuda":
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000  # of milliseconds


class _TimedPart(NamedTuple):
    """One forward pass, backward pass or update."""

    part: str
    """Which of `STEP_PARTS` it is."""
    start: Moment
    end: Moment


@dataclass(slots=True)
class StepPartTimes:
    """Times the parts of steps (forward passes, backward passes, update), and keeps them until they are read."""

    device: torch.device
    _current_step: list[_TimedPart] = field(default_factory=list)
    """The parts so far of the step that is under way."""
    _steps: list[list[_TimedPart]] = field(default_factory=list)
    """The parts of each complete step since the last read."""

    @contextmanager
    def timing_part(self, part: str) -> Iterator[None]:
        """A context around one forward pass, backward pass or update of a step, which times it.

        `part`: which of `STEP_PARTS` it is, such as "forward_s". A step has one pass of each kind for each micro-batch; the
        update ends the step.
        """
        start = moment_on_device(self.device)
        yield
        self._current_step.append(_TimedPart(part, start, moment_on_device(self.device)))
        if part == STEP_PARTS[-1]:
            self._steps.append(self._current_step)
            self._current_step = []

    def take_seconds_by_step(self) -> list[list[float]]:
        """Read and forget the times of the steps since the last call: [[forward, backward, update], ...] in seconds.

        The passes of all micro-batches of a step are summed. Waits for the device.
        """
        steps = self._steps
        self._steps = []
        seconds_by_step = []
        for timed_parts in steps:
            seconds = dict.fromkeys(STEP_PARTS, 0.0)
            for part, start, end in timed_parts:
                seconds[part] += seconds_between(self.device, start, end)
            seconds_by_step.append(list(seconds.values()))
        return seconds_by_step


class _TimedEngine:
    """Passes every call on to an engine, and times its forward passes, backward passes and updates."""

    def __init__(self, engine: Engine, parts: StepPartTimes) -> None:
        self._engine = engine
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._parts.timing_part("forward_s"):
            return self._engine.forward(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with self._parts.timing_part("backward_s"):
            self._engine.backward(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        with self._parts.timing_part("optimizer_s"):
            return self._engine.step(*args, **kwargs)


def timed_engine(engine: Engine, parts: StepPartTimes) -> Engine:
    """Wrap an engine so that its forward passes, backward passes and updates are timed in `parts`; nothing else changes."""
    return cast(Engine, _TimedEngine(engine, parts))
