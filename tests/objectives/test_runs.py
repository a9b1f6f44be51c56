"""Runs of the command line over pairs, and what plain transformers and peft make of their exports."""

import json
from pathlib import Path

import pytest
import torch

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment
from tests.helpers.tokenizers import tiny_tokenizer, write_pairs
from trainer.data.config import DataConfig
from trainer.data.prepare import Preparation
from trainer.objectives.preference import DpoConfig
from trainer.objectives.registry import data_spec_of

BETA = 0.5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs")
    model_dir(path)
    write_pairs(path / "train.jsonl", 32)
    write_pairs(path / "eval.jsonl", 7, seed=1)
    return path


@pytest.fixture(autouse=True)
def shell(site, monkeypatch):
    monkeypatch.chdir(site)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)


def train(run: str, *words: str) -> dict[str, float]:
    """Train two steps; the last evaluation."""
    settings = "model.path=llama data.path=train.jsonl data.eval_path=eval.jsonl data.cache_dir=cache run.device=cpu "
    settings += "batch.global=8 batch.micro=4 budget.steps=2 optim.lr=1e-3 logging.wandb=disabled export.verify=true"
    assert main(["train", *settings.split(), f"run.dir={run}", *words]) == 0
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    (trained,) = [row for row in rows if row["step"] == 2 and "loss" in row]
    assert {"margin", "accuracy", "chosen_reward", "rejected_reward"} <= trained.keys()
    return rows[-1]


def held_out(site):
    config = DataConfig(path="eval.jsonl", cache_dir="cache")
    data = Preparation(config, tiny_tokenizer(), data_spec_of(DpoConfig()), seed=0).open_or_prepare().train
    return [data.sample(number) for number in range(len(data))]


@torch.no_grad()
def logps(model, samples) -> torch.Tensor:
    """Each answer's log-probability by plain logits, `[P, 2]`."""
    found = []
    for sample in samples:
        ids = torch.tensor(sample.input_ids, dtype=torch.int64)
        scores = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        found.append(scores[torch.from_numpy(sample.supervised.copy())[1:]].sum())
    return torch.stack(found).view(-1, 2)


def compare(values: dict[str, float], rewards: torch.Tensor) -> None:
    margins = rewards[:, 0] - rewards[:, 1]
    assert values["eval/margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert values["eval/accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert values["eval/chosen_reward"] == pytest.approx(float(rewards[:, 0].mean()), rel=1e-4, abs=1e-5)
    expected = -torch.nn.functional.logsigmoid(margins).mean()
    assert values["eval/loss"] == pytest.approx(float(expected), rel=1e-4)
    assert "eval/perplexity" not in values and abs(values["eval/margin"]) > 1e-2


def test_dpo_with_an_adapter(site):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    values = train("lora", "objective=dpo", f"objective.beta={BETA}", "tuning=lora", "evaluation.batch=3")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("llama"), "lora/export").eval()
    samples = held_out(site)
    with model.disable_adapter():
        before = logps(model, samples)
    compare(values, BETA * (logps(model, samples) - before))
    assert not (site / "lora" / "reference").exists()


def test_dpo_of_the_whole_model(site):
    from transformers import AutoModelForCausalLM

    values = train("full", "objective=dpo", f"objective.beta={BETA}")
    samples = held_out(site)
    before = logps(AutoModelForCausalLM.from_pretrained("llama").eval(), samples)
    compare(values, BETA * (logps(AutoModelForCausalLM.from_pretrained("full/export").eval(), samples) - before))
    assert len(list((site / "full" / "reference").glob("*.npy"))) == 2


def test_reward_model_run_and_its_export(site):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    values = train("reward", "objective=reward", "tuning=lora")
    base = AutoModelForSequenceClassification.from_pretrained("llama", num_labels=1)
    model = PeftModel.from_pretrained(base, "reward/export").eval()
    with torch.no_grad():
        ids = [torch.tensor(sample.input_ids, dtype=torch.int64)[None] for sample in held_out(site)]
        scores = torch.stack([model(row).logits[0, 0] for row in ids]).view(-1, 2)
    margins = scores[:, 0] - scores[:, 1]
    assert values["eval/margin"] == pytest.approx(float(margins.mean()), rel=1e-3)
    assert values["eval/accuracy"] == pytest.approx(float((margins > 0).float().mean()))


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
def test_objectives_without_a_reference(site, objective):
    values = train(objective, f"objective={objective}", "tuning=lora")
    assert values["eval/chosen_reward"] < 0 and not (site / objective / "reference").exists()


def test_preference_objectives_refuse_other_data(site, capsys):
    (site / "texts.jsonl").write_text('{"text": "no pairs here"}\n')
    words = "train model.path=llama data.path=texts.jsonl data.cache_dir=cache run.device=cpu budget.steps=1 run.dir=no"
    assert main([*words.split(), "objective=dpo", "batch.global=4"]) == 65
    assert "texts.jsonl:1: has no preferred and rejected answer" in capsys.readouterr().err
