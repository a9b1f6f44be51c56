"""Checkpoints of one branch: damage is noticed before anything is read, newest and best stay, what was given up is moved away."""

import errno
import json
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from strategies import atomic_io
from strategies.atomic_io import write_new_file
from strategies.base import Progress
from strategies.errors import ConfigError, StorageError
from strategies.runtime import Runtime
from strategies.state import load_state
from tests.helpers.covering import EVERYTHING, SEED
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.manifest import OLD_FORMAT_REASON, checkpoint_problem, read_manifest, write_manifest
from trainer.checkpoints.resume_selection import choose_checkpoint, resume_setting_problem

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)


class FakeEngine:
    """Writes two files; fails when told to, in the places told."""

    def __init__(self, error: Exception | None = None, only_in: str = "", **header):
        self.error, self.only_in, self.header = error, only_in, header

    def state(self, progress: Progress):
        return SimpleNamespace(save=partial(self.save, progress), num_elements=512)

    def save(self, progress: Progress, path: Path):
        files = [write_new_file(path / "a.safetensors", bytes(range(256)) * 8)]
        if self.error and self.only_in in str(path):
            raise self.error
        about = {"progress": {"step": progress.step}, **self.header}
        return [*files, write_new_file(path / "progress.json", json.dumps(about).encode())]


class Made:
    """The checkpoints of a run directory, and what was said."""

    def __init__(self, root: Path, **settings):
        self.config = CheckpointConfig(**{"background": False, **settings})
        self.said: list[str] = []
        self.all = Checkpoints(
            checkpoint_dirs_of(root / "run", self.config.fallback_dir), self.config, ALONE, self.said.append
        )
        self.directory = self.all.checkpoint_dirs[0]

    def save(self, *steps, engine=None, must_succeed=True, **progress):
        for step in steps:
            saved = self.all.save_checkpoint(
                engine or FakeEngine(), Progress(step=step, **progress), must_succeed=must_succeed
            )
        return self.all.last_published.path if saved else None

    def resume(self, asked="auto"):
        path = choose_checkpoint(self.all.checkpoint_dirs, str(asked), ALONE)
        self.all.continue_from_checkpoint(path, str(asked))
        return path

    @property
    def steps(self):
        return [step for step, _ in checkpoints_in(self.all.checkpoint_dirs)]


@pytest.fixture
def made(tmp_path):
    def make(**settings):
        return Made(tmp_path, **{"keep": 2, **settings})

    return make


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_newest_and_best_checkpoints_are_kept(made):
    run = made()
    run.save(1, 2, 3, 4, best_step=1)
    assert run.steps == [1, 3, 4] and run.resume().name == "step-000004"


DAMAGE = {
    "a bit of the tensors": (lambda p: flip(p / "a.safetensors", 7), "bytes that were written"),
    "too short": (lambda p: (p / "a.safetensors").write_bytes(b"short"), "5 bytes instead of 2048"),
    "a file gone": (lambda p: (p / "progress.json").unlink(), "progress.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest"),
    "half a manifest": (lambda p: (p / "manifest.json").write_text("{"), "damaged manifest"),
    "null": (lambda p: (p / "manifest.json").write_text("null"), "damaged manifest"),
    "a list": (lambda p: (p / "manifest.json").write_text("[" * 100_000), "damaged manifest"),
    "not text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "damaged manifest"),
    "something planted": (lambda p: (p / "planted.pkl").write_bytes(b"x"), "planted.pkl"),
    "a pipe": (
        lambda p: ((p / "progress.json").unlink(), __import__("os").mkfifo(p / "progress.json")),
        "no regular file",
    ),
    "a link": (
        lambda p: ((p / "progress.json").unlink(), (p / "progress.json").symlink_to("/dev/zero")),
        "progress.json cannot be read",
    ),
    "of an early version": (
        lambda p: (p / "state").mkdir() or (p / "state" / ".metadata").write_bytes(b""),
        OLD_FORMAT_REASON,
    ),
    "only a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "is not a directory"),
}


