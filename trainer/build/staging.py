"""`launcher.stage`: copies weights and tokens from slow storage to a disk of the node.

All ranks must call, but nothing communicates. The first rank of a node copies, and the others wait for a lock on that disk. The
name of a copy comes from its source (path, names, sizes, modification times). A copy is verified when it is made and when it is
used. It stays while a run needs it or may be resumed, and is removed when its last run is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, Preempted, StorageError
from strategies.file_fingerprints import sampled_digest
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import TokenDataset
from trainer.model.loading import HUB_PATTERNS, find_weights_directory

COPY_RECORD_FILE = "copy.json"
"""Record in a finished copy: its source, and the digests of its files."""
IN_USE_SUFFIX = ".in-use"
"""Suffix of the lock file of a copy. Each process that reads the copy holds a shared lock on it."""
CHUNK_BYTES = 16 << 20
"""Bytes that are copied at a time, between two looks at whether the run shall stop: 16 MiB."""
STALE_AFTER_S = 7 * 86400
"""An unused copy is removed this many seconds after its last use: its run was killed and never resumed."""
SPARE_SHARE = 0.02
"""Share of the disk that stays free."""
NOT_COPIED_FILES = ("documents.arrow", "audit.html", "audit.json", "datacard.md")
"""Files of prepared data that training reads seldom or never. They are read where they are."""


@dataclass(slots=True)
class StagedCopy:
    """A copy of a directory on this node's disk."""

    content_kind: str
    """`model` or `data`."""
    source: Path
    path: Path
    num_bytes: int
    lock_descriptor: int
    """File descriptor that holds a reader's lock on the copy until it is closed."""


@dataclass(slots=True)
class StagedCopies:
    """The copies that this process reads, by their content: `model` or `data`."""

    copies: dict[str, StagedCopy] = field(default_factory=dict)

    def with_local_model(self, config: RunConfig) -> RunConfig:
        """The configuration with the model's path here, for code that reads weights. Records of the run keep the given path."""
        if "model" not in self.copies:
            return config
        return replace(config, model=replace(config.model, path=str(self.copies["model"].path)))

    def with_local_tokens(self, data: PreparedData) -> PreparedData:
        """The data with its tokens read from the copy."""
        if "data" not in self.copies:
            return data
        directory = self.copies["data"].path
        held_out = TokenDataset.open(directory / "eval") if data.evaluation is not None else None
        test = TokenDataset.open(directory / "test") if data.test is not None else None
        return replace(data, train=TokenDataset.open(directory / "train"), evaluation=held_out, test=test)

    def run_record_entry(self) -> dict[str, Any]:
        """The entry of `run.json` about the copies of this node, `{"staged": {"model": {"from": ...}}}`; {} if there are none."""
        if not self.copies:
            return {}
        rows = {}
        for content_kind, copy in self.copies.items():
            rows[content_kind] = {"from": str(copy.source), "to": str(copy.path), "bytes": copy.num_bytes}
        return {"staged": rows}

    def release(self) -> None:
        """Release the copies when the run is done. The last process of the node that reads a copy deletes it.

        Files that are open stay readable.
        """
        for copy in self.copies.values():
            # An error on the disk of a node is no reason for a finished run to fail.
            with suppress(OSError):
                # The exclusive lock is granted only if nobody else reads the copy.
                fcntl.flock(copy.lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy.path)
            os.close(copy.lock_descriptor)
        self.copies = {}


