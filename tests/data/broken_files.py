"""Files as people hand them in, most of them broken: a generator of cases, each with what reading it must give."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.document import RejectedRow, SourceRow, excerpt
from trainer.data.fields import UnreadableValue

GOOD = b'{"text": "a"}\n'
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4


@dataclass
class TaskCase:
    """One file or tree. `make` writes it below a directory and returns the path value to read.

    `error`: a pattern of the DataError, after `rows` rows and `bad` bad rows. Without: those numbers and nothing else.
    """

    name: str
    make: Callable[[Path], str]
    rows: int | None = None
    bad: tuple[str, ...] = ()
    error: str | None = None


def whole(row: SourceRow | RejectedRow) -> SourceRow | RejectedRow:
    """The row, or why it cannot be taken by a format that reads all its columns."""
    row = row.parse()
    if isinstance(row, SourceRow) and (
        faults := [value for value in row.fields.values() if isinstance(value, UnreadableValue)]
    ):
        return RejectedRow(row.file, row.line, faults[0].reason, faults[0].message, excerpt(repr(row.fields)))
    return row


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True)) if data else bytes.fromhex("28b52ffd2000010000")


def table(**columns) -> pa.Table:
    return pa.table(columns)


def parquet(data: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(data, sink)
    return sink.getvalue()


def arrow(data: pa.Table, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


def file(
    name: str, content: bytes, rows: int | None = None, bad=(), error: str | None = None, title: str = ""
) -> TaskCase:
    def make(root: Path) -> str:
        (root / name).write_bytes(content)
        return str(root / name)

    return TaskCase(title or name, make, rows, (bad,) if isinstance(bad, str) else tuple(bad), error)


def tree(title: str, build: Callable[[Path], str], rows: int | None = None, error: str | None = None) -> TaskCase:
    return TaskCase(title, build, rows, (), error)


def json_lines() -> list[TaskCase]:
    def line(title: str, content: bytes, reason: str) -> TaskCase:
        return file("x.jsonl", GOOD + content + b"\n" + GOOD, 2, reason, title=f"jsonl {title}")

    lone = b'{"text": "\\ud83d"}'
    return [
        line("malformed", b'{"text": }', "not_json"),
        line("two objects", b'{"a": 1}{"b": 2}', "not_json"),
        line("trailing comma", b'{"text": "a",}', "not_json"),
        line("comma after the object", b'{"text": "a"},', "not_json"),
        line("single quotes", b"{'text': 'a'}", "not_json"),
        line("python constant", b'{"text": None}', "not_json"),
        line("cut off", b'{"text": "a', "not_json"),
        line("comment", b"// a comment", "not_json"),
        line("control character", b'{"text": "a\x01"}', "not_json"),
        line("tab in a text", b'{"text": "a\tb"}', "not_json"),
        line("list", b"[1]", "not_an_object"),
        line("text", b'"a"', "not_an_object"),
        line("null", b"null", "not_an_object"),
        line("nan", b'{"n": NaN}', "nan"),
        line("minus infinity", b'{"n": [-Infinity]}', "nan"),
        line("1e400", b'{"n": 1e400}', "number_too_large"),
        line("5000 digits", b'{"n": ' + b"1" * 5000 + b"}", "number_too_large"),
        line("duplicate key", b'{"text": "a", "text": "b"}', "duplicate_key"),
        line("duplicate inner key", b'{"m": [{"a": 1, "b": 2, "a": 1}]}', "duplicate_key"),
        line("duplicate escaped key", b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
        line("depth 10000", b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested_too_deep"),
        line("depth 150", b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "nested_too_deep"),
        line("depth unclosed", b'{"a":' + b"[" * 200_000, "nested_too_deep"),
        line("lone surrogate", lone, "lone_surrogate"),
        line("low surrogate", b'{"text": "\\uDE00"}', "lone_surrogate"),
        line("latin-1", '{"text": "é"}'.encode("latin-1"), "not_utf8"),
        line("overlong", b'{"text": "\xc0\xaf"}', "not_utf8"),
        line("encoded surrogate", b'{"text": "\xed\xa0\x80"}', "not_utf8"),
        line("half a character", b'{"text": "\xe2\x82', "not_utf8"),
        line("nul", b'{"text": "a\0"}', "nul_byte"),
        line("bom inside", b'\xef\xbb\xbf{"text": "a"}', "not_json"),
        file("x.jsonl", b'{"n": ' + b"1" * 400 + b"}\n", 1, title="400 digits are a number"),
        file("x.jsonl", b'{"text": "\\ud83d\\ude00 \\\\ud83d"}\n', 1, title="a whole surrogate pair"),
        file("x.jsonl", b"{}\n", 1, title="empty object"),
        file("x.jsonl", b'\xef\xbb\xbf{"text": "a"}', 1, title="utf-8 bom, no last line end"),
        file("x.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n', 2, title="crlf"),
        file("x.jsonl", b'{"text": "a\xe2\x80\xa8b\xc2\x85c"}\n', 1, title="unicode line separators"),
        file("x.jsonl", b'{"text": "a"}\r{"text": "b"}\r', 0, "not_json", title="cr only"),
        file("x.jsonl", b"", error="empty", title="jsonl of 0 bytes"),
        file("x.jsonl", b"\n \n\r\n", error="no rows", title="blank lines only"),
        file("x.jsonl", GOOD.decode().encode("utf-16"), error="UTF-16.*save the file as UTF-8", title="utf-16"),
        file("x.jsonl", GOOD.decode().encode("utf-16-be"), error="UTF-16", title="utf-16 without bom"),
        file("x.jsonl", GOOD.decode().encode("utf-32"), error="UTF-32", title="utf-32"),
        file("x.jsonl", PNG, error="PNG image", title="png as jsonl"),
        file("x.jsonl", b"%PDF-1.7\n", error="PDF", title="pdf as jsonl"),
        file("x.jsonl", b"PK\x03\x04" + bytes(60), error="zip archive", title="zip as jsonl"),
        file("x.jsonl", parquet(table(text=["a"])), error="Parquet file; name it .parquet", title="parquet as jsonl"),
        file("x.jsonl", gzip.compress(GOOD), error=r"gzip.*name it x\.jsonl\.gz", title="gzip without its suffix"),
        file("x.jsonl", zst(GOOD), error=r"Zstandard.*name it x\.jsonl\.zst", title="zst without its suffix"),
        file("x.ndjson", GOOD * 3, 3),
    ]


def compressed() -> list[TaskCase]:
    # bytes that do not compress, so that cutting the file cuts rows
    many = b"".join(b'{"text": "%s"}\n' % os.urandom(30).hex().encode() for _ in range(200))
    packed, frame = gzip.compress(many), zst(many)
    return [
        file("x.jsonl.gz", packed, 200),
        file("x.jsonl.gz", packed + gzip.compress(GOOD) + b"\0" * 16, 201, title="gzip members and padding"),
        file("x.jsonl.gz", packed[: len(packed) // 2], error="cut off", title="gzip cut off"),
        file("x.jsonl.gz", packed[:-4], error="cut off", title="gzip without its end"),
        file("x.jsonl.gz", packed + b"garbage", error="damaged", title="gzip with garbage"),
        file("x.jsonl.gz", packed[:-8] + bytes(8), error="damaged", title="gzip with a wrong checksum"),
        file("x.jsonl.gz", GOOD, error="it is gzip.*not compressed", title="plain text as gzip"),
        file("x.jsonl.gz", frame, error="holds Zstandard", title="zst as gzip"),
        file("x.jsonl.gz", gzip.compress(packed), error="decompress it once", title="gzip twice"),
        file("x.jsonl.gz", gzip.compress(b""), error="no rows", title="gzip of nothing"),
        file("x.jsonl.gz", gzip.compress(PNG), error=r"PNG.*that \.jsonl promises", title="gzip of a png"),
        file("x.jsonl.zst", frame, 200),
        file("x.jsonl.zst", frame + zst(b"") + zst(GOOD), 201, title="zst frames"),
        file("x.jsonl.zst", frame[: len(frame) // 2], error="cut off", title="zst cut off"),
        file("x.jsonl.zst", frame[:-1], error="cut off", title="zst without its end"),
        file("x.jsonl.zst", frame + b"garbage", error="damaged", title="zst with garbage"),
        file("x.jsonl.zst", GOOD, error="not compressed", title="plain text as zst"),
        *(
            case
            for suffix, pack in (("bz2", bz2.compress), ("xz", lzma.compress))
            for case in further(suffix, pack(many))
        ),
        file("x.jsonl.xz", lzma.compress(many) + bytes(8) + lzma.compress(GOOD), 201, title="xz streams and padding"),
        file("x.jsonl.zip", zipped(a=many), 200),
        file("x.jsonl.zip", zipped(a=many, b=many), error="holds 2 files, and one can be read", title="zip of two"),
        file("x.jsonl.zip", zipped(), error="holds 0 files|not a zip", title="zip of none"),
        file("x.jsonl.zip", zipped(a=many)[:-30], error="damaged", title="zip cut off"),
        file(
            "x.jsonl.zip", zipped(a=many).replace(many[:60], many[60:120], 1), error="damaged", title="zip, other bytes"
        ),
        file("x.csv.gz", gzip.compress(b"text\na\nb\n"), 2),
        file("x.tsv.zst", zst(b"text\tn\na\t1\n"), 1),
        file("x.json.gz", gzip.compress(b'[{"a": 1}, {"a": 2}]'), 2),
        file("x.txt.gz", gzip.compress(b"a text"), 1),
        file("x.parquet.gz", b"\x1f\x8b", error="must end in"),
    ]


def further(suffix: str, packed: bytes) -> list[TaskCase]:
    name = f"x.jsonl.{suffix}"
    return [
        file(name, packed, 200),
        file(name, packed + packed, 400, title=f"{suffix} members"),
        file(name, packed[: len(packed) // 2], error="cut off", title=f"{suffix} cut off"),
        file(name, packed[:-4], error="cut off", title=f"{suffix} without its end"),
        file(name, packed + b"garbage", error="damaged", title=f"{suffix} with garbage"),
        file(name, GOOD, error="not compressed", title=f"plain text as {suffix}"),
    ]


def zipped(**files: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.jsonl", content)
    return sink.getvalue()


def json_files() -> list[TaskCase]:
    def listed(title: str, content: bytes, rows=0, bad=(), error=None) -> TaskCase:
        return file("x.json", content, rows, bad, error, title=f"json {title}")

    wide = json.dumps([{"text": "x" * 999, "n": n} for n in range(3000)], indent=1).encode()
    return [
        listed("list", b'[\n {"text":\n  "c"},\n {"text": "d"}]\n', 2),
        listed("list longer than a buffer", wide, 3000),
        listed("lines", GOOD * 2, 2),
        listed("lines, one malformed", GOOD + b"{\n" + GOOD, 2, "not_json"),
        listed("elements that are no objects", b'[{"a": 1}, 3, [1], "x", null, {}]', 2, ["not_an_object"] * 4),
        listed("nan", b'[{"a": 1},\n{"a": [NaN, "]"]}, {"a": 2}]', 2, "nan"),
        listed("duplicate key", b'[{"a": 1, "a": 2}, {"a": 2}]', 1, "duplicate_key"),
        listed("latin-1", b'[{"a": "\xe9"}, {"a": "\xc3\xa9"}]', 1, "not_utf8"),
        listed("number too large", b'[{"a": 1e999}, {"a": ' + b"7" * 5000 + b"}]", 0, ["number_too_large"] * 2),
        listed("lone surrogate", b'[{"a": "\\ud800"}]', 0, "lone_surrogate"),
        listed("malformed", b'[\n{"a": 1},\n{"a": },\n{"b": 1}]', 2, "not_json"),
        listed("nul", b'[\n{"a": 1},\n{"a": "\0"}\n]', 1, "nul_byte"),
        listed("a text that is never closed", b'[\n{"a": 1},\n{"a": "x},\n{"a": "y"}]', 1, error=":3: .*never closed"),
        listed(
            "a quote too many, twice",
            b'[\n{"a":"x"y"},\n{"a":2},\n{"a":"z"w"},\n{"a":5}]',
            error=":2: .*a quote is never closed",
        ),
        listed("a quote missing", b'[\n{"a": "x"},\n{"b: "x"},\n{"a": "y"}]', 1, error=":3: .*a quote is never closed"),
        listed("blanks after a text", b'[{"a" : "x" \n}, "y" ]', 1, "not_an_object"),
        listed("nothing between commas", b'[{"a": 1},,{"a": 2}]', 1, error=":1: .*a comma before another"),
        listed("brace too many", b'[{"a": 1}}, {"a": 2}]', 0, error=":1: .*expected"),
        listed("trailing comma", b'[\n{"a": 1},\n]', 1, error=":3: .*comma before"),
        listed("missing comma", b'[\n{"a": 1}\n{"a": 2}]', 0, error=":3: .*',' and an object"),
        listed("unclosed", b'[\n{"a": 1}\n', 0, error=r":\d: not valid JSON"),
        listed("cut in an object", b'[\n{"a": 1},\n{"a": "b', 1, error=":3: .*cut off"),
        listed("text after the end", b'[{"a": 1}]\nx', 1, error=":2: .*after the end"),
        listed("two lists", b'[{"a": 1}]\n[{"a": 2}]', 1, error=":2: .*after the end"),
        listed("depth 10000", b'[{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]", 0, "nested_too_deep"),
        listed("one object on many lines", b'{\n"a": 1\n}', error=":1: .*wrap the object in"),
        listed("number", b"3", error="list of objects"),
        listed("text", b"hello", error="list of objects"),
        listed("empty list", b"[ ]", error="no rows"),
        listed("0 bytes", b"", error="empty"),
        listed("blank", b" \n\n", error="empty"),
        listed("utf-16", "[{}]".encode("utf-16"), error="UTF-16"),
        listed("parquet", parquet(table(text=["a"])), error="Parquet file"),
    ]


def delimited() -> list[TaskCase]:
    def cells(title: str, content: bytes, rows=0, bad=(), error=None, name="x.csv") -> TaskCase:
        return file(name, content, rows, bad, error, title=f"csv {title}")

    wrong = "wrong_cell_count"
    return [
        cells("quotes and line breaks", b'text,n\n"e\n""f""",1\r\n\r\n  \ng,2\n', 2),
        cells("ragged", b"text,label\na,1\nb\nc,1,2\nd,4\n", 2, [wrong] * 2),
        cells("trailing comma in a row", b"text,label\na,1,\n", 0, wrong),
        cells("an index as pandas writes it", b",text,label\n0,a,1\n1,b,2\n", 2),
        cells("trailing comma in the header", b"text,label,\na,1,\n", error=":1: .*column 3 without a name"),
        cells("empty cell", b"text,label\n,\n", 1),
        cells("one column with a quoted empty cell", b'text\n""\na\n', 2),
        cells("latin-1", b"text,label\ncaf\xe9,1\na,2\n", 1, "not_utf8"),
        cells("latin-1 in a record of two lines", b'text,label\n"a\ncaf\xe9",1\na,2\n', 1, "not_utf8"),
        cells("nul", b"text,label\na\0b,1\na,2\n", 1, "nul_byte"),
        cells("latin-1 header", b"caf\xe9\na\n", error=":1: in the header: byte 0xe9"),
        cells("unclosed quote", b'text,n\nb,1\n"a,2\nc,3\n', 1, error=":3: .*never closed"),
        cells("stray quote", b'text\nb\n"a"b\n', 1, error=":3: not valid CSV"),
        cells("doubled column", b"text,text\na,b\n", error=":1: .*'text' twice"),
        cells("header only", b"text\n", error="no rows"),
        cells("0 bytes", b"", error="empty"),
        cells("semicolons", b'\n"text";label\n"a;b, c";1\nd, e;2\nf,g\n', 2, wrong),
        cells("semicolons in tsv", b"text;label\na;1\n", error=":1: .*separated by semicolons", name="x.tsv"),
        cells("tabs", b"text\tlabel\na\t1\n", error=r":1: .*separated by tabs.*\.tsv"),
        cells("commas in tsv", b"text,label\na,1\n", error=r":1: .*separated by commas.*\.csv", name="x.tsv"),
        cells("tsv", b"text\tlabel\na, b\t1\n", 1, name="x.tsv"),
        cells("carriage returns", b"text,label\ra,1\rb,2\r", error="carriage returns"),
        cells("utf-16", "text\na\n".encode("utf-16"), error="UTF-16"),
        cells("bom", b"\xef\xbb\xbftext\na\n", 1),
        cells("office document", b"PK\x03\x04" + bytes(60), error="zip archive"),
    ]