def test_a_rollback_finds_a_checkpoint_from_before_what_it_undoes(made):
    kept = made(keep=1)
    kept.all.look_back_steps = 20
    kept.save(10, 20, 30, 40, 45)
    # Those of the last 20 steps, and one from before.
    assert kept.steps == [20, 30, 40, 45]
    assert kept.all.roll_back(38).name == "step-000030" and kept.steps == [20, 30]
    assert not any("there is no checkpoint" in line for line in kept.said)
    kept.save(35)
    flip(kept.directory / "step-000020" / "a.safetensors", 5)
    # The one from before is damaged: the oldest of the others is taken, and that is said.
    assert kept.all.roll_back(25).name == "step-000030" and kept.steps == [20, 30]
    assert any(
        "there is no checkpoint of step 25 or before; the run goes back to the oldest one, of step 30" in line
        for line in kept.said
    )


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_named_passed_over_and_moved_away(made, damage, said, capsys):
    run = made()
    newest = run.save(1, 2)
    damage(newest)
    with pytest.raises(ConfigError, match=r"run\.resume=.*step-000002"):
        choose_checkpoint(run.all.checkpoint_dirs, str(newest), ALONE)
    assert run.resume().name == "step-000001"
    shown = capsys.readouterr().out
    assert "step-000002" in shown and said in shown
    assert run.steps == [1] and (run.directory / "given-up-1" / newest.name).exists()
    run.save(2)
    assert run.steps == [1, 2] and checkpoint_problem(newest) is None


def test_manifest_with_any_flipped_bit_is_damaged(made):
    manifest = made().save(1) / "manifest.json"
    whole = manifest.read_bytes()
    chance = random.Random(SEED)
    for position in range(len(whole)):
        for bit in range(8) if EVERYTHING else [chance.randrange(8)]:
            flip(manifest, position, bit)
            assert checkpoint_problem(manifest.parent) == "has a damaged manifest", (position, bit)
            manifest.write_bytes(whole)
    assert checkpoint_problem(manifest.parent) is None


def test_all_checkpoints_damaged_begins_nothing(made):
    run = made()
    for path in (run.save(1), run.save(2)):
        flip(path / "a.safetensors", 0)
    before = sorted(run.directory.rglob("*"))
    with pytest.raises(StorageError, match=r"none of the checkpoints.*step-000002.*step-000001.*nothing was changed"):
        run.resume()
    assert sorted(run.directory.rglob("*")) == before


def test_checkpoints_of_a_branch_gone_back_to_and_of_the_branch_left_are_kept(made):
    """keep=1: what was just saved used to be deleted, since the steps of the branch given up are higher."""
    run = made(keep=1)
    run.save(10, 20, 30, best_step=10)
    (run.directory.parent / "metrics.jsonl").write_text('{"step": 30}\n')
    again = made(keep=1)
    assert again.resume(run.directory / "step-000010").name == "step-000010"
    assert again.steps == [10]
    aside = run.directory / "given-up-1"
    assert sorted(p.name for p in aside.iterdir()) == ["metrics.jsonl", "step-000030"]
    assert checkpoint_problem(aside / "step-000030") is None and any("given-up-1" in text for text in again.said)
    assert again.save(15).exists() and again.steps == [15]
    assert made(keep=1).resume().name == "step-000015"


def test_checkpoint_of_a_step_written_again_replaces_its_own_earlier_one(made, tmp_path):
    """A made-up evaluation used to leave the very checkpoint resumed from in given-up, which nothing ever deletes."""
    settings = {"fallback_dir": str(tmp_path / "spare"), "keep": 2}
    made(**settings).save(1, 2)
    run = made(**settings)
    path = run.resume()
    run.save(2, engine=FakeEngine(owed=False))
    assert [p.name for p in sorted(run.directory.iterdir())] == ["step-000001", "step-000002"]
    assert checkpoint_problem(path) is None and json.loads((path / "progress.json").read_text())["owed"] is False
    full = FakeEngine(OSError(28, "No space left on device"), only_in="/run/checkpoints/")
    spare = run.save(2, engine=full)
    assert spare.is_relative_to(tmp_path / "spare") and run.steps == [1, 2], "of a step there is one"
    later = made(**settings)
    assert later.resume() == spare and later.save(2) == path and later.steps == [1, 2]
    assert made(**settings).resume() == path


def test_checkpoint_garbage_with_a_high_step_number_pushes_nothing_out(made):
    run = made(keep=1)
    run.save(1)
    (run.directory / "step-999999").mkdir()
    assert run.save(2).exists() and run.steps == [2, 999999]
    later = made(keep=1)
    assert later.resume().name == "step-000002"
    assert later.save(3).exists() and later.steps == [3]


