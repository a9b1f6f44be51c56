"""Who owns a run directory: one attempt at a time, on any host, on NFS and Lustre, whatever the clocks say.

`lease/000007.json` is the seventh attempt's claim, made by a link that only one can make. While the attempt lives it counts
in `000007.beat`; when it ends it leaves `000007.over`. Another attempt claims the next number where the last one is over,
is a process of this host that is gone, is an earlier start of the same SLURM job, or has not counted on for `patience_s` of
the observer's own clock; it then removes the old claim, so that its owner, should it still live, finds out when it looks.

What cannot be had: no file system refuses a write that comes late. An owner looks before it publishes (`check`), and a write
that began before that, in the very moment of a takeover, can still land.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies import atomic_io, shared_files
from strategies.errors import ConfigError, NotOurs, Preempted, StorageError

CLAIM = re.compile(r"(\d{6})\.json")
BEATS = 12
"""Signs of life within the time after which an owner is taken for dead."""
REMOVAL_S = 2.0
"""Seconds after which a directory is looked at again that seems to be in removal: claims in it would only hinder `rm`."""
SILENT = "SHARDTUNE_SILENT"
"""Environment variable with the last sign of life of an owner that was watched in vain: ranks need not watch it again."""


class InUse(NotOurs, ConfigError):
    """Another attempt owned it from the start."""


class LeaseLost(NotOurs, StorageError):
    """Another attempt took it over, or it was deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """What a claim says of the attempt that made it."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process: str = ""
    """Identity of the process on its host: boot, namespace of process ids, start in ticks; no clock is in it."""
    job: str | None = None
    task: str | None = None
    """Array and task of the job, as scancel takes it."""
    restart: int = 0
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    """Local time, to be read by people."""
    beat_s: float = 10.0

    def describe(self) -> str:
        """For a message."""
        start = f", start {self.restart}" if self.restart else ""
        job = f", SLURM job {self.task or self.job}{start}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process(patience_s: float) -> Owner:
    """The claim of this process."""
    job = os.environ.get("SLURM_JOB_ID")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if job and array else None
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    identity = process_identity(os.getpid())
    return Owner(process=identity, job=job, task=task, restart=restart, beat_s=patience_s / BEATS)


def process_identity(pid: int) -> str:
    """`boot/namespace/start`: equal only for the same process of the same start of this host; empty where it is gone."""
    if sys.platform != "linux":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        # The name in brackets may hold blanks; a zombie holds nothing any more.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return "" if state in "ZX" else f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{fields[18]}"  # noqa: PTH116
    except (OSError, IndexError):
        return ""


class Lease:
    """A run directory that this process owns; rank 0 holds it for its run. Use as a context, or `release` it."""

    def __init__(
        self,
        run_dir: Path,
        number: int,
        owner: Owner,
        on_loss: Callable[[], None],
        on_move: Callable[[Path], None] = lambda home: None,
    ) -> None:
        """Errors: OSError if the directory cannot be opened."""
        self.home = run_dir
        """Where the run directory is now."""
        self.number, self.owner = number, owner
        self._on_loss, self._on_move, self._over = on_loss, on_move, threading.Event()
        self._opened = atomic_io.OpenDirectory(run_dir)
        self._looking = threading.Lock()
        self._lost: str | None = None
        self._beaten_at = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_dir: Path,
        patience_s: float,
        *,
        stop: Callable[[], bool] = lambda: False,
        on_loss: Callable[[], None] = lambda: None,
        on_move: Callable[[Path], None] = lambda home: None,
    ) -> Lease:
        """Claim the directory. Waits up to `patience_s` where only time tells whether the last owner lives.

        `on_loss` is called, by another thread, when the directory is found to be another attempt's or deleted; `on_move`, by any
        thread, with its new path when it was renamed. Raises InUse naming the owner that lives, Preempted where `stop` says so,
        StorageError where the directory cannot be written.
        """
        mine, directory = this_process(patience_s), run_dir / "lease"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while True:
                number, _ = latest(directory)  # before the look: whoever claims after it must find its number taken
                refuse_in_use(run_dir, patience_s, stop)
                if not shared_files.claim(_claim(directory, number + 1), _bytes(asdict(mine)), mine.token):
                    continue  # somebody was faster, or this host's view of the directory is old: look again
                if latest(directory)[0] == number + 1:
                    break
                _claim(directory, number + 1).unlink(missing_ok=True)  # the name was free since a later claim is there
            for name in atomic_io.disk.names(directory):
                if name[:6].isdigit() and int(name[:6]) <= number:
                    (directory / name).unlink(missing_ok=True)
            return cls(run_dir, number + 1, mine, on_loss, on_move)
        except OSError as error:
            raise StorageError(
                f"{directory}: cannot be written ({error.strerror or error}); {shared_files.remedy(error)}set run.dir"
            ) from error

    @property
    def directory(self) -> Path:
        """Where claims lie."""
        return self.home / "lease"

    def check(self) -> None:
        """Raise LeaseLost where another attempt took over; opens the claim again. To be asked before anything is published."""
        if self._lost is None:
            self._lost = self._look()
        if self._lost is not None:
            raise LeaseLost(f"run.dir={self.home}: {self._lost}; this attempt ends and writes nothing more")

    def release(self) -> None:
        """Say that this attempt is over, so that the next need not wait."""
        self._over.set()
        self._thread.join()
        if self._lost is None and self._look() is None:
            with suppress(OSError):  # the next attempt waits, or sees that this process is gone
                shared_files.replace(self.directory / f"{self.number:06d}.over", b"{}", self.owner.token)
        self._opened.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _look(self) -> str | None:
        """What says that the directory is not this attempt's any more; makes a claim again that nobody took."""
        try:
            with self._looking:
                return self._superseded()
        except OSError as error:
            silent = time.monotonic() - self._beaten_at
            limit = self.owner.beat_s * BEATS
            return f"unreadable for {silent:.0f} s ({error.strerror})" if silent > limit else None

    def _superseded(self) -> str | None:
        number, owner = latest(self.directory)
        if self._claim_is_here():
            return f"{owner.describe()} took it over" if number > self.number and owner is not None else None
        home = self._find_home()
        if home is None:
            return "the directory was deleted"
        if home != self.home:
            print(f"{self.home}: the directory was renamed to {home}", flush=True)
            self.home = home
            self._on_move(home)
            number, owner = latest(self.directory)
            if number == self.number and self._claim_is_here():
                return None
        return self._claim_again(number, owner)

    def _claim_is_here(self) -> bool:
        try:
            claim = json.loads(shared_files.read(_claim(self.directory, self.number)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False
        return isinstance(claim, dict) and claim.get("token") == self.owner.token

    def _find_home(self) -> Path | None:
        home = self._opened.find()
        if home is not None and not (home / "config.yaml").exists():  # `rm -r` may be at work
            atomic_io.disk.sleep(REMOVAL_S)
            home = self._opened.find()
        return home

    def _claim_again(self, number: int, owner: Owner | None) -> str | None:
        """Why the directory, which lacks this attempt's claim, is another one's; None after the claim was made again."""
        if owner is not None and owner.token == self.owner.token:
            return None  # the claim was read a moment ago: only the second look failed
        content = _bytes(asdict(self.owner))
        torn = owner is not None and owner.token == ""
        if number == self.number and torn:
            shared_files.replace(_claim(self.directory, number), content, self.owner.token)
            return None
        if number > self.number and owner is None:
            return "another attempt took it over"
        if number and owner is not None and not torn and lives_here(owner, self.owner) is not False:
            return f"{owner.describe()} took it over"
        self.directory.mkdir(exist_ok=True)
        if not shared_files.claim(_claim(self.directory, self.number), content, self.owner.token):
            return "another attempt took it over"
        print(f"{self.directory}: was emptied by somebody; the run's claim is made again", flush=True)
        return None

    def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            try:
                shared_files.replace(_beats(self.directory, self.number), b"%d" % count, self.owner.token)
                self._beaten_at = time.monotonic()
            except OSError as error:
                # As long as others cannot take this attempt for dead, a file system that stumbles is waited for.
                if time.monotonic() - self._beaten_at > self.owner.beat_s * (BEATS - 2):
                    self._lost = f"no sign of life could be written for too long ({error.strerror or error})"
            self._lost = self._lost or self._look()
            if self._lost is not None:
                self._on_loss()
                return
            if self._over.wait(self.owner.beat_s):
                return


def latest(directory: Path) -> tuple[int, Owner | None]:
    """The newest claim: its number (0 where there is none) and its owner, None where it is over or cannot be read."""
    try:
        names = atomic_io.disk.names(directory)
    except (FileNotFoundError, NotADirectoryError):
        return 0, None
    numbers = [int(found[1]) for name in names if (found := CLAIM.fullmatch(name))]
    number = max(numbers, default=0)
    # A listing may be old: the names after it are asked for, too.
    owner = _read(directory, number) if number else None
    while (later := _read(directory, number + 1)) is not None:
        number, owner = number + 1, later
    if f"{number:06d}.over" in names or _exists(directory / f"{number:06d}.over"):
        return number, None
    return number, owner


def refuse_in_use(run_dir: Path, patience_s: float, stop: Callable[[], bool] = lambda: False) -> None:
    """Raise InUse where an attempt that lives owns the directory, and as `living_owner` does; StorageError for its disk."""
    try:
        living = living_owner(run_dir, patience_s, stop)
    except OSError as error:
        raise StorageError(f"{run_dir / 'lease'}: cannot be read ({error.strerror or error}); set run.dir") from error
    if living:
        raise InUse(f"run.dir={run_dir}: {living}; stop it, or choose another run.dir")


def living_owner(run_dir: Path, patience_s: float, stop: Callable[[], bool] = lambda: False) -> str | None:
    """Who owns the directory and lives, for a message; None where it may be claimed. To know it may take `patience_s`.

    Raises Preempted where `stop` says so while it waits.
    """
    directory, mine = run_dir / "lease", this_process(patience_s)
    number, owner = latest(directory)
    if owner is None or (owner.job and owner.job == mine.job and owner.restart < mine.restart):
        return None
    if (lives := lives_here(owner, mine)) is not None:
        return f"{owner.describe()}, is running it" if lives else None
    first = _read_beat(directory, number)
    if (
        os.environ.get(SILENT) == f"{owner.token}:{first}"
    ):  # watched already, by this process or the one that started it
        return None
    wait_s = max(patience_s, 3 * owner.beat_s)
    print(
        f"{run_dir}: {owner.describe()}, left no word of its end; watching for a sign of life, up to {wait_s:.0f} s",
        flush=True,
    )
    began = time.monotonic()
    while time.monotonic() - began < wait_s:
        if stop():
            raise Preempted("asked to stop while waiting for the run directory; nothing was begun")
        time.sleep(min(1.0, owner.beat_s))
        newest, still = latest(directory)
        if newest != number or still is None:  # taken by somebody else, or over
            return living_owner(run_dir, patience_s, stop)
        if _read_beat(directory, number) != first:
            return f"{owner.describe()}, is running it"
    os.environ[SILENT] = f"{owner.token}:{first}"
    return None


def lives_here(owner: Owner, mine: Owner) -> bool | None:
    """Whether the owner is a process of this host that lives; None where this host cannot tell."""
    its, here = owner.process.split("/"), mine.process.split("/")
    if len(its) != 3 or its[:2] != here[:2]:  # another host, another start of it, or a container
        return None
    found = process_identity(owner.pid)
    return None if not found and _hidden(owner.pid) else found == owner.process


def _hidden(pid: int) -> bool:
    """Whether a process is another user's, which /proc may not show at all (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def other_owner(run_dir: Path) -> str | None:
    """Who may own the directory now that this host's attempt has ended; without waiting."""
    _, owner = latest(run_dir / "lease")
    return None if owner is None or lives_here(owner, this_process(1)) is False else owner.describe()


def _claim(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.json"


def _beats(directory: Path, number: int) -> Path:
    return directory / f"{number:06d}.beat"


def _bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


def _read(directory: Path, number: int) -> Owner | None:
    try:
        owner = Owner(**json.loads(shared_files.read(_claim(directory, number))))
        # The number stands in a command that is to be pasted: in somebody else's run it can be any text.
        if type(owner.pid) is not int or not isinstance(owner.beat_s, int | float):
            raise TypeError("no number")
        return owner
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # torn by a crash of its host: nobody's
        return Owner(token="", host="an unknown host", pid=0, since="an unknown time")


def _read_beat(directory: Path, number: int) -> str | None:
    try:
        return shared_files.read(_beats(directory, number)).decode()
    except OSError:
        return None


def _exists(path: Path) -> bool:
    try:
        shared_files.read(path)
    except FileNotFoundError:
        return False
    return True
