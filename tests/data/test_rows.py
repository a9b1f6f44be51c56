import codecs
import json

import pytest

from strategies.errors import DataError
from trainer.data.rows import expand, read_rows

GOOD = b'{"text": "a"}\n'
BAD_FILES = {
    "malformed": ("x.jsonl", GOOD + b'{"text": }\n', r"x\.jsonl:2: not valid JSON: .*\(column 10\)"),
    "two objects": ("x.jsonl", GOOD + GOOD + b'{"a": 1}{"b": 2}\n', r"x\.jsonl:3: .*Extra data"),
    "not an object": ("x.jsonl", GOOD + b"[1]\n", r"x\.jsonl:2: .*found a list"),
    "null": ("x.jsonl", b"null\n", r"x\.jsonl:1: .*found null"),
    "nan": ("x.jsonl", GOOD + b'{"text": NaN}\n', r"x\.jsonl:2: .*NaN"),
    "infinity": ("x.jsonl", b'{"text": -Infinity}\n', r"x\.jsonl:1: .*-Infinity"),
    "utf-8": ("x.jsonl", GOOD + b'{"text": "\xff"}\n', r"x\.jsonl:2: byte 0xff in column 11 is not UTF-8"),
    "utf-16": ("x.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"x\.jsonl:1: NUL byte.*UTF-16"),
    "nul": ("x.jsonl", GOOD + b'{"text": "a\0"}\n', r"x\.jsonl:2: NUL byte in column 12"),
    "control": ("x.jsonl", b'{"text": "a\x01"}\n', r"x\.jsonl:1: .*[Cc]ontrol"),
    "empty": ("x.jsonl", b"", r"x\.jsonl:1: .*no rows"),
    "blank": ("x.jsonl", b"\n \n", r"x\.jsonl:1: .*no rows"),
    "deep": ("x.jsonl", b'{"a":' + b"[" * 200_000 + b"\n", r"x\.jsonl:1: not valid JSON"),
    "huge number": ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n", r"x\.jsonl:1: not valid JSON"),
    "json position": ("x.json", b'[\n{"a": 1},\n{"a": }\n]', r"x\.json:3: .*column 7"),
    "json element": ("x.json", b'[\n{"a": 1},\n\n3\n]', r"x\.json:4: .*found a number"),
    "json trailing comma": ("x.json", b'[\n{"a": 1},\n]', r"x\.json:3: not valid JSON"),
    "json unclosed": ("x.json", b'[\n{"a": 1}\n', r"x\.json:\d: not valid JSON"),
    "json missing comma": ("x.json", b'[\n{"a": 1}\n{"a": 2}]', r"x\.json:3: not valid JSON"),
    "json after": ("x.json", b'[{"a": 1}]\nx', r"x\.json:2: .*after the end"),
    "json single object": ("x.json", b'{\n"a": 1\n}', r"x\.json:1: .*list of objects"),
    "json empty list": ("x.json", b"[]", r"x\.json:1: .*no rows"),
    "json empty": ("x.json", b"", r"x\.json:1: .*empty"),
    "json nan": ("x.json", b'[\n{"a": 1},\n{"a": NaN}]', r"x\.json:3: .*NaN"),
    "csv cells": ("x.csv", b'text,label\n"a\nb",1\nc\n', r"x\.csv:4: 1 cells where the header has 2 \(text, label\)"),
    "csv quote": ("x.csv", b'text\n"a"b\n', r"x\.csv:2: not valid CSV"),
    "csv unclosed": ("x.csv", b'text\nb\n"a\n', r"x\.csv:3: not valid CSV"),
    "csv doubled column": ("x.csv", b"text,text\na,b\n", r"x\.csv:1: .*'text' twice"),
    "csv header only": ("x.csv", b"text\n", r"x\.csv:1: .*no rows"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_file_and_line(tmp_path, name):
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows([tmp_path / file]))


def test_good_files_give_rows_with_their_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "\xc3\xa9"}\r\n\n{"text": "b\\u2028"}')
    (tmp_path / "b.json").write_bytes(b'[\n {"text":\n  "c"},\n {"text": "d"}]\n')
    (tmp_path / "c.csv").write_bytes(codecs.BOM_UTF8 + b'text,n\n"e\n""f""",1\r\n\ng,2\n')
    (tmp_path / "d.json").write_bytes(b'{"text": "h"}\n{"text": "i"}\n')  # JSONL under the other name
    rows = list(read_rows(expand(str(tmp_path), "data.path")))
    assert [(r.file.name, r.line, r.fields["text"]) for r in rows] == [
        ("a.jsonl", 1, "é"),
        ("a.jsonl", 3, "b\u2028"),
        ("b.json", 2, "c"),
        ("b.json", 4, "d"),
        ("c.csv", 2, 'e\n"f"'),
        ("c.csv", 5, "g"),
        ("d.json", 1, "h"),
        ("d.json", 2, "i"),
    ]


def test_long_csv_cell(tmp_path):
    (tmp_path / "x.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(next(read_rows([tmp_path / "x.csv"])).fields["text"]) == 200_000


def touch(*paths):
    for path in paths:
        path.write_text(json.dumps({"text": "a"}))


def test_expand_directory_glob_and_list(tmp_path):
    touch(tmp_path / "b.jsonl", tmp_path / "a.json", tmp_path / "note.txt")
    (tmp_path / "sub").mkdir()
    touch(tmp_path / "sub" / "c.jsonl")
    assert [p.name for p in expand(str(tmp_path), "data.path")] == ["a.json", "b.jsonl"]
    assert [p.name for p in expand(str(tmp_path / "*.json*"), "data.path")] == ["a.json", "b.jsonl"]
    assert [p.name for p in expand(str(tmp_path / "**" / "*.jsonl"), "data.path")] == ["b.jsonl", "c.jsonl"]
    listed = [str(tmp_path / "b.jsonl"), str(tmp_path)]
    assert [p.name for p in expand(listed, "data.path")] == ["b.jsonl", "a.json"]


@pytest.mark.parametrize("name", ["a b.jsonl", "[1].jsonl", "a,b.jsonl", "k=v.jsonl", "what?*.jsonl", "ü(1).jsonl"])
def test_names_that_exist_are_literal(tmp_path, name):
    touch(tmp_path / name, tmp_path / "1.jsonl", tmp_path / "whatever.jsonl")
    assert expand(str(tmp_path / name), "data.path") == [tmp_path / name]


def test_home_expands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "a.jsonl")
    assert expand("~/a.jsonl", "data.path") == [tmp_path / "a.jsonl"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("train.jsn", r"data\.eval_path=.*train\.jsn does not exist; did you mean .*train\.jsonl\?"),
        ("dat/x.jsonl", r"did you mean .*data\?"),
        ("*.csv", r"does not exist"),
        ("data", r"holds no"),
        ("note.txt", r"must end in"),
    ],
)
def test_missing_names_value_key_and_neighbour(tmp_path, value, message):
    touch(tmp_path / "train.jsonl", tmp_path / "note.txt")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=message):
        expand(str(tmp_path / value), "data.eval_path")


@pytest.mark.parametrize("value", [[], [3], 3, ""])
def test_values_that_are_no_paths(value):
    with pytest.raises(DataError, match=r"data\.path"):
        expand(value, "data.path")
