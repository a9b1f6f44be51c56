"""Writes a checkpoint while training continues.

At a step boundary, the training state is copied to one reused buffer in host memory. A thread of this rank hashes the
buffer and writes the rank's file; it communicates with no other rank. At a later step boundary all ranks agree that they
are done. Only then the manifest is written and the checkpoint gets its name. Hashing and writing release Python's lock, so
training is not held up.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from strategies.atomic_io import error_summary, size_text
from strategies.base import Progress
from strategies.runtime import Runtime, free_host_memory_bytes, gather_objects
from strategies.saving import RankFileOutcome, RankState
from trainer.checkpoints.layout import STEP_DIR_FORMAT
from trainer.checkpoints.recovery import write_part_note

MAX_MEMORY_SHARE = 0.9
"""Share of the host's free memory that copies may take; the rest is for what training allocates later."""
FLOAT32_BYTES = 4
MAX_STEPS_BETWEEN_QUERIES = 8
"""Most steps between two questions whether all ranks are done."""


class StateBuffer:
    """A reused buffer in host memory for a copy of the state that this rank writes.

    If a host has no room for it, `refusal_reason` says so from then on, and checkpoints are written in the step.
    """

    def __init__(self, runtime: Runtime, free_memory: Callable[[], int | None] = free_host_memory_bytes) -> None:
        """`free_memory`: returns the host's free memory in bytes, None if it is not known."""
        self.runtime = runtime
        self._free_memory = free_memory
        self._buffer: torch.Tensor | None = None
        self.refusal_reason: str | None = None
        """Why no copy is taken, so that checkpoints are written in the step; None if copies are taken. The same on all ranks."""

    def copy_state(self, state: RankState) -> bool:
        """Copy this rank's part of the training state into the buffer, so that training may go on while the copy is written.

        Returns whether every rank could. If a host has no room, or a copy failed, `refusal_reason` is set, and every later call
        returns False at once. All ranks must call.
        """
        if self.refusal_reason is not None:  # the same on all ranks, so that none waits for the others below
            return False
        buffer_is_large_enough = self._buffer is not None and self._buffer.numel() >= state.num_elements
        needed_bytes = 0 if buffer_is_large_enough else state.num_elements * FLOAT32_BYTES
        self.refusal_reason = self._no_room_reason(needed_bytes)  # a collective, with the same result on all ranks
        if self.refusal_reason is not None:
            return False
        # A rank whose copy fails must still call the collective below, in which the other ranks wait for it.
        problem = None
        try:
            if self._buffer is None or not buffer_is_large_enough:
                self._buffer = torch.empty(state.num_elements, dtype=torch.float32)
            state.copy_values_to(self._buffer)
        except (RuntimeError, MemoryError) as error:
            problem = error_summary(error)
        problem_by_rank = gather_objects(problem, self.runtime)
        self.refusal_reason = next(filter(None, problem_by_rank), None)
        return self.refusal_reason is None

    def release(self) -> None:
        """Free the buffer. Nothing may be writing from it. No collective."""
        self._buffer = None

    def _no_room_reason(self, needed_bytes: int) -> str | None:
        """Why one of the hosts has no memory for its ranks' copies of the training state, in words; None if all have.

        A host whose free memory is not known counts as one that has room. `needed_bytes`: memory for this rank's copy, beyond the
        buffer that it has. All ranks must call, and get the same answer.
        """
        own_need = _MemoryNeed(socket.gethostname(), needed_bytes, self._free_memory())
        needs_by_host: dict[str, list[_MemoryNeed]] = {}
        for need in gather_objects(own_need, self.runtime):
            needs_by_host.setdefault(need.host, []).append(need)
        for host, needs in needs_by_host.items():
            needed_on_host = sum(need.needed_bytes for need in needs)
            # Ranks of a host may read different numbers, since memory changes meanwhile: the least counts.
            known_free_bytes = [need.free_bytes for need in needs if need.free_bytes is not None]
            if not known_free_bytes:  # unknown on this host: the copy is tried
                continue
            free_bytes = min(known_free_bytes)
            if needed_on_host > MAX_MEMORY_SHARE * free_bytes:
                return (
                    f"a copy of the training state needs {size_text(needed_on_host)} of host memory on {host}, where "
                    f"{size_text(free_bytes)} are free"
                )
        return None


@dataclass(frozen=True, slots=True)
class _MemoryNeed:
    """What one rank's copy takes, and the memory that is free on its host."""

    host: str
    needed_bytes: int
    free_bytes: int | None


