import contextlib
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError, DataError
from tests.helpers.covering import examples
from trainer.data.config import DataFormat
from trainer.data.document import Document, RejectedRow, SourceRow
from trainer.data.format_recognition import COLUMN_SETS_BY_FORMAT, REQUIRED_COLUMNS_TEXT_BY_FORMAT, recognise_format
from trainer.data.formats import RowReader
from trainer.data.selection.document_hashes import content_json

F = DataFormat
USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
FORMATS = [format for format in F if format is not F.auto]


def row(fields, line=7):
    return SourceRow("f.jsonl", line, fields)


def read(fields, format=F.auto, columns=None):
    format = recognise_format(row(fields), columns or {}) if format is F.auto else format
    return RowReader(format, columns or {}, source="data")(row(fields))


def good(fields, format=F.auto, columns=None):
    document = read(fields, format, columns)
    assert isinstance(document, Document), document
    return document


def test_every_format_has_a_spelling_and_a_need():
    assert set(COLUMN_SETS_BY_FORMAT) == set(REQUIRED_COLUMNS_TEXT_BY_FORMAT) == set(FORMATS)


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": [USER, REPLY]}, F.messages),
        ({"conversation": [USER, REPLY]}, F.messages),
        ({"messages": [USER, REPLY], "text": None}, F.messages),
        ({"messages": [USER, REPLY], "label": "spam"}, F.messages),
        ({"messages": [USER, REPLY], "prompt": "q", "prompt_id": "1"}, F.messages),
        ({"conversations": []}, F.sharegpt),
        ({"instruction": "a", "output": "b"}, F.alpaca),
        ({"instruction": "a", "input": "", "output": "b", "text": "c"}, F.alpaca),
        ({"instruction": "a", "context": "", "response": "b", "category": "qa"}, F.alpaca),
        ({"prompt": "a", "completion": "b"}, F.prompt_completion),
        ({"prompt": "a", "response": "b"}, F.prompt_completion),
        ({"question": "a", "answer": "b"}, F.prompt_completion),
        ({"query": "a", "response": "b"}, F.prompt_completion),
        ({"input": "a", "output": "b"}, F.prompt_completion),
        ({"question": "a", "answer": "b", "content": "page"}, F.prompt_completion),
        ({"prompt": "a", "completion": "b", "label": "hard"}, F.prompt_completion),
        ({"source": "a", "target": "b"}, F.pair),
        ({"input": "a", "target": "b"}, F.pair),
        ({"text": "a", "id": 1}, F.text),
        ({"text": "a", "source": "https://"}, F.text),
        ({"content": "a", "title": "t"}, F.text),
        ({"text": "a", "label": 1}, F.labelled),
        ({"text": "a", "label": True}, F.labelled),
        ({"sentence": "a", "label": 1}, F.labelled),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, F.preference),
        ({"chosen": [USER, REPLY], "rejected": [USER, OTHER]}, F.preference),
        ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, F.preference),
        ({"prompt": "a", "completion": "b", "label": True}, F.thumbs),
        ({"prompt": "a", "completion": "b", "label": "False"}, F.thumbs),
        ({"prompt": "a", "completion": "b", "thumbs": "up"}, F.thumbs),
        ({"messages": [USER, REPLY], "label": False}, F.thumbs),
        ({"messages": [USER, REPLY], "thumbs": "down"}, F.thumbs),
    ],
)
def test_format_is_recognised_by_its_columns(fields, format):
    assert recognise_format(row(fields), {}) is format


@pytest.mark.parametrize(
    ("fields", "meant", "format"),
    [
        ({"text": "a", "label": None}, (F.labelled,), F.labelled),
        ({"text": "a", "label": None}, (), F.text),
        ({"prompt": "a", "completion": "b", "label": None}, (F.thumbs, F.preference), F.thumbs),
        ({"messages": [USER], "prompt": "a", "chosen": "b", "rejected": None}, (F.preference,), F.preference),
        ({"prompt": "a", "completion": "b"}, (F.labelled,), F.prompt_completion),
    ],
)
def test_a_null_in_the_first_row_does_not_hide_the_column_that_the_objective_learns(fields, meant, format):
    assert recognise_format(row(fields), {}, preferred=meant) is format


