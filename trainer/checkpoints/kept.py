"""Resumable training state on disk: written aside, sealed, published by a rename; and which of it stays."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from strategies import durable
from strategies.base import Engine, Progress
from strategies.durable import make_directories, publish, publish_again, reason, size_text, sync_directory, write_new
from strategies.errors import StorageError
from strategies.runtime import Runtime, first_error, found_on_main
from trainer.checkpoints.chosen import choose, note_begun, put_back
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.places import REPLACED, STEP_DIR, published
from trainer.checkpoints.schedule import Schedule
from trainer.checkpoints.seal import seal

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
        self.last: tuple[int, float] | None = None
        """Bytes of the last checkpoint of this process, of all ranks, and the seconds it took; None before the first."""
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
            error = self._fallback_problem()
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

    def _fallback_problem(self) -> StorageError | None:
        """Why the other disk could take no checkpoint, found before one is needed there; one that is full may be emptied."""
        for place in self.places[1:]:
            trial = place / f".{place.name}.trial"
            try:
                make_directories(place)
                write_new(trial, b"\n")
                trial.unlink()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    return StorageError(
                        f"checkpoint.fallback_dir={self.config.fallback_dir}: cannot be written ({reason(error)}); give a "
                        "directory on another disk that this user can write, or null"
                    )
                self.say(f"warning: checkpoint.fallback_dir={self.config.fallback_dir}: {reason(error)}")
        return None

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
                    durable.disk.remove_tree(left)
            if moved := [path for path in given_up if path.parent == place]:
                self._move_aside(place, moved)
        self._good = {path for step, path in there if path.resolve() == mine}

    def _move_aside(self, place: Path, moved: list[Path]) -> None:
        number = next(n for n in range(1, 10**6) if not (place / GIVEN_UP.format(n)).exists())
        aside = place / GIVEN_UP.format(number)
        durable.disk.make_directory(aside)
        rows = place.parent / "metrics.jsonl"
        if rows.is_file():  # its later rows are about to be taken again
            shutil.copyfile(rows, aside / rows.name)
            durable.sync_file(aside / rows.name)
        for path in moved:
            durable.disk.rename(path, aside / path.name)
        sync_directory(aside)
        sync_directory(place)
        self.say(
            f"checkpoints that this run does not go on from ({', '.join(path.name for path in moved[:6])}) were moved to "
            f"{aside}, with the metrics so far; delete it when you need them no more"
        )

    def any(self) -> bool:
        """Whether there are checkpoints of this run. All ranks must call. Errors: StorageError on every rank."""
        return found_on_main(lambda: bool(published(self.places)), self.runtime)

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

    # -- on the way ------------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step. All ranks must call, after the same steps."""
        return self.schedule.due(step)

    def save(self, engine: Engine, progress: Progress, *, must: bool = True) -> Path | None:
        """Write, seal and publish `step-<step>`; then drop what is beyond `checkpoint.keep`. All ranks must call.

        Where the run's directory cannot take it, `checkpoint.fallback_dir` is tried. Raises StorageError on every rank when
        neither could; nothing half-written stays. Unless it `must` be, the run goes on with a warning (and None is returned)
        until `checkpoint.max_failures` in a row.
        """
        began = time.monotonic()
        problems = []
        for place in self.places:
            try:
                path, size = self._write(place, engine, progress)
            except StorageError as error:
                problems.append(str(error))
                self.say(f"warning: {error}")
                continue
            self._failures = 0
            took = time.monotonic() - began
            self.last = size, took
            self.schedule.tried(progress.step, took)
            self._tell(path, size, took)
            if self.runtime.is_main:
                for twin in [each for each in self._good if each.name == path.name and each != path]:
                    self._delete(twin)  # written again in another place
                self._good.add(path)
                self._retain(progress)
            return path
        self._failures += 1
        self.schedule.tried(progress.step, None)
        if must or self._failures > self.config.max_failures:
            again = "" if must else f" {self._failures} checkpoints in a row failed (checkpoint.max_failures)."
            raise StorageError(f"{'; '.join(problems)}.{again} Earlier checkpoints are intact.")
        self.say(
            f"the run goes on without this checkpoint ({self._failures} failed in a row, {self.config.max_failures} may)"
        )
        return None

    def _write(self, place: Path, engine: Engine, progress: Progress) -> tuple[Path, int]:
        final = place / STEP_DIR.format(progress.step)
        aside = place / f".{final.name}.writing"
        self._on_main(lambda: self._make_aside(aside), aside)
        error: BaseException | None = None
        try:
            files = engine.save(aside, progress)
        except (OSError, RuntimeError, StorageError) as caught:
            error = caught
        self._agree(error, aside)

        def finish() -> None:
            seal(aside, files)
            if final in self._good and final.exists():  # this branch's own, of the same step: it owed an evaluation
                publish_again(aside, final, final.with_name(REPLACED.format(final.name)))
                return
            if final.exists():  # not of this branch, and made since it began
                self._move_aside(place, [final])
            publish(aside, final)

        self._on_main(finish, aside)
        return final, sum(each.size for each in files)

    def _make_aside(self, aside: Path) -> None:
        if aside.exists():
            durable.disk.remove_tree(aside)
        make_directories(aside)

    def _on_main(self, do: Callable[[], None], aside: Path) -> None:
        error: BaseException | None = None
        try:
            if self.runtime.is_main:
                do()
        except OSError as caught:
            error = caught
        self._agree(error, aside)

    def _agree(self, error: BaseException | None, aside: Path) -> None:
        """Raise on every rank, the cause first, what any rank met; nothing half-written stays. All ranks must call."""
        told = None if error is None else str(error) if isinstance(error, StorageError) else reason(error)
        message = first_error(None if told is None else StorageError(told), self.runtime)
        if message is None:
            return
        if self.runtime.is_main:
            with suppress(OSError):
                durable.disk.remove_tree(aside)
        cause = message.split("StorageError: ", 1)[1]
        step = aside.name.removeprefix(".").removesuffix(".writing")
        raise StorageError(
            f"{cause}; checkpoint {step} was not written in {aside.parent}; free space or choose another disk"
        )

    def _tell(self, path: Path, size: int, took: float) -> None:
        interval = self.schedule.interval_s
        after = "" if interval is None else f"; the next in about {max(1, round(interval / 60))} minutes"
        where = "" if path.parent == self.places[0] else f" in {path.parent}"
        self.say(f"checkpoint {path.name}{where}: {size_text(size)} in {took:.1f} s{after}")

    def _retain(self, progress: Progress) -> None:
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
            if step < whole[-self.config.keep] and step != progress.best_step:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.deleting")
        try:
            durable.disk.rename(path, aside)  # at once, so that nobody meets half of it
            self._good.discard(path)
            durable.disk.remove_tree(aside)
        except OSError as error:
            if path not in self._warned:
                self.say(f"warning: the old checkpoint {path} could not be deleted ({reason(error)})")
            self._warned.add(path)
