"""The ranks look through a checkpoint together: each file by one of them, and what one finds all are told."""

from dataclasses import replace

import pytest
import torch

from strategies.atomic_io import write_new_file
from strategies.runtime import Runtime
from trainer.checkpoints import manifest as sealing
from trainer.checkpoints.manifest import checkpoint_problem_on_all_ranks, read_manifest, write_manifest

WORLD = 3
ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)
SIZES = (900, 700, 500, 400, 300, 200, 1)


@pytest.mark.parametrize("damaged", [None, 0, 4, 6])
def test_manifest_verification_reads_each_file_once_and_tells_all_ranks_of_damage(tmp_path, monkeypatch, damaged):
    files = [
        write_new_file(tmp_path / f"rank-{number:05d}.safetensors", bytes(size)) for number, size in enumerate(SIZES)
    ]
    write_manifest(tmp_path, files)
    if damaged is not None:
        (tmp_path / files[damaged].name).write_bytes(bytes(SIZES[damaged] - 1) + b"\1")
    read, told, real = [], [], sealing.file_difference

    def noted(directory, expected, looks):
        read.append((rank, expected))
        return real(directory, expected, looks)

    def gathered(mine, runtime):
        told.append(mine)
        return [mine]

    monkeypatch.setattr(sealing, "file_difference", noted)
    monkeypatch.setattr(sealing, "broadcast_object", lambda found, runtime: (None, read_manifest(tmp_path)))
    monkeypatch.setattr(sealing, "gather_objects", gathered)
    for rank in range(WORLD):
        checkpoint_problem_on_all_ranks(tmp_path, replace(ALONE, rank=rank, world_size=WORLD))
    names = [each.name for _, each in read]
    assert len(set(names)) == len(names) and (damaged is not None or set(names) == {each.name for each in files})
    loads = [sum(each.size for by, each in read if by == rank) for rank in range(WORLD)]
    assert damaged is not None or max(loads) - min(loads) < max(SIZES) / 2, "one rank hashes most of it"
    found = [each for each in told if each]
    assert found == ([] if damaged is None else [f"{files[damaged].name} does not have the bytes that were written"])
