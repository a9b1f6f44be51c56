"""Sources against independent oracles: the json module, pandas-free csv and Arrow readers, and hand-written truth."""

import bz2
import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies.errors import DataError
from tests.data.broken_files import arrow, parquet, whole, zst
from tests.helpers.covering import examples
from trainer.data.document import RejectedRow, SourceRow
from trainer.data.read import json_rows
from trainer.data.read import text as text_files
from trainer.data.read.json_rows import UnparsedRow
from trainer.data.read.opening import open_text_bytes
from trainer.data.read.origin import Origin
from trainer.data.read.paths import HUB_PREFIX, expand_paths


def read(paths, **hub):
    return Origin("data.path", paths, **hub).rows()


def parsed(*paths):
    return [whole(row) for row in read(paths)]


def fields(*paths):
    rows = parsed(*paths)
    assert all(isinstance(row, SourceRow) for row in rows), [str(row) for row in rows if isinstance(row, RejectedRow)]
    return [row.fields for row in rows]


# ---- rows ----


def test_good_files_give_rows_with_their_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "\xc3\xa9"}\r\n\n{"text": "b\\u2028"}')
    (tmp_path / "b.json").write_bytes(b'[\n {"text":\n  "c"},\n {"text": "d"}]\n')
    (tmp_path / "c.csv").write_bytes(codecs.BOM_UTF8 + b'text,n\n"e\n""f""",1\r\n\ng,2\n')
    (tmp_path / "d.json").write_bytes(b'{"text": "h"}\n{"text": "i"}\n')  # JSON lines under the other name
    (tmp_path / "e.parquet").write_bytes(parquet(pa.table({"text": ["j", "k"]})))
    (tmp_path / "f.txt").write_bytes(b"l\r\nm")
    rows = parsed(*expand_paths(str(tmp_path), "data.path"))
    assert [(row.file.rsplit("/", 1)[1], row.line, row.fields["text"]) for row in rows] == [
        ("a.jsonl", 1, "é"),
        ("a.jsonl", 3, "b\u2028"),
        ("b.json", 2, "c"),
        ("b.json", 4, "d"),
        ("c.csv", 2, 'e\n"f"'),
        ("c.csv", 5, "g"),
        ("d.json", 1, "h"),
        ("d.json", 2, "i"),
        ("e.parquet", 1, "j"),
        ("e.parquet", 2, "k"),
        ("f.txt", 1, "l\nm"),
    ]


def test_sources_parse_json_lines_only_where_they_are_wanted(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": }\n')
    first, second = read([tmp_path / "x.jsonl"])
    assert first.fields == {}
    assert first.raw == b'{"a": 1}\n'
    assert pickle.loads(pickle.dumps(first)).parse().fields == {"a": 1}
    assert first.parse() is first
    assert first.parse().fields == {"a": 1}
    bad = second.parse()
    assert str(bad) == f"{tmp_path}/x.jsonl:2: not valid JSON: Expecting value (column 7)"
    assert bad.excerpt == '{"a": }'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1,}', "a comma before the closing bracket"),
        (b"{'a': 1}", "double quotes"),
        (b'{"a": True}', "JSON writes true"),
        (b'{"a": 1},', "remove the comma"),
        (b'{"a": "b\tc"}', "write line breaks and tabs as \\n and \\t"),
        (b'{"a": 1', "cut off, or spread"),
        (b'{"a": 1} {"b": 2}', "a line holds one object"),
        (b'{"a": "\xff"}', "byte 0xff in column 8 is not UTF-8"),
        (b'{"a": 0, "b": [{"k": 1, "k": 2}]}', "'k' twice"),
        (b"[1]", "and is [1]"),
        (b'{"a": 1e309}', "1e309 is beyond"),
        (b"[\n", "; a file that holds one list of rows must be called .json: rename it"),
        (b'[{"a": 1}, {"a": 2}]', "; a file that holds one list of rows must be called .json: rename it"),
    ],
)
def test_sources_bad_json_line_says_what_to_mend(line, message):
    bad = whole(UnparsedRow("x", 1, raw=line))
    assert isinstance(bad, RejectedRow)
    assert message in bad.message


def test_sources_excerpt_is_short_and_printable():
    bad = UnparsedRow("x", 1, raw=b'{"a": "\x1b[31m\x00\xff\xe2\x80\xa8' + b"y" * 500).parse()
    assert bad.excerpt.startswith('{"a": "\\x1b[31m\\x00\ufffd\\u2028yyy')
    assert bad.excerpt.count("y") == 200 - 15
    assert bad.excerpt.isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=8), json_values, max_size=5)
