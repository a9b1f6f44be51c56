"""Writes a checkpoint while training goes on.

At a step boundary, the training state is copied to one reused buffer in host memory. A thread of this rank hashes and
writes the rank's file from it, and communicates with nobody. At a later step boundary all ranks agree that they are
done; only then the checkpoint is sealed and gets its name. Hashing and writing release Python's lock, so training
goes on.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from strategies.atomic_io import reason, size_text
from strategies.base import Progress
from strategies.runtime import Runtime, free_host_memory, gather_objects
from strategies.saving import FileOutcome, RankState
from trainer.checkpoints.layout import STEP_DIR
from trainer.checkpoints.recovery import note_part

SHARE = 0.9
"""Of the host's free memory that copies may take; the rest is for what training still asks for."""
LOOK_EVERY = 8
"""Steps, at most, from one question whether all ranks are done to the next."""


class StateBuffer:
    """One buffer in host memory, as large as the state that this rank writes; or the knowledge that there is no room for it."""

    def __init__(self, runtime: Runtime, free: Callable[[], int | None] = free_host_memory) -> None:
        self.runtime, self._free = runtime, free
        self._buffer: torch.Tensor | None = None
        self.refused: str | None = None
        """Why checkpoints are written in the step; the same on all ranks."""

    def take(self, state: RankState) -> bool:
        """Copy the state's values; False where a host has no room or it failed, for the whole run then. All ranks must call."""
        if self.refused is not None:
            return False
        fits = self._buffer is not None and self._buffer.numel() >= state.num_elements
        self.refused = self._no_room(0 if fits else state.num_elements * 4)
        if self.refused is not None:
            return False
        problem = None
        try:
            if self._buffer is None or not fits:
                self._buffer = torch.empty(state.num_elements, dtype=torch.float32)
            state.move_to(self._buffer)
        except (RuntimeError, MemoryError) as error:
            problem = reason(error)
        self.refused = next(filter(None, gather_objects(problem, self.runtime)), None)
        return self.refused is None

    def release(self) -> None:
        """Give the memory back; none is being written out of it. No collective."""
        self._buffer = None

    def _no_room(self, needed: int) -> str | None:
        host = socket.gethostname()
        told: list[tuple[str, int, int | None]] = gather_objects((host, needed, self._free()), self.runtime)
        for name in dict.fromkeys(each[0] for each in told):
            whole = sum(size for there, size, _ in told if there == name)
            free = min((left for there, _, left in told if there == name and left is not None), default=None)
            if free is not None and whole > SHARE * free:
                needs = f"a copy of the training state needs {size_text(whole)} of host memory"
                return f"{needs} on {name}, where {size_text(free)} are free"
        return None


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint, and what it took."""

    path: Path
    size: int
    """Bytes, of all ranks."""
    took_s: float
    """Seconds from its beginning until it had its name."""
    stall_s: float
    """Seconds of that in which training waited for it."""

    @property
    def row(self) -> dict[str, float]:
        """For the metrics."""
        return {"checkpoint_stall_s": self.stall_s, "checkpoint_write_s": self.took_s}


@dataclass(slots=True)
class Writing:
    """One checkpoint under way, of the moment in which it was begun."""

    step: int
    best_step: int | None
    """The best step as it was then, which is on the disk."""
    state: RankState
    began: float
    places: list[Path]
    """Where it may still be tried."""
    size: int = 0
    """Bytes of the tensors, of all ranks."""
    stall_s: float = 0.0
    """Seconds that training waited for it so far."""
    outcome: FileOutcome | None = None
    place: Path = Path()
    """Where it is being written."""
    _thread: threading.Thread | None = None
    _look_at: int = 0

    @classmethod
    def of(cls, progress: Progress, state: RankState, began: float, places: list[Path]) -> Writing:
        """Of the state that was copied when the run was so far."""
        return cls(progress.step, progress.best_step, state, began, list(places), _look_at=progress.step + 1)

    @property
    def aside(self) -> Path:
        """The directory that it is written in until it is whole."""
        return self.place / f".{STEP_DIR.format(self.step)}.writing"

    def start(self, aside: Path) -> None:
        """Let a thread write this rank's file into the existing directory `aside`."""

        def write() -> None:
            self.outcome = self.state.write_part(aside)
            if self.outcome.problem is None:
                with suppress(OSError):  # the checkpoint is whole without it
                    note_part(aside, self.state, self.outcome)

        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> FileOutcome:
        """What became of the file, when the thread is done. No collective."""
        assert self._thread is not None
        self._thread.join()
        assert self.outcome is not None
        return self.outcome

    def linger(self, limit_s: float) -> None:
        """Give the thread at most `limit_s` to end. No collective."""
        if self._thread is not None:
            self._thread.join(limit_s)

    def done(self, step: int, runtime: Runtime) -> bool:
        """Whether all ranks have written their files; asked at fewer and fewer steps. All ranks must call, at the same."""
        if step < self._look_at or self._thread is None:
            return False
        self._look_at = step + min(step - self.step, LOOK_EVERY)
        return all(gather_objects(not self._thread.is_alive(), runtime))