def test_format_error_renames_columns_to_those_that_the_objective_reads():
    with pytest.raises(DataError, match=r"as in data\.columns='\{text:NAME,label:NAME\}'"):
        recognise_format(row({"Text": "a", "Label": "b"}), {}, preferred=(F.labelled,))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": [USER, REPLY], "text": "a"}, ["messages", "text"]),
        ({"messages": [], "conversations": []}, ["messages", "sharegpt"]),
        ({"messages": [USER, REPLY], "prompt": "q", "chosen": [], "rejected": []}, ["messages", "preference"]),
        ({"prompt": "a", "completion": "b", "text": "c"}, ["prompt_completion", "text"]),
        ({"prompt": "a", "completion": "b", "label": 1}, ["prompt_completion", "thumbs"]),
        ({"messages": [USER, REPLY], "label": "0"}, ["messages", "thumbs"]),
        ({"source": "a", "target": "b", "question": "c", "answer": "d"}, ["prompt_completion", "pair"]),
    ],
)
def test_format_that_is_ambiguous_is_an_error_until_one_is_named(fields, named):
    with pytest.raises(DataError, match=r"^f\.jsonl:7: columns .* fit several formats") as caught:
        recognise_format(row(fields), {})
    assert f"data.format={'|'.join(named)}" in str(caught.value)
    assert "the row: {" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.sources\.web\.format="):
        recognise_format(row(fields), {}, source="web")


def test_format_that_is_named_settles_what_auto_cannot():
    both = {"messages": [USER, REPLY], "text": "t"}
    assert good(both, F.messages).messages == [USER, REPLY]
    assert good(both, F.text).text == "t"
    assert good({"prompt": "a", "completion": "b", "label": 1}, F.thumbs).desirable is True


def test_renamed_columns_settle_the_format_too():
    fields = {"text": "t", "q": "a", "r": "b"}
    columns = {"prompt": "q", "completion": "r"}
    assert recognise_format(row(fields), columns) is F.prompt_completion
    assert (good(fields, columns=columns).prompt, good(fields, columns=columns).separator) == ("a", "")
    graded = {"prompt": "a", "completion": "b", "good": 1}
    assert good(graded, columns={"label": "good", "prompt": "prompt", "completion": "completion"}).desirable is True


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"body": "a"}, r"columns \['body'\] fit no format"),
        ({"promt": "a", "completion": "b"}, r"columns \['completion', 'promt'\]"),
        ({"translation": {"en": "a", "de": "b"}}, r"columns \['translation\.de', 'translation\.en'\]"),
        ({"turns": [USER, REPLY]}, r"data\.columns='\{prompt:NAME,completion:NAME\}'"),
        ({}, r"rename them with data\.columns"),
    ],
)
def test_format_error_lists_what_each_format_needs(fields, hint):
    with pytest.raises(DataError, match="fit no format") as caught:
        recognise_format(row(fields), {})
    message = str(caught.value)
    assert re.search(hint, message), message
    recognised = [format for format in FORMATS if format is not F.prompt]
    assert all(f"  {format.value}: {REQUIRED_COLUMNS_TEXT_BY_FORMAT[format]}" in message for format in recognised)
    assert len(message.splitlines()) < 20 and "the row: {" in message


def test_a_long_row_is_shown_shortened():
    with pytest.raises(DataError) as caught:
        recognise_format(row({"body": "x" * 100_000, "deep": [[[[[1]]]]] * 50}), {})
    assert len(str(caught.value)) < 2500


def test_format_of_conversations():
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert good(sharegpt).messages == good(sharegpt, F.messages).messages == [USER, REPLY]
    assert good({"conversations": [USER, REPLY]}).messages == [USER, REPLY]
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": " r"}]
    document = good({"conversation": [{"role": "human", "content": parts}, {"role": "model", "content": "a"}]})
    assert document.messages == [{"role": "user", "content": "q r"}, REPLY]
    assert good({"conversations": [USER, REPLY], "system": "s"}).messages[0] == {"role": "system", "content": "s"}
    told = {"messages": [{"role": "developer", "content": "s"}, USER, REPLY], "system": "s"}
    assert [turn["role"] for turn in good(told).messages] == ["system", "user", "assistant"]
    assert (good(told).location, good(told).source) == ("f.jsonl:7", "data")