def stage(config: RunConfig, data: PreparedData, *, should_stop: Callable[[], bool]) -> StagedCopies:
    """Copy a run's weights and tokens to this node's disk if `launcher.stage` asks for it, or use copies that exist there.

    All ranks call it at their start; one of a node copies, the others wait. `should_stop`: called now and then; True if the run
    shall stop. Without `launcher.stage` the result is empty, and everything is read where it is.

    Raises ConfigError for a directory with a variable that this node does not have, StorageError if the disk has no room or
    cannot be written, Preempted if `should_stop` says so.
    """
    if config.launcher.stage is None:
        return StagedCopies()
    root = staging_directory(config.launcher.stage)
    files_to_stage = {"model": _weight_files(find_weights_directory(config.model))}
    if data.has_rows:
        files_to_stage["data"] = _token_files(data.directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _staging_lock(root, should_stop):
            copies: dict[str, StagedCopy] = {}
            missing: dict[str, _SourceFiles] = {}
            for content_kind, files in files_to_stage.items():
                valid_copy = _find_valid_copy(root, content_kind, files)
                if valid_copy is None:
                    missing[content_kind] = files
                else:
                    copies[content_kind] = valid_copy
            paths_to_keep = {copy.path for copy in copies.values()}
            _free_space_for_copies(root, config.launcher.stage, missing, paths_to_keep)
            for content_kind, files in missing.items():
                copies[content_kind] = _copy_files(root, content_kind, files, should_stop)
    except OSError as error:
        raise StorageError(
            f"launcher.stage={config.launcher.stage}: {error.filename or root} on {socket.gethostname()}: "
            f"{error.strerror or error}; name a disk of the node that can be written, or leave launcher.stage out"
        ) from error
    return StagedCopies({content_kind: copies[content_kind] for content_kind in files_to_stage})


def staging_directory(setting: str) -> Path:
    """This user's directory below `launcher.stage`, with environment variables expanded on this node. Errors: ConfigError."""
    path = str(Path(os.path.expandvars(setting)).expanduser())
    if "$" in path:
        raise ConfigError(
            f"launcher.stage={setting}: {path} names a variable that is not set on {socket.gethostname()}; name a directory"
        )
    return Path(path) / f"shardtune-{os.getuid()}"


@dataclass(slots=True)
class _SourceFiles:
    """Files below a directory, by relative name, and a hash of their names, sizes and times, which changes if they change."""

    source: Path
    names: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    identity_hash: str = ""

    def __post_init__(self) -> None:
        stats = {name: (self.source / name).stat() for name in self.names}
        self.sizes = {name: status.st_size for name, status in stats.items()}
        identity = [str(self.source), [[name, status.st_size, status.st_mtime_ns] for name, status in stats.items()]]
        self.identity_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())


def _weight_files(source: Path) -> _SourceFiles:
    """The files of a model's directory that loading it may read."""
    names: set[str] = set()
    for pattern in HUB_PATTERNS:
        names |= {path.name for path in source.glob(pattern) if path.is_file()}
    return _SourceFiles(source, sorted(names))


def _token_files(source: Path) -> _SourceFiles:
    """The files of prepared data to copy: all but those that training seldom reads."""
    files = [
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name not in NOT_COPIED_FILES
    ]
    return _SourceFiles(source, sorted(path.as_posix() for path in files))


