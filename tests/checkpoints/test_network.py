"""A network file system fails once at every single call of saving and choosing: nothing that was said to be saved is missed."""

import errno
import itertools
import os
import shutil

import pytest
import torch

from strategies import atomic_io
from strategies.base import Progress
from strategies.errors import StorageError
from strategies.runtime import Runtime
from tests.checkpoints.test_power import SAVED, Engine
from tests.helpers.covering import chosen, values
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.manifest import checkpoint_problem
from trainer.checkpoints.resume_selection import choose_checkpoint

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)
CALLS = ("open", "write", "read", "sync", "names", "rename", "swap_names", "make_directory", "remove_tree")
AFTER = ("rename", "swap_names", "make_directory", "remove_tree")
"""Calls that may have been answered although nobody heard of it."""


class Network(atomic_io.Disk):
    """Fails at one call of all, before or after it was done; takes and gives a few bytes at a time; waits for nobody."""

    def __init__(self, code: int, *, lost_answer: bool) -> None:
        self.code, self.lost_answer, self.calls, self.fails_at, self.failed = code, lost_answer, 0, -1, ""

    def _failing(self, name: str) -> OSError | None:
        self.calls += 1
        if self.calls != self.fails_at:
            return None
        self.failed = name
        return OSError(self.code, os.strerror(self.code), name)

    def write(self, descriptor, data):
        return super().write(descriptor, data[:301])

    def read(self, descriptor, into, offset):
        return super().read(descriptor, into[:301], offset)

    def sleep(self, seconds):
        pass


def _wrapped(name: str):
    real = getattr(Network, name)

    def call(self, *given):
        failure = self._failing(name)
        if failure is not None and not (self.lost_answer and name in AFTER):
            raise failure
        done = real(self, *given)
        if failure is not None:
            raise failure
        return done

    return call


for _name in CALLS:
    setattr(Network, _name, _wrapped(_name))


@pytest.mark.parametrize(
    ("code", "lost_answer"), chosen(itertools.product((errno.EIO, errno.ESTALE), (False, True)), values)
)
def test_network_failure_at_any_call_loses_no_saved_checkpoint(tmp_path, monkeypatch, code, lost_answer):
    """As a periodic save that may fail, four times, and as the next start looks for it, on the same network."""
    met = set()
    for number in range(1, 999):
        root = tmp_path / str(number)
        root.mkdir()
        disk = Network(code, lost_answer=lost_answer)
        monkeypatch.setattr(atomic_io, "disk", disk)
        disk.fails_at, places, best = number, [root / "checkpoints"], 0
        said: list[str] = []
        made = Checkpoints(places, CheckpointConfig(keep=1, background=False), ALONE, said.append)
        for step in SAVED:
            if made.save_checkpoint(Engine(), Progress(step=step), must_succeed=False):
                best = step
            else:
                assert said[-1].startswith("the run continues without") and os.strerror(code) in said[-2], said
        for again in range(2):  # a start that the network fails says so, or takes the newest; and the next one takes it
            try:
                chosen = choose_checkpoint(places, "auto", ALONE)
                assert chosen is not None
                assert int(chosen.name[5:]) >= best, (number, disk.failed, checkpoints_in(places))
                break
            except StorageError as error:
                assert disk.failed and again == 0 and os.strerror(code) in str(error), (disk.failed, str(error))
        monkeypatch.setattr(atomic_io, "disk", atomic_io.Disk())
        assert checkpoint_problem(chosen) is None
        later = Checkpoints(places, CheckpointConfig(keep=1), ALONE)
        later.continue_from_checkpoint(chosen)
        assert (
            later.save_checkpoint(Engine(), Progress(step=9)) and checkpoint_problem(places[0] / "step-000009") is None
        )
        shutil.rmtree(root)
        if not disk.failed:
            break
        met.add(disk.failed)
    else:
        raise AssertionError("every start fails")
    assert met >= {"open", "write", "read", "sync", "names", "rename", "swap_names", "make_directory"}, met


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_network_error_that_passes_never_makes_a_start_choose_an_older_checkpoint(tmp_path, monkeypatch, code):
    places = [tmp_path / "checkpoints"]
    made = Checkpoints(places, CheckpointConfig(keep=3, background=False), ALONE)
    for step in (1, 2):
        made.save_checkpoint(Engine(), Progress(step=step))
    met = set()
    for number in range(1, 99):
        disk = Network(code, lost_answer=False)
        disk.fails_at = number
        monkeypatch.setattr(atomic_io, "disk", disk)
        assert choose_checkpoint(places, "auto", ALONE) == places[0] / "step-000002", (number, disk.failed)
        if not disk.failed:
            break
        met.add(disk.failed)
    assert met == {"names", "open", "read"}
