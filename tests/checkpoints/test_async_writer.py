"""Checkpoints that are written while training goes on: of one moment, whole or not there; in the step where memory is short."""

import errno
import os
import threading
from contextlib import contextmanager

import pytest
import torch

from strategies import atomic_io
from strategies.base import Progress
from strategies.errors import StorageError
from strategies.runtime import Runtime
from strategies.saving import FlatRange, RankState
from strategies.state import StateHeader, load_state
from tests.faults.runs import wait
from trainer.checkpoints import manager
from trainer.checkpoints import patience as patience_module
from trainer.checkpoints.async_writer import StateBuffer
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import checkpoint_dirs_of, checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.manifest import checkpoint_problem
from trainer.checkpoints.recovery import publish_complete_staging_dirs, write_part_note
from trainer.checkpoints.resume_selection import choose_checkpoint
from trainer.checkpoints.staging import create_staging_dir

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)
PLACES = 3


class Engine:
    """Trains: all its numbers are the step's."""

    def __init__(self):
        self.values = {"weight": torch.zeros(99), "exp_avg": torch.zeros(99, dtype=torch.bfloat16)}

    def train(self, progress: Progress) -> Progress:
        progress.step += 1
        for each in self.values.values():
            each.fill_(progress.step)
        return progress

    def state(self, progress: Progress) -> RankState:
        header = StateHeader(progress=progress, optimizer_steps=progress.step, world_size=1, strategy="single")
        return RankState([FlatRange("a", 99, 0, self.values)], header.json(), ALONE)

    def load(self, path):
        progress = load_state(path, [FlatRange("a", 99, 0, self.values)], ALONE).progress
        assert {each.unique().item() for each in self.values.values()} == {progress.step}
        return progress


class Slow(atomic_io.Disk):
    """Writes tensors when it is let; fails at those whose path has one of `full`."""

    def __init__(self, *full: str):
        self.let, self.full, self.threads = threading.Event(), full, []

    def open(self, path, flags):
        if path.suffix == ".safetensors" and flags & os.O_WRONLY:
            self.threads.append(threading.current_thread().name)
            assert self.let.wait(60)
            if any(part in str(path) for part in self.full):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return super().open(path, flags)


@pytest.fixture
def job(tmp_path, monkeypatch):
    def make(*full, **settings):
        disk = Slow(*full)
        monkeypatch.setattr(atomic_io, "disk", disk)
        config = CheckpointConfig(every_steps=1, fallback_dir=str(tmp_path / "spare"), **settings)
        said = []
        made = Checkpoints(checkpoint_dirs_of(tmp_path / "run", config.fallback_dir), config, ALONE, said.append)
        return made, Engine(), Progress(best_step=1), disk, said

    return make


def test_background_save_writes_the_state_of_the_step_in_which_it_began(job):
    made, engine, progress, disk, said = job(keep=1)
    for step in (1, 2):
        assert made.save_checkpoint(engine, engine.train(progress), must_succeed=False) and made.pending_step == step
        buffer = made._pending_checkpoint.state.local_elements[0].values.data_ptr()
        asked = [engine.train(progress).step for _ in range(3) if not made.pending_is_written(progress.step)]
        assert len(asked) == 3 and step not in dict(checkpoints_in(made.checkpoint_dirs)), (
            "training goes on, and nothing has a name"
        )
        disk.let.set()
        assert made.publish_pending() and made.pending_step is None
        disk.let.clear()
        path = made.last_published.path
        assert checkpoint_problem(path) is None and engine.load(path).step == step
        progress = Progress(step=step, best_step=1)
        assert (
            made.last_published.metric_columns["checkpoint_stall_s"]
            < made.last_published.metric_columns["checkpoint_write_s"]
        )
    assert disk.threads == ["checkpoint"] * 2, "not the thread that trains"
    made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    assert made._pending_checkpoint.state.local_elements[0].values.data_ptr() == buffer, "one buffer, used again"
    disk.let.set()
    assert made.publish_pending() and [step for step, _ in checkpoints_in(made.checkpoint_dirs)] == [1, 3], (
        "newest and best"
    )
    assert "training waited" in said[-1]


