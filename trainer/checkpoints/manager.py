"""Writes checkpoints into a staging directory, publishes them, and deletes those that are not kept.

To publish a checkpoint: add its manifest, by which its files are checked later, and rename its complete staging directory to
`step-<n>`. A pending checkpoint is one that is being written while training continues, and not published yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import WrittenFile, error_summary
from strategies.base import Engine, Progress
from strategies.errors import StorageError
from strategies.runtime import Runtime, call_on_main, first_rank_error, gather_objects
from strategies.saving import RankState
from trainer.checkpoints.async_writer import (
    FLOAT32_BYTES,
    PendingCheckpoint,
    PublishedFiles,
    SavedCheckpoint,
    StateBuffer,
)
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.given_up import move_to_given_up_dir
from trainer.checkpoints.layout import REPLACED_DIR_FORMAT, STEP_DIR_FORMAT, checkpoints_in
from trainer.checkpoints.manifest import write_manifest
from trainer.checkpoints.patience import REPORT_INTERVAL_S, waiting_for_disk
from trainer.checkpoints.recovery import remove_part_notes
from trainer.checkpoints.resume_selection import choose_checkpoint, record_resumed_checkpoint
from trainer.checkpoints.retention import CheckpointBranch
from trainer.checkpoints.schedule import Schedule
from trainer.checkpoints.staging import create_staging_dir, probe_fallback_dir, raise_if_any_rank_failed, run_on_rank_0


class Checkpoints:
    """Writes and deletes the checkpoints of one run.

    They form one branch: a sequence of steps, each taken from the weights of the one before. The newest and the best are kept. A
    run that goes back to an earlier checkpoint gives the later ones up; they are moved aside.
    """

    def __init__(
        self,
        checkpoint_dirs: list[Path],
        config: CheckpointConfig,
        runtime: Runtime,
        print_line: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Touches no file yet. `print_line`: prints a line for the user, on rank 0; every rank may call it."""
        self.checkpoint_dirs = checkpoint_dirs
        """The directories for checkpoints; the first is the run's own, the others are tried when it cannot take one."""
        self.config = config
        self.runtime = runtime
        self.print_line = print_line
        self.schedule = Schedule(config, runtime)
        self.last_published: SavedCheckpoint | None = None
        """The last checkpoint that this process published; None before the first."""
        self.state_buffer = StateBuffer(runtime)
        self._pending_checkpoint: PendingCheckpoint | None = None
        self._reported_age_s = 0.0
        """Age of the pending checkpoint, in seconds, when the last message said that it is still being written."""
        self._branch = CheckpointBranch(checkpoint_dirs, print_line)
        self.look_back_steps = 0
        """Steps before the newest checkpoint within which all are kept, and one more from before: for a rollback that goes
        further back than to the last one."""
        self._num_failures_in_a_row = 0
        """Checkpoints in a row that could not be written."""

    # -- at the start ----------------------------------------------------------------------------------------------------

    def continue_from_checkpoint(self, resumed: Path | None, resume: str = "auto") -> None:
        """Make `resumed` the newest checkpoint of the run, at a start or rollback: newer ones are moved aside.

        `resumed`: None for a start without a checkpoint; all are then moved aside. `resume`: the setting `run.resume`. If it
        names `resumed`, that is recorded. All ranks must call. Raises StorageError on every rank if

        - `checkpoint.fallback_dir` cannot be written;
        - a checkpoint cannot be moved, since it would be taken for this run's newest;
        - the record cannot be written, since a requeued job would begin at `resumed` again.
        """
        error: StorageError | None = None
        if self.runtime.is_main:
            error = probe_fallback_dir(self.checkpoint_dirs[1:], self.config.fallback_dir, self.print_line)
            try:
                if error is None:
                    self._branch.begin_at(resumed)
            except (OSError, StorageError) as caught:
                error = StorageError(
                    f"checkpoint: what is newer than {resumed} could not be moved aside ({error_summary(caught)}); move it away "
                    "by hand"
                )
            # Last: if this start is cut short before it, the next one goes back to the named checkpoint once more.
            try:
                if error is None and resumed is not None:  # records nothing if `resume` is `auto` or `never`
                    record_resumed_checkpoint(self.checkpoint_dirs, resume, resumed)
            except OSError as caught:
                error = StorageError(
                    f"{self.checkpoint_dirs[0].parent}: cannot be written ({error_summary(caught)}); free space"
                )
        failure = first_rank_error(error, self.runtime)  # a collective: only rank 0 can have an error
        if failure is not None:
            raise StorageError(failure.text)

    def has_any(self) -> bool:
        """Whether there are checkpoints of this run. All ranks must call. Raises StorageError on every rank if that fails."""
        return call_on_main(lambda: bool(checkpoints_in(self.checkpoint_dirs)), self.runtime)

    def has_checkpoint_of(self, step: int) -> bool:
        """Whether this run has a checkpoint of a step. All ranks must call. Raises StorageError on every rank if that fails."""
        return call_on_main(lambda: step in dict(checkpoints_in(self.checkpoint_dirs)), self.runtime)

    def roll_back(self, last_good_step: int) -> Path:
        """Go back to the newest complete checkpoint up to `last_good_step`, after an anomaly; returns its path.

        Newer ones are moved aside; loading is left to the caller. If there is none that old, it is the oldest one, and a line
        says so. All ranks must call. Raises StorageError on every rank if there is no checkpoint at all.
        """
        path = choose_checkpoint(self.checkpoint_dirs, "auto", self.runtime, last_step=last_good_step)
        if path is None:
            raise StorageError(f"there is no checkpoint in {self.checkpoint_dirs[0]} to go back to; was it deleted?")
        step = int(path.name.removeprefix("step-"))
        if step > last_good_step:
            self.print_line(
                f"warning: there is no checkpoint of step {last_good_step} or before; the run goes back to the oldest one, of "
                f"step {step} (checkpoint.keep={self.config.keep})"
            )
        self.continue_from_checkpoint(path)
        self.schedule.restart_interval(step)
        return path

    def follow_renamed_run_dir(self, run_dir: Path) -> None:
        """Use the new paths after somebody renamed the run directory to `run_dir`. Moves nothing on the disk. No collective."""
        old_dir = self.checkpoint_dirs[0]  # the fallback directory is not in the run directory, and keeps its path
        new_dir = run_dir / old_dir.name

        def new_path_of(checkpoint_dir: Path) -> Path:
            return new_dir if checkpoint_dir == old_dir else checkpoint_dir

        self.checkpoint_dirs[0] = new_dir
        self._branch.complete_paths = {new_path_of(path.parent) / path.name for path in self._branch.complete_paths}
        if (pending := self._pending_checkpoint) is not None:
            pending.untried_checkpoint_dirs = [new_path_of(directory) for directory in pending.untried_checkpoint_dirs]
            pending.checkpoint_dir = new_path_of(pending.checkpoint_dir)

    # -- on the way ------------------------------------------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step. All ranks must call, after the same steps."""
        return self.schedule.is_due(step)

    def is_improvement_due(self) -> bool:
        """Whether an improvement may be saved now. All ranks must call, after the same steps."""
        return self.schedule.is_improvement_due()

    @property
    def pending_step(self) -> int | None:
        """The step whose checkpoint is being written while training continues; None if there is none."""
        return None if self._pending_checkpoint is None else self._pending_checkpoint.step

    def pending_is_written(self, step: int) -> bool:
        """Whether all ranks have written the checkpoint that is written in the background, so that it can be published now.

        False if none is pending. `step`: the run's current one. Prints a line from time to time if the write takes long. All
        ranks must call, after the same steps: they ask each other only after some of them.
        """
        if self._pending_checkpoint is None:
            return False
        is_written = self._pending_checkpoint.is_written(step, self.runtime)
        written_s = time.monotonic() - self._pending_checkpoint.began_at
        if not is_written and written_s >= self._reported_age_s + REPORT_INTERVAL_S:
            self._reported_age_s = written_s
            self.print_line(
                f"checkpoint {STEP_DIR_FORMAT.format(self._pending_checkpoint.step)}: still being written after {written_s:.0f} s"
            )
        return is_written

    def _with_longer_disk_timeout(self, step: int, size_bytes: int) -> AbstractContextManager[None]:
        """Within the context collectives time out later, since a slow disk may take long for `size_bytes` of the checkpoint."""
        return waiting_for_disk(f"checkpoint {STEP_DIR_FORMAT.format(step)}", size_bytes, self.runtime, self.print_line)

    def wait_at_most(self, limit_s: float) -> None:
        """Wait at most `limit_s` for the file that this rank is writing. The next start can publish it. No collective."""
        if self._pending_checkpoint is not None:
            self._pending_checkpoint.wait_at_most(limit_s)

    def save_checkpoint(
        self,
        engine: Engine,
        progress: Progress,
        *,
        must_succeed: bool = True,
        replaces_older: bool = True,
        attachments: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Write a checkpoint of this moment, or begin to write it while training continues. All ranks must call.

        The pending checkpoint must be published before. If the run's directory cannot take the checkpoint,
        `checkpoint.fallback_dir` is tried. The outcomes:

        - With `must_succeed`, or `checkpoint.background=false`: it is written and published now, and older ones that
          `checkpoint.keep` no longer keeps are deleted. Returns True.
        - Else it is begun, and pending. Returns True.
        - No directory can take it: nothing half-written stays. Raises StorageError on every rank with `must_succeed`, or after
          more than `checkpoint.max_failures` failures in a row. Else prints a warning and returns False.

        `must_succeed`: the run cannot go on without it; usually its last one. `replaces_older`: False for a checkpoint that is
        deleted after the export, so that no older one is deleted for it. `attachments`: files beside the state by name, which
        rank 0 writes.
        """
        began_at = time.monotonic()
        # The size is known only after these collectives, which wait for rank 0: it may still be writing metrics to the disk.
        with self._with_longer_disk_timeout(progress.step, size_bytes=0):
            state = engine.state(progress)
            num_elements = sum(gather_objects(state.num_elements, self.runtime))
        if attachments and self.runtime.is_main:
            state.attachments = dict(attachments)
        checkpoint = PendingCheckpoint.begin(
            progress,
            state,
            began_at,
            self.checkpoint_dirs,
            size_bytes=FLOAT32_BYTES * num_elements,
            replaces_older=replaces_older,
        )
        with self._with_longer_disk_timeout(progress.step, checkpoint.size_bytes):
            return self._save_or_begin(checkpoint, must_succeed=must_succeed)

    def _save_or_begin(self, checkpoint: PendingCheckpoint, *, must_succeed: bool) -> bool:
        """Write the checkpoint while training waits, or copy the state and begin to write the copy in the background.

        Training waits with `must_succeed` (usually the run's last checkpoint), with `checkpoint.background=false`, or if host
        memory has no room for a copy. Returns whether it was written or begun. All ranks must call. Raises as `save_checkpoint`.
        """
        if must_succeed:  # probably the last one, and the export needs the memory
            self.state_buffer.release()
        if must_succeed or not self.config.background or not self._copy_state(checkpoint.state):
            return self._write_while_training_waits(checkpoint, must_succeed=must_succeed)
        self._pending_checkpoint = checkpoint
        self._reported_age_s = 0.0
        has_begun = self._start_writing(checkpoint)
        # Training has waited for the copy. Publishing will add its own wait, and record the cost of both.
        checkpoint.stall_s = time.monotonic() - checkpoint.began_at
        self.schedule.restart_interval(checkpoint.step)
        if not has_begun:
            self._pending_checkpoint = None
            self._count_failure(checkpoint.failure_texts, must_succeed=False)
        return has_begun

    def publish_pending(self) -> bool:
        """Wait for the checkpoint that is written in the background, and publish it: add its manifest, rename it to `step-<n>`.

        Returns whether it was published. If one directory could not take it, the next is tried with the same copy. Raises
        StorageError on every rank after more than `checkpoint.max_failures` failures in a row. All ranks must call.
        """
        checkpoint = self._pending_checkpoint
        self._pending_checkpoint = None
        assert checkpoint is not None
        with self._with_longer_disk_timeout(checkpoint.step, checkpoint.size_bytes):
            return self._wait_and_publish(checkpoint)

    def _wait_and_publish(self, checkpoint: PendingCheckpoint) -> bool:
        """Wait for the threads of all ranks that write a checkpoint, and publish it; returns and raises as `publish_pending`.

        If its directory could not take it, the remaining ones are tried with the same copy of the state. All ranks must call.
        """
        wait_began_at = time.monotonic()
        while True:
            # Each rank passes on how its own file ended: an error of one is raised on all.
            finish_files = partial(checkpoint.state.finish, outcome=checkpoint.wait_for_outcome())
            try:
                published = self._complete_and_publish(checkpoint, finish_files)
                break
            except StorageError as error:
                self._warn_of_failure(checkpoint, error)
            # The copy is still in the buffer, so that another directory can be tried.
            if not self._start_writing(checkpoint):
                self._count_failure(checkpoint.failure_texts, must_succeed=False)
                return False
        now = time.monotonic()
        # Training has waited for the copy, and waits here; between the two it went on while the thread wrote.
        stall_s = checkpoint.stall_s + now - wait_began_at
        took_s = now - checkpoint.began_at
        self._record_success(checkpoint, published, took_s=took_s, stall_s=stall_s)
        return True

    def _copy_state(self, state: RankState) -> bool:
        """Copy the training state to the buffer in host memory, so that training may go on; returns whether there was room.

        If there is none, a line says so, once. All ranks must call.
        """
        known_refusal = self.state_buffer.refusal_reason
        if self.state_buffer.copy_state(state):  # sets `refusal_reason` if it returns False
            return True
        if known_refusal is None:
            self.print_line(
                f"checkpoints are written in the step (checkpoint.background=false): {self.state_buffer.refusal_reason}"
            )
        return False

    def _start_writing(self, checkpoint: PendingCheckpoint) -> bool:
        """Start a thread that writes a checkpoint, in the first directory not yet tried that has room; returns whether one had.

        A warning names each directory that could not take it. All ranks must call.
        """
        while checkpoint.untried_checkpoint_dirs:
            checkpoint.use_next_directory()
            try:
                create_staging_dir(checkpoint.staging_dir, self.runtime, checkpoint.state.require_space_on_disk)
            except StorageError as error:  # raised on all ranks or none, so that all try the next directory
                self._warn_of_failure(checkpoint, error)
                continue
            checkpoint.start_writing_thread()
            return True
        return False

    def _write_while_training_waits(self, checkpoint: PendingCheckpoint, *, must_succeed: bool) -> bool:
        """Write and publish a checkpoint while training waits, in the first directory that can take it. All ranks must call.

        Returns False if none can; raises StorageError then with `must_succeed`, or after too many failures in a row.
        """
        while checkpoint.untried_checkpoint_dirs:
            checkpoint.use_next_directory()
            try:
                create_staging_dir(checkpoint.staging_dir, self.runtime)
                published = self._complete_and_publish(checkpoint, checkpoint.state.save)
            except StorageError as error:  # raised on all ranks or none, so that all try the next directory
                self._warn_of_failure(checkpoint, error)
                continue
            took_s = time.monotonic() - checkpoint.began_at
            self._record_success(checkpoint, published, took_s=took_s, stall_s=took_s)
            self.schedule.restart_interval(checkpoint.step)
            return True
        self.schedule.restart_interval(checkpoint.step)
        self._count_failure(checkpoint.failure_texts, must_succeed=must_succeed)
        return False

    def _warn_of_failure(self, checkpoint: PendingCheckpoint, error: StorageError) -> None:
        """Print why a directory could not take the checkpoint, and keep that for the error that is raised if all fail."""
        checkpoint.failure_texts.append(str(error))
        self.print_line(f"warning: {error}")

    def _record_success(
        self, checkpoint: PendingCheckpoint, published: PublishedFiles, *, took_s: float, stall_s: float
    ) -> None:
        """After a checkpoint was published: report it, record what it cost, and delete older ones that are no longer kept.

        `took_s`: seconds from its beginning until it had its name. `stall_s`: seconds of these in which training waited.
        """
        self._num_failures_in_a_row = 0
        saved = SavedCheckpoint(published.path, published.size_bytes, took_s=took_s, stall_s=stall_s)
        self.last_published = saved
        if self.runtime.is_main:  # which alone knows the size, and whose line is the one on the screen
            self.print_line(saved.summary_line(self.checkpoint_dirs[0], self.schedule.checkpoint_interval_s))
        self.schedule.record_cost(stall_s, write_s=took_s)
        if not self.runtime.is_main:
            return
        self._branch.add_published(saved.path)
        if checkpoint.replaces_older:
            self._branch.delete_superseded(
                keep=self.config.keep, look_back_steps=self.look_back_steps, best_step=checkpoint.best_step
            )

    def _count_failure(self, failure_texts: list[str], *, must_succeed: bool) -> None:
        """Count a checkpoint that no directory could take, and print a line that the run continues without it.

        `failure_texts`: for each directory, why it could not. Raises StorageError instead if it had to succeed, or if more than
        `checkpoint.max_failures` failed in a row.
        """
        self._num_failures_in_a_row += 1
        num_failures = self._num_failures_in_a_row
        if must_succeed or num_failures > self.config.max_failures:
            error_text = f"{'; '.join(failure_texts)}."
            if not must_succeed:
                error_text += f" {num_failures} checkpoints in a row failed (checkpoint.max_failures)."
            raise StorageError(f"{error_text} Earlier checkpoints are intact.")
        limits = f"{num_failures} failed in a row, {self.config.max_failures} may"
        self.print_line(f"the run continues without this checkpoint ({limits})")

    def _complete_and_publish(
        self, checkpoint: PendingCheckpoint, complete_files: Callable[[Path], list[WrittenFile]]
    ) -> PublishedFiles:
        """Finish the files of a checkpoint, add its manifest, and rename its staging directory to `step-<n>`.

        `complete_files(staging_dir)`: finishes the files in the directory in which the checkpoint was begun, and returns them:
        all on rank 0, none on other ranks. All ranks must call. Raises StorageError on every rank if that fails.
        """
        staging_dir = checkpoint.staging_dir
        error: BaseException | None = None
        try:
            files = complete_files(staging_dir)
        except (OSError, RuntimeError, StorageError) as caught:
            error = caught
        raise_if_any_rank_failed(error, staging_dir, self.runtime)
        named_dir = checkpoint.checkpoint_dir / STEP_DIR_FORMAT.format(checkpoint.step)
        run_on_rank_0(partial(self._publish_staging_dir, staging_dir, named_dir, files), staging_dir, self.runtime)
        return PublishedFiles(named_dir, sum(file.size for file in files))

    def _publish_staging_dir(self, staging_dir: Path, named_dir: Path, files: list[WrittenFile]) -> None:
        """Write the manifest of `files` into `staging_dir`, and rename that to `named_dir`, durably. On rank 0.

        If there is a checkpoint of the step, it is replaced if it belongs to this branch (the steps that led to the weights of
        now), else moved aside. Raises OSError if that fails.
        """
        # The notes told a start after a crash which files of a rank were complete; the manifest tells that of all files.
        remove_part_notes(staging_dir, self.runtime.world_size)
        write_manifest(staging_dir, files)
        if named_dir in self._branch.complete_paths and named_dir.exists():
            # It was written when the run still owed the evaluation of this step. The new one has its result.
            replaced_dir = named_dir.with_name(REPLACED_DIR_FORMAT.format(named_dir.name))
            atomic_io.publish_directory_replacing(staging_dir, named_dir, replaced_dir)
            return
        if named_dir.exists():  # another branch's, made since this one began
            move_to_given_up_dir(named_dir.parent, [named_dir], self.print_line)
        atomic_io.publish_directory(staging_dir, named_dir)

    def discard_checkpoint_of_step(self, step: int) -> None:
        """Delete the checkpoint of a step, unless it is the only one. No collective; rank 0 deletes. A failure is a warning."""
        if self.runtime.is_main:
            self._branch.discard_step(step)
