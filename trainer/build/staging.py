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

    what: str
    source: Path
    path: Path
    size: int
    lock: int
    """Descriptor that holds the lock of a reader."""


@dataclass(slots=True)
class Staged:
    """The copies that this process reads, by what they are of: `model`, `data`."""

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
        place = self.copies["data"].path
        held_out = TokenDataset.open(place / "eval") if data.evaluation is not None else None
        test = TokenDataset.open(place / "test") if data.test is not None else None
        return replace(data, train=TokenDataset.open(place / "train"), evaluation=held_out, test=test)

    def record(self) -> dict[str, Any]:
        """The entry of `run.json` about the copies of this node; empty if there are none."""
        if not self.copies:
            return {}
        rows = {}
        for what, copy in self.copies.items():
            rows[what] = {"from": str(copy.source), "to": str(copy.path), "bytes": copy.size}
        return {"staged": rows}

    def remove(self) -> None:
        """Called when the run is done. The last process of the node that reads a copy removes it. Open files stay readable."""
        for copy in self.copies.values():
            # An error on the disk of a node is no reason for a finished run to fail.
            with suppress(OSError):
                # The exclusive lock is granted only if nobody else reads the copy.
                fcntl.flock(copy.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy.path)
            os.close(copy.lock)
        self.copies = {}


def stage(config: RunConfig, data: PreparedData, *, stop: Callable[[], bool]) -> Staged:
    """Make the copies that `launcher.stage` asks for, or use those that are there. `stop`: called now and then, whether to stop.

    Errors: ConfigError for a directory with a variable that this node does not have, StorageError if the disk has no room or
    cannot be written, Preempted if `stop` says so.
    """
    if config.launcher.stage is None:
        return Staged()
    root = place_of(config.launcher.stage)
    wanted_files = {"model": _weights(weights_directory(config.model))}
    if data.has_rows:
        wanted_files["data"] = _tokens(data.directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root, stop):
            copies: dict[str, Copy] = {}
            missing: dict[str, _Files] = {}
            for what, files in wanted_files.items():
                valid_copy = _valid_copy(root, what, files)
                if valid_copy is None:
                    missing[what] = files
                else:
                    copies[what] = valid_copy
            _make_room(root, config.launcher.stage, missing, keep={copy.path for copy in copies.values()})
            for what, files in missing.items():
                copies[what] = _copy(root, what, files, stop)
    except OSError as error:
        raise StorageError(
            f"launcher.stage={config.launcher.stage}: {error.filename or root} on {socket.gethostname()}: "
            f"{error.strerror or error}; name a disk of the node that can be written, or leave launcher.stage out"
        ) from error
    return Staged({what: copies[what] for what in wanted_files})


def place_of(text: str) -> Path:
    """The directory of this user on this node's disk. Variables in `text` are those of the node. Errors: ConfigError."""
    path = str(Path(os.path.expandvars(text)).expanduser())
    if "$" in path:
        raise ConfigError(
            f"launcher.stage={text}: {path} names a variable that is not set on {socket.gethostname()}; name a directory"
        )
    return Path(path) / f"shardtune-{os.getuid()}"


@dataclass(slots=True)
class _Files:
    """Files below a directory, by relative name, and a key that changes with them."""

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


def _weights(source: Path) -> _Files:
    names: set[str] = set()
    for pattern in HUB_PATTERNS:
        names |= {path.name for path in source.glob(pattern) if path.is_file()}
    return _Files(source, sorted(names))


def _tokens(source: Path) -> _Files:
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name not in NOT_COPIED]
    return _Files(source, sorted(path.as_posix() for path in files))