def test_checkpoint_copied_under_the_name_of_a_later_step_is_moved_aside(made, capsys):
    run = made()
    for step in (2, 3):
        run.save(step)
    copy = run.directory / "step-000005"
    shutil.copytree(run.directory / "step-000002", copy)
    later = made()
    with pytest.raises(ConfigError, match="step-000005: is a checkpoint of step 2 under another name"):
        later.resume(copy)
    assert later.resume().name == "step-000003"
    assert "step-000005: is a checkpoint of step 2 under another name" in capsys.readouterr().out
    assert [path.name for path in (run.directory / "given-up-1").glob("step-*")] == ["step-000005"]


@pytest.mark.parametrize("name", [".nfs000000000001", ".DS_Store", "._progress.json", ".fuse_hidden0000001a"])
def test_checkpoint_is_not_damaged_by_files_that_a_system_adds(made, name):
    run = made()
    run.save(1)
    (run.directory / "step-000001" / name).write_bytes(b"x")
    assert checkpoint_problem(run.directory / "step-000001") is None
    (run.directory / "step-000001" / ".hidden").write_bytes(b"x")
    assert "holds files that are not in its manifest: .hidden" in checkpoint_problem(run.directory / "step-000001")


def test_resume_from_the_state_of_another_run_begins_a_branch(made, tmp_path):
    other = Made(tmp_path / "other").save(5)
    run = made()
    run.save(3, 9)
    again = made()
    assert again.resume(other) == other
    assert again.steps == [] and again.save(6).exists()


def test_resume_with_the_same_words_goes_on_and_does_not_go_back_again(made, tmp_path, capsys):
    """As a requeued job or a repeated command has them; what it had made used to be moved to given-up."""
    other = Made(tmp_path / "other").save(5)
    assert made().resume(other) == other  # stopped before it saved anything
    run = made()
    assert run.resume(other) == other
    run.save(6, 7)
    again = made()
    assert again.resume(other).name == "step-000007" and again.steps == [6, 7]
    assert "has begun from it already" in capsys.readouterr().out
    shutil.move(other, tmp_path / "archive")
    assert made().resume(other).name == "step-000007", "what it began from is needed no more"
    replaced = Made(tmp_path / "other").save(5)
    assert made().resume(replaced).name == "step-000007", "the same bytes"
    shutil.rmtree(replaced)
    replaced.mkdir()
    write_manifest(replaced, [write_new_file(replaced / "progress.json", b"{}")])
    assert made().resume(replaced) == replaced and made().steps == [], "another one under the same name"


def test_resume_goes_back_once_and_again_on_demand(made, capsys):
    run = made(keep=3)
    first = run.save(10)
    run.save(20, 30)
    assert made(keep=3).resume(first) == first
    back = made(keep=1)
    assert back.resume(first) == first, "nothing was made since"
    back.save(15)
    assert back.steps == [15], "and what it went back to is deleted"
    assert made().resume(first).name == "step-000015"
    said = capsys.readouterr().out
    record = run.directory.parent / "resumed-from.json"
    assert f"delete {record}" in said
    run = made(keep=3)
    second = run.resume()
    run.save(25)
    assert made(keep=3).resume(second) == second and run.steps == [15], "another name is another way back"
    run.save(35)
    assert made().resume(second).name == "step-000035"
    record.unlink()
    assert made().resume(second) == second
    record.write_text("[1]")
    with pytest.raises(StorageError, match=r"resumed-from.json: cannot be read .*run\.resume=auto"):
        made().resume(second)


def test_checkpoints_not_yet_verified_stay_until_enough_are_known_to_be_whole(made):
    made(keep=2).save(1, 2)
    flip(made().directory / "step-000001" / "a.safetensors", 0)
    run = made(keep=3)
    run.resume()
    run.save(3)
    assert run.steps == [1, 2, 3]
    run.save(4)
    assert run.steps == [2, 3, 4]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("CUDA error")])
def test_failed_save_leaves_nothing_and_the_earlier_checkpoint_intact(made, error):
    run = made()
    run.save(1)
    with pytest.raises(StorageError, match="free space") as raised:
        run.save(2, engine=FakeEngine(error))
    assert str(raised.value).startswith(("No space left", "RuntimeError: CUDA"))
    assert [p.name for p in run.directory.iterdir()] == ["step-000001"] and checkpoint_problem(
        run.directory / "step-000001"
    ) is None