def test_background_save_that_is_killed_is_not_chosen_and_leaves_nothing(job, monkeypatch):
    made, engine, progress, disk, _ = job()
    disk.let.set()
    made.save_checkpoint(engine, engine.train(progress), must_succeed=True)
    disk.let.clear()
    made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    wait(lambda: disk.threads[1:], "the thread that writes")  # else it meets the disk of the next one
    names = sorted(path.name for path in made.checkpoint_dirs[0].iterdir())
    assert names == [".step-000002.writing", "step-000001"]
    later, *_ = job()
    resumed = choose_checkpoint(later.checkpoint_dirs, "auto", ALONE)
    later.continue_from_checkpoint(resumed)
    assert resumed.name == "step-000001" and [path.name for path in made.checkpoint_dirs[0].iterdir()] == [
        "step-000001"
    ]
    monkeypatch.setattr(
        atomic_io, "VISIBILITY_TIMEOUT_S", 0.0
    )  # else it looks for its directory while others are tested
    disk.let.set()
    made._pending_checkpoint.wait_for_outcome()


def test_background_save_on_the_fallback_disk_writes_the_same_step(job):
    made, engine, progress, disk, said = job("/run/checkpoints/")
    made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    engine.train(progress)
    disk.let.set()
    assert (
        made.publish_pending()
        and "/spare/" in str(made.last_published.path)
        and engine.load(made.last_published.path).step == 1
    )
    assert said[0].startswith("warning: No space left on device")


def test_background_save_that_no_disk_takes_is_reported_when_it_is_settled(job):
    made, engine, progress, disk, said = job("step-000001", max_failures=1)
    made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    disk.let.set()
    assert made.publish_pending() is False and made.pending_step is None and checkpoints_in(made.checkpoint_dirs) == []
    assert "continues without this checkpoint (1 failed in a row, 1 may)" in said[-1]
    assert made.save_checkpoint(engine, engine.train(progress), must_succeed=False) and made.publish_pending()


def test_error_names_each_directory_that_could_not_take_a_background_save(job, monkeypatch):
    made, engine, progress, disk, _ = job("/spare/", max_failures=0)

    def refuse_run_dir(staging, *arguments):
        if "/run/" in str(staging):
            raise StorageError("no room in run")
        create_staging_dir(staging, *arguments)

    monkeypatch.setattr(manager, "create_staging_dir", refuse_run_dir)
    assert made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    disk.let.set()
    with pytest.raises(StorageError, match="no room in run; No space left on device"):
        made.publish_pending()


def test_background_save_asks_all_ranks_less_and_less_often_until_they_are_done(job, monkeypatch):
    made, engine, progress, disk, _ = job()
    asked = []
    monkeypatch.setattr(
        "trainer.checkpoints.async_writer.gather_objects", lambda done, runtime: [asked.append(step), done]
    )
    made._pending_checkpoint = None
    made.state_buffer.copy_state = lambda state: True
    made.save_checkpoint(engine, engine.train(progress), must_succeed=False)
    for step in range(2, 40):
        made.pending_is_written(step)
    assert asked == [2, 3, 5, 9, 17, 25, 33]
    disk.let.set()
    made._pending_checkpoint.wait_for_outcome()


def test_background_save_short_of_host_memory_is_written_in_the_step_and_noted_once(job):
    made, engine, progress, disk, said = job()
    disk.let.set()
    made.state_buffer = StateBuffer(ALONE, free_memory=lambda: 800)  # 792 bytes are needed, and something must be left
    for step in (1, 2):
        assert made.save_checkpoint(engine, engine.train(progress), must_succeed=False) and made.pending_step is None
        assert made.last_published.path.name == f"step-{step:06d}" and disk.threads[-1] == "MainThread"
        assert made.last_published.stall_s == made.last_published.took_s
    told = [text for text in said if "a copy of the training state needs 792 bytes of host memory" in text]
    assert len(told) == 1 and "where 800 bytes are free" in told[0] and "checkpoint.background=false" in told[0]
    assert StateBuffer(ALONE, free_memory=lambda: 900).copy_state(engine.state(progress)) and StateBuffer(
        ALONE, free_memory=lambda: None
    ).copy_state(engine.state(progress))


def test_free_host_memory_is_a_plausible_number():
    from strategies.runtime import free_host_memory_bytes

    free = free_host_memory_bytes()
    assert free is None or 2**20 < free < 2**46


