"""Whatever a file holds, reading gives rows, bad rows or one clear DataError, and no row gets lost."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies.errors import DataError
from tests.data.broken_files import CASES, whole
from tests.helpers.covering import examples
from trainer.data.document import RejectedRow, SourceRow
from trainer.data.read.origin import Origin
from trainer.data.read.paths import expand_paths

KINDS = ("x.json", "x.jsonl", "x.csv", "x.tsv", "x.txt", "x.parquet", "x.arrow", "x.jsonl.gz", "x.jsonl.zst")
ROWS = [
    b'{"text": "a"}',
    b'{"messages": [{"role": "user", "content": "\xc3\xa9\\n\\"q\\""}], "n": -1.5e3}',
    b"  {}  ",
    b"",
    b'{"t": [true, null, {"x": "\\u00e9"}]}\r',
]


def rows_of(value: str) -> tuple[list[SourceRow | RejectedRow], DataError | None]:
    """What comes of reading a path value and all its columns: the rows in front of the error, and the error."""
    found: list[SourceRow | RejectedRow] = []
    try:
        for row in Origin("data.path", expand_paths(value, "data.path")).rows():
            assert isinstance(row, SourceRow | RejectedRow)
            found.append(whole(row))
    except DataError as error:
        return found, error
    return found, None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken_file_gives_the_expected_rows_or_error(case, tmp_path):
    value = case.make(tmp_path)
    if case.name == "unreadable" and os.access(value, os.R_OK):
        pytest.skip("this user may read every file")
    rows, error = rows_of(value)
    bad = [row for row in rows if isinstance(row, RejectedRow)]
    assert [row.reason for row in bad] == list(case.bad)
    if case.rows is not None:
        assert len(rows) - len(bad) == case.rows
    for row in bad:
        assert Path(row.file).is_file()
        assert row.message
        assert len(row.excerpt) <= 200 * 6
        assert row.excerpt.isprintable()
    if case.error is None:
        assert error is None, str(error)
        return
    assert error is not None, "no DataError"
    assert re.search(case.error, str(error)), str(error)
    named = (value, Path(value).name, str(Path(value).parent / "x.jsonl"))  # a glob's error names the file it matched
    assert any(name in str(error) for name in named)
    assert len(str(error).splitlines()) == 1


def test_broken_files_are_many_and_their_names_differ():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


fuzz = settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_random_bytes_never_crash(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    rows, error = rows_of(str(tmp_path / name))
    assert error is None or name in str(error)
    assert rows or error


@fuzz
@given(
    st.lists(st.sampled_from(ROWS), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2), st.binary(min_size=1, max_size=4)), max_size=6),
)
def test_every_line_that_is_not_blank_comes_once(tmp_path, lines, changes):
    content = bytearray(b"\n".join(lines) + b"\n")
    for place, kind, new in changes:
        at = place % (len(content) + 1)
        content[at : at + (0, len(new), 3)[kind]] = (new, new, b"")[kind]
    (tmp_path / "x.jsonl").write_bytes(content)
    rows, error = rows_of(str(tmp_path / "x.jsonl"))
    text = bytes(content).removeprefix(b"\xef\xbb\xbf")
    expected = [number for number, line in enumerate(text.split(b"\n"), 1) if line.strip()]
    if error is not None:
        assert re.search("no rows|empty|UTF-16|UTF-32|carriage returns|holds", str(error))
        assert not rows
    else:
        assert [row.line for row in rows] == expected


@fuzz
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3), st.sampled_from([*range(len(CASES))]))
def test_mutations_of_every_kind_never_crash(tmp_path, place, new, index):
    """One changed place in any file of the corpus."""
    case = CASES[index]
    root = tmp_path / f"{index}-{place}"
    root.mkdir(exist_ok=True)
    for old in sorted(root.rglob("*"), reverse=True):
        old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
    value = case.make(root)
    if case.name != "long name" and Path(value).is_file():
        content = bytearray(Path(value).read_bytes())
        at = place % (len(content) + 1)
        content[at : at + len(new)] = new
        Path(value).write_bytes(content)
    rows, error = rows_of(value)
    assert rows or error
