"""The power goes at every single call of a save: what was published before is whole, or what was being saved is."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from strategies import atomic_io
from strategies.atomic_io import write_new_file
from strategies.base import Progress
from strategies.runtime import Runtime
from trainer.checkpoints.config import CheckpointConfig
from trainer.checkpoints.layout import checkpoints_in
from trainer.checkpoints.manager import Checkpoints
from trainer.checkpoints.resume_selection import choose_checkpoint

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)


class PowerCut(BaseException):
    pass


class Cache(atomic_io.Disk):
    """Knows what a disk would have after a power cut: bytes that were synced, names of directories that were synced.

    Inodes are followed, as a file system does: a renamed directory keeps what was synced in it under its old name.
    """

    def __init__(self, root: Path, exchanges: bool):
        self.root, self.calls, self.cut_at, self.can_swap_names = root, 0, -1, exchanges
        self.bytes: dict[int, bytes] = {}
        self.listed: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        self.kinds: dict[int, bool] = {root.stat().st_ino: True}
        self.kept: list[int] = []
        """Descriptors that keep inodes from being given to other files."""

    def _call(self):
        self.calls += 1
        if self.calls == self.cut_at:
            raise PowerCut

    def open(self, path, flags):
        self._call()
        descriptor = super().open(path, flags)
        self.kept.append(os.dup(descriptor))
        self.kinds[os.fstat(descriptor).st_ino] = path.is_dir()
        return descriptor

    def write(self, descriptor, data):
        self._call()
        return super().write(descriptor, data)

    def sync(self, descriptor):
        self._call()
        inode = os.fstat(descriptor).st_ino
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_dir():
            self.listed[inode] = {each.name: each.stat().st_ino for each in path.iterdir()}
        else:
            self.bytes[inode] = path.read_bytes()

    def make_directory(self, path):
        self._call()
        super().make_directory(path)
        self.kept.append(os.open(path, os.O_RDONLY))
        self.kinds[path.stat().st_ino] = True

    def rename(self, source, target):
        self._call()
        super().rename(source, target)

    def swap_names(self, one, other):
        self._call()
        if not self.can_swap_names:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(one))
        super().swap_names(one, other)

    def remove_tree(self, path):
        self._call()
        self.listed[path.stat().st_ino] = {}  # at once, also where the name that it had before is still on the disk
        super().remove_tree(path)

    def after_the_cut(self, target: Path, *, names_arrived: bool) -> None:
        """What is found when the power is back. `names_arrived`: names and removals had reached the disk by themselves."""
        if names_arrived:
            for path in [self.root, *self.root.rglob("*")]:
                place = target / path.relative_to(self.root)
                if path.is_dir():
                    place.mkdir(parents=True)
                else:
                    place.write_bytes(self.bytes.get(path.stat().st_ino, b""))
            return
        self._rebuild(self.root.stat().st_ino, target)

    def _rebuild(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self.listed.get(inode, {}).items():
            if self.kinds.get(child, False) or child in self.listed:
                self._rebuild(child, target / name)
            else:
                (target / name).write_bytes(self.bytes.get(child, b""))

    def close(self):
        for descriptor in self.kept:
            os.close(descriptor)


class Engine:
    def state(self, progress: Progress):
        return SimpleNamespace(save=partial(self.save, progress), num_elements=512)

    def save(self, progress: Progress, path: Path):
        return [
            write_new_file(path / "a.safetensors", bytes([progress.step]) * 999),
            write_new_file(path / "progress.json", b"{}"),
        ]


SAVED = (1, 2, 3, 3)
"""Steps; the last is written again, as an evaluation that was made up asks for."""


@pytest.mark.parametrize("exchanges", [True, False], ids=["names are swapped", "names cannot be swapped"])
@pytest.mark.parametrize("names_arrived", [False, True])
def test_power_cut_at_any_call_loses_no_saved_checkpoint(tmp_path, monkeypatch, names_arrived, exchanges):
    cut, saved, put_back = 0, 0, 0
    while saved < len(SAVED):
        cut += 1
        root = tmp_path / f"cut-{cut}"
        root.mkdir()
        disk = Cache(root, exchanges)
        monkeypatch.setattr(atomic_io, "disk", disk)
        disk.cut_at = cut
        checkpoints = Checkpoints([root / "checkpoints"], CheckpointConfig(keep=1), ALONE)
        saved = 0
        try:
            for step in SAVED:
                checkpoints.save_checkpoint(Engine(), Progress(step=step))
                saved += 1
        except PowerCut:
            pass
        monkeypatch.setattr(atomic_io, "disk", atomic_io.Disk())
        found = tmp_path / "found"
        disk.after_the_cut(found, names_arrived=names_arrived)
        disk.close()
        places = [found / "checkpoints"]
        put_back += any(path.name == ".step-000003.replaced" for _, path in checkpoints_in(places))
        best = choose_checkpoint(places, "auto", ALONE)
        assert (int(best.name[5:]) if best else 0) in (0, *SAVED)[saved : saved + 2], (cut, checkpoints_in(places))
        later = Checkpoints(places, CheckpointConfig(keep=1), ALONE)
        later.continue_from_checkpoint(best)
        assert later.save_checkpoint(Engine(), Progress(step=9))
        assert [path.name for path in places[0].iterdir()] == ["step-000009"], "and nothing is left over"
        shutil.rmtree(found)
    assert cut > 60 and put_back == (names_arrived and not exchanges)