def test_checkpoint_disk_that_does_not_answer_is_waited_for_by_size_and_reported(tmp_path, monkeypatch):
    """Ranks that wait for one whose fsync takes longer than `run.timeout_s` do not end the run; each minute somebody says so."""
    more_s, said = [], []

    @contextmanager
    def patience(runtime, seconds):
        more_s.append(seconds)
        yield

    monkeypatch.setattr(patience_module, "longer_timeout", patience)
    monkeypatch.setattr(patience_module, "REPORT_INTERVAL_S", 0.01)
    monkeypatch.setattr(manager, "REPORT_INTERVAL_S", 0.0)
    disk = Slow()
    monkeypatch.setattr(atomic_io, "disk", disk)
    made = Checkpoints(checkpoint_dirs_of(tmp_path, None), CheckpointConfig(), ALONE, said.append)
    engine = Engine()
    assert made.save_checkpoint(engine, engine.train(Progress()), must_succeed=False)
    assert not made.pending_is_written(2)
    settling = threading.Thread(target=made.publish_pending)
    settling.start()
    wait(lambda: any("waiting for the disk" in line for line in said), "the wait is told of")
    assert "checkpoint step-000001: waiting for the disk for 0 s; as long as it takes" in said
    assert any(line.startswith("checkpoint step-000001: still being written after ") for line in said)
    disk.let.set()
    settling.join()
    assert made.last_published is not None
    size = 4 * engine.state(Progress()).num_elements
    assert more_s == [900, 900 + size / 10e6, 900 + size / 10e6]


def ranks_of_one_run(values: list[torch.Tensor]) -> list[RankState]:
    """Two ranks with half of a parameter each, of which the second one writes nothing of another parameter."""
    header = StateHeader(progress=Progress(step=2), optimizer_steps=2, world_size=2, strategy="fsdp2").json()
    states = []
    for rank, half in enumerate(values):
        held = [
            FlatRange("a", 8, 4 * rank, {"weight": half}),
            FlatRange("b", 4, 0, {"weight": half}, is_written=rank == 0),
        ]
        states.append(RankState(held, header, Runtime(rank, 2, rank, 2, torch.device("cpu"), None)))
    return states


@pytest.mark.parametrize("lacks", [None, "rank-00001.part.json", "rank-00000.safetensors"])
def test_checkpoint_that_all_ranks_had_written_is_published_by_the_next_start(tmp_path, lacks):
    place, said = tmp_path / "checkpoints", []
    aside = place / ".step-000002.writing"
    aside.mkdir(parents=True)
    for state in ranks_of_one_run([torch.arange(4.0), torch.arange(4.0, 8.0)]):
        write_part_note(aside, state, state.write_part(aside))
    if lacks is not None:
        (aside / lacks).unlink()
    publish_complete_staging_dirs([place], said.append)
    if lacks == "rank-00001.part.json":  # that rank had not come to the end of its file
        assert checkpoints_in([place]) == [] and said == []
        return
    [(step, path)] = checkpoints_in([place])
    assert step == 2 and "all of it was written when the run ended" in said[0]
    if lacks is not None:
        assert checkpoint_problem(path) == "rank-00000.safetensors is missing"
        return
    assert checkpoint_problem(path) is None
    a, b = torch.zeros(8), torch.zeros(4)
    whole = [FlatRange("a", 8, 0, {"weight": a}), FlatRange("b", 4, 0, {"weight": b})]
    assert load_state(path, whole, ALONE).progress.step == 2
    assert a.tolist() == list(range(8)) and b.tolist() == list(range(4))


FOREIGN = b'{"world_size": 1, "parts": {}, "file": null, "progress": 3}'


@pytest.mark.parametrize("note", [b"", b"[", b"[]", b'{"parts": {"a": 3}}', b"\xff", FOREIGN])
def test_checkpoint_part_note_that_cannot_be_read_is_a_warning_at_the_next_start(tmp_path, note):
    aside, said = tmp_path / "checkpoints" / ".step-000002.writing", []
    aside.mkdir(parents=True)
    (aside / "rank-00000.part.json").write_bytes(note)
    publish_complete_staging_dirs([aside.parent], said.append)
    assert checkpoints_in([aside.parent]) == []
    assert said[0].startswith("warning: ") and "could not be made a checkpoint" in said[0]
