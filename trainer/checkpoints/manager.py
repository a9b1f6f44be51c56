"""Writes checkpoints into a staging directory, publishes them by a rename, and deletes those that are not kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import WrittenFile, error_summary, publish, publish_replacing, size_text, sync_directory
from strategies.base import Engine, Progress
from strategies.errors import StorageError
from strategies.runtime import Runtime, call_on_main, first_error, gather_objects
from strategies.saving import RankState
from trainer.checkpoints.async_writer import PendingCheckpoint, SavedCheckpoint, StateBuffer
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import REPLACED, STEP_DIR, published
from trainer.checkpoints.manifest import write_manifest
from trainer.checkpoints.patience import REPORT_EVERY_S, waiting_for_disk
from trainer.checkpoints.recovery import forget_notes
from trainer.checkpoints.resume_selection import choose_checkpoint, record_resume, restore_replaced
from trainer.checkpoints.schedule import Schedule
from trainer.checkpoints.staging import fallback_problem, on_main, open_staging, raise_on_all_ranks

GIVEN_UP = "given-up-{}"
UNFINISHED_NAMES = (".step-*.writing", ".step-*.deleting", REPLACED.format("step-*"))


class Checkpoints:
    """Writes and deletes the checkpoints of one run.

    They form one branch in the order of steps, of which the newest and the best are kept. Checkpoints of a branch that was
    given up are moved aside.
    """

    def __init__(
        self,
        places: list[Path],
        config: CheckpointConfig,
        runtime: Runtime,
        print_line: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.places = places
        """The directories for checkpoints; the first is the run's own, the others are tried when it cannot take one."""
        self.config = config
        self.runtime = runtime
        self.print_line = print_line
        self.schedule = Schedule(config, runtime)
        self.last: SavedCheckpoint | None = None
        """The last checkpoint of this process; None before the first."""
        self.state_buffer = StateBuffer(runtime)
        self._pending: PendingCheckpoint | None = None
        self._reported_s = 0.0
        """Age of the pending checkpoint, in seconds, when the last message said that it is still being written."""
        self._verified: set[Path] = set()
        """Checkpoints of this branch that are known to be complete: the one resumed from, and those written by this process."""
        self._failures = 0
        """Checkpoints in a row that could not be written."""
        self._undeletable: set[Path] = set()
        """Old checkpoints that could not be deleted, each of which was warned of once."""

    # -- at the start ----------------------------------------------------------------------------------------------------

    def start_from(self, resumed: Path | None, resume: str = "auto") -> None:
        """Go on from the checkpoint `resumed`, or afresh: newer ones are of another branch or damaged, and are moved aside.

        If `resumed` is what `resume` (the setting `run.resume`) names, that is recorded. All ranks must call. Errors:
        StorageError on every rank if a checkpoint could not be moved (it would be taken for this run's newest), if the record
        could not be written (a requeue would begin there again), or if `checkpoint.fallback_dir` cannot be written.
        """
        error: StorageError | None = None
        if self.runtime.is_main:
            error = fallback_problem(self.places[1:], self.config.fallback_dir, self.print_line)
            try:
                if error is None:
                    self._set_aside_newer(resumed)
            except (OSError, StorageError) as caught:
                error = StorageError(
                    f"checkpoint: what is newer than {resumed} could not be moved aside ({error_summary(caught)}); move it away "
                    "by hand"
                )
            # Last: if this start is cut short before it, the next one goes back to the named checkpoint once more.
            try:
                if error is None and resumed is not None:
                    record_resume(self.places, resume, resumed)
            except OSError as caught:
                error = StorageError(
                    f"{self.places[0].parent}: cannot be written ({error_summary(caught)}); free space"
                )
        failure = first_error(error, self.runtime)
        if failure is not None:
            raise StorageError(failure.text)

    def _set_aside_newer(self, resumed: Path | None) -> None:
        """Move checkpoints aside that are newer than `resumed`, and remove what killed runs left unfinished. On rank 0."""
        resumed_path = resumed.resolve() if resumed else None
        restore_replaced(self.places)
        checkpoints = published(self.places)
        resumed_step = next((step for step, path in checkpoints if path.resolve() == resumed_path), None)
        self._verified = set()
        given_up = []
        for step, path in checkpoints:
            if path.resolve() == resumed_path:
                self._verified.add(path)
            elif resumed_step is None or step >= resumed_step:  # also one of the same step in another place
                given_up.append(path)
        for place in self.places:
            for pattern in UNFINISHED_NAMES:
                for unfinished in list(place.glob(pattern)):
                    with suppress(OSError):  # it is in nobody's way
                        atomic_io.disk.remove_tree(unfinished)
            in_this_place = [path for path in given_up if path.parent == place]
            if in_this_place:
                self._move_aside(place, in_this_place)

    def _move_aside(self, place: Path, checkpoints: list[Path]) -> None:
        """Move checkpoints of one place into a new directory `given-up-<n>` there, durably. Errors: OSError."""
        number = next(n for n in range(1, 10**6) if not (place / GIVEN_UP.format(n)).exists())
        given_up_dir = place / GIVEN_UP.format(number)
        atomic_io.disk.make_directory(given_up_dir)
        rows = place.parent / "metrics.jsonl"
        if rows.is_file():  # the run will cut its later rows off
            shutil.copyfile(rows, given_up_dir / rows.name)
            atomic_io.sync_file(given_up_dir / rows.name)
        for path in checkpoints:
            atomic_io.disk.rename(path, given_up_dir / path.name)
        sync_directory(given_up_dir)
        sync_directory(place)
        self.print_line(
            f"checkpoints that this run does not continue from ({', '.join(path.name for path in checkpoints[:6])}) were "
            f"moved to {given_up_dir}, with the metrics so far; delete it when you need them no more"
        )

    def any(self) -> bool:
        """Whether there are checkpoints of this run. All ranks must call. Errors: StorageError on every rank."""
        return call_on_main(lambda: bool(published(self.places)), self.runtime)

    def roll_back(self) -> Path:
        """The newest complete checkpoint of this branch, from which the run continues now. All ranks must call.

        Errors: StorageError on every rank if there is none.
        """
        path = choose_checkpoint(self.places, "auto", self.runtime)
        if path is None:
            raise StorageError(f"there is no checkpoint in {self.places[0]} to go back to; was it deleted?")
        self.start_from(path)
        self.schedule.note_attempt(int(path.name.removeprefix("step-")), None)
        return path

    def move_to(self, run_dir: Path) -> None:
        """Follow a run directory that was renamed to `run_dir`, also with the pending checkpoint. No collective."""
        old_place = self.places[0]
        new_place = run_dir / old_place.name

        def moved(place: Path) -> Path:
            return new_place if place == old_place else place

        self.places[0] = new_place
        self._verified = {moved(path.parent) / path.name for path in self._verified}
        if self._pending is not None:
            self._pending.places = [moved(place) for place in self._pending.places]
            self._pending.place = moved(self._pending.place)

    # -- on the way ------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step. All ranks must call, after the same steps."""
        return self.schedule.due(step)

    @property
    def pending(self) -> int | None:
        """The step whose checkpoint is being written while training continues; None if there is none."""
        return None if self._pending is None else self._pending.step

    def pending_is_written(self, step: int) -> bool:
        """Whether all ranks have written the pending checkpoint, so that it can be published. All ranks must call, after the
        same steps."""
        if self._pending is None:
            return False
        done = self._pending.is_written(step, self.runtime)
        written_s = time.monotonic() - self._pending.began
        if not done and written_s >= self._reported_s + REPORT_EVERY_S:
            self._reported_s = written_s
            self.print_line(
                f"checkpoint {STEP_DIR.format(self._pending.step)}: still being written after {written_s:.0f} s"
            )
        return done

    def _patience(self, step: int, size: int) -> AbstractContextManager[None]:
        return waiting_for_disk(f"checkpoint {STEP_DIR.format(step)}", size, self.runtime, self.print_line)

    def linger(self, limit_s: float) -> None:
        """Wait at most `limit_s` for the file that this rank is writing. The next start can publish it. No collective."""
        if self._pending is not None:
            self._pending.linger(limit_s)

    def save(self, engine: Engine, progress: Progress, *, must: bool = True) -> bool:
        """Write `step-<step>`, publish it, and delete what `checkpoint.keep` no longer keeps. All ranks must call.

        A pending checkpoint must be published before. If the run's directory cannot take the checkpoint,
        `checkpoint.fallback_dir` is tried. If that fails too, nothing half-written stays, and StorageError is raised on every
        rank with `must`, or after `checkpoint.max_failures` in a row. Otherwise the run continues with a warning, and False is
        returned. Without `must` and with `checkpoint.background`, the checkpoint is only begun, and is then pending.
        """
        began = time.monotonic()
        with self._patience(progress.step, 0):  # rank 0 may still be writing its rows to the disk
            state = engine.state(progress)
            size = 4 * sum(gather_objects(state.num_elements, self.runtime))
        writing = PendingCheckpoint.begin(progress, state, began, self.places)
        writing.size = size
        with self._patience(progress.step, size):
            return self._save(writing, must=must)

    def _save(self, writing: PendingCheckpoint, *, must: bool) -> bool:
        """Write the checkpoint in the step, or start its write in the background. All ranks must call."""
        if must:  # probably the last one, and the export needs the memory
            self.state_buffer.release()
        if must or not self.config.background or not self._copy_state(writing.state):
            return self._save_in_step(writing, must=must)
        self._pending = writing
        self._reported_s = 0.0
        problems: list[str] = []
        begun = self._start_writing(writing, problems)
        # Training has waited for the copy so far; publishing adds its own wait later.
        writing.stall_s = time.monotonic() - writing.began
        self.schedule.note_attempt(writing.step, None)
        if not begun:
            self._pending = None
            self._note_failure(problems, must=False)
        return begun

    def publish_pending(self) -> bool:
        """Wait for the pending checkpoint and publish it. Returns whether it was published. All ranks must call.

        If one place could not take it, the next is tried with the same copy. Raises StorageError as `save` does.
        """
        writing = self._pending
        self._pending = None
        assert writing is not None
        with self._patience(writing.step, writing.size):
            return self._publish(writing)

    def _publish(self, writing: PendingCheckpoint) -> bool:
        """Publish a checkpoint that is being written, in the first place that can take it. All ranks must call."""
        wait_began = time.monotonic()
        problems: list[str] = []
        while True:
            # Each rank passes on how its own file ended: an error of one is raised on all.
            finish_files = partial(writing.state.finish, outcome=writing.wait())
            try:
                path, size = self._seal_and_publish(writing, finish_files)
                break
            except StorageError as error:
                self._warn(error, problems)
            # The copy is still in the buffer, so that another place can be tried.
            if not self._start_writing(writing, problems):
                self._note_failure(problems, must=False)
                return False
        now = time.monotonic()
        writing.stall_s += now - wait_began
        self._note_success(writing, SavedCheckpoint(path, size, now - writing.began, writing.stall_s))
        self.schedule.note_cost(writing.stall_s, now - writing.began)
        return True

    def _copy_state(self, state: RankState) -> bool:
        """Copy the state to the buffer; False if there is no room, which is said once. All ranks must call."""
        known_refusal = self.state_buffer.refused
        if self.state_buffer.take(state):
            return True
        if known_refusal is None:
            self.print_line(
                f"checkpoints are written in the step (checkpoint.background=false): {self.state_buffer.refused}"
            )
        return False

    def _start_writing(self, writing: PendingCheckpoint, problems: list[str]) -> bool:
        """Start writing in the first remaining place that has room for all ranks' files; False if none has. All ranks must
        call."""
        while writing.places:
            writing.place = writing.places.pop(0)
            try:
                open_staging(writing.staging, self.runtime, writing.state.make_room)
            except StorageError as error:
                self._warn(error, problems)
                continue
            writing.start(writing.staging)
            return True
        return False

    def _save_in_step(self, writing: PendingCheckpoint, *, must: bool) -> bool:
        """Write and publish while training waits. All ranks must call."""
        problems: list[str] = []
        while writing.places:
            writing.place = writing.places.pop(0)
            try:
                open_staging(writing.staging, self.runtime)
                path, size = self._seal_and_publish(writing, writing.state.save)
            except StorageError as error:  # the same on every rank, so that all try the next place
                self._warn(error, problems)
                continue
            took_s = time.monotonic() - writing.began
            self._note_success(writing, SavedCheckpoint(path, size, took_s, took_s))
            self.schedule.note_attempt(writing.step, took_s)
            return True
        self.schedule.note_attempt(writing.step, None)
        self._note_failure(problems, must=must)
        return False

    def _warn(self, error: StorageError, problems: list[str]) -> None:
        problems.append(str(error))
        self.print_line(f"warning: {error}")

    def _note_success(self, writing: PendingCheckpoint, saved: SavedCheckpoint) -> None:
        """Report a published checkpoint, and delete those that it replaces."""
        self._failures = 0
        self.last = saved
        self._report(saved)
        if not self.runtime.is_main:
            return
        # The same step may have been written in another place before.
        twins = [path for path in self._verified if path.name == saved.path.name and path != saved.path]
        for twin in twins:
            self._delete(twin)
        self._verified.add(saved.path)
        self._delete_old(writing.best_step)

    def _note_failure(self, problems: list[str], *, must: bool) -> None:
        """Count a failed checkpoint. Raises StorageError if it had to succeed, or if too many failed in a row."""
        self._failures += 1
        if must or self._failures > self.config.max_failures:
            count_text = "" if must else f" {self._failures} checkpoints in a row failed (checkpoint.max_failures)."
            raise StorageError(f"{'; '.join(problems)}.{count_text} Earlier checkpoints are intact.")
        self.print_line(
            f"the run continues without this checkpoint ({self._failures} failed in a row, {self.config.max_failures} may)"
        )

    def _seal_and_publish(
        self, writing: PendingCheckpoint, write: Callable[[Path], list[WrittenFile]]
    ) -> tuple[Path, int]:
        """Seal and publish the files that `write` makes in the staging directory. Returns the path and the bytes of all files.

        All ranks must call. Errors: StorageError on every rank.
        """
        place = writing.place
        staging = writing.staging
        final = place / STEP_DIR.format(writing.step)
        error: BaseException | None = None
        try:
            files = write(staging)
        except (OSError, RuntimeError, StorageError) as caught:
            error = caught
        raise_on_all_ranks(error, staging, self.runtime)

        def finish() -> None:
            """Seal the staging directory and give it its name. On rank 0."""
            forget_notes(staging, self.runtime.world_size)
            write_manifest(staging, files)
            if final in self._verified and final.exists():
                # This branch wrote the same step before, when it still owed an evaluation.
                publish_replacing(staging, final, final.with_name(REPLACED.format(final.name)))
                return
            if final.exists():  # another branch's, made since this one began
                self._move_aside(place, [final])
            publish(staging, final)

        on_main(finish, staging, self.runtime)
        return final, sum(file.size for file in files)

    def _report(self, saved: SavedCheckpoint) -> None:
        """Say where a checkpoint was written, its size and its cost."""
        path = saved.path
        text = f"checkpoint {path.name}"
        if path.parent != self.places[0]:
            text += f" in {path.parent}"
        text += f": {size_text(saved.size)} in {saved.took_s:.1f} s"
        if saved.stall_s != saved.took_s:
            text += f"; training waited {saved.stall_s:.1f} s"
        interval_s = self.schedule.interval_s
        if interval_s is not None:
            text += f"; the next in about {max(1, round(interval_s / 60))} minutes"
        self.print_line(text)

    def _delete_old(self, best_step: int | None) -> None:
        """Delete checkpoints older than the newest `checkpoint.keep` complete ones, but not the best. A failure is a warning."""
        try:
            checkpoints = published(self.places)
        except StorageError as error:
            self.print_line(f"warning: old checkpoints could not be looked for ({error})")
            return
        verified_steps = [step for step, path in checkpoints if path in self._verified]
        if len(verified_steps) < self.config.keep:
            return
        for step, path in checkpoints:
            if step < verified_steps[-self.config.keep] and step != best_step:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        """Delete a checkpoint. A failure is a warning, once for each checkpoint."""
        doomed = path.with_name(f".{path.name}.deleting")
        try:
            atomic_io.disk.rename(path, doomed)  # so that nobody finds half of it under its name
            self._verified.discard(path)
            atomic_io.disk.remove_tree(doomed)
        except OSError as error:
            if path not in self._undeletable:
                self.print_line(f"warning: the old checkpoint {path} could not be deleted ({error_summary(error)})")
            self._undeletable.add(path)
