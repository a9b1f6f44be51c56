"""Rows of a kind that the objective cannot learn from are bad rows like any others; where all are, the run ends."""

import json

import pytest

from strategies.errors import DataError
from tests.helpers.tokenizers import chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, SourceConfig
from trainer.data.prepare import Preparation
from trainer.objectives.classification import LabelDataSpec
from trainer.objectives.kto import RatedDataSpec
from trainer.objectives.pairs import PairDataSpec
from trainer.objectives.pretrain import TextDataSpec
from trainer.objectives.seq2seq import TwoSidedDataSpec
from trainer.objectives.sft import SftDataSpec

CHAT = chat_rows(3)
TEXTS = [{"text": f"number {n}"} for n in range(3)]
LABELS = [{"text": f"number {n}", "label": "ab"[n % 2]} for n in range(20)]
PAIRS = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
RATED = [{"prompt": f"q{n}", "completion": f"a{n}", "label": bool(n % 2)} for n in range(20)]
QA = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(20)]
CASES = {
    "pretrain": (
        TextDataSpec(),
        [{"text": f"long {n}"} for n in range(20)],
        PAIRS[:3],
        "is no plain text, which objective=pr",
    ),
    "pretrain, labels": (TextDataSpec(), TEXTS, LABELS[:3], "has a label, .* set objective=classification"),
    "pairs": (PairDataSpec(), PAIRS, CHAT, "has no preferred and rejected answer, .*data.format=preference"),
    "pairs, texts": (PairDataSpec(), PAIRS, TEXTS, "has no preferred and rejected answer"),
    "kto": (RatedDataSpec(), RATED, CHAT, "has no label that objective=kto can use"),
    "sft": (SftDataSpec(), QA, LABELS[:3], "has a label, .* set objective=classification"),
    "classification": (LabelDataSpec(), LABELS, TEXTS, "has no label, .* needs rows with a text and a label"),
    "seq2seq": (
        TwoSidedDataSpec(prefix="", max_target=9),
        QA,
        TEXTS,
        "a text without an answer; objective=seq2seq reads",
    ),
}


def prepare(tmp_path, data_spec, **settings):
    config = DataConfig(cache_dir=str(tmp_path / "cache"), **settings)
    return Preparation(config, tiny_tokenizer(), data_spec, seed=1).open_or_prepare()


@pytest.mark.parametrize("case", CASES)
def test_wrong_kind_rows_count_against_the_bound(tmp_path, case):
    data_spec, good, bad, said = CASES[case]
    paths = write_jsonl(tmp_path / "good.jsonl", good), write_jsonl(tmp_path / "bad.jsonl", bad)
    sources = {name: SourceConfig(path=str(path)) for name, path in zip(("good", "bad"), paths, strict=True)}
    with pytest.raises(DataError, match=rf"3 of {len(good) + 3} rows cannot be used(.|\n)*bad.jsonl:1: {said}"):
        prepare(tmp_path, data_spec, sources=sources, max_bad_share=0.1)
    made = prepare(tmp_path, data_spec, sources=sources, max_bad_share=0.6)
    assert made.report["conserved"] == {"rows_in": len(good) + 3, "kept": len(good), "dropped": 3}
    lost = [json.loads(line) for line in (made.directory / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["file"].split("/")[-1], row["line"]) for row in lost] == [("bad.jsonl", n) for n in (1, 2, 3)]
    assert all(row["excerpt"] for row in lost)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_wrong_kind_of_all_rows_ends_the_run(tmp_path, case, bound):
    data_spec, _, bad, said = CASES[case]
    path = write_jsonl(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError) as error:
        prepare(tmp_path, data_spec, path=str(path), max_bad_share=bound)
    error.match(rf"3 of 3 rows cannot be used \(\w+ 3\)(.|\n)*bad.jsonl:1: {said}")
    assert ("more than data.max_bad_share=0 allows" in str(error.value)) is (bound == 0)
    assert "continue without them" not in str(error.value)
    assert len(next((tmp_path / "cache" / "rejected").glob("*.jsonl")).read_text().splitlines()) == 3