def test_a_run_outlives_some_failed_saves(made):
    full = FakeEngine(OSError(28, "No space left on device"))
    run = made(max_failures=2)
    assert run.save(1, 2, engine=full, must_succeed=False) is None
    assert run.save(3) is not None  # counts from the start again
    assert run.save(4, 5, engine=full, must_succeed=False) is None
    assert sum(text.startswith("warning: No space left on device") for text in run.said) == 4
    with pytest.raises(StorageError, match="3 checkpoints in a row failed"):
        run.save(6, engine=full, must_succeed=False)
    with pytest.raises(StorageError, match="No space left"):
        made().save(7, engine=full)


def test_fallback_disk_takes_a_save_and_is_looked_through_at_resume(made, tmp_path):
    settings = {"fallback_dir": str(tmp_path / "spare"), "keep": 1}
    run = made(**settings)
    run.save(1)
    path = run.save(
        2, engine=FakeEngine(OSError(28, "No space left on device"), only_in="/run/checkpoints/"), best_step=2
    )
    assert path.is_relative_to(tmp_path / "spare") and run.steps == [2]
    later = made(**settings)
    assert later.resume() == path and later.save(3).parent == later.directory
    assert later.steps == [3]
    elsewhere = Made(tmp_path / "two", fallback_dir=settings["fallback_dir"])
    assert elsewhere.resume() is None, "another run's"


def test_fallback_disk_that_takes_nothing_is_reported_before_it_is_needed(made, tmp_path, monkeypatch):
    class Sealed(atomic_io.Disk):
        code = errno.EROFS

        def open(self, path, flags):
            if path.is_relative_to(tmp_path / "spare") and flags & os.O_WRONLY:
                raise OSError(self.code, os.strerror(self.code), str(path))
            return super().open(path, flags)

    monkeypatch.setattr(atomic_io, "disk", Sealed())
    run = made(fallback_dir=str(tmp_path / "spare"))
    with pytest.raises(
        StorageError, match=r"^checkpoint\.fallback_dir=.*spare: cannot be written \(Read-only file system"
    ):
        run.resume()
    Sealed.code = errno.ENOSPC
    run.resume()
    assert [
        text for text in run.said if "No space left" in text and text.startswith("warning: checkpoint.fallback_dir=")
    ]
    monkeypatch.undo()
    made(fallback_dir=str(tmp_path / "spare")).resume()
    assert [*(tmp_path / "spare").glob("*/*")] == []


def test_old_checkpoint_that_cannot_be_deleted_is_a_warning(made, monkeypatch):
    class Stuck(atomic_io.Disk):
        def rename(self, source, target):
            if target.name.endswith(".deleting"):
                raise PermissionError(13, "Permission denied", str(source))
            super().rename(source, target)

    run = made(keep=1)
    monkeypatch.setattr(atomic_io, "disk", Stuck())
    run.save(1, 2, 3)
    assert run.steps == [1, 2, 3]
    assert [text for text in run.said if "could not be deleted" in text and "Permission denied" in text].__len__() == 2


def test_an_interrupted_write_is_no_checkpoint(made):
    run = made()
    run.save(1)
    shutil.copytree(run.directory / "step-000001", run.directory / ".step-000002.writing")
    assert run.steps == [1] and run.resume().name == "step-000001"
    assert [p.name for p in run.directory.iterdir()] == ["step-000001"]
    run.save(2)
    assert sorted(p.name for p in run.directory.iterdir()) == ["step-000001", "step-000002"]


def test_resume_setting_chooses_the_checkpoint(made, tmp_path):
    run = made()
    assert run.resume() is None
    first, second = run.save(1), run.save(2)
    places = run.all.checkpoint_dirs
    assert choose_checkpoint(places, "auto", ALONE) == second
    assert choose_checkpoint(places, "never", ALONE) is None
    assert choose_checkpoint(places, str(first), ALONE) == first
    with pytest.raises(ConfigError, match="not a directory"):
        choose_checkpoint(places, str(tmp_path / "nope"), ALONE)


