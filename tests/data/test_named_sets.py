"""Evaluation sets by name: one split, told apart; leakage of each; names and files that cannot be."""

import json

import pytest

from strategies.errors import ConfigError, DataError
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.report.audit import Audit


@pytest.fixture
def files(tmp_path):
    train, medical, general = chat_rows(40), chat_rows(8, seed=1), chat_rows(6, seed=2)
    write_jsonl(tmp_path / "train.jsonl", [*train, *general[:2]])
    write_jsonl(tmp_path / "medical.jsonl", medical)
    write_jsonl(tmp_path / "general.jsonl", general)
    return tmp_path


def prepared(files, eval_path, **settings):
    config = DataConfig(
        path=str(files / "train.jsonl"), cache_dir=str(files / "cache"), eval_path=eval_path, **settings
    )
    return Preparation(config, tiny_tokenizer(), DataSpec(), seed=0).open_or_prepare()


def test_named_eval_sets_are_one_split_with_the_leakage_of_each(files):
    sets = {name: str(files / f"{name}.jsonl") for name in ("medical", "general")}
    data = prepared(files, sets)
    held_out = data.evaluation
    names = [held_out.source_names[number] for number in held_out.sources.tolist()]
    assert {name: names.count(name) for name in sets} == {"medical": 8, "general": 6}
    assert held_out.manifest["sets"] == ["medical", "general"]
    audit = Audit.read(data.directory)
    assert {name: found.num_leaked for name, found in audit.leakage.items()} == {"eval/medical": 0, "eval/general": 2}
    assert [(source.name, source.split, source.kept) for source in audit.sources[1:]] == [
        ("medical", "eval", 8),
        ("general", "eval", 6),
    ]
    plain = prepared(files, list(sets.values()))
    assert "sets" not in plain.evaluation.manifest and plain.evaluation.lengths.tolist() == held_out.lengths.tolist()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({"a/b": "x"}, r"data\.eval_path\.a/b: is no name of a set"),
        ({"eval": "x"}, r"and not eval"),
        ({}, r"data\.eval_path=\{\}: name files, or sets of them"),
    ],
)
def test_named_eval_sets_refuse_names_that_cannot_be(files, sets, said):
    with pytest.raises(ConfigError, match=said):
        prepared(files, sets)


def test_named_eval_set_that_is_missing_or_empty_is_refused(files):
    with pytest.raises(DataError, match=r"data\.eval_path\.general=.*nowhere\.jsonl does not exist"):
        prepared(files, {"medical": str(files / "medical.jsonl"), "general": str(files / "nowhere.jsonl")})
    with pytest.raises(ConfigError, match=r"data\.test_path"):
        prepared(files, None, test_path={"medical": str(files / "medical.jsonl")})
    (files / "bad.jsonl").write_text(json.dumps({"messages": []}) + "\n")
    with pytest.raises(DataError, match=r"data\.eval_path\.bad: of 1 rows none could be kept"):
        prepared(
            files,
            {"medical": str(files / "medical.jsonl"), "bad": str(files / "bad.jsonl")},
            max_bad_share=0.5,
            format="messages",
        )