fuzz = settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.lists(objects, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_sources_read_back_what_json_writes(tmp_path, rows, ascii_only, indent):
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8", newline="")
    (tmp_path / "x.json").write_text(
        json.dumps(rows, ensure_ascii=ascii_only, indent=indent), encoding="utf-8", newline=""
    )
    assert fields(tmp_path / "x.jsonl") == rows
    assert fields(tmp_path / "x.json") == rows


@fuzz
@given(st.text(alphabet='{}[]",:ab\\u0d8 1-.eE\n\t', max_size=40))
def test_sources_accept_a_line_only_if_json_accepts_it(line):
    row = whole(UnparsedRow("x", 1, raw=line.encode()))
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(row, SourceRow):
        assert row.fields == value
    elif isinstance(value, dict):
        assert row.reason in ("duplicate_key", "lone_surrogate", "number_too_large")


NAMES = st.sampled_from(["a", "b", "a:", 'a"', "a\\", "é"])
TEXTS = st.text(alphabet='ab:"\\ {},', max_size=6)
SPACES = st.sampled_from(["", "", " ", "\t", " \r"])


@st.composite
def written(draw, depth=0):
    """A JSON value as text, spaced and escaped in any way, and whether a key is there twice in it."""
    kind = draw(st.sampled_from(["text", "number", "object", "list"] if depth < 2 else ["text", "number"]))
    if kind == "text":
        text = json.dumps(draw(TEXTS))
        return (text.replace(":", "\\u003a") if draw(st.booleans()) else text), False
    if kind == "number":
        return draw(st.sampled_from(["1", "-0", "1.5e3", "18446744073709551617", "123456789012345678901"])), False
    inner = draw(st.lists(written(depth + 1), max_size=3))
    if kind == "list":
        return f"[{','.join(text for text, _ in inner)}]", any(doubled for _, doubled in inner)
    names = [draw(NAMES) for _ in inner]
    colon = draw(SPACES) + ":" + draw(SPACES)
    pairs = [json.dumps(name) + colon + text for name, (text, _) in zip(names, inner, strict=True)]
    return f"{{{','.join(pairs)}}}", len({*names}) < len(names) or any(doubled for _, doubled in inner)


@settings(max_examples=examples(400), deadline=None)
@given(st.lists(st.tuples(NAMES, written()), min_size=1, max_size=4))
def test_sources_find_duplicate_json_keys_and_keep_numbers_exact(columns):
    line = ",".join(f"{json.dumps(name)}:{text}" for name, (text, _) in columns)
    row = UnparsedRow("x", 1, raw=f"{{{line}}}".encode()).parse()
    names = [name for name, _ in columns]
    for name, (text, doubled) in columns:
        if doubled or names.count(name) > 1:
            assert row.fields[name].reason == "duplicate_key"
        else:
            value = json.loads(text)
            assert row.fields[name] == value and type(row.fields[name]) is type(value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_sources_json_lists_do_not_depend_on_where_the_buffer_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "READ_BYTES", chunk)
    rows = [{"a": [1.5, -2e10, True, None, '\\"é\u2028'], "b": {"c": "x" * 30}}, {}, {"d": 12345678}]
    text = json.dumps(rows, indent=2, ensure_ascii=False)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    found = parsed(tmp_path / "x.json")
    assert [row.fields for row in found] == rows
    starts = [number for number, line in enumerate(text.split("\n"), 1) if line.startswith("  {")]
    assert [row.line for row in found] == starts
    broken = text.replace("12345678", "1234,,78")
    (tmp_path / "x.json").write_text(broken, encoding="utf-8")
    place = next(number for number, line in enumerate(broken.split("\n"), 1) if ",,78" in line)
    column = broken.split("\n")[place - 1].index(",78") + 1
    *good, bad = parsed(tmp_path / "x.json")  # an element that is no JSON is a bad row, as a line is
    assert [row.fields for row in good] == rows[:2]
    within = place - starts[2] + 1
    assert bad.line == starts[2] and f"(line {within} of the row, column {column})" in bad.message
    (tmp_path / "x.json").write_text("[3, 12345, 1]", encoding="utf-8")
    assert [row.excerpt for row in parsed(tmp_path / "x.json")] == ["3", "12345", "1"]


def test_sources_line_above_the_limit_is_one_bad_row_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(json_rows, "READ_BYTES", 64)
    limit = b'{"a": "' + b"x" * 990 + b'"}'  # 999 bytes, 1000 with its line end
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([limit, limit + b" " * 2, b'{"a": "' + b"y" * 9000, b'{"a": 1}']))
    rows = parsed(tmp_path / "x.jsonl")
    assert [(row.line, getattr(row, "reason", None)) for row in rows] == [
        (1, None),
        (2, "too_long"),
        (3, "too_long"),
        (4, None),
    ]
    assert rows[2].excerpt.startswith('{"a": "yyy')