NO_CHECKPOINTS = {
    "a run directory": (
        "run",
        r"run: is a run directory, and no checkpoint; give its newest: run\.resume={0}/run/checkpoints/step-000002$",
    ),
    "its checkpoints": ("run/checkpoints", "is no checkpoint, but holds some; give its newest: .*step-000002$"),
    "one that was given up": (
        "run/checkpoints/given-up-1",
        "but holds some; give its newest: .*given-up-1/step-000003$",
    ),
    "a run without any": (
        "began",
        "is a run directory, and no checkpoint; it has none that can be used; give a checkpoint dir",
    ),
    "an empty one": ("empty", r"empty: is empty; give a checkpoint directory \(step-\.\.\.\), auto or never"),
    "something else": ("model", "is no checkpoint: it has no manifest.json"),
    "nothing": ("nowhere", "is not a directory"),
    "a file": ("model/config.json", "is not a directory"),
    "of an early version": ("early/step-000004", OLD_FORMAT_REASON),
    "its state": ("early/step-000004/state", OLD_FORMAT_REASON),
    "a torn one": ("torn/step-000005", "has no manifest"),
    "one without a file": ("run/checkpoints/step-000001", "a.safetensors is missing"),
}


def test_resume_from_what_is_no_checkpoint_is_refused_at_once_with_its_kind(made, tmp_path):
    """It came to `run.accept=[unknown]`, or to an error after the data was prepared."""
    run = made(keep=9)
    run.save(1, 2, 3)
    damaged = run.directory / "step-000003"
    (damaged / "manifest.json").unlink()
    (run.directory / "step-000001" / "a.safetensors").unlink()
    shutil.copytree(run.directory / "step-000002", run.directory / "given-up-1" / "step-000003")
    for name in ("began", "empty", "model", "early/step-000004/state", "torn/step-000005"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "began" / "config.yaml").touch()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "torn" / "step-000005" / "a.safetensors").touch()
    (tmp_path / "early" / "step-000004" / "state" / ".metadata").touch()
    for name, said in NO_CHECKPOINTS.values():
        found = resume_setting_problem(str(tmp_path / name), checkpoint_dirs_of(tmp_path / name, None))
        assert re.search(said.format(tmp_path), found), found
    assert resume_setting_problem(str(run.directory / "step-000002"), []) is None


class Unlisted(atomic_io.Disk):
    """One directory of this name cannot be listed."""

    def __init__(self, name):
        self.name = name

    def names(self, directory):
        if directory.name == self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(directory))
        return super().names(directory)

    def sleep(self, seconds):
        pass


def test_checkpoint_directory_that_cannot_be_listed_raises_alike_on_every_rank(made, tmp_path, monkeypatch):
    """Rank 0 alone looks, and what it met reaches the others: they used to wait for it."""
    run = made()
    newest = run.save(1)
    heard = []

    def broadcast(box, **_):
        box[:] = heard if heard else box
        heard[:] = box

    ranks = [Runtime(rank, 2, rank, 2, torch.device("cpu"), None) for rank in range(2)]
    monkeypatch.setattr("strategies.runtime.dist.broadcast_object_list", broadcast)
    lists = {
        "choose": lambda rank: choose_checkpoint(run.all.checkpoint_dirs, "auto", rank),
        "load": lambda rank: load_state(newest, [], rank),
    }
    for name, call in (("checkpoints", lists["choose"]), (newest.name, lists["load"])):
        heard.clear()
        monkeypatch.setattr(atomic_io, "disk", Unlisted(name))
        for rank in ranks:
            with pytest.raises(StorageError, match="Input/output error"):
                call(rank)
    assert checkpoint_problem(newest).startswith("cannot be read (Input/output error")
    with pytest.raises(StorageError, match=r"cannot be listed \(Input/output error"):
        resume_setting_problem(str(newest), [])


def test_manifest_holds_hashes_of_the_intended_bytes_not_of_those_on_the_disk(made, monkeypatch):
    """A disk that loses bytes on the way is found out; hashes of what lies there afterwards would seal the damage."""

    class Forgetful(atomic_io.Disk):
        def write(self, descriptor, data):
            return (
                super().write(descriptor, memoryview(bytes(len(data))))
                if len(data) == 2048
                else super().write(descriptor, data)
            )

    monkeypatch.setattr(atomic_io, "disk", Forgetful())
    path = made().save(1)
    assert checkpoint_problem(path) == "a.safetensors does not have the bytes that were written"
    assert {each.name for each in read_manifest(path)} == {"a.safetensors", "progress.json"}
    assert json.loads((path / "manifest.json").read_text())["format"] == 2
