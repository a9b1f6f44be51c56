"""What `shardtune prepare` says of columns and files, on real runs: unread columns, carriers of meaning, shapes, addresses."""

import bz2
import gzip
import io
import json
import lzma
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.main import main
from tests.data.broken_files import zst
from tests.helpers.models import tiny_model_dir
from tests.helpers.tokenizers import tiny_tokenizer, write_jsonl
from trainer.data.store.documents import DocumentTable

QA = [{"question": f"what is {n}", "answer": f"it is {n}"} for n in range(6)]
FROM_USER, FROM_GPT = {"from": "human", "value": "which is right"}, {"from": "gpt", "value": "this one"}


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A directory with a model and its tokenizer, and no traces of earlier runs."""
    tiny_tokenizer().save_pretrained(tiny_model_dir(tmp_path / "model"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Shell:
    def __init__(self, capsys) -> None:
        self.capsys = capsys

    def __call__(self, *words: str, path: str | None = "train.jsonl", code: int = 0) -> str:
        named = [f"data.path={path}"] if path else []
        found = main(["prepare", "model.path=model", "data.cache_dir=cache", *named, *words])
        said = self.capsys.readouterr()
        assert found == code, said.out + said.err
        return said.out + said.err

    @property
    def directory(self) -> Path:
        return max(Path("cache").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns).parent

    @property
    def audit(self) -> dict:
        return json.loads((self.directory / "audit.json").read_text())

    def documents(self) -> list:
        table = DocumentTable(self.directory)
        rows = sum(source["kept"] for source in self.audit["sources"])
        return [table.document(number) for number in range(rows)]


@pytest.fixture
def prepare(shell, capsys):
    return Shell(capsys)


# ---- columns that nobody read ----


def test_unread_columns_are_named_once_a_source(prepare, capsys):
    write_jsonl(Path("train.jsonl"), [{**row, "id": n, "topic": "x"} for n, row in enumerate(QA)])
    write_jsonl(Path("more.jsonl"), [{**row, "url": "u"} if n > 3 else row for n, row in enumerate(QA)])
    words = ("data.sources.a.path=train.jsonl", "data.sources.b.path=more.jsonl")
    said = prepare(*words, path=None)
    assert prepare.audit["unread_columns"] == {"a": ["id", "topic"], "b": ["url"]}
    assert said.count("unused columns of a: id, topic") == 1 and "unused columns of b: url" in said
    assert "unused columns of a" in prepare(*words, path=None)  # from the cache too
    said = prepare(*words, "data.ignore_columns=[id,url,topic]", path=None)
    assert "nobody read" not in said and not prepare.audit["unread_columns"]


def test_many_unread_columns_are_shortened(prepare):
    write_jsonl(Path("train.jsonl"), [{**row, **{f"c{n}-{i}": 1 for i in range(10)}} for n, row in enumerate(QA)])
    prepare()
    names = prepare.audit["unread_columns"]["data"]
    assert names[:2] == ["c0-0", "c0-1"] and len(names) == 21 and names[-1] == "and 40 more"


def test_unread_columns_survive_the_parts_of_an_array(prepare):
    write_jsonl(Path("train.jsonl"), [{**row, "id": n} for n, row in enumerate(QA)])
    for number in (0, 1):
        prepare("--shard", f"{number}/2")
    assert "unused columns of data: id" in prepare()


def test_names_of_text_files_are_no_column(prepare):
    Path("texts").mkdir()
    Path("texts/one.txt").write_text("some words")
    assert "nothing read" not in prepare("objective=pretrain", path="texts")


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([{"question": "q", "answer": "a", "image": "a.jpg"}], "image"),
        ([{"question": "q", "answer": "a", "passage": "it says so"}], "passage"),
        ([{"question": "q", "answer": "a", "context": "it says so"}], "context"),
        ([{"prompt": "q", "completion": "a", "history": [["x", "y"]]}], "history"),
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tool_calls": 1}],
          "tool_calls"),
        ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "thinking": "hm"}], "thinking"),
        ([{"instruction": "i", "output": "o", "videos": ["v.mp4"]}], "videos"),
        ([{"text": "a caption", "image": {"path": "a.jpg", "bytes": None}}], "image"),
    ],
)  # fmt: skip
def test_column_that_carries_meaning_is_refused_until_it_is_ignored(prepare, rows, column):
    write_jsonl(Path("train.jsonl"), rows * 3)
    said = prepare(code=65)
    assert f'train.jsonl:1: column "{column}" would be ignored' in said, said
    assert "data.columns" in said and "data.ignore_columns" in said
    assert not list(Path("cache").glob("*/manifest.json"))
    format = {"question": "prompt_completion", "prompt": "prompt_completion", "messages": "messages", "text": "text"}
    named = f"data.format={format.get(next(iter(rows[0])), 'alpaca')}"
    assert f'train.jsonl:1: column "{column}" would be ignored' in prepare(named, "data.max_bad_share=1", code=65)
    assert "nothing read" not in prepare(f"data.ignore_columns=[{column}]")
    empty = [{**row, column: [] if column != "image" else None} for row in rows]
    write_jsonl(Path("train.jsonl"), empty)
    assert f"unused columns of data: {column}" in prepare()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"loss_mask": 0.5}, "messages[1] has loss_mask (0.5)"),
        ({"loss": 0}, "messages[1] has loss (0)"),
        ({"mask": 0}, 'messages[1] has mask (0), which shardtune does not know: use "train"'),
        ({"tool_calls": [{"name": "f"}]}, "this chat template cannot write tool calls"),
        ({"images": ["a.png"]}, "messages[1] has images"),
    ],
)
def test_turn_key_that_carries_meaning_is_refused_until_it_is_ignored(prepare, extra, said):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_jsonl(Path("train.jsonl"), [{"messages": [turns[0], {**turns[1], **extra}]}])
    found = prepare(code=65)
    assert said in found and "train.jsonl:1" in found and "data.ignore_columns" in found
    prepare(f"data.ignore_columns=[{next(iter(extra))}]")
    neutral = {"loss_weight": 1.0, "tool_calls": None, "images": [], "reasoning_content": ""}
    write_jsonl(Path("train.jsonl"), [{"messages": [turns[0], {**turns[1], **neutral}]}])
    prepare()


def test_column_that_carries_meaning_in_a_later_row_makes_a_bad_row(prepare):
    write_jsonl(Path("train.jsonl"), [*QA, {**QA[0], "image": "a.jpg"}])
    assert 'train.jsonl:7: column "image" would be ignored' in prepare(code=65)
    assert "dropped, read: unread image: 1 (first: train.jsonl:7)" in prepare("data.max_bad_share=0.5")


def test_ignored_column_counts_as_absent(prepare):
    write_jsonl(Path("train.jsonl"), [{**row, "text": "rendered"} for row in QA])
    assert "fit several formats" in prepare(code=65)
    prepare("data.ignore_columns=[text]")
    assert prepare.documents()[0].completion == "it is 0"
    said = prepare("data.ignore_columns=[text]", "data.columns.answer=text", code=64)
    assert "data.ignore_columns names text, which data.path reads by its columns" in said


# ---- values ----


def test_unread_columns_of_odd_values_make_no_row_unusable(prepare):
    lines = [
        '{"question": "q", "answer": "a", "score": NaN}',
        '{"question": "q", "answer": "b", "meta": {"k": 1, "k": 2}, "meta2": 1e999}',
        '{"question": "q", "answer": "c", "note": "\\ud800"}',
        '{"question": "q", "id": 1, "id": 2, "answer": "d"}',
    ]
    Path("train.jsonl").write_text("\n".join(lines))
    prepare()
    assert [document.completion for document in prepare.documents()] == ["a", "b", "c", "d"]
    for bad, said in (
        ('{"question": "q", "answer": NaN}', 'column "answer": NaN is not a JSON value'),
        ('{"question": "q", "answer": "a", "answer": "b"}', "the key 'answer' twice"),
        ('{"question": "q", "answer": "a", "answer" : "b: \\u003a"}', "the key 'answer' twice"),
    ):
        Path("train.jsonl").write_text("\n".join([*lines, bad]))
        found = prepare(code=65)
        assert f"train.jsonl:5: {'column' if 'column' in said else ''}" in found and said in found
    listed = "[" + ",\n".join(lines) + "]"
    Path("train.json").write_text(listed)
    prepare(path="train.json")
    assert len(prepare.documents()) == 4


def test_an_unread_column_of_bytes_makes_no_row_unusable(prepare):
    table = pa.table({"question": ["q", "r"], "answer": ["a", "b"], "embedding": [b"\xff\xfe", b"\x00\x01"]})
    odd = pa.array([(1, 2, 3), None], pa.month_day_nano_interval())  # a type that has no value in JSON
    with pa.ipc.new_file("train.arrow", pa.schema([*table.schema, pa.field("odd", odd.type)])) as file:
        file.write_table(table.append_column("odd", odd))
    assert "unused columns of data: embedding, odd" in prepare(path="train.arrow")
    pq.write_table(table, "train.parquet")
    said = prepare(path="train.parquet")
    assert len(prepare.documents()) == 2 and "unused columns of data: embedding" in said
    pq.write_table(table.rename_columns(["question", "about", "answer"]), "bad.parquet")
    assert 'bad.parquet:1: column "answer": 2 bytes that are not UTF-8' in prepare(path="bad.parquet", code=65)


def test_line_ends_in_cells_are_line_feeds(prepare):
    Path("train.csv").write_bytes(b'question,answer\r\nq,"one\r\ntwo"\r\n')
    prepare(path="train.csv")
    assert prepare.documents()[0].completion == "one\ntwo"


def test_text_in_a_list_of_one_is_a_text(prepare):
    write_jsonl(Path("train.jsonl"), [{"prompt": "q", "completion": ["a"]}, {"prompt": ["q"], "completion": "b"}])
    prepare()
    assert [(d.prompt, d.completion) for d in prepare.documents()] == [("q", "a"), ("q", "b")]
    write_jsonl(Path("train.jsonl"), [{"prompt": "q", "completion": ["a", "b"]}])
    said = prepare(code=65)
    assert "\"completion\" is a list of 2 texts, ['a', 'b'], but must be one text" in said
    assert "data.columns.completion=completion.0" in said
    prepare("data.columns.completion=completion.0", "data.columns.prompt=prompt")


def test_format_error_of_prepare_lists_what_each_format_needs(prepare):
    write_jsonl(Path("train.jsonl"), [{"frage": "q", "antwort": "a"}])
    said = prepare(code=65)
    assert "columns ['antwort', 'frage'] fit no format" in said and "closest" not in said
    assert 'alpaca: "instruction", optional "input", and "output"' in said


# ---- the shapes of LLaMA-Factory's demo files ----

TOLD = "You are a judge."
SHAPES = {
    "alpaca": (
        {"instruction": "Tell", "input": "more", "output": "Yes.", "system": TOLD, "history": [["Hi", "Hello"]]},
        "sft",
        [("system", TOLD), ("user", "Hi"), ("assistant", "Hello"), ("user", "Tell\n\nmore"), ("assistant", "Yes.")],
    ),
    "alpaca without history": (
        {"instruction": "Tell", "input": "", "output": "Yes.", "system": "", "history": []},
        "sft",
        ["Tell", "Yes."],
    ),
    "sharegpt": (
        {"conversations": [FROM_USER, FROM_GPT], "system": TOLD, "tools": ""},
        "sft",
        [("system", TOLD), ("user", "which is right"), ("assistant", "this one")],
    ),
    "glaive without tools": (
        {"conversations": [FROM_USER, FROM_GPT], "tools": "[]"},
        "sft",
        [("user", "which is right"), ("assistant", "this one")],
    ),
    "kto_en_demo": (
        {"messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}], "label": True},
        "kto",
        [("user", "q"), ("assistant", "a")],
    ),
    "dpo_en_demo": (
        {"conversations": [FROM_USER], "chosen": FROM_GPT, "rejected": {"from": "gpt", "value": "that one"}},
        "dpo",
        [("user", "which is right"), ("assistant", "this one"), ("assistant", "that one")],
    ),
    "parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]},
        "sft",
        [("user", "q"), ("assistant", "a")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_demo_shapes_are_read_as_they_are(prepare, name):
    row, objective, wanted = SHAPES[name]
    rows = [row, {**row, "label": False}] if "label" in row else [row]
    Path("demo.json").write_text(json.dumps(rows, indent=2))
    prepare(f"objective={objective}", path="demo.json")
    document = prepare.documents()[0]
    found = [(turn["role"], turn["content"]) for turn in document.turns()] or document.texts()
    assert found == wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"conversations": [FROM_USER, {"from": "function_call", "value": "{}"}, FROM_GPT], "tools": "[]"},
            "demo.json:2: conversations[1].value[0] is {}; .*a call must be",
        ),
        (
            {"conversations": [FROM_USER, FROM_GPT], "tools": '[{"name": "f"}]'},
            "demo.json:2: this chat template ignores the column tools",
        ),
        (
            {
                "messages": [
                    {"content": "<image>Who are they?", "role": "user"},
                    {"content": "Players.", "role": "assistant"},
                ],
                "images": ["mllm_demo_data/1.jpg"],
            },
            'demo.json:2: column "images" would be ignored, but it looks important',
        ),
    ],
)
def test_demo_shapes_that_hold_more_than_text_are_refused(prepare, row, said):
    Path("demo.json").write_text(json.dumps([row], indent=1))
    found = prepare(path="demo.json", code=65)
    before, _, after = said.partition(" .*")
    assert before in found and after in found


# ---- compressed files and addresses ----


def test_compressed_files_give_the_same_rows(prepare):
    plain = "".join(json.dumps(row) + "\n" for row in QA).encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train.jsonl", plain)
    packed = {
        "gz": gzip.compress(plain),
        "zst": zst(plain),
        "bz2": bz2.compress(plain),
        "xz": lzma.compress(plain),
        "zip": archive.getvalue(),
    }
    for suffix, content in packed.items():
        Path(f"train.jsonl.{suffix}").write_bytes(content)
        prepare(path=f"train.jsonl.{suffix}")
        assert [document.completion for document in prepare.documents()] == [row["answer"] for row in QA], suffix


class Server:
    """Files of a directory over HTTP on this machine, and every request that came."""

    def __init__(self, directory: Path) -> None:
        self.asked = asked = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *about):
                asked.append(about)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory)))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    made = Server(tmp_path / "served")
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_remote_address_is_read_only_where_the_configuration_says_so(prepare, server):
    write_jsonl(Path("served/train.jsonl"), QA)
    said = prepare(path=f"{server.url}/train.jsonl", code=64)
    assert "is an address; set data.remote=true" in said
    assert not server.asked
    prepare("data.remote=true", path=f"{server.url}/train.jsonl")
    assert server.asked
    assert prepare.documents()[0].location == f"{server.url}/train.jsonl:1"
    first = prepare.directory
    assert "(from the cache)" in prepare("data.remote=true", path=f"{server.url}/train.jsonl")
    write_jsonl(Path("served/train.jsonl"), QA[:3])  # other content under the same address is other data
    prepare("data.remote=true", path=f"{server.url}/train.jsonl")
    assert prepare.directory != first and len(prepare.documents()) == 3
    said = prepare("data.remote=true", path=f"{server.url}/no.jsonl", code=65)
    assert f"{server.url}/no.jsonl: does not exist" in said


def test_remote_compressed_file_and_table_are_read(prepare, server):
    Path("served/train.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in QA).encode()))
    pq.write_table(pa.Table.from_pylist(QA), "served/train.parquet")
    for name in ("train.jsonl.gz", "train.parquet"):
        prepare("data.remote=true", path=f"{server.url}/{name}")
        assert len(prepare.documents()) == 6


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/x.jsonl", "s3fs"), ("gs://bucket/x.jsonl", "gcsfs")])
def test_remote_file_system_without_its_package_is_named(prepare, monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    said = prepare("data.remote=true", path=url, code=65)
    assert f"{url}: reading it needs the package {package}: pip install {package}" in said


def test_remote_files_of_any_fsspec_file_system_are_read(prepare):
    import fsspec

    memory = fsspec.filesystem("memory")
    for number, row in enumerate(QA):
        memory.pipe(f"/some/{number}.jsonl", json.dumps(row).encode())
    memory.pipe("/some/about.rst", b"no data")
    for path in ("memory://some", "memory://some/*.jsonl"):
        prepare("data.remote=true", path=path)
        assert [document.completion for document in prepare.documents()] == [row["answer"] for row in QA]