def test_sources_json_and_text_rows_above_the_limit_are_bad_rows(tmp_path, monkeypatch):
    for module in (json_rows, text_files):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 100)
    (tmp_path / "x.json").write_text(json.dumps([{"a": "x" * 150}, {"a": "y"}]))
    assert [getattr(row, "reason", None) for row in parsed(tmp_path / "x.json")] == ["too_long", None]
    (tmp_path / "x.txt").write_text("x" * 101)
    assert [row.reason for row in parsed(tmp_path / "x.txt")] == ["too_long"]
    (tmp_path / "x.csv").write_text("text\n" + "x" * 101 + "\n")
    with pytest.raises(DataError, match=r"x\.csv:2: the line is longer"):
        parsed(tmp_path / "x.csv")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json"])
def test_sources_give_rows_before_the_file_is_read_to_its_end(tmp_path, name):
    """A file whose end is broken still gives its first rows: reading does not wait for the end."""
    lines = b"".join(b'{"text": "%s %d"}\n' % (b"x" * 1000, n) for n in range(5000))
    if name == "x.json":
        lines = b"[" + b",".join(lines.splitlines()) + b"]"
    packed = {"gz": gzip.compress, "zst": zst}.get(name[-3:].strip("."), bytes)(lines)
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    rows = read([tmp_path / name])
    assert next(rows).parse().fields["text"].endswith(" 0")


# ---- CSV ----

cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@fuzz
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5), st.sampled_from([",", "\t"]))
def test_sources_read_back_what_csv_writes(tmp_path, rows, delimiter):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("a", "b"), *rows])
    path = tmp_path / ("x.csv" if delimiter == "," else "x.tsv")
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    found = parsed(path)
    assert [(row.fields["a"], row.fields["b"]) for row in found] == rows
    line = 2
    for row, pair in zip(found, rows, strict=True):
        assert row.line == line
        line += 1 + sum(cell.count("\n") for cell in pair)


