"""Room on the disk: what is estimated before the work, against what is written; refusals with the numbers."""

import bz2
import gzip
import lzma
import math
import random
import shutil
from collections import namedtuple
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strategies.errors import StorageError
from tests.helpers.covering import EVERYTHING
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data import disk_space
from trainer.data.config import DataConfig, DuplicatePolicy, DuplicatesConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.read.opening import decompression_ratio
from trainer.data.selection import bands

Usage = namedtuple("Usage", "total used free")
ROWS = [row for seed in range(2) for row in chat_rows(1500, seed=seed)]
STORE = ("tokens.bin", "supervised.bin", "offsets.npy", "columns.npz", "documents.arrow")


def written_as(path, kind):
    name = {"arrow": "x.arrow", "parquet": "x.parquet"}.get(kind, f"x.jsonl{kind}")
    if kind in ("arrow", "parquet"):
        table = pa.Table.from_pylist([{**row, "picture": bytes(5000)} for row in ROWS])
        if kind == "parquet":
            pq.write_table(table, path / name)
        else:
            with pa.ipc.new_file(path / name, table.schema) as file:
                file.write_table(table, max_chunksize=1000)
        return path / name
    write_jsonl(path / "x.jsonl", ROWS)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(kind)
    if pack:
        (path / name).write_bytes(pack((path / "x.jsonl").read_bytes()))
    return path / name


def preparation(path, **settings):
    settings = {"ignore_columns": ["picture"], **settings}
    config = DataConfig(path=str(path), cache_dir=str(path.parent / "cache"), workers=1, **settings)
    return Preparation(config, tiny_tokenizer(), DataSpec(), seed=0)


@pytest.fixture
def room(monkeypatch):
    """Sets the bytes that seem to be free."""
    return lambda free: monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(2 * free, free, free))


@pytest.mark.parametrize("kind", ["", ".xz", "parquet", *([".gz", ".bz2", "arrow"] if EVERYTHING else [])])
def test_space_estimate_is_what_is_written(tmp_path, room, kind):
    path = written_as(tmp_path, kind)
    data = preparation(path).open_or_prepare()
    written = sum((data.directory / name).stat().st_size for name in STORE)
    shutil.rmtree(tmp_path / "cache")
    room(int(0.8 * written))
    with pytest.raises(
        StorageError, match=r"data\.cache_dir=.* GiB will be written, and .* GiB are free .*data\.max_documents"
    ):
        preparation(path).open_or_prepare()
    assert not list((tmp_path / "cache").rglob("tokens.bin")), "nothing was begun"
    room(int(1.2 * written))
    assert len(preparation(path).open_or_prepare().train) == len(data.train)


def test_space_estimate_is_less_for_fewer_documents_and_shards(tmp_path, room):
    path = written_as(tmp_path, "")
    data = preparation(path).open_or_prepare()
    written = sum((data.directory / name).stat().st_size for name in STORE)
    room(int(0.3 * written))
    preparation(path, max_documents=len(ROWS) // 5, max_length=99).open_or_prepare()
    other = preparation(path, max_length=98)
    with pytest.raises(StorageError, match="will be written by this shard"):
        other.make_shard(0, 2)
    other.make_shard(0, 5)


def test_space_estimate_counts_the_files_of_the_search_for_near_copies(tmp_path, room, monkeypatch):
    """They have no names, and are gone when the data is prepared."""
    path = written_as(tmp_path, "")
    searching = {"duplicates": DuplicatesConfig(near=DuplicatePolicy.report)}
    sizes = []
    make_file = bands._zeros_in_unnamed_file

    def measured(shape, dtype, directory):
        sizes.append(math.prod(shape) * np.dtype(dtype).itemsize)
        return make_file(shape, dtype, directory)

    monkeypatch.setattr(bands, "_zeros_in_unnamed_file", measured)
    data = preparation(path, **searching).open_or_prepare()
    written = sum((data.directory / name).stat().st_size for name in STORE)
    shutil.rmtree(tmp_path / "cache")
    assert sum(sizes) > 0.15 * written, "enough to tell"
    room(int(1.05 * written))
    with pytest.raises(StorageError, match="GiB will be written"):
        preparation(path, **searching).open_or_prepare()


def test_space_is_not_measured_where_there_is_plenty(tmp_path, monkeypatch):
    path = written_as(tmp_path, "")
    monkeypatch.setattr(disk_space, "_measure_first_block", lambda *_: pytest.fail("measured"))
    assert len(preparation(path, max_documents=10).open_or_prepare().train)


def test_space_estimate_of_a_large_file_is_judged_by_its_start(tmp_path):
    draw = random.Random(3)
    text = b"".join(f"{draw.getrandbits(64)} some words\n".encode() for number in range(250_000))
    zstd = partial(pa.compress, codec="zstd", asbytes=True)
    xz = partial(lzma.compress, preset=0)  # the default takes ten times as long for the same kind of file
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", xz), (".zst", zstd)):
        path = tmp_path / f"x.txt{suffix}"
        path.write_bytes(pack(text))
        assert path.stat().st_size > 1.3 * 2**20, "only a part of it is looked at"
        assert decompression_ratio(path) == pytest.approx(len(text) / path.stat().st_size, rel=0.1)
