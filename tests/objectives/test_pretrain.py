"""Continued pre-training: every token of plain texts, and nothing else."""

import json
import math
from pathlib import Path

import pytest

from launch.main import main
from strategies.errors import DataError
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment
from tests.helpers.tokenizers import WORDS, chat_rows, tiny_tokenizer, write_jsonl
from trainer.data.config import DataConfig, OverLength
from trainer.data.prepare import Preparation
from trainer.objectives.pretrain import PretrainConfig
from trainer.objectives.registry import data_spec_of


def prepared(tmp_path: Path, rows: list[dict], **changes):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **changes)
    return Preparation(config, tiny_tokenizer(), data_spec_of(PretrainConfig()), seed=0).open_or_prepare().train


def test_every_token_but_the_first_is_learned_and_so_is_the_end(tmp_path):
    data = prepared(tmp_path, [{"text": f"{WORDS} {number}"} for number in range(3)])
    tokenizer = tiny_tokenizer()
    for number in range(3):
        sample = data.sample(number)
        assert not sample.supervised[0] and sample.supervised[1:].all()
        assert sample.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(sample.input_ids, skip_special_tokens=True) == f"{WORDS} {number}"
    assert data.counts["loss"].tolist() == (data.lengths - 1).tolist()


def test_pretrain_splits_a_long_text_and_loses_none_of_it(tmp_path):
    text = " ".join([WORDS] * 6)
    whole = prepared(tmp_path, [{"text": text}], max_length=4096)
    pieces = prepared(tmp_path, [{"text": text}], max_length=40, over_length=OverLength.split)
    assert len(pieces) > 3 and pieces.lengths.max() <= 40
    joined = [token for number in range(len(pieces)) for token in pieces.sample(number).input_ids.tolist()]
    assert joined == whole.sample(0).input_ids.tolist()


def test_pretrain_refuses_conversations(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: is no plain text, which objective=pretrain learns"):
        prepared(tmp_path, chat_rows(2))


def test_a_run_in_packs_reports_perplexity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    model_dir(tmp_path)
    write_jsonl(tmp_path / "texts.jsonl", [{"text": f"text {n} " + WORDS * (1 + n % 3)} for n in range(24)])
    words = "model.path=llama data.path=texts.jsonl data.eval_share=0.2 data.cache_dir=cache run.device=cpu objective=pretrain "
    words += "data.packing=true data.over_length=split data.max_length=64 batch.global=4 batch.micro=2 budget.steps=3 "
    words += "optim.lr=1e-2 logging.wandb=disabled run.dir=run"
    assert main(["train", *words.split()]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-1]
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]), rel=1e-9)
    assert last["eval/perplexity"] < first["eval/perplexity"]
