"""Evaluation by parts: the loss of each source, out of one pass, for any batch size and number of ranks."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.building import model_dir
from tests.helpers.launching import clean_environment, command_here
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data
from tests.helpers.warm import command_warm
from trainer.data.batches.loader import EvalShare, eval_micro_batches
from trainer.data.config import DataConfig, SourceConfig
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation
from trainer.data.store.sequences import TokenDataset
from trainer.monitors.kept_answers import GENERATED, read_kept_answers

SIZES = {"ward": 40, "web": 24}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    model_dir(path)
    for seed, (name, number) in enumerate(SIZES.items()):
        write_chat_data(path / f"{name}.jsonl", number, seed=seed)
    return path


@pytest.fixture(autouse=True)
def shell(site, monkeypatch):
    monkeypatch.chdir(site)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)


SOURCES = "data.eval_share=0.25 data.sources.ward.path=ward.jsonl data.sources.web.path=web.jsonl"


def train(run: str, *words: str, data: str = SOURCES) -> list[dict]:
    settings = f"model.path=llama {data} data.cache_dir=cache "
    settings += "batch.global=8 batch.micro=2 budget.steps=2 optim.lr=1e-2 logging.wandb=disabled "
    settings += f"run.device=cpu run.dir={run} export.at_end=true export.verify=false"
    assert command_warm(["train", *settings.split(), *words]) == 0
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def prepared(run: str) -> Path:
    return Path(json.loads(Path(run, "run.json").read_text())["data_directory"])


def held_out_loss(data: TokenDataset, numbers: list[int], export: Path) -> float:
    """Mean over the targets of some sequences, by plain transformers and logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for number in numbers:
        sample = data.sample(number)
        ids = torch.tensor(sample.input_ids, dtype=torch.int64)
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        learned = torch.from_numpy(sample.supervised.copy())[1:]
        total, count = total - float(scores[learned].double().sum()), count + int(learned.sum())
    return total / count


def test_evaluation_loss_of_a_source_is_that_of_the_source_alone(site):
    *steps, last = train("one", "evaluation.batch=3")
    for row in steps:
        if "loss" in row:
            parts = [row["loss/ward"], row["loss/web"]]
            assert min(parts) < row["loss"] < max(parts)
    data = TokenDataset.open(prepared("one") / "eval")
    for number, name in enumerate(data.source_names):
        mine = [place for place, source in enumerate(data.sources.tolist()) if source == number]
        assert last[f"eval/loss/{name}"] == pytest.approx(held_out_loss(data, mine, Path("one/export")), rel=1e-5)
    everything = held_out_loss(data, list(range(len(data))), Path("one/export"))
    assert last["eval/loss"] == pytest.approx(everything, rel=1e-5)
    assert last["eval/loss/ward"] != pytest.approx(last["eval/loss/web"], rel=1e-4)
    trained = [row for row in steps if "loss" in row]
    assert len(trained) == 2
    assert all(row["step_tokens/ward"] + row["step_tokens/web"] == row["step_tokens"] for row in trained)
    assert all(row["step_tokens/ward"] > 0 < row["step_tokens/web"] for row in trained)


def test_ranks_strategy_and_batch_do_not_matter(site):
    first = train("alone", "evaluation.batch=64")[-1]
    other = train("two", "evaluation.batch=1", "launcher.processes=2", "strategy=fsdp2")[-1]
    names = [name for name in first if name.startswith("eval/")]
    assert {"eval/loss/ward", "eval/loss/web"} <= {*names}
    assert {name: other[name] for name in names} == pytest.approx({name: first[name] for name in names}, rel=1e-5)


def test_evaluation_of_one_source_has_no_loss_by_source(site):
    rows = train("plain", data="data.path=ward.jsonl data.eval_share=0.25")
    assert not [name for row in rows for name in row if name.startswith(("eval/loss/", "step_tokens/"))]


