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

PARTS = ("conf", "launch", "strategies", "trainer", "slurm", "shardtune.py")
DIRECTORY = "code"


def read_code(root: Path = ROOT) -> dict[str, bytes]:
    """The files of the code below `root` by their paths. Errors: StorageError."""
    files: dict[str, bytes] = {}
    try:
        for name in PARTS:
            part = root / name
            if name == "slurm" and not (part / "env.sh").is_file():
                continue  # another package of that name
            for file in [part] if part.is_file() else sorted(part.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    files[file.relative_to(root).as_posix()] = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{error.filename}: the code cannot be read ({error.strerror})") from error
    return files


def code_digest(files: dict[str, bytes]) -> str:
    """SHA-256 of names and contents."""
    sha256 = hashlib.sha256()
    for name, content in sorted(files.items()):
        sha256.update(f"{name}\0{len(content)}\0".encode() + content)
    return sha256.hexdigest()


def copy_path(run_dir: Path, sha256: str) -> Path:
    """Where a run keeps its copy of the code with this digest."""
    return run_dir.absolute() / DIRECTORY / sha256[:12]


def copy_code(run_dir: Path, root: Path = ROOT) -> Path:
    """Copy the code into the run directory; returns the copy. Errors: StorageError.

    Earlier copies stay, because jobs may still run them.
    """
    files = read_code(root)
    sha256 = code_digest(files)
    copy = copy_path(run_dir, sha256)
    unfinished = copy.parent / f".{copy.name}-{os.getpid()}"
    record = {"sha256": sha256, "revision": revision(root), "source": str(root)}
    try:
        if manifest(copy).get("sha256") != sha256 or code_digest(read_code(copy)) != sha256:
            shutil.rmtree(unfinished, ignore_errors=True)
            for name, content in files.items():
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).write_bytes(content)
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


def newest_copy(run_dir: Path) -> Path | None:
    """The copy that was made or used last; None if there is none."""
    manifests = (run_dir.absolute() / DIRECTORY).glob(f"[!.]*/{MANIFEST}")  # a dot begins an unfinished copy
    newest = max(manifests, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else newest.parent


def refuse_changed(root: Path = ROOT) -> None:
    """Raise ConfigError if a copy is no longer what was submitted. A clone has no manifest and may change."""
    recorded = manifest(root).get("sha256")
    if recorded is not None and code_digest(read_code(root)) != recorded:
        raise ConfigError(
            f"{root}: changed since the job was submitted, and so no longer the code that it was submitted with; submit the run "
            "again, or run the clone itself: launcher.code=clone"
        )
