"""`data.streaming`: hub data sets read from a hub as they are prepared, beside the same sets copied first."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strategies.errors import DataError
from tests.helpers.hub import COMMIT, hub
from tests.helpers.launching import ROOT, clean_environment, command_here
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from trainer.data.config import DataConfig, SourceConfig
from trainer.data.prepare import open_prepared
from trainer.data.read.origin import Origin
from trainer.data.sources import data_problems

CALLS = """
import json, sys
from pathlib import Path
from launch.main import main
words, home = json.loads(sys.argv[1])
for more in (["data.streaming=true"], []):
    assert main([*words, *more]) == 0
    copied = [path.name for path in Path(home).rglob("*") if path.suffix in (".arrow", ".parquet", ".jsonl")]
    print(json.dumps(copied))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two sets of a hub, prepared from a stream and from a copy, and what was said of each."""
    root = tmp_path_factory.mktemp("stream")
    tiny_tokenizer().save_pretrained(root / "tok")
    (root / "tok" / "config.json").write_text('{"model_type": "llama"}')
    lines, tables = root / "served/datasets/org/lines", root / "served/datasets/org/tables"
    for place in (lines, tables):
        place.mkdir(parents=True)
    write_chat_data(lines / "train-0.jsonl", 700)
    write_chat_data(lines / "train-1.jsonl", 40)
    rows = [json.loads(line) | {"extra": number} for number, line in enumerate((lines / "train-0.jsonl").open())]
    pq.write_table(pa.Table.from_pylist(rows[:600]), tables / "train-0.parquet", row_group_size=100)
    words = [
        "prepare",
        f"model.path={root / 'tok'}",
        "data.max_length=512",
        "data.sources.a.path=hub:org/lines",
        "--json",
    ]
    words += [f"data.sources.a.revision={COMMIT}", f"data.sources.b.revision={COMMIT}", "data.duplicates.exact=none"]
    words += ["data.sources.b.path=hub:org/tables", "data.ignore_columns=[extra]", f"data.cache_dir={root / 'cache'}"]
    with hub(root / "served") as (address, _):
        home = str(root / "hf")
        env = clean_environment(HF_HOME=home, HF_ENDPOINT=address, PYTHONPATH=str(ROOT))
        command = [sys.executable, "-c", CALLS, json.dumps([words, home])]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stream, after_stream, copy, after_copy = map(json.loads, done.stdout.splitlines()[-4:])
    assert not after_stream and after_copy  # the copied way leaves copies of the hub's files, the other one none
    return words, stream, copy


def test_streaming_gives_the_rows_of_the_copy_and_copies_nothing(prepared):
    _, *both = prepared
    stream, copy = (open_prepared(Path(told["directory"])) for told in both)
    assert len(stream.train) == 1340 and stream.directory != copy.directory
    for name in ("tokens", "supervised", "starts", "lengths"):
        assert np.array_equal(getattr(stream.train, name), getattr(copy.train, name)), name


def test_streaming_prepared_data_is_opened_without_a_hub(prepared, capsys):
    words, stream, _ = prepared
    assert command_here([*words, "data.streaming=true"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["cached"] and told["directory"] == stream["directory"]


def test_streaming_without_a_hub_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    origin = Origin("data.path", [Path("hub:org/none-such")], split="train", revision=COMMIT, streaming=True)
    with pytest.raises(
        DataError, match=r"hub:org/none-such .*run shardtune prepare where it is, .*data\.streaming=false"
    ):
        list(origin.rows())


def test_streaming_that_breaks_off_is_an_error_and_no_end(monkeypatch):
    class Broken:
        column_names, split, features = ["a"], "train", None

        def select_columns(self, _):
            return self

        def with_format(self, _):
            return self

        def iter(self, _):
            yield pa.table({"a": ["x"]})
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(Origin, "load_hub_split", lambda *_: Broken())
    rows = Origin("data.path", [Path("hub:org/x")], revision=COMMIT, streaming=True).rows()
    next(rows)
    with pytest.raises(DataError, match=r"hub:org/x/train cannot be loaded: reset by peer"):
        next(rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"sources": {"a": SourceConfig(path="hub:org/x")}},
            "data.sources.a.revision=None: data.streaming=true reads hub:org/x",
        ),
        (
            {"sources": {"a": SourceConfig(path=["b.jsonl", "hub:org/x"], revision="v1")}},
            "revision=v1: data.streaming=true",
        ),
        ({"path": "hub:org/x"}, "data.path=hub:org/x: data.streaming=true reads hub data sets at a commit"),
        ({"path": "x.jsonl", "eval_path": {"own": "hub:org/x"}}, "data.eval_path=hub:org/x: data.streaming=true"),
        ({"path": "x.jsonl"}, "no data set of the hub is named"),
        ({"sources": {"a": SourceConfig(path="hub:org/x", revision=COMMIT)}}, None),
    ],
)
def test_streaming_needs_hub_data_sets_named_at_a_commit(settings, said):
    found = [problem for problem in data_problems(DataConfig(streaming=True, **settings)) if "streaming" in problem]
    assert (said in found[0] and len(found) == 1) if said else not found
