"""Replay: nothing at weight 0, the right sums above it, and a model that forgets less."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.main import main
from tests.helpers.building import (
    GLOBAL_BATCH,
    collate,
    data_set,
    model_dir,
    replay_set,
    run_config,
    take_steps,
    trainer_for,
)
from tests.helpers.covering import EVERYTHING
from tests.helpers.launching import clean_environment, command_here
from tests.helpers.models import tiny_model_dir
from tests.helpers.stores import write
from tests.helpers.tokenizers import tiny_tokenizer, write_chat_data, write_jsonl
from trainer.data.batches.collate import to_device
from trainer.data.config import Layout
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import Sample, TokenDataset
from trainer.objectives.registry import build_objective
from trainer.objectives.sft import ForgettingConfig, SftConfig, SftDataSpec
from trainer.optim.config import AdamwConfig


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kept(weight: float, *, replay_loss: bool = True) -> SftConfig:
    return SftConfig(forgetting=ForgettingConfig(kl_weight=weight, replay_loss=replay_loss))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_weight_0_is_plain_mixing_exactly(tmp_path, runtime, tuning):
    config = run_config(model_dir(tmp_path), "single", tuning, micro=4, steps=4)
    plain = take_steps(trainer_for(config, data_set(tmp_path, uneven=True), runtime), 4)
    config.objective = kept(0.0)
    assert take_steps(trainer_for(config, replay_set(tmp_path), runtime), 4) == plain
    config.objective = kept(0.7)
    assert take_steps(trainer_for(config, replay_set(tmp_path), runtime), 4) != plain


@pytest.mark.parametrize("replay_loss", [True, False])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_replay_sums_are_those_of_plain_logits(tmp_path, runtime, tuning, replay_loss):
    """After three steps: the loss over its own tokens, the divergence from the first model over the replayed ones."""
    config = run_config(model_dir(tmp_path), "single", tuning, micro=4, steps=5)
    config.objective, config.optim.lr = kept(0.7, replay_loss=replay_loss), 1e-2
    data = replay_set(tmp_path)
    trainer = trainer_for(config, data, runtime)
    first = trainer_for(config, data, runtime).engine.step_module.model
    take_steps(trainer, 3)
    step = next(iter(trainer.loader.steps(trainer.progress.samples, 1)))
    chosen = [number for slot in trainer.loader.plan(trainer.progress.samples)[0] for number in slot]
    sums = {"loss": [0.0, 0], "kl": [0.0, 0]}
    for number in chosen:
        sample = data.train.sample(number)
        rows = torch.from_numpy(sample.supervised.copy())[1:]
        inputs = collate([sample], Layout.padding_free)
        given = {k: v for k, v in inputs.items() if k.startswith(("input", "position", "cu_", "max_", "document"))}
        with torch.no_grad():
            now, before = (
                m(**given).logits[0, :-1][rows].double().log_softmax(-1)
                for m in (trainer.engine.step_module.model, first)
            )
        targets = torch.tensor(sample.input_ids[1:], dtype=torch.int64)[rows]
        if replay_loss or not sample.marks["replay"]:
            sums["loss"] = [
                sums["loss"][0] + float(F.nll_loss(now, targets, reduction="sum")),
                sums["loss"][1] + len(targets),
            ]
        if sample.marks["replay"]:
            apart = F.kl_div(now, before, reduction="sum", log_target=True)
            sums["kl"] = [sums["kl"][0] + float(apart), sums["kl"][1] + len(targets)]
    loss, kl = (total / count for total, count in sums.values())
    record = trainer.train_step(step)
    found = {name: float(value) / record.counts["loss"] for name, value in record.local_sums.items()}
    assert kl > 1e-3 and len(chosen) == GLOBAL_BATCH
    assert found["sft_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["replay_kl"] == pytest.approx(kl, rel=1e-3)
    assert found["loss"] == pytest.approx(loss + 0.7 * kl, rel=1e-5)


def test_replay_evaluation_has_the_plain_loss(tmp_path, runtime):
    config = run_config(model_dir(tmp_path), "single", "full", micro=4, steps=4, objective=kept(3.0))
    trainer = trainer_for(config, replay_set(tmp_path), runtime)
    take_steps(trainer, 2)
    rows = to_device(
        collate([trainer.loader.dataset.sample(n) for n in range(8)], Layout.padding_free), torch.device("cpu")
    )
    with trainer.engine.inference() as module:
        terms = module(rows)
        plain = build_objective(SftConfig()).terms(module.model, rows)
    assert {name: float(v) for name, v in terms.items()} == {name: float(v) for name, v in plain.items()}


def counting(num: int, step: int, *, seed: int) -> list[Sample]:
    """Documents of 16 tokens that count up or down in a ring of 24."""
    begins = np.random.default_rng(seed).integers(0, 24, num)
    return [Sample((3 + (b + step * np.arange(16)) % 24).astype(np.int32), np.arange(16) > 0) for b in begins]


def stored(directory: Path, made: list[Sample]) -> PreparedData:
    write(directory, made, SftDataSpec().counts, {"fingerprint": directory.name})
    opened = TokenDataset.open(directory)
    return PreparedData(train=opened, evaluation=opened, directory=directory, report={}, label_names=None)


@pytest.fixture(scope="module")
def educated(tmp_path_factory, runtime) -> Path:
    """A directory with a model that counts up."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("educated")
    config = run_config(model_dir(root), "single", "full", micro=16, steps=60)
    config.optim = AdamwConfig(lr=1e-2)
    trainer = trainer_for(config, stored(root / "up", counting(48, 1, seed=1)), runtime)
    take_steps(trainer, 60)
    model = AutoModelForCausalLM.from_pretrained(root / "llama")
    model.load_state_dict(dict(trainer.engine.gather_full_parameters(trainable_only=False)))
    model.save_pretrained(root / "llama")
    return root