def test_a_user_turn_may_be_learned():
    turns = good({"messages": [{**USER, "train": True}, {**REPLY, "train": False}]}).messages
    assert [turn["train"] for turn in turns] == [True, False]


@pytest.mark.parametrize(
    ("extra", "train"),
    [
        ({}, None),
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 1.0}, True),
        ({"masked": True}, False),
        ({"masked": False, "train": True, "weight": 1}, True),
        ({"train": None}, None),
    ],
)
def test_format_of_turns_that_say_whether_they_are_learned(extra, train):
    turns = good({"messages": [USER, {**REPLY, **extra}, {**USER, "train": False}, REPLY]}).messages
    assert turns[1].get("train") is train
    assert turns[2] == {**USER, "train": False} and turns[3] == REPLY


@pytest.mark.parametrize(
    ("extra", "weight"),
    [
        ({"weight": 0.5}, 0.5),
        ({"loss_weight": 0.25}, 0.25),
        ({"weight": 0.5, "train": True, "masked": False}, 0.5),
        ({"weight": 0.5, "loss_weight": None}, 0.5),
        ({"weight": 1e-6}, 1e-6),
        ({"weight": 1}, None),
        ({"loss_weight": 0}, None),
    ],
)
def test_format_of_turns_that_say_how_much_they_are_learned(extra, weight):
    (_, turn, *_) = good({"messages": [USER, {**REPLY, **extra}, USER, REPLY]}).messages
    assert turn.get("weight") == weight
    assert turn["train"] is (extra.get("loss_weight") != 0)
    assert {key: turn[key] for key in REPLY} == REPLY and turn.keys() <= {*REPLY, "train", "weight"}


def test_format_of_prompts_and_completions():
    plain = good({"q": "a ", "r": " b"}, columns={"prompt": "q", "completion": "r"})
    assert (plain.prompt, plain.completion, plain.separator) == ("a ", " b", "")
    asked = good({"question": "a", "answer": "b"})
    assert (asked.prompt, asked.completion, asked.separator) == ("a", "b", "\n\n")
    for format in (F.alpaca, F.prompt_completion):
        alpaca = good({"instruction": "i", "input": "x", "output": "o"}, format)
        assert (alpaca.prompt, alpaca.completion, alpaca.separator) == ("i\n\nx", "o", "\n\n")
        assert good({"instruction": "i", "input": "", "output": "o"}, format).prompt == "i"
    dolly = good({"instruction": "i", "context": "x", "response": "o"})
    assert (dolly.prompt, dolly.completion) == ("i\n\nx", "o")
    system = good({"instruction": "i", "output": "o", "system": "s"})
    assert [turn["content"] for turn in system.messages] == ["s", "i", "o"] and system.prompt is None
    pair = good({"source": "Tag", "target": "day", "system": "linux"})
    assert (pair.prompt, pair.completion, pair.messages) == ("Tag", "day", None)


def test_conversational_prompt_and_completion_learn_the_completion_only():
    document = good({"prompt": [USER, OTHER, USER], "completion": [REPLY]})
    assert document.messages == [USER, {**OTHER, "train": False}, USER, REPLY]
    assert good({"prompt": [USER], "completion": "a"}).messages == [USER, REPLY]
    assert good({"prompt": "q", "completion": [REPLY]}).messages == [USER, REPLY]


def test_format_of_texts_and_labels():
    assert good({"text": " t\n"}).text == " t\n"
    assert good({"content": "t"}).text == "t"
    for label, name in ((3, "3"), (3.0, "3"), (" spam ", "spam"), (True, "true"), (False, "false"), (-1, "-1")):
        document = good({"text": "t", "label": label})
        assert (document.text, document.label) == ("t", name)
    assert good({"sentence": "t", "label": 0}).label == "0"


