"""Copies the code into the run directory, so that a queued or requeued job runs the code that was submitted.

`<run>/code/<digest>` holds the packages, `conf` and `slurm`, a few MB, under a digest of the content. Editing the
clone, switching its branch or deleting it changes no job.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from strategies.errors import ConfigError, StorageError
from trainer.reporting.code_revision import MANIFEST, ROOT, manifest, revision

COPIED_PATHS = ("conf", "launch", "strategies", "trainer", "slurm", "shardtune.py")
DIRECTORY = "code"


def read_code(root: Path = ROOT) -> dict[str, bytes]:
    """The content of every file of shardtune's code below `root`, by relative path. Errors: StorageError."""
    files: dict[str, bytes] = {}
    try:
        for name in COPIED_PATHS:
            path = root / name
            if name == "slurm" and not (path / "env.sh").is_file():
                continue  # another package of that name
            candidates = [path] if path.is_file() else sorted(path.rglob("*"))
            for file in candidates:
                if file.is_file() and "__pycache__" not in file.parts:
                    files[file.relative_to(root).as_posix()] = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{error.filename}: the code cannot be read ({error.strerror})") from error
    return files


def code_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of the names and contents of `files`, independent of their order."""
    sha256 = hashlib.sha256()
    for name, content in sorted(files.items()):
        # With the length between them, no two sets of files give the same bytes.
        sha256.update(f"{name}\0{len(content)}\0".encode() + content)
    return sha256.hexdigest()


def code_copy_dir(run_dir: Path, sha256: str) -> Path:
    """Where a run keeps its copy of the code with this digest."""
    return run_dir.absolute() / DIRECTORY / sha256[:12]


def copy_code(run_dir: Path, root: Path = ROOT) -> Path:
    """Copy shardtune's code from `root` into the run directory, unless the same copy is there; returns the copy's directory.

    Earlier copies stay, because jobs may still run them. Errors: StorageError.
    """
    files = read_code(root)
    sha256 = code_digest(files)
    copy = code_copy_dir(run_dir, sha256)
    unfinished = copy.parent / f".{copy.name}-{os.getpid()}"
    record = {"sha256": sha256, "revision": revision(root), "source": str(root)}
    try:
        is_intact = manifest(copy).get("sha256") == sha256 and code_digest(read_code(copy)) == sha256
        if not is_intact:
            # Written beside its place and renamed whole, since another process may read or write the same copy.
            shutil.rmtree(unfinished, ignore_errors=True)
            for name, content in files.items():
                file = unfinished / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            (unfinished / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(copy, ignore_errors=True)
            unfinished.rename(copy)
        os.utime(copy / MANIFEST)  # the newest is the one in use
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(
            f"{copy}: the code cannot be copied there ({error.strerror or error}); free space, choose another run.dir, or "
            "run the clone itself: launcher.code=clone"
        ) from error
    return copy


def newest_code_copy(run_dir: Path) -> Path | None:
    """The copy of the code in a run directory that was made or used last; None if there is none."""
    manifests = (run_dir.absolute() / DIRECTORY).glob(f"[!.]*/{MANIFEST}")  # a dot begins an unfinished copy
    newest = max(manifests, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else newest.parent


def refuse_changed_code(root: Path = ROOT) -> None:
    """Refuse a copy of the code that was changed since the job was submitted. A clone has no manifest and may change.

    Errors: ConfigError.
    """
    recorded = manifest(root).get("sha256")
    if recorded is not None and code_digest(read_code(root)) != recorded:
        raise ConfigError(
            f"{root}: changed since the job was submitted, and so no longer the code that it was submitted with; submit the run "
            "again, or run the clone itself: launcher.code=clone"
        )