def test_sources_read_a_long_csv_cell(tmp_path):
    (tmp_path / "x.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(fields(tmp_path / "x.csv")[0]["text"]) == 200_000


def test_sources_ragged_csv_record_names_the_columns(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'text,label\n"a\nb",1\nc\n')
    good, bad = parsed(tmp_path / "x.csv")
    assert good.fields == {"text": "a\nb", "label": "1"}
    assert (bad.line, bad.reason, bad.excerpt) == (4, "wrong_cell_count", "c")
    assert "1 cell where the header has 2 (text, label)" in bad.message


def test_csv_readers_may_run_side_by_side(tmp_path):
    for name in ("x.csv", "y.csv"):
        (tmp_path / name).write_text("text\n" + ("a" * 200_000 + "\n") * 3)
    first, second = (read([tmp_path / name]) for name in ("x.csv", "y.csv"))
    assert next(first).line == next(second).line == 2
    assert len(list(second)) == len(list(first)) == 2


# ---- Parquet and Arrow ----


def test_sources_table_values_that_json_does_not_know(tmp_path):
    moment = datetime.datetime(2024, 2, 29, 12, 30, 1, 250_000)
    table = pa.table(
        {
            "moment": pa.array([moment, None], pa.timestamp("us")),
            "zoned": pa.array([moment, None], pa.timestamp("ms", tz="UTC")),
            "nanos": pa.array([1, None], pa.timestamp("ns")),
            "day": pa.array([moment.date(), None]),
            "clock": pa.array([datetime.time(1, 2, 3), None]),
            "price": pa.array([decimal.Decimal("1.10"), None]),
            "share": [float("nan"), 0.5],
            "half": pa.array([1.5, None], pa.float16()),
            "bytes": [b"caf\xc3\xa9", None],
            "name": pa.array(["red", None]).dictionary_encode(),
            "tags": [[moment], None],
            "floats": pa.array([[1.0, float("nan"), None], None], pa.large_list(pa.float32())),
            "inner": [{"when": moment, "x": float("nan"), "b": b"y"}, None],
            "map": pa.array([[("k", 1.0), ("l", None)], None], pa.map_(pa.string(), pa.float64())),
            "empty_map": pa.array([[], None], pa.map_(pa.string(), pa.int64())),
            "nothing": pa.nulls(2),
            "flag": [True, None],
        }
    )
    expected = {
        "moment": "2024-02-29 12:30:01.250000",
        "zoned": "2024-02-29 12:30:01.250Z",
        "nanos": "1970-01-01 00:00:00.000000001",
        "day": "2024-02-29",
        "clock": "01:02:03.000000",
        "price": "1.10",
        "share": None,
        "half": 1.5,
        "bytes": "café",
        "name": "red",
        "tags": ["2024-02-29 12:30:01.250000"],
        "floats": [1.0, None, None],
        "inner": {"when": "2024-02-29 12:30:01.250000", "x": None, "b": "y"},
        "map": {"k": 1.0, "l": None},
        "empty_map": {},
        "nothing": None,
        "flag": True,
    }
    (tmp_path / "x.arrow").write_bytes(arrow(table, stream=True))
    (tmp_path / "y.arrow").write_bytes(arrow(table, stream=False))
    for path in (tmp_path / "x.arrow", tmp_path / "y.arrow"):
        first, second = fields(path)
        assert first == expected
        assert second == dict.fromkeys(expected) | {"share": 0.5}
        json.dumps(first, allow_nan=False)
    pq.write_table(table, tmp_path / "x.parquet")
    assert fields(tmp_path / "x.parquet")[0] == expected


@pytest.mark.parametrize(
    ("column", "reason", "message"),
    [
        (pa.array([b"\x89PNG\r\n\x1a\n\xff", b"ok"]), "binary", r"9 bytes .* a PNG image"),
        (pa.array([float("-inf"), 1.0]), "nan", "-inf is not a JSON value"),
        (pa.array([[float("inf")], [1.0]]), "nan", "inf is not"),
        (pa.array([{"a": b"\xff"}, {"a": b"ok"}]), "binary", "not UTF-8"),
        (pa.array([[("k", 1), ("k", 2)], []], pa.map_(pa.string(), pa.int64())), "duplicate_key", "same key twice"),
        (pa.array([b"\xff", b"ok"], pa.binary_view()), "binary", "store text"),
    ],
)
def test_values_that_would_lose_their_meaning_are_bad_rows(tmp_path, column, reason, message):
    (tmp_path / "x.arrow").write_bytes(arrow(pa.table({"x": column, "text": ["a", "b"]}), stream=False))
    bad, good = parsed(tmp_path / "x.arrow")
    assert (bad.line, bad.reason) == (1, reason)
    assert re.search(message, bad.message)
    assert isinstance(good, SourceRow)
    assert good.line == 2


def test_a_type_without_a_rule_is_named(tmp_path):
    table = pa.table({"inner": [{"x": None}], "text": ["a"]})
    column = pa.array([{"x": (1, 2, 3)}], pa.struct([("x", pa.month_day_nano_interval())]))
    (tmp_path / "x.arrow").write_bytes(arrow(table.set_column(0, "inner", column), stream=False))
    (bad,) = parsed(tmp_path / "x.arrow")
    assert (bad.line, bad.reason) == (1, "no_json")
    assert re.search("no rule turns month_day_nano_interval.*store it as text", bad.message)


def test_rows_of_many_batches_are_numbered_through(tmp_path):
    table = pa.table({"n": list(range(3000))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=700)
    with pa.ipc.new_stream(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=999)
    for name in ("x.parquet", "x.arrow"):
        assert [(row.line, row.fields["n"]) for row in parsed(tmp_path / name)] == [(n + 1, n) for n in range(3000)]


def test_sources_read_a_saved_data_set_in_its_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"text": f"{n}", "n": n} for n in range(50)]
    saved = datasets.Dataset.from_list(rows).shuffle(seed=1)
    saved.save_to_disk(tmp_path / "one", num_shards=3)
    assert len(expand_paths(str(tmp_path / "one"), "data.path")) == 3
    assert fields(*expand_paths(str(tmp_path / "one"), "data.path")) == list(saved)
    both = datasets.DatasetDict(train=saved, test=saved.select([3, 1]))
    both.save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"two holds the splits train, test; name one of them, .*two/train"):
        expand_paths(str(tmp_path / "two"), "data.path")
    assert fields(*expand_paths(str(tmp_path / "two" / "test"), "data.path")) == [saved[3], saved[1]]
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: cannot be read: No such file"):
        expand_paths(str(tmp_path / "one"), "data.path")