def test_format_of_preference_pairs():
    wanted = ([USER], [REPLY], [OTHER])
    texts = good({"prompt": "q", "chosen": "a", "rejected": "b"})
    lists = good({"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]})
    whole = good({"chosen": [USER, REPLY], "rejected": [USER, OTHER]})
    both = good({"prompt": "q", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "score_chosen": 9.5})
    mixed = good({"prompt": [USER], "chosen": "a", "rejected": "b"})
    hh = good({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"})
    for document in (texts, lists, whole, both, mixed, hh):
        assert (document.messages, document.chosen, document.rejected) == wanted
    longer = good({"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, USER, OTHER, USER, REPLY]})
    assert (longer.messages, longer.chosen, longer.rejected) == ([USER, REPLY, USER], [REPLY], [OTHER, USER, REPLY])
    orca = good({"system": "s", "question": "q", "chosen": "a", "rejected": "b"})
    assert orca.messages == [{"role": "system", "content": "s"}, USER]


def test_format_of_thumbs():
    for fields in ({"label": True}, {"label": "true"}, {"thumbs": "up"}, {"thumbs": "UP"}):
        document = good({"prompt": "q", "completion": "a", **fields})
        assert (document.prompt, document.completion, document.desirable) == ("q", "a", True)
    down = good({"messages": [USER, REPLY], "thumbs": "down"})
    assert (down.messages, down.desirable) == ([USER, REPLY], False)
    assert good({"prompt": [USER], "completion": [REPLY], "label": False}).messages == [USER, REPLY]
    assert good({"messages": [USER, REPLY], "label": 0}, F.thumbs).desirable is False


def test_format_with_dotted_columns():
    fields = {"translation": {"en": "day", "de": "Tag"}, "id": 1}
    document = good(fields, columns={"source": "translation.de", "target": "translation.en"})
    assert (document.prompt, document.completion) == ("Tag", "day")
    squad = {"question": "q", "answers": {"text": ["a", "b"]}}
    assert good(squad, columns={"question": "question", "answer": "answers.text.0"}).completion == "a"
    assert good({"a.b": "t", "a": {"b": "u"}}, columns={"text": "a.b"}).text == "t"
    for column in ("translation.fr", "translation.en.x", "answers.text.9", "id.x"):
        rejected = read({**fields, **squad}, F.text, {"text": column})
        assert (rejected.reason, rejected.line) == ("missing_column", 7)
        assert f"no column '{column}' (data.columns.text)" in rejected.message
        assert "translation.en" in rejected.message


def test_columns_that_no_format_reads():
    with pytest.raises(ConfigError, match=r"data\.columns\.promt: .*did you mean prompt"):
        recognise_format(row({"a": "b"}), {"promt": "a"})
    with pytest.raises(ConfigError, match=r"data\.sources\.web\.columns\.messages: .*format=text"):
        RowReader(F.text, {"messages": "m"}, source="web")


BAD = [
    ({"messages": "hi"}, "bad_messages", r"messages.*\'hi\'.*a list of"),
    ({"messages": []}, "bad_messages", r"\[\]"),
    ({"messages": ["hi"]}, "bad_messages", r"messages\[0\] is 'hi'"),
    (
        {"messages": [USER, {"role": "bot", "content": "a"}]},
        "unknown_role",
        r"messages\[1\]\.role is 'bot'; known roles",
    ),
    ({"conversations": [{"from": "bot", "value": "a"}]}, "unknown_role", r"conversations\[0\]\.from is 'bot'"),
    ({"conversations": [{"from": "tool", "value": "a"}]}, "tool_first", r"begins with a turn of the tool"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "not_text", r"messages\[1\]\.content is None"),
    ({"messages": [USER, {"role": "assistant"}]}, "not_text", r"messages\[1\]\.content is missing"),
    ({"conversations": [{"from": "human"}]}, "not_text", r"conversations\[0\]\.value is missing"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "not_text",
        r"\[0\] is.*text",
    ),
    ({"messages": [{"role": "user", "content": []}]}, "empty_text", r"empty text"),
    ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "empty_text", r"\[1\]\.content is an empty text"),
    ({"messages": [USER]}, "no_assistant_turn", r"no assistant turn"),
    ({"messages": [REPLY, USER, REPLY]}, "assistant_first", r"begins with a turn of the assistant"),
    ({"messages": [USER, {**REPLY, "weight": 0}]}, "no_learned_turn", r"nothing to learn"),
    ({"messages": [USER, {**REPLY, "weight": 1.5}]}, "bad_weight", r"messages\[1\]\.weight is 1\.5; .* from 0 to 1"),
    ({"messages": [USER, {**REPLY, "weight": -0.1}]}, "bad_weight", r"weight is -0\.1; .* from 0 to 1"),
    ({"messages": [USER, {**REPLY, "weight": 1e-9}]}, "bad_weight", r"weight is 1e-09; .* at least 1e-06"),
    ({"messages": [USER, {**REPLY, "weight": math.nan}]}, "bad_weight", r"weight is nan; .* from 0 to 1"),
    ({"messages": [USER, {**REPLY, "loss_weight": "0.5"}]}, "bad_weight", r"loss_weight is '0\.5'; .* from 0 to 1"),
    ({"messages": [USER, {**REPLY, "weight": [1]}]}, "bad_weight", r"weight is \[1\]; it must be a number"),
    (
        {"messages": [USER, {**REPLY, "weight": 0.5, "loss_weight": 0.4}]},
        "bad_train",
        r"weight, loss_weight contradict",
    ),
    ({"messages": [USER, {**REPLY, "weight": 0.5, "train": False}]}, "bad_train", r"weight, train contradict"),
    ({"messages": [USER, {**REPLY, "weight": 0.5, "masked": True}]}, "bad_train", r"weight, masked contradict"),
    ({"messages": [USER, {**REPLY, "weight": 0, "train": True}]}, "bad_train", r"weight, train contradict"),
    ({"messages": [USER, {**REPLY, "train": "yes"}]}, "bad_train", r"train is 'yes'; it must be true or false"),
    ({"messages": [USER, {**REPLY, "train": True, "masked": True}]}, "bad_train", r"contradict"),
    ({"messages": [USER, {**REPLY, "tool_calls": [1]}]}, "bad_tool_calls", r"tool_calls\[0\] is 1; a call must be"),
    ({"messages": [USER, {**REPLY, "function_call": {"arguments": "f"}}]}, "bad_tool_calls", r"function_call"),
    ({"messages": [{"role": "system", "content": "t"}, USER, REPLY], "system": "s"}, "two_system_turns", r"differs"),
    ({"messages": [USER, REPLY], "system": 5}, "not_text", r'"system" is 5'),
    ({"prompt": "a", "completion": 3}, "not_text", r'"completion" is 3; it must be a text'),
    ({"prompt": "a", "completion": None}, "not_text", r'"completion" is None; it must be a text'),
    ({"prompt": [USER], "completion": [USER]}, "no_assistant_turn", r'"completion" has no assistant turn'),
    ({"instruction": "a", "input": 5, "output": "b"}, "not_text", r'"input" is 5'),
    ({"source": "a", "target": ""}, "empty_text", r'"target" is an empty text'),
    ({"text": ""}, "empty_text", r'"text" is an empty text'),
    ({"text": "a", "label": 1.5}, "bad_label", r'"label" is 1\.5'),
    ({"text": "a", "label": [1]}, "bad_label", r'"label" is \[1\]'),
    ({"text": "a", "label": " "}, "bad_label", r'"label" is \' \''),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical_pair", r"the same"),
    ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "identical_pair", r"the same"),
    ({"chosen": "a", "rejected": "b"}, "no_prompt", r'"chosen" is a text; add its "prompt"'),
    ({"chosen": [REPLY], "rejected": [OTHER]}, "no_prompt", r"no prompt"),
    ({"chosen": [USER, REPLY], "rejected": [USER]}, "no_answer", r'"rejected" has no answer of its own'),
    ({"chosen": [USER, REPLY], "rejected": [{"role": "user", "content": "r"}, OTHER]}, "differing_prompts", r"share"),
    (
        {"prompt": "r", "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        "differing_prompts",
        r"begin with the prompt",
    ),
    ({"prompt": [REPLY], "chosen": "a", "rejected": "b"}, "assistant_first", r"begins with an assistant"),
    (
        {"prompt": "a", "completion": "b", "thumbs": "sideways"},
        "bad_label",
        r'"thumbs" is \'sideways\'; it must be true',
    ),
]


@pytest.mark.parametrize(("fields", "reason", "message"), BAD)
def test_bad_rows_are_rejected_with_reason_file_and_line(fields, reason, message):
    rejected = read(fields)
    assert isinstance(rejected, RejectedRow), rejected
    assert (rejected.file, rejected.line, rejected.reason) == ("f.jsonl", 7, reason)
    assert re.search(message, rejected.message), rejected.message
    assert str(rejected) == f"f.jsonl:7: {rejected.message}"


def test_a_row_of_another_format_is_rejected():
    strange = row({"messages": [USER, REPLY]}, 3)
    assert read(strange.fields, F.text).reason == "wrong_format"
    other = RowReader(F.text, {}, source="web")(strange)
    assert other.message.startswith("columns ['messages'], but data.sources.web.format=text needs")


def test_format_that_does_not_fit_the_row_is_rejected():
    rejected = RowReader(F.messages, {}, source="data")(row({"text": "a"}))
    assert re.search(r"columns \['text'\], but data\.format=messages needs", rejected.message)


def test_renamed_column_must_exist():
    rejected = RowReader(F.text, {"text": "body"}, source="data")(row({"txt": "a"}))
    assert re.search(r"no column 'body' \(data\.columns\.text\)", rejected.message)


WORDS = sorted({name for spellings in COLUMN_SETS_BY_FORMAT.values() for spelling in spellings for name in spelling})
KEYS = st.sampled_from([*WORDS, "system", "context", "role", "content", "from", "value", "train", "weight", "type"])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.sampled_from(["user", "assistant", "gpt", "human", "text", "up", "\n\nHuman: q\n\nAssistant: a"])
)  # fmt: skip
CALLS = st.fixed_dictionaries({"name": st.text(), "arguments": LEAVES | st.dictionaries(st.text(), LEAVES)}).map(
    lambda c: [c]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text()},
        optional={"train": st.booleans() | LEAVES, "weight": LEAVES, "tool_calls": LEAVES | CALLS, "thinking": LEAVES},
    )
)
VALUES = st.recursive(
    LEAVES | TURNS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=3)
)


@settings(max_examples=examples(300), deadline=None)
@given(st.dictionaries(KEYS | st.text(max_size=3), VALUES, max_size=5), st.sampled_from(FORMATS), st.data())
def test_format_reader_makes_a_document_or_rejects_whatever_a_row_holds(fields, format, data):
    spelling = data.draw(st.sampled_from(COLUMN_SETS_BY_FORMAT[format]))
    filled = {**fields, **{name: data.draw(VALUES) for name in spelling}}
    for candidate in (fields, filled):
        result = RowReader(format, {}, source="data")(row(candidate))
        assert isinstance(result, Document | RejectedRow)
        if isinstance(result, Document):
            assert result.texts() and all(text.strip() for text in result.texts())
            json.loads(content_json(result))
            for turn in result.turns():
                assert set(turn) <= {
                    "role",
                    "content",
                    "train",
                    "tool_calls",
                    "reasoning_content",
                    "name",
                    "tool_call_id",
                }
                assert turn["role"] in ("user", "assistant", "system", "tool")
        with contextlib.suppress(DataError):
            recognise_format(row(candidate), {})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@st.composite
def valid_rows(draw, format):
    """A row of the format, and the texts that must come out of it, in reading order."""
    spelling = draw(st.sampled_from(COLUMN_SETS_BY_FORMAT[format]))
    texts = draw(st.lists(TEXTS, min_size=4, max_size=4, unique=True))
    turns = [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    if format is F.sharegpt:
        turns = [{"from": "human", "value": texts[0]}, {"from": "gpt", "value": texts[1]}]
    if (len(spelling) == 1 and format is not F.text) or spelling[0] == "messages":
        fields, wanted = {spelling[0]: turns}, texts[:2]
    elif spelling == ("chosen", "rejected"):
        fields = {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": texts[2]}]}
        wanted = texts[:3]
    else:
        names = [name for name in spelling if name not in ("label", "thumbs")]
        fields, wanted = dict(zip(names, texts, strict=False)), texts[: len(names)]
    if spelling[-1] in ("label", "thumbs"):
        fields[spelling[-1]] = draw(st.booleans())
    order = draw(st.permutations(list(fields)))
    return {name: fields[name] for name in order}, wanted


@pytest.mark.parametrize("format", [format for format in FORMATS if format is not F.prompt])
def test_format_reader_returns_the_texts_of_valid_rows_unchanged(format):
    @settings(max_examples=examples(60), deadline=None)
    @given(valid_rows(format))
    def check(made):
        fields, wanted = made
        before = json.dumps(fields)
        assert recognise_format(row(fields), {}) is format
        document = good(fields, format)
        assert document.texts() == wanted
        assert (document.desirable is not None) is (format is F.thumbs)
        assert (document.label is not None) is (format is F.labelled)
        assert json.dumps(fields) == before

    check()
