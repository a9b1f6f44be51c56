"""Rows survive a resume, W&B keeps its run, TensorBoard can be read back."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from strategies import durable
from strategies.errors import StorageError
from trainer.records.earlier import Earlier
from trainer.records.trackers import JsonlTracker, LoggingConfig, Trackers, WandbMode, build_trackers, summary_of


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


def records(directory):
    """What `wandb leet inspect` reads back from an offline run."""
    return subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_wandb_offline_keeps_its_id_and_flat_config(tmp_path):
    config = LoggingConfig(group="sweep", tags=["a"])
    settings = {"strategy": "fsdp2", "tuning": "lora", "world_size": 2, "global_batch": 8, "precision": "fp32"}
    trackers, run_id, note = build_trackers(config, tmp_path, wandb_id=None, resume_step=0, settings=settings)
    trackers.log({"loss": 1.5, "tokens": 100}, step=1)
    trackers.summarise(summary_of({"tokens_per_s": 12.0, "loss": 1.5}, {"tokens_per_s": 14.0}, {"eval/loss": 1.25}))
    trackers.close()
    assert note is None and trackers.sync_line is not None and "offline-run" in trackers.sync_line
    again, same_id, _ = build_trackers(config, tmp_path, wandb_id=run_id, resume_step=1, settings=settings)
    again.close()
    assert same_id == run_id
    runs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert runs
    shown = records(next(runs[0].glob("*.wandb")))
    for text in ("fsdp2", "sweep", "final/eval/loss", "train_step"):
        assert text in shown
    summary = summary_of({"tokens_per_s": 12.0, "loss": 1.5, "memory_gib": 2.0}, {"tokens_per_s": 14.0, "mfu": 0.5}, {})
    assert summary == {"final/tokens_per_s": 14.0, "final/memory_gib": 2.0, "final/mfu": 0.5, "final/loss": 1.5}


def test_online_without_an_account_is_offline_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = LoggingConfig(wandb=WandbMode.online)
    trackers, _, note = build_trackers(config, tmp_path, wandb_id=None, resume_step=0, settings={})
    trackers.close()
    assert note is not None and "API key" in note and trackers.sync_line is not None


def test_tensorboard_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    config = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    trackers, _, _ = build_trackers(config, tmp_path, wandb_id=None, resume_step=0, settings={})
    trackers.log({"loss": 1.5}, step=3)
    trackers.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 1.5)]


def test_rows_are_brought_to_the_disk_and_say_later_what_was_measured(tmp_path, monkeypatch):
    class Seen(durable.Disk):
        sizes: ClassVar[list[int]] = []

        def sync(self, descriptor):
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(durable, "disk", Seen())
    path = tmp_path / "metrics.jsonl"
    trackers = Trackers([JsonlTracker(path, 0)])
    assert trackers.earlier == Earlier() == Trackers([]).earlier
    trackers.log({"eval/loss": 5.0, "tokens": 0}, step=0)
    for step, speed in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 99.0)):
        trackers.log({"loss": 1 / step, "tokens_per_s": speed}, step=step)
        if step == 2:
            trackers.log({"eval/loss": 4.0, "tokens": 9}, step=step)
    trackers.sync()
    assert Seen.sizes == [path.stat().st_size]
    trackers.close()
    found = Trackers([JsonlTracker(path, 3)]).earlier
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
