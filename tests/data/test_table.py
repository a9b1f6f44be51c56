import subprocess
import sys

import pytest

from trainer.data.config import DuplicatePolicy, DuplicatesConfig
from trainer.data.document import Document
from trainer.data.selection.document_hashes import DocumentHasher
from trainer.data.store.documents import document_schema, to_record_batch


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def documents_of_every_format():
    pair = Document("f", 3, messages=turns("q"), chosen=turns("good"), rejected=turns("bad"))
    more = [
        Document("f", 1, prompt="p", completion="c", separator="\n"),
        Document("f", 2, text="ü😀", label="x", source="other"),
        Document("f", 3, text=""),
        Document("g", 1 << 40, messages=[], desirable=False),
        Document("g", 5, messages=[{"role": "user", "content": "é", "train": False}], desirable=True),
    ]
    return [Document("f", 7, messages=turns("q", "a")), pair, *more]


@pytest.mark.parametrize("number", [0, 1, 2, 7, 35])
def test_table_rows_are_what_arrow_itself_makes_of_them(number):
    import pyarrow as pa

    documents = (documents_of_every_format() * 5)[:number]
    columns = {name: [getattr(document, name) for document in documents] for name in document_schema().names}
    batch = to_record_batch(documents)
    batch.validate(full=True)
    assert batch.equals(pa.RecordBatch.from_pydict(columns, schema=document_schema()))
    assert [column.null_count for column in batch] == [sum(v is None for v in column) for column in columns.values()]


def test_rows_are_made_without_pandas():
    code = (
        "import sys; from trainer.data.document import Document; from trainer.data.store.documents import to_record_batch;"
        "to_record_batch([Document('f', 1, messages=[{'role': 'user', 'content': 'a'}])]); assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_duplicate_signatures_leave_out_what_nothing_is_compared_with():
    documents = documents_of_every_format()
    full = DocumentHasher(DuplicatesConfig()).hash_documents(documents)
    alone = DocumentHasher(DuplicatesConfig(), has_held_out=False).hash_documents(documents)
    assert full["prompt"].any() and not alone["prompt"].any()
    assert all((full[name] == alone[name]).all() for name in ("digest", "normal"))
    exact = DuplicatesConfig(normalized=DuplicatePolicy.none)
    only = DocumentHasher(exact, has_held_out=False).hash_documents(documents)
    assert (only["digest"] == full["digest"]).all() and len(set(only["normal"].tolist())) == len(documents)
    kept = DocumentHasher(exact).hash_documents(documents)
    assert all((full[name] == kept[name]).all() for name in full)