class PublishedFiles(NamedTuple):
    """A checkpoint that has its name."""

    path: Path
    """Such as `checkpoints/step-000040`."""
    size_bytes: int
    """Of its files, of all ranks together."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A published checkpoint, its size and its cost."""

    path: Path
    size_bytes: int
    """Of the files of all ranks together."""
    took_s: float
    """Seconds from its beginning until it had its name."""
    stall_s: float
    """Seconds of `took_s` in which training waited."""

    @property
    def metric_columns(self) -> dict[str, float]:
        """What the checkpoint cost, as columns of `metrics.jsonl`."""
        return {"checkpoint_stall_s": self.stall_s, "checkpoint_write_s": self.took_s}

    def summary_line(self, checkpoint_dir: Path, interval_s: float | None) -> str:
        """The line that tells the user of a published checkpoint: where, how large, how long, and when the next one is due.

        Such as `checkpoint step-000040: 1.2 GiB in 9.1 s; training waited 0.4 s; the next in about 12 minutes`. `checkpoint_dir`:
        the run's own directory for checkpoints; another is named. `interval_s`: seconds between two checkpoints; None if unknown.
        """
        text = f"checkpoint {self.path.name}"
        if self.path.parent != checkpoint_dir:
            text += f" in {self.path.parent}"
        text += f": {size_text(self.size_bytes)} in {self.took_s:.1f} s"
        if self.stall_s != self.took_s:
            text += f"; training waited {self.stall_s:.1f} s"
        if interval_s is not None:
            minutes = max(1, round(interval_s / 60))
            text += f"; the next in about {minutes} {'minute' if minutes == 1 else 'minutes'}"
        return text


@dataclass(slots=True)
class PendingCheckpoint:
    """A checkpoint that is being written, with the state of the moment in which it was begun."""

    step: int
    best_step: int | None
    """The best step at that moment, whose checkpoint must be kept."""
    state: RankState
    began_at: float
    """When it was begun, by the monotonic clock."""
    untried_checkpoint_dirs: list[Path]
    """Directories in which its writing can still be tried, in this order: the run's own, then the fallback."""
    size_bytes: int
    """Of the tensors of all ranks together."""
    replaces_older: bool
    """Whether older checkpoints are deleted for it. They are not for one that is written only for the export."""
    stall_s: float = 0.0
    """Seconds that training has waited for it so far."""
    outcome: RankFileOutcome | None = None
    """How the write of this rank's file ended; None while its thread runs."""
    checkpoint_dir: Path = Path()
    """The parent directory of checkpoints, such as `<run>/checkpoints`, in which it is being written."""
    failure_texts: list[str] = field(default_factory=list)
    """For each directory that could not take it: why."""
    _thread: threading.Thread | None = None
    _next_query_step: int = 0
    """The step from which on the ranks ask each other again whether all have written their files."""

    @classmethod
    def begin(
        cls,
        progress: Progress,
        state: RankState,
        began_at: float,
        checkpoint_dirs: list[Path],
        *,
        size_bytes: int,
        replaces_older: bool,
    ) -> PendingCheckpoint:
        """Make the record of a checkpoint of this moment, of which nothing is written yet.

        `state`: this rank's part of the training state at `progress`. `began_at`: when saving began, by the monotonic clock.
        `checkpoint_dirs`: where its writing can be tried, in this order. `size_bytes`: of the tensors of all ranks.
        `replaces_older`: whether older checkpoints may be deleted for it.
        """
        return cls(
            step=progress.step,
            best_step=progress.best_step,
            state=state,
            began_at=began_at,
            untried_checkpoint_dirs=list(checkpoint_dirs),
            size_bytes=size_bytes,
            replaces_older=replaces_older,
            _next_query_step=progress.step + 1,  # the ranks ask each other whether all are done from the next step on
        )

    @property
    def staging_dir(self) -> Path:
        """The directory in which it is written until it is complete, such as `checkpoints/.step-000040.writing`."""
        return self.checkpoint_dir / f".{STEP_DIR_FORMAT.format(self.step)}.writing"

    def use_next_directory(self) -> None:
        """Set `checkpoint_dir`, and so `staging_dir`, to the next directory that was not tried."""
        self.checkpoint_dir = self.untried_checkpoint_dirs.pop(0)

    def start_writing_thread(self) -> None:
        """Start a thread that writes this rank's file into the existing `staging_dir`, while training goes on.

        At its end it sets `outcome`, which says whether the file was written.
        """
        staging_dir = self.staging_dir

        def write_file_and_note() -> None:
            self.outcome = self.state.write_part(staging_dir)
            if self.outcome.problem is None:
                with suppress(OSError):  # the note only helps a start after a crash
                    write_part_note(staging_dir, self.state, self.outcome)

        self._thread = threading.Thread(target=write_file_and_note, name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_outcome(self) -> RankFileOutcome:
        """Wait for the thread; returns how the write ended. No collective."""
        assert self._thread is not None
        self._thread.join()
        assert self.outcome is not None
        return self.outcome

    def wait_at_most(self, limit_s: float) -> None:
        """Wait at most `limit_s` for the thread to end. No collective."""
        if self._thread is not None:
            self._thread.join(limit_s)

    def is_written(self, step: int, runtime: Runtime) -> bool:
        """Whether all ranks have written their files, so that the checkpoint can be published. `step`: the run's current one.

        Asking the ranks is a collective. The longer the write takes, the fewer steps ask; the steps between return False. All
        ranks must call, after the same steps.
        """
        if step < self._next_query_step or self._thread is None:
            return False
        # After 1, 2, 4, 8 steps since the checkpoint was begun, and every 8 steps from then on.
        self._next_query_step = step + min(step - self.step, MAX_STEPS_BETWEEN_QUERIES)
        return all(gather_objects(not self._thread.is_alive(), runtime))