# ---- text files ----


def test_sources_read_a_folder_of_texts(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Chapter 2.v1.txt").write_text("two")
    (tmp_path / "a.md").write_text("# one")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "README.md").write_text("a text among texts")
    assert fields(*expand_paths(str(tmp_path), "data.path")) == [
        {"text": "a text among texts", "title": "README"},
        {"text": "# one", "title": "a"},
        {"text": "two", "title": "Chapter 2.v1"},
        {"text": "three", "title": "c"},
    ]


def test_sources_bad_byte_in_a_text_names_its_line(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\nb\nc\xe9\n")
    (bad,) = parsed(tmp_path / "x.txt")
    assert bad.message == "line 3: byte 0xe9 in column 2 is not UTF-8; save the file as UTF-8"


# ---- opening ----


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zst), ("x.jsonl.bz2", bz2.compress), ("x.jsonl.xz", lzma.compress)],
)
def test_every_cut_of_a_compressed_file_is_noticed(tmp_path, name, pack):
    members = [pack(part) for part in (b'{"a": 1}\n' * 9, b'{"b": 2}')]
    whole = b"".join(members)
    for length in range(1, len(whole)):
        (tmp_path / name).write_bytes(whole[:length])
        if length == len(members[0]):  # a whole file of its own
            assert len(parsed(tmp_path / name)) == 9
        else:
            with pytest.raises(DataError, match=name):
                parsed(tmp_path / name)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    for name in ("x.jsonl", "x.parquet"):
        (tmp_path / name).write_bytes(b"{}\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    for name in ("x.jsonl", "x.parquet"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read: Permission denied; give yourself"):
            parsed(tmp_path / name)


def test_sources_open_a_text_after_its_byte_order_mark(tmp_path):
    (tmp_path / "x.txt").write_bytes(codecs.BOM_UTF8 + b"a")
    with open_text_bytes(tmp_path / "x.txt") as stream:
        assert stream.read() == b"a"


# ---- paths ----


def touch(*paths):
    for path in paths:
        path.write_text(json.dumps({"text": "a"}))


def test_expand_directory_glob_and_list(tmp_path):
    touch(tmp_path / "b.jsonl", tmp_path / "a.json", tmp_path / "note.rst")
    (tmp_path / "sub").mkdir()
    touch(tmp_path / "sub" / "c.jsonl")
    assert [p.name for p in expand_paths(str(tmp_path), "data.path")] == ["a.json", "b.jsonl", "c.jsonl"]
    assert [p.name for p in expand_paths(str(tmp_path / "*.json*"), "data.path")] == ["a.json", "b.jsonl"]
    assert [p.name for p in expand_paths(str(tmp_path / "**" / "*.jsonl"), "data.path")] == ["b.jsonl", "c.jsonl"]
    listed = [str(tmp_path / "b.jsonl"), str(tmp_path)]
    assert [p.name for p in expand_paths(listed, "data.path")] == ["b.jsonl", "a.json", "c.jsonl"]


@pytest.mark.parametrize("name", ["a b.jsonl", "[1].jsonl", "a,b.jsonl", "k=v.jsonl", "what?*.jsonl", "ü(1).jsonl"])
def test_names_that_exist_are_literal(tmp_path, name):
    touch(tmp_path / name, tmp_path / "1.jsonl", tmp_path / "whatever.jsonl")
    assert expand_paths(str(tmp_path / name), "data.path") == [tmp_path / name]


def test_sources_expand_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "a.jsonl")
    assert expand_paths("~/a.jsonl", "data.path") == [tmp_path / "a.jsonl"]


def test_links_are_followed_and_a_file_is_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    touch(tmp_path / "real" / "a.jsonl")
    (tmp_path / "again").symlink_to("real")
    (tmp_path / "b.jsonl").symlink_to("real/a.jsonl")
    assert [p.name for p in expand_paths(str(tmp_path), "data.path")] == ["a.jsonl"]
    assert expand_paths(str(tmp_path / "again"), "data.path") == [tmp_path / "again" / "a.jsonl"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("train.jsn", r"data\.eval_path=.*train\.jsn does not exist; did you mean .*train\.jsonl\?"),
        ("dat/x.jsonl", r"did you mean .*data\?"),
        ("abc.jsonl", r"; nothing like it in "),
        ("*.csv", r"does not exist"),
        ("data", r"holds no"),
        ("note.rst", r"must end in .*\.jsonl.*\.parquet and \.arrow"),
    ],
)
def test_missing_names_value_key_and_neighbour(tmp_path, value, message):
    touch(tmp_path / "train.jsonl", tmp_path / "note.rst")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=message):
        expand_paths(str(tmp_path / value), "data.eval_path")


