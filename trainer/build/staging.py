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
from trainer.model.loading import HUB_PATTERNS, weights_directory

COPY_RECORD = "copy.json"
"""Record in a finished copy: its source, and the digests of its files."""
IN_USE = ".in-use"
"""Suffix of the lock file of a copy. Each process that reads the copy holds a shared lock on it."""
CHUNK_BYTES = 16 << 20
STALE_S = 7 * 86400
"""An unused copy is removed this many seconds after its last use: its run was killed and never resumed."""
SPARE_SHARE = 0.02
"""Share of the disk that stays free."""
NOT_COPIED = ("documents.arrow", "audit.html", "audit.json", "datacard.md")
"""Files of prepared data that training reads seldom or never. They are read where they are."""


@dataclass(slots=True)
class Copy:
    """A copy of a directory on this node's disk."""

    content: str
    """`model` or `data`."""
    source: Path
    path: Path
    size: int
    lock: int
    """File descriptor that holds a reader's lock."""


@dataclass(slots=True)
class Staged:
    """The copies that this process reads, by their content: `model` or `data`."""

    copies: dict[str, Copy] = field(default_factory=dict)

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

    def record(self) -> dict[str, Any]:
        """The entry of `run.json` about the copies of this node; empty if there are none."""
        if not self.copies:
            return {}
        rows = {}
        for content, copy in self.copies.items():
            rows[content] = {"from": str(copy.source), "to": str(copy.path), "bytes": copy.size}
        return {"staged": rows}

    def remove(self) -> None:
        """Release the copies when the run is done. The last process of the node that reads a copy deletes it.

        Files that are open stay readable.
        """
        for copy in self.copies.values():
            # An error on the disk of a node is no reason for a finished run to fail.
            with suppress(OSError):
                # The exclusive lock is granted only if nobody else reads the copy.
                fcntl.flock(copy.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy.path)
            os.close(copy.lock)
        self.copies = {}


def stage(config: RunConfig, data: PreparedData, *, should_stop: Callable[[], bool]) -> Staged:
    """Make the copies that `launcher.stage` asks for on this node's disk, or use those that exist.

    `should_stop`: called now and then; True if the run shall stop. Raises ConfigError for a directory with a variable that this
    node does not have, StorageError if the disk has no room or cannot be written, Preempted if `should_stop` says so.
    """
    if config.launcher.stage is None:
        return Staged()
    root = staging_directory(config.launcher.stage)
    files_to_stage = {"model": _weight_files(weights_directory(config.model))}
    if data.has_rows:
        files_to_stage["data"] = _token_files(data.directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root, should_stop):
            copies: dict[str, Copy] = {}
            missing: dict[str, _Files] = {}
            for content, files in files_to_stage.items():
                valid_copy = _valid_copy(root, content, files)
                if valid_copy is None:
                    missing[content] = files
                else:
                    copies[content] = valid_copy
            _make_room(root, config.launcher.stage, missing, keep={copy.path for copy in copies.values()})
            for content, files in missing.items():
                copies[content] = _copy_files(root, content, files, should_stop)
    except OSError as error:
        raise StorageError(
            f"launcher.stage={config.launcher.stage}: {error.filename or root} on {socket.gethostname()}: "
            f"{error.strerror or error}; name a disk of the node that can be written, or leave launcher.stage out"
        ) from error
    return Staged({content: copies[content] for content in files_to_stage})


def staging_directory(setting: str) -> Path:
    """This user's directory below `launcher.stage`, with environment variables expanded on this node. Errors: ConfigError."""
    path = str(Path(os.path.expandvars(setting)).expanduser())
    if "$" in path:
        raise ConfigError(
            f"launcher.stage={setting}: {path} names a variable that is not set on {socket.gethostname()}; name a directory"
        )
    return Path(path) / f"shardtune-{os.getuid()}"


@dataclass(slots=True)
class _Files:
    """Files below a directory, by relative name, and a hash of their names, sizes and times, which changes if they change."""

    source: Path
    names: list[str]
    sizes: dict[str, int] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        stats = {name: (self.source / name).stat() for name in self.names}
        self.sizes = {name: status.st_size for name, status in stats.items()}
        identity = [str(self.source), [[name, status.st_size, status.st_mtime_ns] for name, status in stats.items()]]
        self.key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def size(self) -> int:
        return sum(self.sizes.values())


def _weight_files(source: Path) -> _Files:
    """The files of a model's directory that loading it may read."""
    names: set[str] = set()
    for pattern in HUB_PATTERNS:
        names |= {path.name for path in source.glob(pattern) if path.is_file()}
    return _Files(source, sorted(names))


