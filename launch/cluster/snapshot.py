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
PLACE = "code"


def read(root: Path = ROOT) -> dict[str, bytes]:
    """The files of the code below `root` by their paths. Errors: StorageError."""
    found: dict[str, bytes] = {}
    try:
        for part in (root / part for part in PARTS):
            if part.name == "slurm" and not (part / "env.sh").is_file():
                continue  # somebody else's package of that name
            for file in [part] if part.is_file() else sorted(part.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    found[file.relative_to(root).as_posix()] = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{error.filename}: the code cannot be read ({error.strerror})") from error
    return found


def digest(files: dict[str, bytes]) -> str:
    """SHA-256 of names and contents."""
    whole = hashlib.sha256()
    for name, content in sorted(files.items()):
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def place_of(run_dir: Path, sha256: str) -> Path:
    """Where the copy of a run lies."""
    return run_dir.absolute() / PLACE / sha256[:12]


def take(run_dir: Path, root: Path = ROOT) -> Path:
    """Copy the code into the run directory, beside earlier copies, which jobs may still run; its place. Errors: StorageError."""
    files = read(root)
    sha256 = digest(files)
    place = place_of(run_dir, sha256)
    aside = place.parent / f".{place.name}-{os.getpid()}"
    told = {"sha256": sha256, "revision": revision(root), "source": str(root)}
    try:
        if manifest(place).get("sha256") != sha256 or digest(read(place)) != sha256:
            shutil.rmtree(aside, ignore_errors=True)
            for name, content in files.items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(content)
            (aside / MANIFEST).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
        os.utime(place / MANIFEST)  # the newest is the one in use
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(
            f"{place}: the code cannot be copied there ({error.strerror or error}); free space, choose another run.dir, or "
            "run the clone itself: launcher.code=clone"
        ) from error
    return place


def taken(run_dir: Path) -> Path | None:
    """The copy that was taken last; None where there is none."""
    there = (run_dir.absolute() / PLACE).glob(f"[!.]*/{MANIFEST}")
    return max((path.parent for path in there), key=lambda path: (path / MANIFEST).stat().st_mtime_ns, default=None)


def check(root: Path = ROOT) -> None:
    """Raise ConfigError where a copy is no longer what was submitted; a clone is as it is."""
    told = manifest(root).get("sha256")
    if told is not None and digest(read(root)) != told:
        raise ConfigError(
            f"{root}: changed since the job was submitted, and so no longer the code that it was submitted with; submit the run "
            "again, or run the clone itself: launcher.code=clone"
        )