def _valid_copy(root: Path, what: str, files: _Files) -> Copy | None:
    """The copy that was made before, if every file of it is as it was written. A broken one is removed; then None."""
    path = root / f"{what}-{files.key[:16]}"
    # Locked before it is looked at: a run that removes it holds no other lock.
    use = _lock_for_use(path, fcntl.LOCK_SH)
    try:
        written = json.loads((path / COPY_RECORD).read_text(encoding="utf-8"))["digests"]
        if written == {name: sampled_digest(path / name) for name in files.names}:
            return Copy(what, files.source, path, files.size, use)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    os.close(use)
    if path.exists():
        print(f"{path}: is not as it was copied; it is copied again", file=sys.stderr, flush=True)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _copy(root: Path, what: str, files: _Files, stop: Callable[[], bool]) -> Copy:
    """Make a copy, and compare it with its source. Errors: OSError, StorageError, Preempted."""
    path = root / f"{what}-{files.key[:16]}"
    partial = root / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    print(
        f"staging {what} on {socket.gethostname()}: {_gib(files.size)} GiB of {files.source} to {path}",
        file=sys.stderr,
        flush=True,
    )
    try:
        digests = {name: _copy_file(files.source / name, partial / name, stop) for name in files.names}
        record = {"of": str(files.source), "bytes": files.size, "digests": digests}
        (partial / COPY_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Copy(what, files.source, path, files.size, _lock_for_use(path, fcntl.LOCK_SH))


def _copy_file(source: Path, target: Path, stop: Callable[[], bool]) -> str:
    """Copy a file, and return the sampled digest of both. Errors: OSError, StorageError if they differ, Preempted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        while piece := read.read(CHUNK_BYTES):
            if stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            write.write(piece)
    digest = sampled_digest(source)
    if sampled_digest(target) != digest:
        raise StorageError(f"{target}: has not the bytes of {source} that were written there; look after this disk")
    return digest


def _make_room(root: Path, setting: str, missing: dict[str, _Files], *, keep: set[Path]) -> None:
    """Remove copies that nobody uses if they are old or in the way. Raises StorageError, with numbers, if that is not enough."""
    needed = sum(files.size for files in missing.values())
    for broken in root.glob(".*.partial"):
        shutil.rmtree(broken, ignore_errors=True)
    for path in sorted(_unused(root, keep), key=_last_used):
        is_stale = time.time() - _last_used(path) > STALE_S
        if not path.exists() or is_stale or _free(root) < needed:
            _remove(path)
    free = _free(root)
    if free >= needed:
        return
    parts = ", ".join(f"{what} {_gib(files.size)}" for what, files in missing.items())
    raise StorageError(
        f"launcher.stage={setting}: {_gib(needed)} GiB are to be copied to {root} on {socket.gethostname()} ({parts}), and "
        f"{_gib(max(0, free))} GiB are free there; free space, name another disk, or leave launcher.stage out"
    )


def _free(root: Path) -> int:
    """Bytes that copies may take."""
    usage = shutil.disk_usage(root)
    return usage.free - int(SPARE_SHARE * usage.total)


def _unused(root: Path, keep: set[Path]) -> Iterator[Path]:
    """Copies that no process reads, also if only their lock file is left. Those in `keep` are left out."""
    names = {path.name.removesuffix(IN_USE) for path in root.iterdir() if not path.name.startswith(".")}
    for name in names:
        path = root / name
        if path not in keep:
            with suppress(OSError):  # somebody reads it
                os.close(_lock_for_use(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
                yield path


def _last_used(path: Path) -> float:
    """When a copy was last used, in seconds since the epoch; 0 if nobody knows."""
    try:
        return Path(f"{path}{IN_USE}").stat().st_mtime
    except OSError:
        return 0.0


def _lock_for_use(path: Path, how: int) -> int:
    """A descriptor that holds a lock on a copy until it is closed or the process ends. `how`: a mode of `fcntl.flock`.

    Errors: OSError, also if others hold the lock and `how` does not wait.
    """
    descriptor = os.open(f"{path}{IN_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        if not how & fcntl.LOCK_NB:  # a reader, not somebody who wants to remove the copy
            os.utime(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    """Remove a copy. The caller must hold the lock of the directory, without which nobody begins to use a copy."""
    shutil.rmtree(path, ignore_errors=True)
    Path(f"{path}{IN_USE}").unlink(missing_ok=True)


@contextmanager
def _locked(root: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Inside the context this is the only process of the node that stages. Raises Preempted if it must stop while it waits."""
    with (root / ".lock").open("a", encoding="utf-8") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if stop():
                raise Preempted("interrupted while copying model and data; the copy will start over")
            time.sleep(0.05)
        yield


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