@pytest.mark.parametrize("tuning", ["full", *(["lora"] if EVERYTHING else [])])
def test_replay_forgets_less(tmp_path, educated, runtime, tuning):
    """A model that counts up learns to count down: how much worse it then counts up, a divergence at least halves.

    Both runs show the same documents and learn to count down alone; only the weight of the divergence differs.
    """
    made = [*counting(36, -1, seed=2), *counting(12, 1, seed=3)]
    for number, sample in enumerate(made):
        sample.marks["replay"] = int(number >= 36)
    data = stored(tmp_path / "down", made)
    texts = {"up": counting(24, 1, seed=4), "down": counting(24, -1, seed=5)}
    risen = {}
    for weight in (1e-6, 1.0):
        config = run_config(educated / "llama", "single", tuning, micro=16, steps=30)
        config.optim, config.objective = AdamwConfig(lr=1e-2), kept(weight, replay_loss=False)
        trainer = trainer_for(config, data, runtime)
        before = losses(trainer, texts)
        take_steps(trainer, 30)
        after = losses(trainer, texts)
        risen[weight] = {name: after[name] - before[name] for name in texts}
    assert risen[1e-6]["up"] > 2
    assert risen[1.0]["up"] < 0.5 * risen[1e-6]["up"]
    assert risen[1.0]["down"] < -1.0


def losses(trainer, texts: dict[str, list[Sample]]) -> dict[str, float]:
    found = {}
    with trainer.engine.inference() as module:
        for name, samples in texts.items():
            rows = collate(samples, Layout.padding_free)
            found[name] = float(module(rows)["loss"]) / len(rows["target_rows"])
    return found


