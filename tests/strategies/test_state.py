"""Training state on disk: any cut into runs reads what any other wrote; no file runs code or leaves memory unread."""

import errno
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from strategies import atomic_io, tensor_files
from strategies.atomic_io import WrittenFile, file_difference
from strategies.base import Progress
from strategies.errors import ConfigError, ShardtuneError, StorageError
from strategies.runtime import Runtime
from strategies.saving import FlatRange, RankState
from strategies.state import StateHeader, load_state, read_state_header
from strategies.tensor_files import (
    RANK_FILE_FORMAT,
    LocalElements,
    MalformedFile,
    index_json,
    parse_index,
    planned_tensor_file,
    write_tensors,
)
from tests.helpers.covering import EVERYTHING
from trainer.checkpoints.manifest import checkpoint_problem, write_manifest

ALONE = Runtime(0, 1, 0, 1, torch.device("cpu"), None)
SIZES = {"embed.weight": 977, "norm.weight": 8, "head.bias": 1}
KEYS = ("weight", "exp_avg", "exp_avg_sq")


def whole(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}/{key}": torch.randn(size, generator=generator) for name, size in SIZES.items() for key in KEYS}


def cut(values: dict[str, torch.Tensor], world: int, rank: int, *, copies: bool = False) -> list[FlatRange]:
    """Contiguous runs of each parameter for one of `world` ranks; most of them hold nothing of the small ones."""
    runs = []
    for name, size in SIZES.items():
        step = -(-size // world)
        low, high = min(rank * step, size), min((rank + 1) * step, size)
        part = {key: values[f"{name}/{key}"][low:high] for key in KEYS}
        runs.append(FlatRange(name, size, low, {key: p.clone() if copies else p for key, p in part.items()}))
    return runs


def header(**changes) -> StateHeader:
    fields = {"progress": Progress(step=3), "optimizer_steps": 3, "world_size": 1, "strategy": "single", **changes}
    return StateHeader(**fields)


def save_as(path: Path, world: int, values: dict[str, torch.Tensor]) -> None:
    """What `world` ranks write."""
    RankState([], header(world_size=world).json(), ALONE).save(path)
    parts = []
    for rank in range(world):
        held = [each for run in cut(values, world, rank) for each in run.local_elements()]
        head, places = planned_tensor_file(held, RANK_FILE_FORMAT.format(rank))
        write_tensors(path / RANK_FILE_FORMAT.format(rank), head, held)
        parts.append(places)
    (path / "index.json").write_bytes(index_json(parts))


@pytest.mark.parametrize("writers", [1, 3, 7])
def test_state_written_by_any_number_of_ranks_is_read_by_any_other(tmp_path, writers):
    values = whole()
    save_as(tmp_path, writers, values)
    for readers in (1, 2, 5):
        for rank in range(readers):
            runs = cut(whole(seed=1), readers, rank, copies=True)
            assert load_state(tmp_path, runs, ALONE).progress.step == 3
            for run, expected in zip(runs, cut(values, readers, rank), strict=True):
                for key in KEYS:
                    assert torch.equal(run.tensors_by_key[key], expected.tensors_by_key[key])


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
def test_state_that_rank_0_sees_is_waited_for_where_another_host_has_just_written_it(tmp_path, monkeypatch, code):
    """Also progress and index, and not what nobody sees."""

    class Late(atomic_io.Disk):
        def __init__(self):
            self.failed, self.slept = [], 0.0

        def open(self, path, flags):
            if self.failed.count(path.name) < 3:
                self.failed.append(path.name)
                raise OSError(code, os.strerror(code), str(path))
            return super().open(path, flags)

        def sleep(self, seconds):
            self.slept += seconds

    save_as(tmp_path, 1, whole())
    monkeypatch.setattr(atomic_io, "disk", Late())
    assert load_state(tmp_path, cut(whole(), 1, 0), ALONE).progress.step == 3
    assert {*atomic_io.disk.failed} == {"progress.json", "index.json", RANK_FILE_FORMAT.format(0)}
    (tmp_path / "progress.json").unlink()
    monkeypatch.setattr(atomic_io, "disk", Late())
    with pytest.raises(StorageError, match=r"progress\.json"):
        load_state(tmp_path, cut(whole(), 1, 0), ALONE)
    assert atomic_io.disk.slept == 0


def test_state_files_are_plain_safetensors(tmp_path):
    """By the library's own reader, which knows nothing of the index."""
    values = whole()
    save_as(tmp_path, 2, values)
    for name, expected in values.items():
        parts = []
        for path in sorted(tmp_path.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                parts += [file.get_tensor(name)] if name in file.keys() else []  # noqa: SIM118 - not a dict
        assert torch.equal(torch.cat(parts), expected)


def test_state_is_returned_as_stored_and_other_types_as_float32(tmp_path):
    half = {"weight": torch.arange(6, dtype=torch.bfloat16), "step": torch.ones(6, dtype=torch.uint8)}
    files = RankState(
        [FlatRange("a", 6, 0, half), FlatRange("b", 6, 0, half, is_written=False)], header().json(), ALONE
    ).save(tmp_path)
    assert {each.name for each in files} == {path.name for path in tmp_path.iterdir()}
    assert all(file_difference(tmp_path, each) is None for each in files)
    back = {key: torch.zeros_like(value) for key, value in half.items()}
    load_state(tmp_path, [FlatRange("a", 6, 0, back)], ALONE)
    assert all(torch.equal(back[key], half[key]) for key in half)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([FlatRange("a", 4, 0, {"weight": torch.zeros(4), "exp_avg": torch.zeros(4)})], "does not hold a/exp_avg"),
        ([], "beyond what this run trains, a/weight"),
        ([FlatRange("a", 5, 0, {"weight": torch.zeros(5)})], "has 4 elements of a/weight, this run 5"),
    ],
)
def test_state_of_another_kind_of_run_is_refused(tmp_path, runs, said):
    RankState([FlatRange("a", 4, 0, {"weight": torch.zeros(4)})], header().json(), ALONE).save(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_state(tmp_path, runs, ALONE)


def test_state_index_with_a_missing_doubled_or_outside_part_is_refused():
    file = RANK_FILE_FORMAT.format(0)
    good = {"a/weight": [[file, 0, 3, 8], [file, 3, 2, 20]]}
    assert parse_index(json.dumps(good).encode())["a/weight"][1].length == 2
    for rows in (
        [],
        [[file, 1, 3, 8]],  # a gap at the start
        [[file, 0, 3, 8], [file, 4, 2, 20]],  # a gap
        [[file, 0, 3, 8], [file, 2, 3, 20]],  # twice
        [[file, 0, 3, 8], [file, 0, 3, 8]],
        [[file, 0, 0, 8]],
        [[file, 0, -3, 8]],
        [[file, 0, True, 8]],
        [[file, 0, 3.0, 8]],
        [[file, 0, 3]],
        [["../" + file, 0, 3, 8]],
        [["/etc/passwd", 0, 3, 8]],
        [[".", 0, 3, 8]],
        {"file": file},
    ):
        with pytest.raises(MalformedFile):
            parse_index(json.dumps({"a/weight": rows}).encode())
    for text in ("null", "[]", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"):
        with pytest.raises(MalformedFile):
            parse_index(text.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer_steps": -1},
        {"optimizer_steps": "3"},
        {"optimizer_steps": True},
        {"world_size": 1e9},
        {"strategy": None},
        {"loss_scale": 0},
        {"loss_scale": float("nan")},
        {"groups": {"lr": 1}},
        {"groups": [{"params": []}]},
        {"progress": None},
        {"progress": {"step": "x"}},
        {"progress": {"steps": 1}},
        {"progress": {"wandb_id": 7}},
        {"progress": {"recent": [{"loss": 1.0}]}},
        {"progress": {"recent": 3}},
        {"progress": {"passed": [{"first": 8, "count": -4}]}},
        {"progress": {"passed": [{"first": 8, "count": 0.5}]}},
        {"progress": {"passed": [{"first": 8}]}},
        {"more": 1},
    ],
)
def test_state_with_damaged_progress_is_refused(tmp_path, change):
    RankState([], header().json(), ALONE).save(tmp_path)
    raw = json.loads((tmp_path / "progress.json").read_text())
    (tmp_path / "progress.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(StorageError, match=r"progress\.json"):
        read_state_header(tmp_path)


def test_state_with_progress_that_never_improved_is_not_damaged(tmp_path):
    RankState([], header(progress=Progress(step=1, best_metric=float("inf"))).json(), ALONE).save(tmp_path)
    assert read_state_header(tmp_path).progress.best_metric == float("inf")


def test_state_without_room_is_not_begun(tmp_path, monkeypatch):
    from strategies import atomic_io

    class Full(atomic_io.Disk):
        def free(self, path):
            return 2**20 + 15

    monkeypatch.setattr(atomic_io, "disk", Full())
    with pytest.raises(StorageError, match=r"^No space left on .* 1 MiB are needed and 1 MiB are free"):
        RankState([FlatRange("a", 4, 0, {"weight": torch.zeros(4)})], header().json(), ALONE).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- hostile files -----------------------------------------------------------------------------------------------------

UNPICKLED: list[object] = []
WATCHING = [False]
sys.addaudithook(
    lambda event, arguments: UNPICKLED.append(arguments) if WATCHING[0] and event == "pickle.find_class" else None
)
UNREAD = 0x7FAB_CDEF
"""Bits of a number that no file here has: what memory holds before it was read."""


class Runs:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Bytes as damage, a careless hand or an attacker would leave them."""
    at = chance.randrange(max(1, len(data)))
    kind = chance.randrange(8)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return pickle.dumps(Runs())
    if kind == 2:
        return data[:at] + pickle.dumps(Runs()) + data[at:]
    if kind == 3:
        return data[:at] + data[at : at + 40] + data[at:]
    if kind == 4:
        return data[:at] + data[at + chance.randrange(1, 30) :]
    if kind == 5:
        digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57] or [at]
        place = chance.choice(digits)
        return (
            data[:place] + chance.choice([b"-1", b"99999999999", b"0", b"1e3", b"null", b"9" * 400]) + data[place + 1 :]
        )
    if kind == 6:
        word = chance.choice([b"null", b"[]", b"{}", b"NaN", b"\x00", b"[" * 60_000, b'"../../x"', b"\xff"])
        return data[:at] + word + data[at:]
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :] if data else b"\0"


def test_state_file_runs_no_code_raises_only_known_errors_and_leaves_no_memory_unread(tmp_path, monkeypatch):
    """Sealed anew, as an attacker would: the seal is no protection here, the format is."""
    monkeypatch.chdir(tmp_path)
    real = torch.empty
    monkeypatch.setattr(
        tensor_files.torch,
        "empty",
        lambda size, dtype: real(size, dtype=dtype).view(torch.int32).fill_(UNREAD).view(dtype),
    )
    good = tmp_path / "good"
    good.mkdir()
    save_as(good, 2, whole())
    names = sorted(path.name for path in good.iterdir())
    chance = random.Random(0)
    count = {"used": 0, "refused": 0}
    for _ in range(1000 if EVERYTHING else 200):
        there = tmp_path / "changed"
        there.mkdir()
        contents = {name: (good / name).read_bytes() for name in names}
        for name in {chance.choice([*names, "index.json", "progress.json"]) for _ in range(chance.randrange(1, 3))}:
            contents[name] = mutated(contents[name], chance)
        for name, data in contents.items():
            (there / name).write_bytes(data)
        if chance.random() < 0.8:
            write_manifest(
                there, [WrittenFile(path.name, path.stat().st_size, digest(path)) for path in there.iterdir()]
            )
            assert checkpoint_problem(there) is None
        elif chance.random() < 0.9:
            (there / "manifest.json").write_bytes(mutated(b'{"format": 2, "sha256": "x", "files": {}}', chance))
            assert checkpoint_problem(there) is not None
        runs = cut(whole(seed=1), 1, 0, copies=True)
        WATCHING[0] = True
        try:
            load_state(there, runs, ALONE)
            count["used"] += 1
        except ShardtuneError as error:
            count["refused"] += 1
            assert len(str(error)) < 1000
        finally:
            WATCHING[0] = False
        for run in runs:
            assert not any((value.view(torch.int32) == UNREAD).any() for value in run.tensors_by_key.values())
        for path in [*there.iterdir()]:
            path.unlink()
        there.rmdir()
    assert not UNPICKLED and not Path("executed").exists()
    assert min(count.values()) > 20, count


def digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_state_test_of_code_in_files_can_fail(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WATCHING[0] = True
    pickle.loads(pickle.dumps(Runs()))
    WATCHING[0] = False
    assert UNPICKLED and Path("executed").exists()
    UNPICKLED.clear()


def test_state_elements_are_named_by_parameter_and_moment():
    held = FlatRange("a", 9, 3, {"weight": torch.ones(2), "exp_avg": torch.ones(0)}).local_elements()
    assert [(each.name, each.full_numel, each.start) for each in held] == [("a/weight", 9, 3)] and isinstance(
        held[0], LocalElements
    )
