"""Runs of the command line with encoder-decoder models, and what plain transformers and peft make of their exports."""

import json
from pathlib import Path

import pytest
import torch

from launch.main import main
from tests.helpers.launching import clean_environment
from tests.helpers.learning import LEAST_LEARNED
from tests.helpers.seq2seq import seq2seq_dir
from tests.helpers.tokenizers import pair_rows, write_jsonl

KINDS = ("t5", "t5_untied", "bart", "marian")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("seq2seq")
    for name in KINDS:
        seq2seq_dir(path, name)
    for name, num, seed in (("train", 32, 0), ("eval", 7, 1)):
        rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pair_rows(num, seed=seed)]
        write_jsonl(path / f"{name}.jsonl", rows)
    return path


@pytest.fixture(autouse=True)
def shell(site, monkeypatch):
    monkeypatch.chdir(site)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)


def train(run: str, architecture: str, *words: str, steps: int = 3) -> list[dict]:
    """Train a few steps, verify the export; the rows of metrics.jsonl."""
    settings = (
        f"model.path={architecture} objective=seq2seq data.path=train.jsonl data.eval_path=eval.jsonl run.device=cpu "
    )
    settings += (
        "data.max_length=128 objective.max_target=64 data.cache_dir=cache batch.global=8 batch.micro=4 optim.lr=1e-3 "
    )
    settings += f"schedule=constant budget.steps={steps} logging.wandb=disabled export.verify=true run.dir={run}"
    assert main(["train", *settings.split(), *words]) == 0
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@torch.no_grad()
def held_out_loss(model, tokenizer) -> float:
    """Mean loss of a target token by `model(labels=...)`, row by row."""
    total = count = 0.0
    end = [tokenizer.eos_token_id]
    for line in Path("eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + end])
        labels = torch.tensor([tokenizer(row["response"])["input_ids"] + end])
        total += float(model.eval()(input_ids=ids, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    return total / count


@pytest.mark.parametrize("architecture", KINDS)
def test_seq2seq_full_run_and_its_export(site, architecture):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    rows = train(f"full-{architecture}", architecture)
    model = AutoModelForSeq2SeqLM.from_pretrained(f"full-{architecture}/export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(f"full-{architecture}/export")
    assert rows[-1]["eval/loss"] == pytest.approx(held_out_loss(model, tokenizer), rel=1e-5)
    assert abs(rows[-1]["eval/loss"] / rows[0]["eval/loss"] - 1) > LEAST_LEARNED, "the first is of the model as it came"
    bias = getattr(model, "final_logits_bias", None)
    assert bias is None or bias[0, 1] == 2.0


@pytest.mark.parametrize("architecture", ["t5_untied", "bart"])
def test_seq2seq_adapter_run_and_its_fold(site, architecture):
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    run = f"lora-{architecture}"
    rows = train(
        run, architecture, "tuning=lora", "evaluation.generate.samples=5", "evaluation.generate.max_new_tokens=6"
    )
    base = AutoModelForSeq2SeqLM.from_pretrained(architecture, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/export")
    loss = held_out_loss(PeftModel.from_pretrained(base, f"{run}/export"), tokenizer)
    assert rows[-1]["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert {"eval/bleu", "eval/rougeL"} <= rows[-1].keys()
    assert main(["export", f"run.dir={run}", f"to={run}-merged", "merge=true", "--verify"]) == 0
    folded = AutoModelForSeq2SeqLM.from_pretrained(f"{run}-merged", dtype=torch.float32)
    assert held_out_loss(folded, tokenizer) == pytest.approx(loss, rel=1e-5)
    assert "AutoModelForSeq2SeqLM" in Path(run, "export", "README.md").read_text()


def test_seq2seq_run_that_was_stopped_resumes_on_its_curve(site):
    whole = train("whole", "t5", steps=4)
    train("first", "t5", "checkpoint.every_steps=2", steps=4)
    rest = train("second", "t5", "run.resume=first/checkpoints/step-000002", steps=4)
    steps = {row["step"]: row["loss"] for row in whole if "loss" in row}
    assert {row["step"]: row["loss"] for row in rest if "loss" in row} == {n: steps[n] for n in (3, 4)}
