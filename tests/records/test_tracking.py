"""Rows survive a resume, TensorBoard can be read back, a tracker that fails is left out."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import ClassVar

import pytest

from strategies import durable
from strategies.errors import StorageError
from trainer.records.config import LoggingConfig, WandbMode
from trainer.records.earlier import EarlierResults
from trainer.records.jsonl import JsonlTracker
from trainer.records.status import State
from trainer.records.trackers.base import Ended, Tracked
from trainer.records.tracking import Trackers, open_trackers


def test_rows_after_the_checkpoint_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, 0)
    for step in (1, 2, 3):
        first.log({"loss": step / 3}, step=step)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    second = JsonlTracker(path, 2)
    second.log({"loss": 0.5}, step=3)
    second.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1 / 3), (2, 2 / 3), (3, 0.5)]


def tracked(run_dir, config, **about):
    given = {"run_id": "", "name": "fsdp2-lora-lr2e-4", "resumed_at": 0, "settings": {}, "say": print, **about}
    return Tracked(config=config, run_dir=run_dir, **given)


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    config = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    trackers = open_trackers(tracked(tmp_path, config), {}).trackers
    trackers.log({"loss": 1.5}, step=3)
    trackers.close(Ended(State.done))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5)]


def test_a_tracker_that_fails_is_told_and_costs_the_run_nothing(tmp_path):
    class Broken:
        hint = None

        def log(self, metrics, *, step):
            raise RuntimeError("no quota")

    said = []
    trackers = Trackers(JsonlTracker(tmp_path / "metrics.jsonl", 0), [Broken()], said.append)
    trackers.log({"loss": 1.0}, step=1)
    trackers.log({"loss": 2.0}, step=2)
    trackers.close(Ended(State.done))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert said == ["Broken stopped working and is dropped: RuntimeError: no quota"]


def test_rows_are_brought_to_the_disk_and_say_later_what_was_measured(tmp_path, monkeypatch):
    class Seen(durable.Disk):
        sizes: ClassVar[list[int]] = []

        def sync(self, descriptor):
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(durable, "disk", Seen())
    path = tmp_path / "metrics.jsonl"
    trackers = Trackers(JsonlTracker(path, 0))
    assert trackers.earlier == EarlierResults() == Trackers().earlier
    trackers.log({"eval/loss": 5.0, "tokens": 0}, step=0)
    for step, speed in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 99.0)):
        trackers.log({"loss": 1 / step, "tokens_per_s": speed}, step=step)
        if step == 2:
            trackers.log({"eval/loss": 4.0, "tokens": 9}, step=step)
    trackers.sync()
    assert Seen.sizes == [path.stat().st_size]
    trackers.close(Ended(State.done))
    found = Trackers(JsonlTracker(path, 3)).earlier
    assert (found.before, found.after, found.last_row["step"]) == ({"eval/loss": 5.0}, {"eval/loss": 4.0}, 3)
    assert found.speed == {"tokens_per_s": 20.0}, "of the steps that count, and not of step 4"


def test_rows_that_a_checkpoint_counts_on_are_on_the_disk_also_after_a_resume(tmp_path, monkeypatch, capsys):
    """What a resume leaves of them is written anew: it used to lie in memory alone, and a sync that failed was not told."""
    done, broken = [], []

    class Watched(durable.Disk):
        def sync(self, descriptor):
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            if name in broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done.append(name)

        def rename(self, source, target):
            done.append(f"{source.name} is {target.name}")
            super().rename(source, target)

    monkeypatch.setattr(durable, "disk", Watched())
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, 0)
    for step in (1, 2, 3):
        first.log({"loss": 1.0}, step=step)
    first.close()
    assert done == [tmp_path.name]
    rows = path.read_bytes()
    broken.append("metrics.tmp")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written \(Input/output error"):
        JsonlTracker(path, 2)
    assert path.read_bytes() == rows, "rows that cannot be replaced safely stay"
    broken[:] = done[:] = []
    again = JsonlTracker(path, 2)
    assert done == ["metrics.tmp", "metrics.tmp is metrics.jsonl", tmp_path.name]
    broken.append("metrics.jsonl")
    again.sync()
    again.sync()
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "could not be synced (Input/output error)" in said