def test_a_replayed_source_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    model_dir(tmp_path)
    write_chat_data(tmp_path / "task.jsonl", 16)
    write_jsonl(tmp_path / "general.jsonl", [{"text": f"some general text of number {n}"} for n in range(8)])
    words = "model.path=llama data.sources.task.path=task.jsonl data.sources.general.path=general.jsonl data.cache_dir=cache "
    words += "data.sources.general.replay=true data.eval_share=0.2 objective.forgetting.kl_weight=0.5 tuning=lora run.device=cpu "
    words += "batch.global=8 batch.micro=4 budget.steps=3 optim.lr=1e-2 logging.wandb=disabled run.dir=run"
    assert main(["train", *words.split()]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 3 and trained[-1]["replay_kl"] > trained[0]["replay_kl"] >= 0
    assert trained[-1]["loss"] == pytest.approx(trained[-1]["sft_loss"] + 0.5 * trained[-1]["replay_kl"], rel=1e-6)
    assert {"eval/loss", "eval/perplexity"} <= rows[-1].keys() and "eval/replay_kl" not in rows[-1]


def test_replay_sources_of_which_nothing_is_left_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for key, value in clean_environment().items():
        monkeypatch.setenv(key, value)
    model_dir(tmp_path)
    write_jsonl(tmp_path / "task.jsonl", [{"text": f"short {n}"} for n in range(8)])
    write_jsonl(tmp_path / "general.jsonl", [{"text": f"some general text of number {n} " * 20} for n in range(8)])
    words = "model.path=llama data.sources.task.path=task.jsonl data.sources.general.path=general.jsonl data.cache_dir=cache "
    words += "data.sources.general.replay=true data.max_length=32 data.over_length=drop batch.global=4 run.device=cpu "
    words += "budget.steps=1 logging.wandb=disabled run.dir=run objective.forgetting.kl_weight=0.5"
    assert main(["train", *words.split()]) == 65
    assert "no learned token of the sources marked replay=true is left" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter_trained_before(tmp_path_factory):
    """A folder with a model, two files of documents, and an adapter that an earlier run made of the first."""
    folder = tmp_path_factory.mktemp("before")
    model = tiny_model_dir(folder / "model", "llama", pad_token_id=2)
    tiny_tokenizer().save_pretrained(model)
    write_chat_data(folder / "task.jsonl", 8)
    write_chat_data(folder / "general.jsonl", 8, seed=1)
    words = [f"data.path={folder / 'task.jsonl'}", "optim.lr=0.1", "budget.steps=3", "batch.global=4", "batch.micro=4"]
    assert command_here(["train", *words, *common_words(folder), f"run.dir={folder / 'first'}"]) == 0
    return folder


def common_words(folder):
    words = [f"model.path={folder / 'model'}", f"data.cache_dir={folder / 'cache'}", "tuning=lora", "tuning.rank=4"]
    return [*words, "run.device=cpu", "logging.wandb=disabled", "checkpoint.save_final=false"]


@pytest.mark.parametrize("start", ["tuning.from", "model.adapters", "tuning.init=pissa", "tuning.init=olora"])
def test_the_reference_is_the_model_that_the_run_begins_with(adapter_trained_before, tmp_path, start):
    """At a rate of 1e-9 nothing moves, so that nothing may diverge: the divergence from the bare base was 0.3 here."""
    folder = adapter_trained_before
    words = [f"data.sources.task.path={folder / 'task.jsonl'}", f"data.sources.general.path={folder / 'general.jsonl'}"]
    words += ["data.sources.general.replay=true", "objective.forgetting.kl_weight=0.5", "optim.lr=1e-9"]
    words += ["budget.steps=2", "batch.global=8", "batch.micro=8", "logging.every_steps=1", "export.at_end=false"]
    exported = folder / "first" / "export"
    starts = {"tuning.from": f"tuning.from={exported}", "model.adapters": f"model.adapters=[{exported}]"}
    words.append(starts.get(start, start))
    assert command_here(["train", *words, *common_words(folder), f"run.dir={tmp_path / 'run'}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["replay_kl"] for row in rows if "replay_kl" in row]
    assert len(found) == 2 and all(abs(value) < 1e-5 for value in found), found