@pytest.mark.parametrize(("size", "batch", "limit"), [(1, 1, None), (2, 3, None), (5, 4, None), (3, 64, 2)])
def test_every_document_once_and_no_batch_of_two_sources(site, size, batch, limit):
    sources = {name: SourceConfig(path=f"{name}.jsonl") for name in SIZES}
    config = DataConfig(sources=sources, eval_share=0.25, cache_dir="cache")
    data = Preparation(config, tiny_tokenizer(), DataSpec(), seed=0).open_or_prepare().evaluation
    plans = [
        list(eval_micro_batches(data, EvalShare(batch, rank, size, limit, by_source=True))) for rank in range(size)
    ]
    assert len({len(plan) for plan in plans}) == 1, "all ranks take the same number of turns"
    held = [numbers for plan in plans for numbers in plan if numbers]
    assert all(len({int(data.sources[number]) for number in numbers}) == 1 for numbers in held)
    firsts = [[n for n in range(len(data)) if data.sources[n] == source][:limit] for source in (0, 1)]
    assert sorted(number for numbers in held for number in numbers) == sorted(firsts[0] + firsts[1])
    assert all(firsts)


def test_the_loss_of_a_source_can_be_watched(site, capsys):
    rows = train("watched", "evaluation.watch=eval/loss/web", "evaluation.every_steps=1", "checkpoint.every_steps=1")
    record = json.loads(Path("watched/run.json").read_text())["outcome"]["progress"]
    assert record["best_metric"] == min(row["eval/loss/web"] for row in rows if row["step"] and "eval/loss" in row)
    words = (
        "model.path=llama data.path=web.jsonl data.eval_share=0.2 data.cache_dir=cache run.device=cpu run.dir=unknown"
    )
    assert command_here(["train", *words.split(), "budget.steps=1", "evaluation.watch=eval/loss/wep"]) != 0
    assert "evaluation.watch=eval/loss/wep: the evaluation documents have no such part" in capsys.readouterr().err


NAMED = "data.path=ward.jsonl data.eval_path={ward:other.jsonl,general:web.jsonl}"


def test_evaluation_sets_by_name_have_the_metrics_of_each_alone(site, capsys):
    """Each set's metrics are those of a run that evaluates it alone; a set may have the name of a source."""
    write_chat_data(site / "other.jsonl", 10, seed=7)
    written = "evaluation.generate.samples=3", "evaluation.generate.max_new_tokens=8"
    rows = train("named", *written, data=NAMED)
    alone = {
        name: train(f"only-{name}", *written, data=f"data.path=ward.jsonl data.eval_path={file}.jsonl")
        for name, file in (("ward", "other"), ("general", "web"))
    }
    for name, other in alone.items():
        for metric in ("loss", "perplexity", "accuracy"):
            assert rows[-1][f"eval/{name}/{metric}"] == pytest.approx(other[-1][f"eval/{metric}"], rel=1e-5)
        for metric in ("bleu", "rougeL"):
            assert rows[-1][f"eval/{name}/{metric}"] == pytest.approx(other[-1][f"eval/{metric}"])
    assert min(rows[-1]["eval/ward/loss"], rows[-1]["eval/general/loss"]) < rows[-1]["eval/loss"]
    assert "eval/loss/ward" not in rows[-1]
    kept = read_kept_answers(Path("named"))
    assert (kept["first"]["step"], kept["last"]["step"]) == (0, rows[-1]["step"])
    prompts = [[row["prompt"] for row in kept[end]["tasks"][GENERATED]] for end in ("first", "last")]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 6 and all(prompts[0])  # three of each set
    words = "model.path=llama data.cache_dir=cache run.device=cpu run.dir=unknown budget.steps=1"
    assert command_here(["train", *words.split(), *NAMED.split(), "evaluation.watch=eval/genral/loss"]) != 0
    assert "of their parts there are eval/ward/loss" in capsys.readouterr().err
