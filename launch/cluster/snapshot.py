"""Copies the code into the run directory, so that a queued or requeued job runs the code that was submitted.

`<run>/code/<digest>` holds the packages, `conf` and `slurm`, a few MB, under a digest of the content. Editing the
clone, switching its branch or deleting it changes no job.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from strategies.errors import ConfigError, StorageError
from trainer.reporting.code_revision import CODE_DIRECTORY, CODE_MANIFEST_FILE, code_revision, read_code_manifest

COPIED_PATHS = ("conf", "launch", "strategies", "trainer", "slurm", "shardtune.py")
COPIES_DIRECTORY = "code"


def read_code(root: Path = CODE_DIRECTORY) -> dict[str, bytes]:
    """Read every file of shardtune's code below `root`, for a copy or a digest: contents by relative path.

    Raises StorageError if a file cannot be read.
    """
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


def code_digest(content_by_path: dict[str, bytes]) -> str:
    """SHA-256 of the relative paths and contents of files, independent of their order."""
    sha256 = hashlib.sha256()
    for path, content in sorted(content_by_path.items()):
        # With the length between them, no two sets of files give the same bytes.
        sha256.update(f"{path}\0{len(content)}\0".encode() + content)
    return sha256.hexdigest()


def code_copy_dir(run_dir: Path, sha256: str) -> Path:
    """Where a run keeps its copy of the code with this digest."""
    return run_dir.absolute() / COPIES_DIRECTORY / sha256[:12]


def copy_code(run_dir: Path, root: Path = CODE_DIRECTORY) -> Path:
    """Copy shardtune's code into the run directory, so that a queued job runs what was submitted; returns the copy's directory.

    Nothing is copied if an intact copy of the same code is there. Marks the copy as the newest. Earlier copies stay, because jobs
    may still run them. Raises StorageError.
    """
    content_by_path = read_code(root)
    sha256 = code_digest(content_by_path)
    copy_dir = code_copy_dir(run_dir, sha256)
    # Written beside its place and renamed when it is complete, since another process may read or write the same copy.
    staging_dir = copy_dir.parent / f".{copy_dir.name}-{os.getpid()}"
    record = {"sha256": sha256, "revision": code_revision(root), "source": str(root)}
    try:
        is_intact = read_code_manifest(copy_dir).get("sha256") == sha256 and code_digest(read_code(copy_dir)) == sha256
        if not is_intact:
            shutil.rmtree(staging_dir, ignore_errors=True)
            for path, content in content_by_path.items():
                file = staging_dir / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            (staging_dir / CODE_MANIFEST_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(copy_dir, ignore_errors=True)
            staging_dir.rename(copy_dir)
        os.utime(copy_dir / CODE_MANIFEST_FILE)  # the newest is the one in use
    except OSError as error:
        shutil.rmtree(staging_dir, ignore_errors=True)
        raise StorageError(
            f"{copy_dir}: the code cannot be copied there ({error.strerror or error}); free space, choose another run.dir, or "
            "run the clone itself: launcher.code=clone"
        ) from error
    return copy_dir


def newest_code_copy(run_dir: Path) -> Path | None:
    """The copy of the code in a run directory that was made or used last, for a requeued job; None if there is none."""
    # A dot begins the name of an unfinished copy.
    manifests = (run_dir.absolute() / COPIES_DIRECTORY).glob(f"[!.]*/{CODE_MANIFEST_FILE}")
    newest = max(manifests, key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if newest is None else newest.parent


def refuse_changed_code(root: Path = CODE_DIRECTORY) -> None:
    """Raise ConfigError if the code in `root` is a copy that somebody has changed since its job was submitted.

    The copy has a manifest with its digest. A clone has none, and may change.
    """
    submitted_sha256 = read_code_manifest(root).get("sha256")
    if submitted_sha256 is not None and code_digest(read_code(root)) != submitted_sha256:
        raise ConfigError(
            f"{root}: changed since the job was submitted, and so no longer the code that it was submitted with; submit the run "
            "again, or run the clone itself: launcher.code=clone"
        )
