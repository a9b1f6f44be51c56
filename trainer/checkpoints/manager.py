"""Writes checkpoints into a staging directory, publishes them by a rename, and deletes those that are not kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import WrittenFile, publish, publish_replacing, reason, size_text, sync_directory
from strategies.base import Engine, Progress
from strategies.errors import StorageError
from strategies.runtime import Runtime, call_on_main, first_error, gather_objects
from strategies.saving import RankState
from trainer.checkpoints.async_writer import SavedCheckpoint, StateBuffer, Writing
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import REPLACED, STEP_DIR, published
from trainer.checkpoints.manifest import seal
from trainer.checkpoints.patience import TOLD_EVERY_S, waiting_for_disk
from trainer.checkpoints.recovery import forget_notes
from trainer.checkpoints.resume_selection import choose, note_begun, put_back
from trainer.checkpoints.schedule import Schedule
from trainer.checkpoints.staging import agree, fallback_problem, on_main, open_aside

GIVEN_UP = "given-up-{}"
UNFINISHED = (".step-*.writing", ".step-*.deleting", REPLACED.format("step-*"))


class Checkpoints:
    """The checkpoints of one run, in the order of its steps: one branch, of which the newest and the best stay."""

    def __init__(
        self,
        places: list[Path],
        config: CheckpointConfig,
        runtime: Runtime,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.places, self.config, self.runtime, self.say = places, config, runtime, say
        self.schedule = Schedule(config, runtime)
        self.last: SavedCheckpoint | None = None
        """The last checkpoint of this process; None before the first."""
        self.copies = StateBuffer(runtime)
        self._writing: Writing | None = None
        self._told_s = 0.0
        """Seconds after which it was last told that a checkpoint is still being written."""
        self._good: set[Path] = set()
        """Of this branch, and known to be whole: resumed from, or written by this process."""
        self._failures = 0
        self._warned: set[Path] = set()

    # -- at the start ----------------------------------------------------------------------------------------------------

    def begin(self, resumed: Path | None, asked: str = "auto") -> None:
        """Go on from `resumed`: what is newer is of a branch given up, or damaged, and is moved aside. All ranks must call.

        Where it is what `asked` (`run.resume`) names, that is noted. Errors: StorageError on every rank, where something could
        not be moved (it would be taken for this run's newest) or noted (a requeue would begin there again), or where
        `checkpoint.fallback_dir` cannot be written.
        """
        error: StorageError | None = None
        if self.runtime.is_main:
            error = fallback_problem(self.places[1:], self.config.fallback_dir, self.say)
            try:
                if error is None:
                    self._begin(resumed)
            except (OSError, StorageError) as caught:
                error = StorageError(
                    f"checkpoint: what is newer than {resumed} could not be moved aside ({reason(caught)}); move it away by "
                    "hand"
                )
            try:  # last: a start that is cut short before goes back once more
                if error is None and resumed is not None:
                    note_begun(self.places, asked, resumed)
            except OSError as caught:
                error = StorageError(f"{self.places[0].parent}: cannot be written ({reason(caught)}); free space")
        if (message := first_error(error, self.runtime)) is not None:
            raise StorageError(message.split(": ", 2)[-1])

    def _begin(self, resumed: Path | None) -> None:
        mine = resumed.resolve() if resumed else None
        put_back(self.places)
        there = published(self.places)
        reached = next((step for step, path in there if path.resolve() == mine), None)
        given_up = [path for step, path in there if reached is None or step > reached]
        given_up += [path for step, path in there if step == reached and path.resolve() != mine]
        for place in self.places:
            for left in [path for kind in UNFINISHED for path in place.glob(kind)]:
                with suppress(OSError):  # what a killed run had not finished; in nobody's way
                    atomic_io.disk.remove_tree(left)
            if moved := [path for path in given_up if path.parent == place]:
                self._move_aside(place, moved)
        self._good = {path for step, path in there if path.resolve() == mine}

    def _move_aside(self, place: Path, moved: list[Path]) -> None:
        number = next(n for n in range(1, 10**6) if not (place / GIVEN_UP.format(n)).exists())
        aside = place / GIVEN_UP.format(number)
        atomic_io.disk.make_directory(aside)
        rows = place.parent / "metrics.jsonl"
        if rows.is_file():  # its later rows are about to be taken again
            shutil.copyfile(rows, aside / rows.name)
            atomic_io.sync_file(aside / rows.name)
        for path in moved:
            atomic_io.disk.rename(path, aside / path.name)
        sync_directory(aside)
        sync_directory(place)
        self.say(
            f"checkpoints that this run does not continue from ({', '.join(path.name for path in moved[:6])}) were moved to "
            f"{aside}, with the metrics so far; delete it when you need them no more"
        )

    def any(self) -> bool:
        """Whether there are checkpoints of this run. All ranks must call. Errors: StorageError on every rank."""
        return call_on_main(lambda: bool(published(self.places)), self.runtime)

    def go_back(self) -> Path:
        """The newest checkpoint of this branch that is whole, from which the run now goes on. All ranks must call.

        Errors: StorageError on every rank where there is none.
        """
        path = choose(self.places, "auto", self.runtime)
        if path is None:
            raise StorageError(f"there is no checkpoint in {self.places[0]} to go back to; was it deleted?")
        self.begin(path)
        self.schedule.tried(int(path.name.removeprefix("step-")), None)
        return path

    def move_to(self, run_dir: Path) -> None:
        """Go on in a run directory that was renamed to `run_dir`, also with what is being written. No collective."""
        before, now = self.places[0], run_dir / self.places[0].name
        self.places[0] = now
        self._good = {now / path.name if path.parent == before else path for path in self._good}
        if self._writing is not None:
            self._writing.places = [now if place == before else place for place in self._writing.places]
            if self._writing.place == before:
                self._writing.place = now

    # -- on the way ------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step. All ranks must call, after the same steps."""
        return self.schedule.due(step)

    @property
    def pending(self) -> int | None:
        """The step whose checkpoint is being written while training goes on; None where none is."""
        return None if self._writing is None else self._writing.step

    def written(self, step: int) -> bool:
        """Whether all ranks have written what is pending, so that it can be settled. All ranks must call, at the same."""
        if self._writing is None:
            return False
        done = self._writing.done(step, self.runtime)
        written_s = time.monotonic() - self._writing.began
        if not done and written_s >= self._told_s + TOLD_EVERY_S:
            self._told_s = written_s
            self.say(f"checkpoint {STEP_DIR.format(self._writing.step)}: still being written after {written_s:.0f} s")
        return done

    def _patience(self, step: int, size: int) -> AbstractContextManager[None]:
        return waiting_for_disk(f"checkpoint {STEP_DIR.format(step)}", size, self.runtime, self.say)

    def linger(self, limit_s: float) -> None:
        """Give what this rank is writing at most `limit_s` to come to the disk, where the next start finds it. No collective."""
        if self._writing is not None:
            self._writing.linger(limit_s)

    def save(self, engine: Engine, progress: Progress, *, must: bool = True) -> bool:
        """Write, seal and publish `step-<step>`; then drop what is beyond `checkpoint.keep`. All ranks must call.

        What is pending is to be settled before.
        Where the run's directory cannot take it, `checkpoint.fallback_dir` is tried. Raises StorageError on every rank when
        neither could; nothing half-written stays. Unless it `must` be, the run goes on with a warning (and False is returned)
        until `checkpoint.max_failures` in a row; and with `checkpoint.background` the checkpoint is only begun, and pending.
        """
        began = time.monotonic()
        with self._patience(progress.step, 0):  # rank 0 may still bring its rows to the disk
            state = engine.state(progress)
            size = 4 * sum(gather_objects(state.num_elements, self.runtime))
        writing = Writing.of(progress, state, began, self.places)
        writing.size = size
        with self._patience(progress.step, size):
            return self._save(writing, must=must)

    def _save(self, writing: Writing, *, must: bool) -> bool:
        if must:  # the last one, as far as is known: exports need the memory
            self.copies.release()
        if must or not self.config.background or not self._copied(writing.state):
            return self._in_step(writing, must=must)
        self._writing, self._told_s = writing, 0.0
        problems: list[str] = []
        begun = self._start(writing, problems)
        writing.stall_s = time.monotonic() - writing.began
        self.schedule.tried(writing.step, None)
        if not begun:
            self._writing = None
            self._failed(problems, must=False)
        return begun

    def settle(self) -> bool:
        """Wait for what is pending, seal and publish it; whether there is such a checkpoint now. All ranks must call.

        What one place could not take, another is given out of the same copy. Raises StorageError as `save` does.
        """
        writing, self._writing = self._writing, None
        assert writing is not None
        with self._patience(writing.step, writing.size):
            return self._settle(writing)

    def _settle(self, writing: Writing) -> bool:
        began = time.monotonic()
        problems: list[str] = []
        while True:
            finish = partial(writing.state.finish, outcome=writing.wait())
            try:
                path, size = self._close(writing, finish)
                break
            except StorageError as error:
                self._note(error, problems)
            if not self._start(writing, problems):
                self._failed(problems, must=False)
                return False
        now = time.monotonic()
        writing.stall_s += now - began
        self._succeeded(writing, SavedCheckpoint(path, size, now - writing.began, writing.stall_s))
        self.schedule.priced(writing.stall_s, now - writing.began)
        return True

    def _copied(self, state: RankState) -> bool:
        known = self.copies.refused
        if self.copies.take(state):
            return True
        if known is None:
            self.say(f"checkpoints are written in the step (checkpoint.background=false): {self.copies.refused}")
        return False

    def _start(self, writing: Writing, problems: list[str]) -> bool:
        """Let each rank's file be written in the first place left that has room for all of them."""
        while writing.places:
            writing.place = writing.places.pop(0)
            try:
                open_aside(writing.aside, self.runtime, writing.state.make_room)
            except StorageError as error:
                self._note(error, problems)
                continue
            writing.start(writing.aside)
            return True
        return False

    def _in_step(self, writing: Writing, *, must: bool) -> bool:
        problems: list[str] = []
        while writing.places:
            writing.place = writing.places.pop(0)
            try:
                open_aside(writing.aside, self.runtime)
                path, size = self._close(writing, writing.state.save)
            except StorageError as error:
                self._note(error, problems)
                continue
            took = time.monotonic() - writing.began
            self._succeeded(writing, SavedCheckpoint(path, size, took, took))
            self.schedule.tried(writing.step, took)
            return True
        self.schedule.tried(writing.step, None)
        self._failed(problems, must=must)
        return False

    def _note(self, error: StorageError, problems: list[str]) -> None:
        problems.append(str(error))
        self.say(f"warning: {error}")

    def _succeeded(self, writing: Writing, saved: SavedCheckpoint) -> None:
        self._failures, self.last, path = 0, saved, saved.path
        self._tell(saved)
        if self.runtime.is_main:
            for twin in [each for each in self._good if each.name == path.name and each != path]:
                self._delete(twin)  # written again in another place
            self._good.add(path)
            self._retain(writing.best_step)

    def _failed(self, problems: list[str], *, must: bool) -> None:
        self._failures += 1
        if must or self._failures > self.config.max_failures:
            again = "" if must else f" {self._failures} checkpoints in a row failed (checkpoint.max_failures)."
            raise StorageError(f"{'; '.join(problems)}.{again} Earlier checkpoints are intact.")
        self.say(
            f"the run continues without this checkpoint ({self._failures} failed in a row, {self.config.max_failures} may)"
        )

    def _close(self, writing: Writing, write: Callable[[Path], list[WrittenFile]]) -> tuple[Path, int]:
        """(the checkpoint, its bytes) when `write` has given all its files. All ranks must call. Errors: StorageError."""
        place, aside = writing.place, writing.aside
        final = place / STEP_DIR.format(writing.step)
        error: BaseException | None = None
        try:
            files = write(aside)
        except (OSError, RuntimeError, StorageError) as caught:
            error = caught
        agree(error, aside, self.runtime)

        def finish() -> None:
            forget_notes(aside, self.runtime.world_size)
            seal(aside, files)
            if final in self._good and final.exists():  # this branch's own, of the same step: it owed an evaluation
                publish_replacing(aside, final, final.with_name(REPLACED.format(final.name)))
                return
            if final.exists():  # not of this branch, and made since it began
                self._move_aside(place, [final])
            publish(aside, final)

        on_main(finish, aside, self.runtime)
        return final, sum(each.size for each in files)

    def _tell(self, saved: SavedCheckpoint) -> None:
        path = saved.path
        interval = self.schedule.interval_s
        after = "" if interval is None else f"; the next in about {max(1, round(interval / 60))} minutes"
        where = "" if path.parent == self.places[0] else f" in {path.parent}"
        waited = "" if saved.stall_s == saved.took_s else f", of which training waited {saved.stall_s:.1f} s"
        self.say(f"checkpoint {path.name}{where}: {size_text(saved.size)} in {saved.took_s:.1f} s{waited}{after}")

    def _retain(self, best_step: int | None) -> None:
        """Delete what `checkpoint.keep` newer ones, known to be whole, stand for; a warning where that is not possible."""
        try:
            there = published(self.places)
        except StorageError as error:
            self.say(f"warning: old checkpoints could not be looked for ({error})")
            return
        whole = [step for step, path in there if path in self._good]
        if len(whole) < self.config.keep:
            return
        for step, path in there:
            if step < whole[-self.config.keep] and step != best_step:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.deleting")
        try:
            atomic_io.disk.rename(path, aside)  # at once, so that nobody meets half of it
            self._good.discard(path)
            atomic_io.disk.remove_tree(aside)
        except OSError as error:
            if path not in self._warned:
                self.say(f"warning: the old checkpoint {path} could not be deleted ({reason(error)})")
            self._warned.add(path)
