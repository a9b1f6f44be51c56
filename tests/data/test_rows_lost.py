"""Rows lost for any cause count against one bound, and every one of them can be read in the quarantine file."""

import json

import pytest

from strategies.errors import ConfigError, DataError
from tests.helpers import tokenizers as make
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, DuplicatePolicy, DuplicatesConfig, FilterConfig, OverLength
from trainer.data.prepare import Preparation
from trainer.data.reading import Reading
from trainer.data.report.preview import summary
from trainer.data.tokens.skeleton import RESERVED


def talk(question, answer, *, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepare(tmp_path, rows, tokenizer=None, **settings):
    write_jsonl(tmp_path / "train.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "train.jsonl"), cache_dir=str(tmp_path / "cache"), **settings)
    return Preparation(config, tokenizer or tiny_tokenizer(), Reading(), seed=1).open_or_make()


def quarantined(made):
    return json.loads((made.directory / "audit.json").read_text())["quarantine"]["rows"]


def test_every_cause_counts_against_one_bound(tmp_path):
    gemma = tiny_tokenizer(make.GEMMA)
    rows = [
        *chat_rows(15),
        {"messages": [{"role": "user", "content": "x"}]},
        talk("q", "a", system="the template knows no system turn"),
        talk(f"q{RESERVED[0]}", "a"),
        talk("fox " * 200, "nothing of this is left"),
        {"messages": [{"role": "user", "content": "<s>q"}, {"role": "assistant", "content": "a"}]},
    ]
    causes = {16: "no_assistant_turn", 17: "refused_by_template", 18: "reserved_character", 19: "nothing_to_learn"}
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, gemma, max_length=150, max_bad_share=0.1)
    said = str(caught.value)
    assert said.startswith("4 of 20 rows cannot be used (") and "more than data.max_bad_share=0.1 allows" in said
    assert all(f"{reason} 1" in said and f"train.jsonl:{line}: " in said for line, reason in causes.items())
    assert "No system role" in said and "raise data.max_length or set data.over_length=split" in said
    assert said.endswith("data.max_bad_share=0.2"), "what is advised is enough, see below"
    listed = [json.loads(line) for path in (tmp_path / "cache" / "rejected").iterdir() for line in path.open()]
    assert {row["line"]: row["reason"] for row in listed} == causes

    made = prepare(tmp_path, rows, gemma, max_length=150, max_bad_share=0.2)
    kept = [json.loads(line) for line in (made.directory / "quarantine.jsonl").open()]
    assert sorted(kept, key=str) == sorted(listed, key=str) and all(row["message"] and row["excerpt"] for row in kept)
    assert len(made.train) == made.report["conserved"]["kept"] == 16, "one refusal loses nothing else of its batch"
    first = summary(made.report).splitlines()[0]
    assert first == "rows: 20 rows read = 16 kept + 4 dropped (20.0% lost)"
    page = (made.directory / "audit.html").read_text()
    assert "4 rows could not be used" in page and "<b>20.0% of the rows are lost</b>" in page
    whole = prepare(tmp_path, rows[:15], gemma)
    for number in range(15):
        assert made.train.sample(number).input_ids.tolist() == whole.train.sample(number).input_ids.tolist()
        assert made.train.sample(number).supervised.tolist() == whole.train.sample(number).supervised.tolist()


def test_two_bos_refuse_the_document_that_has_them(tmp_path):
    begins = tiny_tokenizer(
        "{{ bos_token }}{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    )
    made = prepare(tmp_path, [talk("<s>q", "a"), *chat_rows(3)], begins, max_bad_share=0.25)
    (row,) = [json.loads(line) for line in (made.directory / "quarantine.jsonl").open()]
    assert row["line"] == 1 and row["reason"] == "doubled_bos" and "two <s> tokens" in row["message"]


def test_many_documents_with_nothing_left_to_learn_are_no_quiet_line(tmp_path):
    rows = [*chat_rows(31), *(talk("fox " * 100 + str(n), "a") for n in range(13))]
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, rows, max_length=100)
    said = str(caught.value)
    assert said.startswith("13 of 44 rows cannot be used (nothing_to_learn 13), more than data.max_bad_share=0 allows")
    assert "... and 8 more" in said and "data.over_length=split" in said and said.endswith("data.max_bad_share=0.3")
    assert quarantined(prepare(tmp_path, rows, max_length=100, max_bad_share=0.3)) == 13


def test_what_was_asked_for_does_not_count(tmp_path):
    rows = [*chat_rows(5), *(talk("fox " * 100 + str(n), "a") for n in range(5))]
    settings = {"max_length": 100, "over_length": OverLength.drop, "filters": FilterConfig(max_words=120)}
    rows += [talk("word " * 150, "a"), rows[0]]
    settings["duplicates"] = DuplicatesConfig(exact=DuplicatePolicy.drop)
    made = prepare(tmp_path, rows, **settings)
    assert quarantined(made) == 0 and made.report["conserved"]["dropped"] == 7


def test_a_template_that_is_wrong_as_such_is_an_error_at_once(tmp_path):
    for template, said in (
        (None, "has no chat template"),
        ("{% for message in messages %}{{ oops", "is no Jinja template"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare(tmp_path, chat_rows(3), tiny_tokenizer(template), max_bad_share=1.0)
    with pytest.raises(DataError, match=r"\{% generation %\} blocks"):
        prepare(tmp_path, chat_rows(3), tiny_tokenizer(make.DROPS_REPLY), max_bad_share=1.0)