def columnar() -> list[TaskCase]:
    good = table(text=["a", "b", "c"], n=[1, 2, 3])
    packed, ipc, stream = parquet(good), arrow(good, stream=False), arrow(good, stream=True)
    broken = pa.table({"text": pa.array([b"ok", b"\xff\xfe\xfd", b"x"]).view(pa.binary())})
    unchecked = pa.Table.from_arrays(
        [pa.Array.from_buffers(pa.string(), 3, broken["text"].chunk(0).buffers())], names=["text"]
    )
    ends, far = struct.pack("<4i", 0, 1, 2, 3), struct.pack("<4i", 0, 1, 2, 1 << 30)
    assert stream.count(ends) == 1
    doubled = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    return [
        file("x.parquet", packed, 3),
        file("x.parquet", packed[: len(packed) // 2], error="Parquet.*damaged", title="parquet cut off"),
        file("x.parquet", packed[:-1], error="Parquet.*damaged", title="parquet without its last byte"),
        file("x.parquet", packed[:4] + packed[40:], error="Parquet.*damaged", title="parquet with a hole"),
        file("x.parquet", GOOD, error="it is Parquet, but.*JSON text", title="jsonl as parquet"),
        file("x.parquet", b"", error="empty", title="parquet of 0 bytes"),
        file("x.parquet", parquet(good.slice(0, 0)), error="no rows", title="parquet without rows"),
        file("x.parquet", parquet(doubled), error="'text' twice", title="parquet with a doubled column"),
        file("x.parquet", parquet(broken), 2, "binary", title="parquet with bytes"),
        file("x.parquet", parquet(unchecked), 2, "not_utf8", title="parquet with a text that is not utf-8"),
        file("x.parquet", parquet(table(n=[1.0, float("inf"), float("nan")])), 2, "nan", title="parquet infinity"),
        file("x.arrow", ipc, 3, title="arrow file"),
        file("x.arrow", stream, 3, title="arrow stream"),
        file("x.arrow", ipc[:-20], error="Arrow.*damaged", title="arrow file cut off"),
        file("x.arrow", stream[:-8], error="cut off", title="arrow stream without its end"),
        file("x.arrow", stream[: len(stream) // 2], error="Arrow.*(damaged|cut off)", title="arrow stream cut off"),
        file("x.arrow", stream + stream, error="bytes follow", title="two arrow streams"),
        file("x.arrow", packed, error="it is Arrow, but.*Parquet", title="parquet as arrow"),
        file("x.arrow", stream.replace(ends, far), error="Arrow.*damaged", title="arrow with offsets out of bounds"),
        file("x.arrow", b"\xff\xff\xff\xff" + struct.pack("<i", 1 << 30), error="Arrow.*damaged", title="arrow header"),
    ]


def texts() -> list[TaskCase]:
    return [
        file("x.txt", b"a\r\nb", 1),
        file("x.md", b"\xef\xbb\xbf# a", 1),
        file("x.txt", b"caf\xe9", 0, "not_utf8", title="latin-1 text"),
        file("x.txt", b"a\0b", 0, "nul_byte", title="text with nul"),
        file("x.txt", b" \n", 0, "empty", title="blank text"),
        file("x.txt", b"", error="empty", title="text of 0 bytes"),
        file("x.txt", "abc".encode("utf-16"), error="UTF-16", title="utf-16 text"),
        file("x.txt", PNG, error="PNG", title="png as text"),
    ]


def trees() -> list[TaskCase]:
    def named(name: str) -> Callable[[Path], str]:
        def build(root: Path) -> str:
            (root / name).write_bytes(GOOD)
            (root / "1.jsonl").write_bytes(GOOD * 2)
            return str(root / name)

        return build

    def fifo(root: Path) -> str:
        os.mkfifo(root / "x.jsonl")
        return str(root / "x.jsonl")

    def fifo_in_directory(root: Path) -> str:
        fifo(root)
        return str(root)

    def directory(root: Path) -> str:
        (root / "x.jsonl").mkdir()
        return str(root / "x.jsonl")

    def directory_matched(root: Path) -> str:
        directory(root)
        return str(root / "*.jsonl")

    def broken_link(root: Path) -> str:
        (root / "x.jsonl").symlink_to("missing.jsonl")
        return str(root / "x.jsonl")

    def broken_link_in_directory(root: Path) -> str:
        broken_link(root)
        return str(root)

    def link_loop(root: Path) -> str:
        (root / "x.jsonl").symlink_to("y.jsonl")
        (root / "y.jsonl").symlink_to("x.jsonl")
        return str(root / "x.jsonl")

    def directory_loop(root: Path) -> str:
        (root / "a").mkdir()
        (root / "a" / "x.jsonl").write_bytes(GOOD)
        (root / "a" / "up").symlink_to("..")
        return str(root)

    def link_glob(root: Path) -> str:
        (root / "x.jsonl").symlink_to("missing.jsonl")
        return str(root / "*.jsonl")

    def deep(root: Path) -> str:
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "b" / "x.jsonl").write_bytes(GOOD)
        (root / "y.jsonl").write_bytes(GOOD)
        return str(root / "**" / "*.jsonl")

    def mixed(root: Path) -> str:
        deep(root)
        (root / "z.csv").write_bytes(b"text\na\n")
        (root / "note.txt").write_bytes(b"a note")
        (root / "README.md").write_bytes(b"# about the data")
        (root / ".hidden.jsonl").write_bytes(b"{")
        (root / "picture.png").write_bytes(PNG)
        return str(root)

    def unreadable(root: Path) -> str:
        (root / "x.jsonl").write_bytes(GOOD)
        (root / "x.jsonl").chmod(0)
        return str(root / "x.jsonl")

    def nothing(root: Path) -> str:
        (root / "picture.png").write_bytes(PNG)
        return str(root)

    names = ["a b.jsonl", "[1].jsonl", "a,b.jsonl", "k=v.jsonl", "what?*.jsonl", "ü(1).jsonl", "X.JSONL", "x.y.jsonl"]
    return [
        *(tree(f"named {name}", named(name), 1) for name in names),
        tree("fifo", fifo, error="named pipe"),
        tree("fifo in a directory", fifo_in_directory, error="x.jsonl.*named pipe"),
        tree("directory named x.jsonl", directory, error="holds no file"),
        tree("glob of directories", directory_matched, error="only directories"),
        tree("directory with nothing usable", nothing, error=r"holds no file that ends in \.json"),
        tree("broken link", broken_link, error="missing.jsonl, which does not exist"),
        tree("broken link in a directory", broken_link_in_directory, error="missing.jsonl, which does not exist"),
        tree("broken link in a glob", link_glob, error="missing.jsonl, which does not exist"),
        tree("link loop", link_loop, error="x.jsonl.*loop"),
        tree("directory loop", directory_loop, error="a/up.*loop"),
        tree("deep glob", deep, 2),
        tree("mixed directory", mixed, 4),
        tree("unreadable", unreadable, error="cannot be read: Permission denied"),
        tree("missing", lambda root: str(root / "no.jsonl"), error="no.jsonl does not exist"),
        tree("address", lambda root: "https://example.com/x.jsonl", error="x.jsonl is an address"),
        tree("long name", lambda root: str(root / ("x" * 300 + ".jsonl")), error="File name too long|does not exist"),
    ]


CASES = [*json_lines(), *compressed(), *json_files(), *delimited(), *columnar(), *texts(), *trees()]
