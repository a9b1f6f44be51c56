"""Resumable training state on disk: when it is written, how it is sealed, which one is trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from strategies.base import Engine, Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime, broadcast_object, first_error


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When training state is written and how much of it is kept."""

    every_steps: int = 0
    """Steps between checkpoints; 0 writes one at the end and when the run is preempted."""
    keep: int = 2
    """Newest checkpoints kept; the best one is kept besides."""
    save_final: bool = True
    """Write a checkpoint after the last step, so that the run can be extended."""


STEP_DIR = "step-{:06d}"
MANIFEST = "manifest.json"


class Checkpoints:
    """The `checkpoints/` directory of a run: written aside, sealed by a manifest, published by rename."""

    def __init__(self, directory: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self.directory, self.config, self.runtime = directory, config, runtime

    def due(self, step: int) -> bool:
        """Whether the periodic schedule asks for a checkpoint after this step."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write, seal and publish `step-<step>`; then drop the ones beyond `checkpoint.keep`. All ranks must call.

        Raises StorageError on every rank when any rank could not write; nothing is left under the final name.
        """
        from torch.distributed.checkpoint.api import CheckpointException  # heavy, and settings are read without it

        final = self.directory / STEP_DIR.format(progress.step)
        aside = self.directory / f".{final.name}.writing"
        error: BaseException | None = None
        try:
            if self.runtime.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        except OSError as caught:
            error = caught
        self._agree(error, aside)
        try:
            engine.save(aside, progress)
        except (OSError, RuntimeError, CheckpointException) as caught:
            error = caught
        self._agree(error, aside)
        try:
            if self.runtime.is_main:
                seal(aside)
                if final.exists():  # the same step again, from a run that was resumed before it
                    shutil.rmtree(final)
                aside.rename(final)
                self._retain(progress)
        except OSError as caught:
            error = caught
        self._agree(error, aside)
        return final

    def _agree(self, error: BaseException | None, aside: Path) -> None:
        message = first_error(error, self.runtime)
        if message is None:
            return
        if self.runtime.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(
            f"checkpoint: writing {aside.name} in {self.directory} failed ({message[:300]}); free space or choose "
            "another run.dir. Earlier checkpoints are intact."
        )

    def _retain(self, progress: Progress) -> None:
        kept = set(self.steps()[-self.config.keep :])
        if progress.best_step is not None:
            kept.add(progress.best_step)
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.directory / STEP_DIR.format(step))

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name[5:]) for p in self.directory.glob("step-*") if p.name[5:].isdigit())

    def latest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are what was written, and a line for each newer one that is not."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            path = self.directory / STEP_DIR.format(step)
            problem = verify(path)
            if problem is None:
                return path, skipped
            skipped.append(f"{path.name}: {problem}")
        return None, skipped


def seal(directory: Path) -> None:
    """Record size and SHA-256 of every file, so that a torn or flipped one is noticed before it is read."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    (directory / MANIFEST).write_text(json.dumps(files, indent=1))


def verify(directory: Path) -> str | None:
    """What is wrong with a sealed directory, or None. Nothing in it is unpickled before this has passed."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return "has no manifest (its writing was interrupted)"
    try:
        files = json.loads(manifest.read_text())
    except ValueError:
        return "has a damaged manifest"
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    if present - set(files):
        return f"holds files that are not in its manifest: {', '.join(sorted(present - set(files))[:3])}"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != expected["sha256"]:
                return f"{name} does not have the bytes that were written"
    return None


def choose(directory: Path, resume: str, runtime: Runtime, config: CheckpointConfig) -> Path | None:
    """The checkpoint to resume from, agreed by all ranks; None starts afresh. All ranks must call."""
    found: Path | None = None
    error: BaseException | None = None
    notes: list[str] = []
    if runtime.is_main:
        if resume in ("auto", "never"):
            found, notes = Checkpoints(directory, config, runtime).latest_valid()
            if resume == "never":
                found = None
        else:
            found = Path(resume).expanduser()
            problem = verify(found) if found.is_dir() else "is not a directory"
            if problem:
                error = ConfigError(f"run.resume={resume}: {problem}; give a checkpoint directory (step-...), or auto")
    for note in notes:
        print(f"checkpoint ignored: {note}", flush=True)
    failed = first_error(error, runtime)
    if failed:
        raise ConfigError(failed.split(": ", 2)[-1])
    return broadcast_object(found, runtime)
