"""The lease of a run directory: one attempt owns it at a time, on any host, on NFS and Lustre, whatever the clocks say.

`lease/000007.json` is the seventh attempt's claim, made by a hard link that only one process can make. While the attempt
lives, it counts up in `000007.beat`; when it ends, it leaves `000007.over`. Another attempt may claim the next number if the
last attempt

- is over,
- is a process of this host that is gone,
- is an earlier start of the same SLURM job,
- or has not counted up for `lease_timeout_s` by the observer's own clock.

It then removes the old claim, so that the old owner, if it still lives, notices when it looks.

One gap remains, since no file system refuses a late write: an owner looks before it publishes (`check`), and a write that
began before a takeover can still land after it.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from strategies import atomic_io, shared_files
from strategies.errors import ConfigError, NotRunOwner, Preempted, StorageError
from trainer.session.lease_owner import (
    HEARTBEATS_PER_TIMEOUT,
    LeaseOwner,
    is_alive_here,
    owner_of_this_process,
)

CLAIM_FILE_REGEX = re.compile(r"(\d{6})\.json")  # 000007.json is the claim of the seventh attempt
REMOVAL_CHECK_DELAY_S = 2.0
"""Seconds to wait before a second look at a directory that seems to be under removal. A new claim would only hinder `rm`."""
SILENT_OWNER_VARIABLE = "SHARDTUNE_SILENT"
"""Environment variable with the last heartbeat of an owner that was found dead, so that other ranks need not watch it too."""


class RunDirInUse(NotRunOwner, ConfigError):
    """Another attempt owned the directory before this one began."""


class LeaseLost(NotRunOwner, StorageError):
    """Another attempt took the directory over, or somebody deleted it."""


class LatestClaim(NamedTuple):
    """The newest claim of a run directory: its number, 0 without any, and its owner, None if that attempt is over."""

    number: int
    owner: LeaseOwner | None


class Lease:
    """Ownership of a run directory by this process, so that no two attempts write into it. Rank 0 holds it while its run lives.

    Use it as a context, or call `release`. A thread writes the heartbeats, and looks whether another attempt took the directory
    over.
    """

    def __init__(
        self,
        run_dir: Path,
        number: int,
        owner: LeaseOwner,
        on_loss: Callable[[], None],
        on_run_dir_renamed: Callable[[Path], None] = lambda run_dir: None,
    ) -> None:
        """Begin to hold a claim that was just made. Errors: OSError if the directory cannot be opened.

        A thread writes heartbeats from now on.

        `number`, `owner`: of the claim. `on_loss`, `on_run_dir_renamed`: see `acquire`.
        """
        self.run_dir = run_dir
        """The current path of the run directory."""
        self.number = number
        self.owner = owner
        self._on_loss = on_loss
        self._on_run_dir_renamed = on_run_dir_renamed
        self._released = threading.Event()
        # Finds the directory again after a rename.
        self._directory_handle = atomic_io.OpenDirectory(run_dir)
        self._look_lock = threading.Lock()
        self._loss_reason: str | None = None
        self._last_heartbeat_at = time.monotonic()
        self._thread = threading.Thread(target=self._write_heartbeats, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        lease_timeout_s: float,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_loss: Callable[[], None] = lambda: None,
        on_run_dir_renamed: Callable[[Path], None] = lambda run_dir: None,
    ) -> Lease:
        """Claim a run directory for this process: make `lease/000008.json`, if 7 is the newest claim and its owner dead or done.

        Waits up to `lease_timeout_s` if only time tells whether the last owner lives.

        `stop`: asked while it waits; True ends the wait with Preempted.
        `on_loss`: called by another thread when the directory turns out to be another attempt's, or deleted.
        `on_run_dir_renamed`: called by any thread with the new path after a rename.

        Raises RunDirInUse, with the owner, if one lives, and StorageError if the directory cannot be written.
        """
        claimant = owner_of_this_process(lease_timeout_s)
        directory = run_dir / "lease"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while True:
                # Read the number before looking for a living owner: if anybody claims in between, our number is taken.
                number, _ = latest_claim(directory)
                raise_if_run_dir_is_in_use(run_dir, lease_timeout_s, stop)
                claim_path = _claim_path(directory, number + 1)
                if not shared_files.claim_shared_file(claim_path, _json_bytes(asdict(claimant)), claimant.token):
                    continue  # the file exists: somebody was faster, or this host's view of the directory is old
                if latest_claim(directory).number == number + 1:
                    break
                # A later claim exists, whose owner has removed the one that had this number.
                claim_path.unlink(missing_ok=True)
            # Remove all files of older claims. The old owner, if it still lives, finds its claim gone and ends.
            for name in atomic_io.disk.names(directory):
                if name[:6].isdigit() and int(name[:6]) <= number:  # such as 000007.json and 000007.beat
                    (directory / name).unlink(missing_ok=True)
            return cls(run_dir, number + 1, claimant, on_loss, on_run_dir_renamed)
        except OSError as error:
            raise StorageError(
                f"{directory}: cannot be written ({error.strerror or error}); {shared_files.free_space_advice(error)}set run.dir"
            ) from error

    @property
    def directory(self) -> Path:
        """The directory of the claims, in the run directory; it follows a rename too."""
        return self.run_dir / "lease"

    def check(self) -> None:
        """Raise LeaseLost if the directory is not this attempt's any more. To be called before anything is published there."""
        if self._loss_reason is None:
            self._loss_reason = self._find_loss_reason()
        if self._loss_reason is not None:
            raise LeaseLost(f"run.dir={self.run_dir}: {self._loss_reason}; this attempt ends and writes nothing more")

    def release(self) -> None:
        """Mark this attempt as over (`000007.over`), so that the next one need not wait for heartbeats to stop."""
        self._released.set()
        self._thread.join()
        if self._loss_reason is None and self._find_loss_reason() is None:
            with suppress(OSError):  # the next attempt waits, or sees that this process is gone
                shared_files.replace_shared_file(self.directory / f"{self.number:06d}.over", b"{}", self.owner.token)
        self._directory_handle.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _find_loss_reason(self) -> str | None:
        """Why this attempt no longer owns its run directory, as a part of a sentence; None if it does.

        For example "process 812 on node-3, since 2026-01-05 10:00:00 took it over". Also makes a claim again that somebody
        deleted, and follows a rename. A directory that cannot be read counts as lost only after HEARTBEATS_PER_TIMEOUT intervals
        without a heartbeat: others may take this attempt for dead by then.
        """
        try:
            # The thread of heartbeats and the main thread both look; only one of them may make a claim again.
            with self._look_lock:
                return self._check_or_restore_claim()
        except OSError as error:
            silent_s = time.monotonic() - self._last_heartbeat_at
            if silent_s <= self.owner.beat_s * HEARTBEATS_PER_TIMEOUT:
                return None
            return f"unreadable for {silent_s:.0f} s ({error.strerror})"

    def _check_or_restore_claim(self) -> str | None:
        """Look whether the directory is still this attempt's; returns why it is not, or None.

        Raises OSError if it cannot be read.

        - The claim exists: None, unless another attempt has made a later one.
        - It is missing and the directory was deleted: that is the reason.
        - It is missing because the directory was renamed: follows it (sets `run_dir`), and looks there.
        - It is still missing: makes it again, unless another attempt has taken the directory over.
        """
        number, owner = latest_claim(self.directory)
        if self._claim_exists():
            if number > self.number and owner is not None:
                return f"{owner.describe()} took it over"
            return None
        # The directory was renamed, deleted or emptied, or another attempt has removed the claim.
        current_run_dir = self._find_renamed_run_dir()
        if current_run_dir is None:
            return "the directory was deleted"
        if current_run_dir != self.run_dir:
            print(f"{self.run_dir}: the directory was renamed to {current_run_dir}", flush=True)
            self.run_dir = current_run_dir
            self._on_run_dir_renamed(current_run_dir)
            number, owner = latest_claim(self.directory)
            if number == self.number and self._claim_exists():
                return None
        return self._restore_claim(number, owner)

    def _claim_exists(self) -> bool:
        """Whether the file of this attempt's claim exists and is still this attempt's. Errors: OSError."""
        try:
            claim = json.loads(shared_files.read_shared_file(_claim_path(self.directory, self.number)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        return isinstance(claim, dict) and claim.get("token") == self.owner.token

    def _find_renamed_run_dir(self) -> Path | None:
        """The current path of the run directory, which somebody may have renamed; None if it was deleted."""
        # An open handle follows the directory whatever its name is.
        run_dir = self._directory_handle.find_directory()
        if run_dir is not None and not (run_dir / "config.yaml").exists():  # `rm -r` may be running
            atomic_io.disk.sleep(REMOVAL_CHECK_DELAY_S)
            run_dir = self._directory_handle.find_directory()
        return run_dir

    def _restore_claim(self, latest_number: int, latest_owner: LeaseOwner | None) -> str | None:
        """Make this attempt's missing claim again; returns None, or why the directory is now another attempt's.

        `latest_number`, `latest_owner`: of the latest claim in the directory; number 0 without any, owner None if that attempt is
        over. Cases, in order:

        - this attempt's own claim: nothing is missing.
        - this attempt's claim, torn by a crash of the host: written again.
        - a later claim of an attempt that is over by now, or a claim of an owner that may live: the directory is lost.
        - none, or one of a dead owner: the claim is made again.
        """
        claim_path = _claim_path(self.directory, self.number)
        content = _json_bytes(asdict(self.owner))
        is_torn = latest_owner is not None and latest_owner.is_torn
        if latest_owner is not None and latest_owner.token == self.owner.token:
            return None  # the claim could be read a moment ago: only the second look failed
        if latest_number == self.number and is_torn:
            shared_files.replace_shared_file(claim_path, content, self.owner.token)
            return None

        if latest_number > self.number and latest_owner is None:
            return "another attempt took it over"
        if latest_number and latest_owner is not None and not is_torn:
            may_be_alive = is_alive_here(latest_owner, self.owner) is not False  # None: this host cannot tell
            if may_be_alive:
                return f"{latest_owner.describe()} took it over"

        self.directory.mkdir(exist_ok=True)
        # False if the file exists: another process made it at the same moment.
        if not shared_files.claim_shared_file(claim_path, content, self.owner.token):
            return "another attempt took it over"
        print(f"{self.directory}: was emptied by somebody; the run's claim is made again", flush=True)
        return None

    def _write_heartbeats(self) -> None:
        """Body of the lease's thread: show other attempts that this one lives, and check its claim, until it is released or lost.

        A heartbeat is a count in `000007.beat` that grows; others compare counts, since clocks of hosts may differ.
        """
        count = 0
        while True:
            count += 1
            try:
                shared_files.replace_shared_file(
                    _heartbeat_path(self.directory, self.number), b"%d" % count, self.owner.token
                )
                self._last_heartbeat_at = time.monotonic()
            except OSError as error:
                # An error may pass. It counts two heartbeats before others may take this attempt for dead.
                if time.monotonic() - self._last_heartbeat_at > self.owner.beat_s * (HEARTBEATS_PER_TIMEOUT - 2):
                    self._loss_reason = f"no heartbeat could be written for too long ({error.strerror or error})"
            self._loss_reason = self._loss_reason or self._find_loss_reason()
            if self._loss_reason is not None:
                self._on_loss()
                return
            if self._released.wait(self.owner.beat_s):
                return


def latest_claim(directory: Path) -> LatestClaim:
    """Find the newest claim in `directory` (`<run>/lease`), to see who owns a run directory, or who owned it last.

    A claim is a file such as `000007.json`; an attempt that is over has left `000007.over` too, and counts as no owner.
    """
    try:
        names = atomic_io.disk.names(directory)
    except (FileNotFoundError, NotADirectoryError):
        return LatestClaim(0, None)
    number = 0
    for name in names:
        match = CLAIM_FILE_REGEX.fullmatch(name)
        if match:
            number = max(number, int(match[1]))
    owner = None
    if number:
        owner = _read_claim(directory, number)
    # The listing of a network file system may be old: look for later claims by their names.
    while (newer := _read_claim(directory, number + 1)) is not None:
        number += 1
        owner = newer
    if f"{number:06d}.over" in names or _exists_when_opened(directory / f"{number:06d}.over"):
        return LatestClaim(number, None)
    return LatestClaim(number, owner)


def raise_if_run_dir_is_in_use(run_dir: Path, lease_timeout_s: float, stop: Callable[[], bool] = lambda: False) -> None:
    """Raise RunDirInUse if another process trains this run now.

    An attempt is one start of a run; it owns the directory while it lives. Waits up to `lease_timeout_s` if only heartbeats tell
    whether the last attempt lives. Raises Preempted if `stop` says so meanwhile, and StorageError if the directory cannot be
    read.
    """
    try:
        living = living_owner_text(run_dir, lease_timeout_s, stop)
    except OSError as error:
        raise StorageError(f"{run_dir / 'lease'}: cannot be read ({error.strerror or error}); set run.dir") from error
    if living:
        raise RunDirInUse(f"run.dir={run_dir}: {living}; stop it, or choose another run.dir")


def living_owner_text(run_dir: Path, lease_timeout_s: float, stop: Callable[[], bool] = lambda: False) -> str | None:
    """The living owner of a run directory, in words for an error ("process 812 on node-3, ..."); None if it may be claimed.

    The cases in order, the cheap ones first: nobody has a claim; it is an earlier start of this SLURM job; its process is, or
    was, on this host; it is on another host. In the last case, its heartbeats are watched for up to `lease_timeout_s`, or until
    `stop` says that this process shall end (Preempted).
    """
    directory = run_dir / "lease"
    this_process = owner_of_this_process(lease_timeout_s)
    number, owner = latest_claim(directory)
    if owner is None:
        return None
    is_earlier_start = bool(owner.job) and owner.job == this_process.job and owner.restart < this_process.restart
    if is_earlier_start:  # SLURM requeues a job only when its last start has ended
        return None
    # None if this host cannot see the process, as one of another host.
    is_alive = is_alive_here(owner, this_process)
    if is_alive is not None:
        return f"{owner.describe()}, is running it" if is_alive else None
    return _watch_owner_on_other_host(run_dir, number, owner, lease_timeout_s, stop)


def _watch_owner_on_other_host(
    run_dir: Path, number: int, owner: LeaseOwner, lease_timeout_s: float, stop: Callable[[], bool]
) -> str | None:
    """Wait to see whether the owner of claim `number`, a process that this host cannot see, still writes heartbeats.

    Returns the owner in words if it lives, else None. If another attempt claims the directory meanwhile, that one is looked at in
    turn. Raises Preempted if `stop` says so.
    """
    directory = run_dir / "lease"
    first_beat = _read_heartbeat_count(directory, number)
    if os.environ.get(SILENT_OWNER_VARIABLE) == f"{owner.token}:{first_beat}":
        return None  # found dead already, by this process or the one that started it
    wait_s = max(lease_timeout_s, 3 * owner.beat_s)
    print(
        f"{run_dir}: {owner.describe()}, did not record its end; watching for a heartbeat, up to {wait_s:.0f} s",
        flush=True,
    )
    began = time.monotonic()
    while time.monotonic() - began < wait_s:
        if stop():
            raise Preempted("asked to stop while waiting for the run directory; nothing was begun")
        time.sleep(min(1.0, owner.beat_s))
        newest, current_owner = latest_claim(directory)
        if newest != number or current_owner is None:  # somebody else claimed it, or the owner has ended
            return living_owner_text(run_dir, lease_timeout_s, stop)
        if _read_heartbeat_count(directory, number) != first_beat:
            return f"{owner.describe()}, is running it"
    # Child processes, such as the ranks of a launcher, inherit the answer and need not wait for it again.
    os.environ[SILENT_OWNER_VARIABLE] = f"{owner.token}:{first_beat}"
    return None


def possible_owner_text(run_dir: Path) -> str | None:
    """The attempt that may still own a run directory after this host's own process has ended, in words; None if none does.

    Does not wait for heartbeats, so an owner on another host counts as possible.
    """
    _, owner = latest_claim(run_dir / "lease")
    if owner is None or is_alive_here(owner, owner_of_this_process(1)) is False:
        return None
    return owner.describe()


def _claim_path(directory: Path, number: int) -> Path:
    """The file of a claim, such as `lease/000007.json`."""
    return directory / f"{number:06d}.json"


def _heartbeat_path(directory: Path, number: int) -> Path:
    """The file of the heartbeats of a claim's owner, such as `lease/000007.beat`."""
    return directory / f"{number:06d}.beat"


def _json_bytes(claim: dict[str, Any]) -> bytes:
    return json.dumps(claim, indent=1).encode() + b"\n"


def _read_claim(directory: Path, number: int) -> LeaseOwner | None:
    """Read who made claim `number`; None without that file. Errors: OSError.

    A file that a crash tore gives an owner that `is_torn`.
    """
    try:
        owner = LeaseOwner(**json.loads(shared_files.read_shared_file(_claim_path(directory, number))))
        # The pid is printed in a command for the user to paste: a claim that somebody forged may have any text there.
        if type(owner.pid) is not int or not isinstance(owner.beat_s, int | float):
            raise TypeError("no number")
        return owner
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # torn by a crash of its host
        return LeaseOwner(token="", host="an unknown host", pid=0, since="an unknown time")


def _read_heartbeat_count(directory: Path, number: int) -> str | None:
    """The last count that the owner of a claim has written as a heartbeat; None if it cannot be read."""
    try:
        return shared_files.read_shared_file(_heartbeat_path(directory, number)).decode()
    except OSError:
        return None


def _exists_when_opened(path: Path) -> bool:
    """Whether a file exists, found by opening it: a network file system may answer from an old listing otherwise."""
    try:
        shared_files.read_shared_file(path)
    except FileNotFoundError:
        return False
    return True
