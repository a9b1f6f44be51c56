"""The staging directory, in which a checkpoint is written until it is complete. An error of one rank is raised on all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from strategies import atomic_io
from strategies.atomic_io import error_summary, make_directories, write_new_file
from strategies.errors import StorageError
from strategies.runtime import Runtime, first_rank_error


def create_staging_dir(
    staging_dir: Path, runtime: Runtime, check_room: Callable[[Path], None] = lambda staging_dir: None
) -> None:
    """Create the empty directory `staging_dir`, in which a checkpoint is written before it gets its name. All ranks must call.

    An old directory of that name, from a write that was cut short, is deleted. `check_room`: called on every rank with the new
    directory; raises StorageError if the disk has no room for the checkpoint.

    Raises StorageError on every rank, or on none: if rank 0 could not create the directory, or `check_room` failed on any rank.
    """

    def create_empty() -> None:
        if staging_dir.exists():
            atomic_io.disk.remove_tree(staging_dir)
        make_directories(staging_dir)

    run_on_rank_0(create_empty, staging_dir, runtime)
    error: StorageError | None = None
    try:
        check_room(staging_dir)
    except StorageError as caught:
        error = caught
    raise_if_any_rank_failed(error, staging_dir, runtime)


def run_on_rank_0(function: Callable[[], None], staging_dir: Path, runtime: Runtime) -> None:
    """Call `function` on rank 0 alone, and let all ranks learn whether it failed, so that none goes on with a broken checkpoint.

    `staging_dir`: the directory of the unfinished checkpoint, into which it writes. All ranks must call. Raises StorageError
    on every rank if `function` raised OSError.
    """
    error: BaseException | None = None
    try:
        if runtime.is_main:
            function()
    except OSError as caught:
        error = caught
    raise_if_any_rank_failed(error, staging_dir, runtime)


def raise_if_any_rank_failed(error: BaseException | None, staging_dir: Path, runtime: Runtime) -> None:
    """Give up an unfinished checkpoint if any rank failed: rank 0 removes its directory, and every rank raises StorageError.

    Returns if no rank failed. `error`: what went wrong on this rank; None if nothing. `staging_dir`: the directory, such as
    `checkpoints/.step-000040.writing`. All ranks must call.
    """
    own_error = None
    if isinstance(error, StorageError):
        own_error = StorageError(str(error))
    elif error is not None:
        own_error = StorageError(error_summary(error))
    failure = first_rank_error(own_error, runtime)
    if failure is None:
        return
    if runtime.is_main:
        with suppress(OSError):
            atomic_io.disk.remove_tree(staging_dir)
    step = staging_dir.name.removeprefix(".").removesuffix(".writing")
    raise StorageError(
        f"{failure.text}; checkpoint {step} was not written in {staging_dir.parent}; free space or choose another disk"
    )


def probe_fallback_dir(
    checkpoint_dirs: list[Path], fallback_dir: str | None, print_line: Callable[[str], None]
) -> StorageError | None:
    """Find out at the start, by writing a small file, whether checkpoints can be written into `checkpoint.fallback_dir`.

    Returns the error to raise if they cannot; None if they can, or without such a directory. A full disk is only a warning: it
    may have room when it is needed. `checkpoint_dirs`: the run's own directories in it, one or none. `fallback_dir`: the setting,
    for messages.
    """
    for checkpoint_dir in checkpoint_dirs:
        probe = checkpoint_dir / f".{checkpoint_dir.name}.trial"
        try:
            make_directories(checkpoint_dir)
            write_new_file(probe, b"\n")
            probe.unlink()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                return StorageError(
                    f"checkpoint.fallback_dir={fallback_dir}: cannot be written ({error_summary(error)}); give a directory on "
                    "another disk that this user can write, or null"
                )
            print_line(f"warning: checkpoint.fallback_dir={fallback_dir}: {error_summary(error)}")
    return None
