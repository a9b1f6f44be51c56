"""Refusals of common files name the way out: the columns to map, the line to delete, the words to type."""

import json

import pytest

from strategies.errors import DataError
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig
from trainer.data.fields import UnreadableValue, show_value
from trainer.data.prepare import Preparation
from trainer.objectives.registry import data_spec_of
from trainer.objectives.sft import SftConfig

TURNS = chat_rows(1)[0]["messages"]


def refusal(tmp_path, content, name="train.jsonl", **settings):
    path = tmp_path / name
    if isinstance(content, list):
        write_jsonl(path, content)
    else:
        path.write_text(content)
    config = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **settings)
    with pytest.raises(DataError) as caught:
        Preparation(config, tiny_tokenizer(), data_spec_of(SftConfig()), seed=1).open_or_prepare()
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (  # OpenOrca
            {"id": "1", "system_prompt": "s", "question": "q", "response": "r"},
            {"prompt": "question", "completion": "response", "system": "system_prompt"},
        ),
        ({"Prompt": "q", "Completion": "a"}, {"prompt": "Prompt", "completion": "Completion"}),
        (  # SQuAD
            {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
            {"instruction": "question", "input": "context", "output": "answers.text.0"},
        ),
    ],
)
def test_refusal_suggests_columns_that_work(tmp_path, row, columns):
    said = ",".join(f"{expected}:{name}" for expected, name in columns.items())
    assert f"fit no format; try data.columns='{{{said}}}'" in refusal(tmp_path, [row])
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), columns=columns)
    made = Preparation(config, tiny_tokenizer(), data_spec_of(SftConfig()), seed=1).open_or_prepare()
    assert len(made.train) == 1


def test_refusal_of_conversation_pairs_suggests_their_columns(tmp_path):
    row = {"chosen_messages": TURNS, "rejected_messages": TURNS}
    assert "try data.columns='{chosen:chosen_messages,rejected:rejected_messages}'" in refusal(tmp_path, [row])


@pytest.mark.parametrize(
    ("content", "name", "remedy"),
    [
        ("Paris,the capital of France\nBonn,a town\n", "train.csv", "the file lacks a header line: put one on top"),
        ("sep=,\nprompt,completion\nq,a\n", "train.csv", "'sep=,', which Excel writes; delete this line"),
        ([{"messages": json.dumps(TURNS)}], "train.jsonl", "is a JSON text, .* parse it first"),
        ([{"conversations": json.dumps(TURNS)}], "train.jsonl", '"conversations" is a JSON text'),
        ([{"messages": [{"role": "User", "content": "q"}]}], "train.jsonl", "role is 'User'; write 'user'"),
        ([{"prompt": "q", "completion": 0}], "train.jsonl", '"completion" is 0; it must be a text, as "0"'),
        ([{"segments": [{"label": True, "text": "a"}]}], "train.jsonl", "axolotl's input_output"),
        ("PK", "train.zip", r"a zip file holds one file and is named like it: rows\.jsonl\.zip"),
    ],
)
def test_refusal_of_a_common_file_names_the_way_out(tmp_path, content, name, remedy):
    import re

    assert re.search(remedy, refusal(tmp_path, content, name))


def test_refusal_of_mixed_formats_suggests_a_source_for_each(tmp_path):
    rows = [*chat_rows(4), *({"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3))]
    message = refusal(tmp_path, rows)
    assert "wrong_format 3" in message and "data.sources.one.path=... data.sources.two.path=..." in message
    assert message.count("train.jsonl:") == 1 and "... and 2 more like it" in message, "the same message is shown once"


def test_without_an_answer_no_length_is_advised(tmp_path):
    rows = [{"messages": [{"role": "system", "content": f"s{n}"}]} for n in range(3)]
    message = refusal(tmp_path, rows, max_bad_share=1.0)
    assert "no_assistant_turn 3" in message and "max_length" not in message


def test_refusal_shows_an_unusable_value_in_words():
    assert show_value(UnreadableValue("binary", "holds a JPEG image")) == "holds a JPEG image"
