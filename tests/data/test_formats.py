import re
from pathlib import Path

import pytest

from strategies.errors import DataError
from trainer.data.formats import documents, recognise, to_document
from trainer.data.rows import Row
from trainer.data.settings import DataFormat

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def row(fields, line=7):
    return Row(Path("f.jsonl"), line, fields)


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": [USER, REPLY]}, DataFormat.messages),
        ({"conversations": []}, DataFormat.messages),
        ({"prompt": "a", "completion": "b"}, DataFormat.prompt_completion),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, DataFormat.prompt_completion),
        ({"text": "a", "label": 1}, DataFormat.labelled),
        ({"text": "a", "id": 1}, DataFormat.text),
    ],
)
def test_recognise(fields, format):
    assert recognise(row(fields), {}) is format


def test_documents_of_each_format():
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert to_document(row(sharegpt), DataFormat.messages, {}).messages == [USER, REPLY]
    alpaca = to_document(row({"instruction": "i", "input": "x", "output": "o"}), DataFormat.prompt_completion, {})
    assert (alpaca.prompt, alpaca.completion, alpaca.separator) == ("i\n\nx", "o", "\n\n")
    no_input = to_document(row({"instruction": "i", "input": "", "output": "o"}), DataFormat.prompt_completion, {})
    assert no_input.prompt == "i"
    plain = to_document(row({"q": "a ", "r": " b"}), DataFormat.prompt_completion, {"prompt": "q", "completion": "r"})
    assert (plain.prompt, plain.completion, plain.separator) == ("a ", " b", "")
    labelled = to_document(row({"text": "t", "label": 3}), DataFormat.labelled, {})
    assert (labelled.text, labelled.label, labelled.where) == ("t", "3", "f.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "hi"}, r"messages.*'hi'.*a list of"),
        ({"messages": []}, r"\[\]"),
        ({"messages": ["hi"]}, r"messages\[1\] is 'hi'"),
        ({"messages": [USER, {"role": "bot", "content": "a"}]}, r"messages\[2\]\.role is 'bot'; known roles"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[2\]\.content is None"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[2\]\.content is missing"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, r"messages\[2\]\.content is an empty text"),
        ({"messages": [USER]}, r"no assistant turn"),
        ({"messages": [REPLY, USER, REPLY]}, r"begins with an assistant turn"),
        ({"messages": [USER, {**REPLY, "tool_calls": [1]}]}, r"tool_calls"),
        ({"prompt": "a", "completion": 3}, r'"completion" is 3; it must be a text'),
        ({"instruction": "a", "input": 5, "output": "b"}, r'"input" is 5'),
        ({"text": ""}, r'"text" is an empty text'),
        ({"text": "a\ud800b"}, r"surrogate.*character 2|character 2.*"),
        ({"text": "a", "label": 1.5}, r'"label" is 1\.5'),
        ({"text": "a", "label": True}, r'"label" is True'),
        ({"body": "a"}, r"columns \['body'\] fit no format"),
    ],
)
def test_bad_rows_are_shown_with_file_and_line(fields, message):
    with pytest.raises(DataError, match=r"^f\.jsonl:7: ") as caught:
        list(documents([row(fields)], DataFormat.auto, {}))

    assert re.search(message, str(caught.value)), caught.value


def test_mix_of_formats_is_an_error_at_the_first_differing_row():
    rows = [row({"text": "a"}, 1), row({"text": "b"}, 2), row({"messages": [USER, REPLY]}, 3)]
    with pytest.raises(DataError, match=r"^f\.jsonl:3: messages format, but .*f\.jsonl:1 are in text format"):
        list(documents(rows, DataFormat.auto, {}))


def test_given_format_that_does_not_fit():
    with pytest.raises(DataError, match=r"data\.format=messages needs"):
        list(documents([row({"text": "a"})], DataFormat.messages, {}))


def test_renamed_column_must_exist():
    with pytest.raises(DataError, match=r"no column 'body' \(data\.columns\.text\)"):
        list(documents([row({"txt": "a"})], DataFormat.auto, {"text": "body"}))