def _find_valid_copy(root: Path, content_kind: str, files: _SourceFiles) -> StagedCopy | None:
    """Look for a complete copy of these files on the node's disk: returns it, locked for reading, or None.

    Deletes a broken one. It is valid if every file has the digest that was recorded when it was written. `root`: directory of
    all copies. `content_kind`: `model` or `data`. The caller must hold `_staging_lock`. `StagedCopies.release` closes the
    descriptor of the lock.
    """
    path = root / f"{content_kind}-{files.identity_hash[:16]}"
    # Lock the copy before reading it: a run that ends deletes a copy under its exclusive lock, without the lock on `root`.
    lock_descriptor = _lock_for_use(path, fcntl.LOCK_SH)
    try:
        recorded_digests = json.loads((path / COPY_RECORD_FILE).read_text(encoding="utf-8"))["digests"]
        if recorded_digests == {name: sampled_digest(path / name) for name in files.names}:
            return StagedCopy(
                content_kind, files.source, path, num_bytes=files.num_bytes, lock_descriptor=lock_descriptor
            )
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no copy, or a broken one
    os.close(lock_descriptor)
    # Whoever calls this is the only process of the node that stages, so nobody begins to use the broken copy meanwhile.
    if path.exists():
        print(f"{path}: is not as it was copied; it is copied again", file=sys.stderr, flush=True)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _copy_files(root: Path, content_kind: str, files: _SourceFiles, should_stop: Callable[[], bool]) -> StagedCopy:
    """Copy files to `root`, compare each with its source, and return the copy, locked. It gets its final name when complete.

    `content_kind`: `model` or `data`. The lock tells other processes that the copy is in use. The caller must hold
    `_staging_lock`. `should_stop`: asked while bytes are copied.

    Raises OSError, StorageError if a copied file differs from its source, and Preempted if `should_stop` says so; an incomplete
    copy is then deleted.
    """
    path = root / f"{content_kind}-{files.identity_hash[:16]}"
    partial = root / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    print(
        f"staging {content_kind} on {socket.gethostname()}: {_as_gib(files.num_bytes)} GiB of {files.source} to {path}",
        file=sys.stderr,
        flush=True,
    )
    try:
        digests = {name: _copy_file(files.source / name, partial / name, should_stop) for name in files.names}
        # `of` names the source for whoever looks at the disk; the digests are compared whenever the copy is used.
        record = {"of": str(files.source), "bytes": files.num_bytes, "digests": digests}
        (partial / COPY_RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    lock_descriptor = _lock_for_use(path, fcntl.LOCK_SH)
    return StagedCopy(content_kind, files.source, path, num_bytes=files.num_bytes, lock_descriptor=lock_descriptor)


def _copy_file(source: Path, target: Path, should_stop: Callable[[], bool]) -> str:
    """Copy a file, and return the sampled digest of both, by which later runs recognise an intact copy.

    Raises OSError, StorageError if the two differ, and Preempted if `should_stop` says so.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as source_file, target.open("wb") as target_file:
        while chunk := source_file.read(CHUNK_BYTES):
            if should_stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            target_file.write(chunk)
    digest = sampled_digest(source)
    if sampled_digest(target) != digest:
        raise StorageError(f"{target}: has not the bytes of {source} that were written there; look after this disk")
    return digest


def _free_space_for_copies(
    root: Path, setting: str, missing: dict[str, _SourceFiles], paths_to_keep: set[Path]
) -> None:
    """Make room on the node's disk: delete unused copies that are stale, and as many others as are needed, the oldest first.

    `missing`: the files to copy, under `model` and `data`. `setting`: `launcher.stage`, for the message. Unfinished copies are
    deleted too, and lock files without a copy. Raises StorageError, with numbers, if there is still too little space.
    """
    needed = sum(files.num_bytes for files in missing.values())
    for unfinished in root.glob(".*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in sorted(_unused_copies(root, paths_to_keep), key=_last_use_time):
        is_lock_file_alone = not path.exists()
        is_stale = time.time() - _last_use_time(path) > STALE_AFTER_S
        if is_lock_file_alone or is_stale or _free_bytes(root) < needed:
            _remove_copy(path)
    free = _free_bytes(root)
    if free >= needed:
        return
    sizes_text = ", ".join(f"{content_kind} {_as_gib(files.num_bytes)}" for content_kind, files in missing.items())
    raise StorageError(
        f"launcher.stage={setting}: {_as_gib(needed)} GiB are to be copied to {root} on "
        f"{socket.gethostname()} ({sizes_text}), and "
        f"{_as_gib(max(0, free))} GiB are free there; free space, name another disk, or leave launcher.stage out"
    )


def _free_bytes(root: Path) -> int:
    """Bytes of the disk that copies may still take: free space without SPARE_SHARE of the disk."""
    usage = shutil.disk_usage(root)
    return usage.free - int(SPARE_SHARE * usage.total)


def _unused_copies(root: Path, paths_to_keep: set[Path]) -> Iterator[Path]:
    """Copies that no process reads, except those to keep. Also yields a path of which only the lock file is left."""
    names = {path.name.removesuffix(IN_USE_SUFFIX) for path in root.iterdir() if not path.name.startswith(".")}
    for name in names:
        path = root / name
        if path not in paths_to_keep:
            with suppress(OSError):  # a process that reads it holds the lock
                os.close(_lock_for_use(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
                yield path


def _last_use_time(path: Path) -> float:
    """When a copy was last used, as the modification time of its lock file in seconds since the epoch; 0 without that file."""
    try:
        return Path(f"{path}{IN_USE_SUFFIX}").stat().st_mtime
    except OSError:
        return 0.0


def _lock_for_use(path: Path, mode: int) -> int:
    """Lock a copy; returns the file descriptor that holds the lock until it is closed or the process ends.

    `mode`: of `fcntl.flock`: LOCK_SH to read the copy, LOCK_EX | LOCK_NB to delete it. Raises OSError, also if others hold the
    lock and `mode` does not wait.
    """
    descriptor = os.open(f"{path}{IN_USE_SUFFIX}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode)
        is_reader = not mode & fcntl.LOCK_NB
        if is_reader:
            os.utime(descriptor)  # the time of the last use, for `_last_use_time`
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_copy(path: Path) -> None:
    """Delete a copy and its lock file.

    The caller must hold `_staging_lock`, so that no process begins to use the copy meanwhile.
    """
    shutil.rmtree(path, ignore_errors=True)
    Path(f"{path}{IN_USE_SUFFIX}").unlink(missing_ok=True)


@contextmanager
def _staging_lock(root: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Wait for the lock on `root`: within the context this is the only process of the node that looks for copies or makes them.

    A run that ends deletes its copies without this lock (`StagedCopies.release`). Raises Preempted if `should_stop` says so
    while it waits.
    """
    with (root / ".lock").open("a", encoding="utf-8") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if should_stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            time.sleep(0.05)
        yield


def _as_gib(size: float) -> str:
    """A number of bytes in GiB, with two decimals."""
    return f"{size / 2**30:.2f}"
