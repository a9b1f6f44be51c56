"""The directory in which a checkpoint is written until it is complete. An error of one rank there is raised on all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import make_directories, reason, write_new
from strategies.errors import StorageError
from strategies.runtime import Runtime, first_error


def open_aside(aside: Path, runtime: Runtime, look: Callable[[Path], None] = lambda aside: None) -> None:
    """Make the empty directory, in which `look` is to find nothing wrong. All ranks must call. Errors: StorageError on all."""

    def make() -> None:
        if aside.exists():
            atomic_io.disk.remove_tree(aside)
        make_directories(aside)

    on_main(make, aside, runtime)
    error: StorageError | None = None
    try:
        look(aside)
    except StorageError as caught:
        error = caught
    agree(error, aside, runtime)


def on_main(do: Callable[[], None], aside: Path, runtime: Runtime) -> None:
    """`do` on rank 0. All ranks must call. Errors: StorageError on all, where it raised OSError."""
    error: BaseException | None = None
    try:
        if runtime.is_main:
            do()
    except OSError as caught:
        error = caught
    agree(error, aside, runtime)


def agree(error: BaseException | None, aside: Path, runtime: Runtime) -> None:
    """Raise on every rank, the cause first, what any rank met; nothing half-written stays. All ranks must call."""
    told = None if error is None else str(error) if isinstance(error, StorageError) else reason(error)
    message = first_error(None if told is None else StorageError(told), runtime)
    if message is None:
        return
    if runtime.is_main:
        with suppress(OSError):
            atomic_io.disk.remove_tree(aside)
    cause = message.split("StorageError: ", 1)[1]
    step = aside.name.removeprefix(".").removesuffix(".writing")
    raise StorageError(
        f"{cause}; checkpoint {step} was not written in {aside.parent}; free space or choose another disk"
    )


def fallback_problem(places: list[Path], given: str | None, say: Callable[[str], None]) -> StorageError | None:
    """Why `checkpoint.fallback_dir` could take no checkpoint, before one is needed there; one that is full may be emptied."""
    for place in places:
        trial = place / f".{place.name}.trial"
        try:
            make_directories(place)
            write_new(trial, b"\n")
            trial.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return StorageError(
                    f"checkpoint.fallback_dir={given}: cannot be written ({reason(error)}); give a directory on another disk "
                    "that this user can write, or null"
                )
            say(f"warning: checkpoint.fallback_dir={given}: {reason(error)}")
    return None
