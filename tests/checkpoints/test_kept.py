"""Sealed checkpoints: damage is noticed before anything is read, retention keeps newest and best, torn ones are ignored."""

import shutil
from pathlib import Path

import pytest
import torch

from strategies.base import Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime
from trainer.checkpoints.kept import CheckpointConfig, Checkpoints, choose, verify

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)


class FakeEngine:
    """Writes two files; fails when told to."""

    error: Exception | None = None

    def save(self, path: Path, progress: Progress) -> None:
        (path / "state").mkdir()
        (path / "state" / "a.bin").write_bytes(bytes(range(256)) * 8)
        if self.error:
            raise self.error
        (path / "progress.json").write_text(f'{{"step": {progress.step}}}')


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2), ALONE)


def saved(checkpoints, step, **progress):
    return checkpoints.save(FakeEngine(), Progress(step=step, **progress))


def test_newest_and_best_are_kept(checkpoints):
    for step in (1, 2, 3, 4):
        saved(checkpoints, step, best_step=1)
    assert checkpoints.steps() == [1, 3, 4]
    assert checkpoints.latest_valid() == (checkpoints.directory / "step-000004", [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda p: (p / "state" / "a.bin").write_bytes(b"\x01" + bytes(range(256))[1:] + bytes(range(256)) * 7),
            "bytes that",
        ),
        (lambda p: (p / "state" / "a.bin").write_bytes(b"short"), "5 bytes instead of 2048"),
        (lambda p: (p / "progress.json").unlink(), "missing"),
        (lambda p: (p / "manifest.json").unlink(), "no manifest"),
        (lambda p: (p / "manifest.json").write_text("{"), "damaged manifest"),
        (lambda p: (p / "state" / "planted.pkl").write_bytes(b"x"), "planted.pkl"),
    ],
)
def test_a_damaged_one_is_named_and_passed_over(checkpoints, damage, said):
    saved(checkpoints, 1)
    damage(saved(checkpoints, 2))
    path, notes = checkpoints.latest_valid()
    assert path == checkpoints.directory / "step-000001"
    assert len(notes) == 1 and "step-000002" in notes[0] and said in notes[0]
    with pytest.raises(ConfigError, match=r"run\.resume=.*step-000002"):
        choose(checkpoints.directory, str(checkpoints.directory / "step-000002"), ALONE, CheckpointConfig())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 576 vs 534")])
def test_a_failed_write_leaves_nothing_and_the_earlier_one_intact(checkpoints, error):
    saved(checkpoints, 1)
    engine = FakeEngine()
    engine.error = error
    with pytest.raises(StorageError, match="free space"):
        checkpoints.save(engine, Progress(step=2))
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step-000001"]
    assert verify(checkpoints.directory / "step-000001") is None


def test_an_interrupted_write_is_no_checkpoint(checkpoints):
    saved(checkpoints, 1)
    shutil.copytree(checkpoints.directory / "step-000001", checkpoints.directory / ".step-000002.writing")
    assert checkpoints.steps() == [1]
    saved(checkpoints, 2)
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["step-000001", "step-000002"]


def test_resume_words(checkpoints):
    assert choose(checkpoints.directory, "auto", ALONE, CheckpointConfig()) is None
    first, second = saved(checkpoints, 1), saved(checkpoints, 2)
    assert choose(checkpoints.directory, "auto", ALONE, CheckpointConfig()) == second
    assert choose(checkpoints.directory, "never", ALONE, CheckpointConfig()) is None
    assert choose(checkpoints.directory, str(first), ALONE, CheckpointConfig()) == first
    with pytest.raises(ConfigError, match="not a directory"):
        choose(checkpoints.directory, str(checkpoints.directory / "nope"), ALONE, CheckpointConfig())