def _token_files(source: Path) -> _Files:
    """The files of prepared data, without those that training seldom reads."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name not in NOT_COPIED]
    return _Files(source, sorted(path.as_posix() for path in files))


def _valid_copy(root: Path, content: str, files: _Files) -> Copy | None:
    """The existing copy of these files, locked, if every file is as it was written. Else None; a broken copy is deleted."""
    path = root / f"{content}-{files.key[:16]}"
    # Lock it before reading it: a run that removes a copy holds only the exclusive lock on that copy.
    lock = _lock_for_use(path, fcntl.LOCK_SH)
    try:
        recorded_digests = json.loads((path / COPY_RECORD).read_text(encoding="utf-8"))["digests"]
        if recorded_digests == {name: sampled_digest(path / name) for name in files.names}:
            return Copy(content, files.source, path, files.size, lock)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no copy, or a broken one
    os.close(lock)
    if path.exists():
        print(f"{path}: is not as it was copied; it is copied again", file=sys.stderr, flush=True)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _copy_files(root: Path, content: str, files: _Files, should_stop: Callable[[], bool]) -> Copy:
    """Copy files to `root`, compare each with its source, and return the copy, locked. It gets its final name when complete.

    `content`: `model` or `data`. `should_stop`: asked while bytes are copied. Raises OSError, StorageError if a copied file
    differs from its source, and Preempted if `should_stop` says so; an incomplete copy is then deleted.
    """
    path = root / f"{content}-{files.key[:16]}"
    partial = root / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    print(
        f"staging {content} on {socket.gethostname()}: {_gib(files.size)} GiB of {files.source} to {path}",
        file=sys.stderr,
        flush=True,
    )
    try:
        digests = {name: _copy_file(files.source / name, partial / name, should_stop) for name in files.names}
        # `of` names the source for whoever looks at the disk; the digests are checked before the copy is used.
        record = {"of": str(files.source), "bytes": files.size, "digests": digests}
        (partial / COPY_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Copy(content, files.source, path, files.size, _lock_for_use(path, fcntl.LOCK_SH))


def _copy_file(source: Path, target: Path, should_stop: Callable[[], bool]) -> str:
    """Copy a file, and return the sampled digest of both. Errors: OSError, StorageError if they differ, Preempted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        while piece := read.read(CHUNK_BYTES):
            if should_stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            write.write(piece)
    digest = sampled_digest(source)
    if sampled_digest(target) != digest:
        raise StorageError(f"{target}: has not the bytes of {source} that were written there; look after this disk")
    return digest


def _make_room(root: Path, setting: str, missing: dict[str, _Files], *, keep: set[Path]) -> None:
    """Delete unused copies that are stale, and as many others as the `missing` copies need space, the oldest first.

    Unfinished copies are deleted too. Copies in `keep` stay. Raises StorageError, with numbers, if there is still too little
    space.
    """
    needed = sum(files.size for files in missing.values())
    for unfinished in root.glob(".*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for path in sorted(_unused(root, keep), key=_last_used):
        is_stale = time.time() - _last_used(path) > STALE_S
        if not path.exists() or is_stale or _free(root) < needed:
            _remove(path)
    free = _free(root)
    if free >= needed:
        return
    parts = ", ".join(f"{content} {_gib(files.size)}" for content, files in missing.items())
    raise StorageError(
        f"launcher.stage={setting}: {_gib(needed)} GiB are to be copied to {root} on {socket.gethostname()} ({parts}), and "
        f"{_gib(max(0, free))} GiB are free there; free space, name another disk, or leave launcher.stage out"
    )


def _free(root: Path) -> int:
    """Bytes of the disk that copies may still take: free space without SPARE_SHARE of the disk."""
    usage = shutil.disk_usage(root)
    return usage.free - int(SPARE_SHARE * usage.total)


def _unused(root: Path, keep: set[Path]) -> Iterator[Path]:
    """Copies that no process reads, except those in `keep`. Also yields a path of which only the lock file is left."""
    names = {path.name.removesuffix(IN_USE) for path in root.iterdir() if not path.name.startswith(".")}
    for name in names:
        path = root / name
        if path not in keep:
            with suppress(OSError):  # a process that reads it holds the lock
                os.close(_lock_for_use(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
                yield path


def _last_used(path: Path) -> float:
    """When a copy was last used, as the modification time of its lock file in seconds since the epoch; 0 without that file."""
    try:
        return Path(f"{path}{IN_USE}").stat().st_mtime
    except OSError:
        return 0.0


def _lock_for_use(path: Path, mode: int) -> int:
    """Lock a copy; returns the file descriptor that holds the lock until it is closed or the process ends.

    `mode`: of `fcntl.flock`: LOCK_SH to read the copy, LOCK_EX | LOCK_NB to delete it. Errors: OSError, also if others hold the
    lock and `mode` does not wait.
    """
    descriptor = os.open(f"{path}{IN_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode)
        is_reader = not mode & fcntl.LOCK_NB
        if is_reader:
            os.utime(descriptor)  # the time of the last use, for `_last_used`
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    """Delete a copy and its lock file. The caller must be in `_locked`, so that no process begins to use the copy meanwhile."""
    shutil.rmtree(path, ignore_errors=True)
    Path(f"{path}{IN_USE}").unlink(missing_ok=True)


@contextmanager
def _locked(root: Path, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Inside the context this is the only process of the node that stages. Raises Preempted if it must stop while it waits."""
    with (root / ".lock").open("a", encoding="utf-8") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if should_stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            time.sleep(0.05)
        yield


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
