"""`launcher.stage`: copies weights and tokens from slow storage to a disk of the node.

All ranks must call. The first rank of a node copies, and the others wait for a lock on that disk. A copy is named by
its source (path, names, sizes, modification times), verified when it is made and when it is used, kept while a run
needs it or may be resumed, and removed when its last run is done. Nothing communicates.
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
from trainer.data.prepare import Prepared
from trainer.data.store.sequences import TokenDataset
from trainer.model.loading import WANTED, weights_directory

COPY_RECORD = "copy.json"
"""In a finished copy: what it is of, and the digests of its files."""
IN_USE = ".in-use"
"""Behind a copy's name: the file that each process which reads it has locked with others."""
CHUNK_BYTES = 16 << 20
STALE_S = 7 * 86400
"""Seconds after its last use in which a copy is left alone that no run took away: of one that was killed and never went on."""
SPARE_SHARE = 0.02
"""Share of the disk that stays free."""
NOT_COPIED = ("documents.arrow", "audit.html", "audit.json", "datacard.md")
"""Of prepared data: what training reads seldom or never, from where it was."""


@dataclass(slots=True)
class Copy:
    """A directory of which there is a copy here."""

    what: str
    source: Path
    path: Path
    size: int
    lock: int
    """Descriptor of the lock that says that it is read."""


@dataclass(slots=True)
class Staged:
    """What is read from this node's disk."""

    copies: dict[str, Copy] = field(default_factory=dict)

    def with_local_model(self, config: RunConfig) -> RunConfig:
        """The configuration for what reads weights, with their place here; what a run tells of itself has the given one."""
        if "model" not in self.copies:
            return config
        return replace(config, model=replace(config.model, path=str(self.copies["model"].path)))

    def with_local_tokens(self, data: Prepared) -> Prepared:
        """The data with its tokens here."""
        if "data" not in self.copies:
            return data
        place = self.copies["data"].path
        held_out = TokenDataset.open(place / "eval") if data.evaluation is not None else None
        return replace(data, train=TokenDataset.open(place / "train"), evaluation=held_out)

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it, of this node."""
        if not self.copies:
            return {}
        copies = {what: {"from": str(c.source), "to": str(c.path), "bytes": c.size} for what, c in self.copies.items()}
        return {"staged": copies}

    def remove(self) -> None:
        """The run is done: the last process of the node that reads a copy takes it away. What is open stays readable."""
        for copy in self.copies.values():
            with suppress(OSError):  # the disk of a node that ends is not worth a failure
                fcntl.flock(copy.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copy.path)
            os.close(copy.lock)
        self.copies = {}


def stage(config: RunConfig, data: Prepared, *, stop: Callable[[], bool]) -> Staged:
    """The copies that `launcher.stage` asks for; none where it asks for none. `stop` is asked now and then.

    Errors: ConfigError for a place that this node does not know, StorageError where it has no room or cannot be written,
    Preempted where `stop` says so.
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
            copies = {what: _valid_copy(root, what, files) for what, files in wanted_files.items()}
            missing = {what: files for what, files in wanted_files.items() if copies[what] is None}
            _make_room(root, config.launcher.stage, missing, keep={c.path for c in copies.values() if c is not None})
            for what, files in missing.items():
                copies[what] = _copy(root, what, files, stop)
    except OSError as error:
        raise StorageError(
            f"launcher.stage={config.launcher.stage}: {error.filename or root} on {socket.gethostname()}: "
            f"{error.strerror or error}; name a disk of the node that can be written, or leave launcher.stage out"
        ) from error
    return Staged({what: copy for what, copy in copies.items() if copy is not None})


def place_of(text: str) -> Path:
    """The directory of this user on this node; variables are those of the node. Raises ConfigError."""
    path = str(Path(os.path.expandvars(text)).expanduser())
    if "$" in path:
        raise ConfigError(
            f"launcher.stage={text}: {path} names a variable that is not set on {socket.gethostname()}; name a directory"
        )
    return Path(path) / f"shardtune-{os.getuid()}"


@dataclass(slots=True)
class _Files:
    """Files below a directory, by relative name."""

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
    return _Files(source, sorted({path.name for pattern in WANTED for path in source.glob(pattern) if path.is_file()}))


def _tokens(source: Path) -> _Files:
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.name not in NOT_COPIED]
    return _Files(source, sorted(path.as_posix() for path in files))


def _valid_copy(root: Path, what: str, files: _Files) -> Copy | None:
    """The copy that was made before, if every file of it is as it was written; a broken one is removed."""
    path = root / f"{what}-{files.key[:16]}"
    use = _lock_for_use(path, fcntl.LOCK_SH)  # first: the run that takes it away holds no other lock
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
    """Copy, and compare with what was read. Errors: OSError, StorageError, Preempted."""
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
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as write:
        while piece := read.read(CHUNK_BYTES):
            if stop():
                raise Preempted("asked to stop while model and data were copied; nothing is lost but the copy")
            write.write(piece)
    digest = sampled_digest(source)
    if sampled_digest(target) != digest:
        raise StorageError(f"{target}: has not the bytes of {source} that were written there; look after this disk")
    return digest


def _make_room(root: Path, setting: str, missing: dict[str, _Files], *, keep: set[Path]) -> None:
    """Remove what nobody uses, where it is old or in the way. Raises StorageError with the numbers where that is not enough."""
    needed = sum(files.size for files in missing.values())
    for broken in root.glob(".*.partial"):
        shutil.rmtree(broken, ignore_errors=True)
    for path in sorted(_unused(root, keep), key=_last_used):
        if not path.exists() or time.time() - _last_used(path) > STALE_S or _free(root) < needed:
            _remove(path)
    if (free := _free(root)) >= needed:
        return
    parts = ", ".join(f"{what} {_gib(files.size)}" for what, files in missing.items())
    raise StorageError(
        f"launcher.stage={setting}: {_gib(needed)} GiB are to be copied to {root} on {socket.gethostname()} ({parts}), and "
        f"{_gib(max(0, free))} GiB are free there; free space, name another disk, or leave launcher.stage out"
    )


def _free(root: Path) -> int:
    usage = shutil.disk_usage(root)
    return usage.free - int(SPARE_SHARE * usage.total)


def _unused(root: Path, keep: set[Path]) -> Iterator[Path]:
    """Copies, and what is left of their locks."""
    for name in {path.name.removesuffix(IN_USE) for path in root.iterdir() if not path.name.startswith(".")}:
        if (path := root / name) not in keep:
            with suppress(OSError):
                os.close(_lock_for_use(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
                yield path


def _last_used(path: Path) -> float:
    try:
        return Path(f"{path}{IN_USE}").stat().st_mtime
    except OSError:
        return 0.0


def _lock_for_use(path: Path, how: int) -> int:
    """A descriptor with a lock of a copy's users, which ends with the process. Errors: OSError, also where others hold it."""
    descriptor = os.open(f"{path}{IN_USE}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        if not how & fcntl.LOCK_NB:
            os.utime(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    """To be called under the lock of the place, without which nobody begins to use a copy."""
    shutil.rmtree(path, ignore_errors=True)
    Path(f"{path}{IN_USE}").unlink(missing_ok=True)


@contextmanager
def _locked(root: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """One process of the node at a time. Raises Preempted where this one is told to stop while it waits."""
    with (root / ".lock").open("a", encoding="utf-8") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if stop():
                raise Preempted("asked to stop while model and data were copied; nothing is lost but the copy")
            time.sleep(0.05)
        yield


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
