"""Rows survive a resume, TensorBoard can be read back, a tracker that fails is left out."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import ClassVar

import pytest

from launch.compare.progress import _last_step
from launch.runs import metrics_tail as following
from launch.sweep import search
from shardtune import Run
from strategies import atomic_io
from strategies.errors import StorageError
from trainer.reporting import results
from trainer.reporting.config import LoggingConfig, WandbMode
from trainer.reporting.earlier_rows import EarlierResults
from trainer.reporting.jsonl import UNREADABLE_LINES_FILE, JsonlTracker
from trainer.reporting.metric_rows import read_rows
from trainer.reporting.status import RunState
from trainer.reporting.trackers.base import RunEnding, TrackedRun
from trainer.reporting.tracking import Trackers, open_trackers


def test_metrics_rows_after_the_checkpoint_are_replaced_at_a_resume(tmp_path):
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


NO_ROWS = {
    b"\xe9": "is not UTF-8",
    b'{"step": 1, "l\xf3ss": 2.0}': "is not UTF-8",
    b"[1]": "is no object",
    b"5": "is no object",
    b'{"step": "x"}': "has no step that is a whole number",
    b'{"step": true}': "has no step that is a whole number",
    b'{"loss": 1.0}': "has no step that is a whole number",
    b'{"step": 1, "loss": "high"}': "has a loss that is no number",
    b'{"step": 1, "lo': "is not JSON",
    b"[" * 20_000: "is nested too deep",
    b"\0" * 3000: "has NUL bytes, as a power cut leaves them",
    b'{"step": 1, "loss": ' + b"9" * 5000 + b"}": "is not JSON",
}
"""Lines that no run writes, and why they are no rows."""


def test_a_line_that_cannot_be_read_never_stops_a_start(tmp_path, capsys):
    """It is set aside with the reason, to the byte; the rows around it stay. A torn last line is torn, and nothing to tell of."""
    path, aside = tmp_path / "metrics.jsonl", tmp_path / UNREADABLE_LINES_FILE
    row = b'{"step": 1, "loss": 2.0, "name": "\xc3\xa4"}\n'
    path.write_bytes(row + b"".join(line + b"\n" for line in NO_ROWS) + b"\n" + row + b'{"step": 1, "lo')
    tracker = JsonlTracker(path, 1)
    tracker.close()
    assert path.read_bytes() == row + row
    assert tracker.earlier.last_row["loss"] == 2.0
    lines = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [(each["line"], each["reason"]) for each in lines] == list(enumerate(NO_ROWS.values(), 2))
    assert [each["text"].encode(errors="surrogateescape") for each in lines] == list(NO_ROWS)
    said = capsys.readouterr().out
    assert f"warning: {path}: line 2 is not UTF-8, line 3 is not UTF-8, line 4 is no object and 9 more; " in said
    assert f"moved to {UNREADABLE_LINES_FILE}" in said

    JsonlTracker(path, 1).close()  # what was set aside once is not told of again
    assert len(aside.read_text(encoding="utf-8").splitlines()) == len(NO_ROWS)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("line", NO_ROWS)
def test_no_reader_stops_at_a_line_that_cannot_be_read(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0 / step, "eval/loss": 2.0} for step in (1, 2)]
    before, after = (json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(before + line + b"\n" + after)
    assert results.read_metric_rows(tmp_path) == following.read_last_rows(path) == rows
    assert results.held_out_metrics_at_step(tmp_path, 2) == {"eval/loss": 2.0}
    assert following.loss_curve(path, 4) == [1.0, 0.5]
    assert search.metric_by_step(tmp_path, "eval/loss") == {1: 2.0, 2: 2.0}
    assert search.missing_metric_problem(tmp_path, "eval/accuracy").startswith("sweeper.metric=eval/accuracy: ")
    assert _last_step(tmp_path) == 2
    with pytest.warns(UserWarning, match="left out: line 2 "):
        assert len(Run(tmp_path).metrics()) == 2


def tracked(run_dir, config, **about):
    given = {"run_id": "", "name": "fsdp2-lora-lr2e-4", "resumed_at": 0, "settings": {}, "print_line": print, **about}
    return TrackedRun(config=config, run_dir=run_dir, **given)


def test_a_mount_that_stumbles_while_a_row_is_written_ends_no_run(tmp_path, monkeypatch):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl", 0)

    def stumble(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as stumbling:
        stumbling.setattr(Path, "exists", stumble)
        tracker.log({"loss": 2.0}, step=1)
    tracker.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl").rows] == [1]


def test_tensorboard_run_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    config = LoggingConfig(wandb=WandbMode.disabled, tensorboard=True)
    trackers = open_trackers(tracked(tmp_path, config), {}).trackers
    trackers.log({"loss": 1.5}, step=3)
    trackers.close(RunEnding(RunState.done))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5)]


def test_trackers_count_the_seconds_of_all_steps_also_after_a_resume_and_a_rollback(tmp_path):
    seen = []

    class Rows:
        hint = None

        def log(self, metrics, *, step):
            seen.append((metrics["train/global_step"], metrics["time/training_s"]))

    path = tmp_path / "metrics.jsonl"
    first = Trackers(JsonlTracker(path, 0), [Rows()])
    for step in (1, 2, 3):
        first.log({"loss": 1.0, "step_s": 0.5}, step=step)
    first.rewind(2)
    first.log({"loss": 1.0, "step_s": 0.25}, step=3)
    first.log({"eval/loss": 1.0, "tokens": 5}, step=3)
    resumed = Trackers(JsonlTracker(path, 3), [Rows()])
    resumed.log({"loss": 1.0, "step_s": 1.0}, step=4)
    assert seen == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 1.25), (3, 1.25), (4, 2.25)]
    assert "time/training_s" not in path.read_text()


def test_tracker_that_fails_is_reported_and_costs_the_run_nothing(tmp_path):
    class Broken:
        hint = None

        def log(self, metrics, *, step):
            raise RuntimeError("no quota")

    said = []
    trackers = Trackers(JsonlTracker(tmp_path / "metrics.jsonl", 0), [Broken()], said.append)
    trackers.log({"loss": 1.0}, step=1)
    trackers.log({"loss": 2.0}, step=2)
    trackers.close(RunEnding(RunState.done))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert said == ["Broken stopped working and is dropped: RuntimeError: no quota"]


def test_metrics_rows_are_synced_and_say_later_what_was_measured(tmp_path, monkeypatch):
    class Seen(atomic_io.Disk):
        sizes: ClassVar[list[int]] = []

        def sync(self, descriptor):
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                self.sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(atomic_io, "disk", Seen())
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
    trackers.close(RunEnding(RunState.done))
    found = Trackers(JsonlTracker(path, 3)).earlier
    assert (found.metrics_before_training, found.last_metrics, found.last_row["step"]) == (
        {"eval/loss": 5.0},
        {"eval/loss": 4.0},
        3,
    )
    assert found.speed == {"tokens_per_s": 20.0}, "of the steps that count, and not of step 4"


def test_metrics_rows_that_a_checkpoint_counts_on_are_synced_also_after_a_resume(tmp_path, monkeypatch, capsys):
    """What a resume leaves of them is written anew: it used to lie in memory alone, and a sync that failed was not told."""
    done, broken = [], []

    class Watched(atomic_io.Disk):
        def sync(self, descriptor):
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            if name in broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done.append(name)

        def rename(self, source, target):
            done.append(f"{source.name} is {target.name}")
            super().rename(source, target)

    monkeypatch.setattr(atomic_io, "disk", Watched())
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