def test_several_files_are_a_list(tmp_path):
    touch(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    with pytest.raises(DataError) as caught:
        expand_paths(both, "data.path")
    assert str(caught.value).endswith(f"several files are a list: [{both}]")


@pytest.mark.parametrize("value", [[], [3], 3, "", "a\0b", "hub:", "hub:a/b/c", "hub:../x", "s3://bucket/x.jsonl"])
def test_values_that_are_no_paths(value):
    with pytest.raises(DataError, match=r"data\.path"):
        expand_paths(value, "data.path")


def test_sources_inputs_name_what_decides_the_rows(tmp_path):
    names = ["A.JSONL.GZ", "b.parquet", "c one.txt", "d.md.zst"]
    paths = [tmp_path / name for name in names]
    kinds = [".jsonl.gz", ".parquet", "c one.txt", "d.md.zst"]
    assert Origin("data.path", paths).content_identity(lambda path: path) == list(zip(kinds, paths, strict=True))


# ---- the hub ----


@pytest.fixture
def hub_data(monkeypatch, tmp_path):
    """`datasets.load_dataset` over a table in memory, and the arguments of its last call."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    made = datasets.Dataset.from_dict({"text": [f"{n}" for n in range(700)], "x": [float("nan")] * 700})
    state = {"result": made.select(range(699, -1, -1)), "call": None}

    def load_dataset(name, config=None, **options):
        state["call"] = (name, config, options)
        if isinstance(state["result"], Exception):
            raise state["result"]
        return state["result"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def test_sources_hub_rows_by_subset_split_and_revision(hub_data):
    (path,) = expand_paths("hub:org/name", "data.path")
    rows = list(read([path], subset="en", split="train", revision="abc"))
    assert hub_data["call"] == ("org/name", "en", {"split": "train", "revision": "abc", "streaming": False})
    assert [row.fields["text"] for row in rows] == [f"{n}" for n in range(699, -1, -1)]
    assert rows[0].fields["x"] is None
    assert (rows[-1].file, rows[-1].line) == ("hub:org/name/en/train", 700)
    ((kind, text),) = Origin("data.path", [path], split="train").content_identity(str)
    assert kind == "hub"
    assert text.startswith("org/name:")
    hub_data["result"] = hub_data["result"].select(range(5))
    assert Origin("data.path", [path], split="train").content_identity(str) != [(kind, text)]


def test_sources_hub_data_set_of_several_splits_needs_one_named(hub_data):
    datasets = pytest.importorskip("datasets")
    one = hub_data["result"]
    hub_data["result"] = datasets.DatasetDict(train=one)
    assert len(list(read([Path("hub:org/name")]))) == 700
    hub_data["result"] = datasets.DatasetDict(train=one, test=one)
    with pytest.raises(DataError, match="hub:org/name has the splits train, test; name one"):
        list(read([Path("hub:org/name")]))


def hub_error(name, base, text):
    return type(name, (base,), {})(text)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error("DatasetNotFoundError", FileNotFoundError, "Dataset 'org/name' doesn't exist"), "check the name"),
        (ConnectionError("Couldn't reach 'org/name' on the Hub"), "no hub was reached.*HF_HOME"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['de', 'en']"),
            r"one of its configs.*\['de', 'en'\]",
        ),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), "name a split that it has"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "converted to Parquet"),
        (KeyError("surprise"), "surprise.*download its files"),
    ],
)
def test_hub_failures_say_what_to_do(hub_data, error, message):
    hub_data["result"] = error
    with pytest.raises(DataError, match=message) as caught:
        list(read([Path("hub:org/name")], split="x"))
    assert "hub:org/name (split 'x')" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_local_folder_is_not_taken_for_the_hub(hub_data, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a local org/name exists here"):
        list(read([Path("hub:org/name")]))
    assert hub_data["call"] is None


def test_an_offline_machine_gets_a_remedy(tmp_path, monkeypatch):
    """The real library, offline and with an empty cache."""
    config = pytest.importorskip("datasets.config")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"hub:org/no-such-data cannot be loaded: .*load it once on a machine"):
        list(read(expand_paths(f"{HUB_PREFIX}org/no-such-data", "data.path")))
