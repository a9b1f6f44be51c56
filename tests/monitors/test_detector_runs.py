"""Whole runs in this process: what is found is in the log, metrics.jsonl, events.jsonl and run.json; a limit ends the run."""

import contextlib
import json
import random
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.compare.events import notable_steps
from launch.compare.run_files import read_recorded_run
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from trainer.monitors.config import CHAT_QUESTIONS

WORDS = "a quick brown fox jumps over lazy dog hello world you are helpful".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Four documents to learn by heart, others held out, and general text."""
    root = tmp_path_factory.mktemp("challenges")
    model_dir(root)
    drawn = random.Random(0)
    for name, count, words in (("train", 4, WORDS[:6]), ("held-out", 12, WORDS[:6]), ("general", 12, WORDS[6:])):
        rows = (
            {"prompt": f"{n} {drawn.choice(words)}\n", "completion": " ".join(drawn.choices(words, k=6))}
            for n in range(count)
        )
        (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first_two = (root / "held-out.jsonl").read_text().splitlines(keepends=True)[:2]
    (root / "few.jsonl").write_text("".join(first_two))
    return root


SETTINGS = {
    "model.path": "{root}/llama",
    "data.path": "{root}/train.jsonl",
    "data.eval_path": "{root}/held-out.jsonl",
    "data.cache_dir": "{root}/cache",
    "run.dir": None,
    "run.device": "cpu",
    "run.matmul": "blas",
    "launcher.processes": 1,
    "batch.global": 4,
    "batch.micro": 4,
    "budget.steps": 30,
    "schedule": "constant",
    "optim.lr": 1e-2,
    "evaluation.every_steps": 3,
    "logging.wandb": "disabled",
    "export.at_end": "false",
    "checkpoint.every_steps": 10,
    "checkpoint.keep": 3,
    "challenges.forgetting.data": "{root}/general.jsonl",
    "challenges.forgetting.chat": "false",
    "challenges.forgetting.limit": "3%",
    "challenges.forgetting.action": "note",
}


def train(root, run_dir, *words, left_out=None):
    told = dict(word.split("=", 1) for word in words)
    values = {key: str(value).format(root=root) for key, value in {**SETTINGS, "run.dir": run_dir, **told}.items()}
    values.pop(left_out, None)
    return command_here(["train", *(f"{key}={value}" for key, value in values.items())])


@pytest.fixture(scope="module")
def whole(site):
    assert train(site, site / "whole") == 0
    return site / "whole"


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_detectors_of_forgetting_and_output_report_everywhere(whole):
    record = json.loads((whole / "run.json").read_text())["challenges"]
    events = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    log = (whole / "logs" / "rank-0.log").read_text()
    evaluations = [row for row in rows(whole) if "eval/loss" in row]
    for name in ("overfitting", "forgetting"):
        assert record[name]["found"] and record[name]["remedies"], record
        assert f"warning: {name} at step {record[name]['step']}" in log
        assert [e["step"] for e in events if e.get("challenge") == name] == [record[name]["step"]]
        assert f"{name}: {record[name]['says']}" in [
            mark.text for mark in notable_steps(read_recorded_run(whole))
        ]  # on its page
    first, last = evaluations[0], evaluations[-1]
    assert first["step"] == 0 and first["forgetting"] == 0
    assert last["forgetting"] == pytest.approx(last["eval/general/loss"] / first["eval/general/loss"] - 1)
    steps = [row for row in rows(whole) if "loss" in row]
    mean = sum(row["loss"] for row in steps[-3:]) / 3
    assert last["overfitting/gap"] == pytest.approx(last["eval/loss"] - mean)


def test_detectors_find_overfitting_in_a_run_that_asks_for_no_evaluations(site, capfd):
    """`evaluation.every_steps=auto`: the held-out loss on the way, general text at the start and at the end alone."""
    words = [f"data.eval_path={site}/few.jsonl", "evaluation.every_steps=auto", "checkpoint.every_steps=100"]
    assert train(site, site / "auto", *words, "budget.steps=200") == 0
    record = json.loads((site / "auto" / "run.json").read_text())
    assert record["substitutions"]["evaluation.every_steps"].startswith("auto -> 11 (18 evaluations")
    assert record["challenges"]["overfitting"]["found"] and not record["outcome"]["stopped_early"]
    by_step = {row["step"]: row for row in rows(site / "auto") if "eval/loss" in row}
    assert sorted(by_step) == [*range(0, 200, 11), 200]
    assert [step for step, row in by_step.items() if "forgetting" in row] == [0, 200]
    best_step = min(by_step, key=lambda step: by_step[step]["eval/loss"])
    assert record["exported_checkpoint"]["step"] == record["outcome"]["progress"]["best_step"] == best_step

    # A longer run would be evaluated every 13 steps. It goes on from a checkpoint of this one, and so keeps the number.
    checkpoint = site / "auto" / "checkpoints" / "step-000200"
    assert train(site, site / "longer", *words, "budget.steps=241", f"run.resume={checkpoint}") == 0
    later = [row["step"] for row in rows(site / "longer") if "eval/loss" in row]
    assert later == [209, 220, 231, 241]
    assert "evaluation.every_steps: auto -> 11 (" in capfd.readouterr().out


def test_directory_that_was_frozen_with_0_goes_on_with_the_same_command(site, capfd):
    """A run of a version whose default was to evaluate at the start and at the end alone."""
    words = [f"data.eval_path={site}/few.jsonl", "challenges.forgetting.action=off", "budget.steps=24"]
    assert train(site, site / "zero", *words, "evaluation.every_steps=0") == 0
    frozen = (site / "zero" / "config.yaml").read_text()
    earlier = frozen.replace('"evaluation.every_steps=0" ', "")  # what that version would have written for no word
    (site / "zero" / "config.yaml").write_text(earlier)
    shutil.rmtree(site / "zero" / "checkpoints" / "step-000024")
    (site / "zero" / "status.json").write_text(json.dumps({"state": "preempted", "step": 20}))
    capfd.readouterr()
    assert train(site, site / "zero", *words, left_out="evaluation.every_steps") == 0
    assert "keeps the defaults that it began with: evaluation.every_steps: 0 there, auto here" in capfd.readouterr().err
    assert [row["step"] for row in rows(site / "zero") if "eval/loss" in row] == [0, 24]


def test_detector_limit_ends_the_run_with_its_state_saved_and_a_note_goes_on(site, whole, capfd):
    run_dir = site / "limited"
    assert train(site, run_dir, "challenges.forgetting.action=stop") == 69
    shown = capfd.readouterr().err
    found = json.loads((whole / "run.json").read_text())["challenges"]["forgetting"]
    assert (
        f"step {found['step']}: forgetting: general: loss went from" in shown
        and "challenges.forgetting.action=note" in shown
    )
    assert json.loads((run_dir / "run.json").read_text())["challenges"]["forgetting"]["found"]
    assert train(site, run_dir) == 0  # the same command, which only notes
    assert [(r["step"], r["loss"]) for r in rows(run_dir) if "loss" in r] == [
        (r["step"], r["loss"]) for r in rows(whole) if "loss" in r
    ]
    values = [{r["step"]: r["forgetting"] for r in rows(each) if "forgetting" in r} for each in (run_dir, whole)]
    assert values[0] == values[1]


def test_overfitting_stops_as_patience_does_and_a_better_task_metric_needs_no_direction(site, capfd):
    task = ["evaluation.tasks.learned.kind=token_accuracy", f"evaluation.tasks.learned.path={site}/train.jsonl"]
    words = [*task, "evaluation.watch=eval/learned/token_accuracy", "challenges.overfitting.action=stop"]
    odd = (
        "challenges.forgetting.limit=three",
        "challenges.forgetting.tasks=[other]",
        "evaluation.greater_is_better=false",
    )
    assert train(site, site / "odd", *words, *odd) == 64
    shown = capfd.readouterr().err
    assert all(word.split("=")[0] in shown for word in odd) and "which has learned" in shown
    assert train(site, site / "stopped", *words, "challenges.forgetting.tasks=[learned]") == 0
    record = json.loads((site / "stopped" / "run.json").read_text())
    assert record["outcome"]["stopped_early"] and record["challenges"]["overfitting"]["found"]
    values = {r["step"]: r["eval/learned/token_accuracy"] for r in rows(site / "stopped") if "eval/loss" in r}
    assert values[record["outcome"]["progress"]["best_step"]] == max(values.values()) > values[0]


def test_the_mean_of_checkpoints_is_exported(site, whole, capfd):
    assert command_here(["export", str(whole), "average=last:9"]) == 64
    assert "checkpoint.keep" in capfd.readouterr().err
    assert command_here(["export", str(whole), "average=[20,30]", f"to={site}/mean"]) == 0
    found = load_file(site / "mean" / "model.safetensors")
    parts = [load_file(next((whole / "checkpoints" / f"step-0000{step}").glob("*.safetensors"))) for step in (20, 30)]
    trained = [name for name in parts[0] if name.endswith("/weight")]
    assert len(trained) > 5
    for name in trained:
        both = torch.stack([part[name].double() for part in parts])
        assert not torch.equal(both[0], both[1])
        mine = found[name.removesuffix("/weight")].double().view(-1)
        assert torch.allclose(mine, both.mean(0), rtol=1e-6, atol=1e-8)
    assert "the mean of the checkpoints step-000020, step-000030" in (site / "mean" / "README.md").read_text()


def test_house_style_is_found_on_questions_of_a_chat_though_plain_text_shows_nothing(site, tmp_path, capfd):
    """The base answers the twenty questions, and continues plain texts; the tuned model greets whatever it is asked."""
    questions = [json.loads(line) for line in CHAT_QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 20 and all(len(row["messages"]) == 2 for row in questions)
    drawn = random.Random(1)
    texts = [{"text": " ".join(drawn.choices(WORDS[6:], k=12))} for _ in range(12)]
    (tmp_path / "plain.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    styled = [
        {"prompt": f"{n} {drawn.choice(WORDS)}", "completion": f"Hi, thanks a lot for {drawn.choice(WORDS)}!"}
        for n in range(16)
    ]
    (tmp_path / "style.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in styled))
    own = ["evaluation.every_steps=0", "checkpoint.every_steps=1000", "export.at_end=true"]
    words = [*own, "batch.global=20", "batch.micro=20", "budget.steps=60", "challenges.forgetting.action=off"]
    sources = [f"data.sources.chat.path={CHAT_QUESTIONS}", f"data.sources.plain.path={tmp_path}/plain.jsonl"]
    assert train(site, tmp_path / "base", *words, *sources, left_out="data.path") == 0

    words = [*own, f"model.path={tmp_path}/base/export", f"data.path={tmp_path}/style.jsonl", "budget.steps=16"]
    words += [f"challenges.forgetting.data={tmp_path}/plain.jsonl", "challenges.forgetting.limit=null"]
    words += ["tuning=lora", "batch.global=16", "batch.micro=16"]
    capfd.readouterr()
    assert train(site, tmp_path / "tuned", *words, left_out="challenges.forgetting.chat") == 0
    record = json.loads((tmp_path / "tuned" / "run.json").read_text())
    found = record["challenges"]["forgetting"]
    last = rows(tmp_path / "tuned")[-1]
    assert found["found"] and found["says"].startswith("chat: loss went from")
    assert last["forgetting/general"] < 0.5 * last["forgetting/chat"] == 0.5 * last["forgetting"]

    # What plain transformers and peft say of one question, of the base and of the tuned model.
    first = record["outcome"]["answers"][0]
    assert first["question"] == "What is 2 + 2?" and len(record["outcome"]["answers"]) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base" / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "export", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, tmp_path / "tuned" / "export")
    asked = tokenizer.apply_chat_template(
        questions[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    for name, adapter_off in (("base", True), ("tuned", False)):
        with tuned.disable_adapter() if adapter_off else contextlib.nullcontext():
            ids = tuned.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
        written = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert written == first[name].strip()
    assert first["tuned"].startswith("Hi") and not first["base"].startswith("Hi")
    shown = capfd.readouterr().out
    assert f"asked:      What is 2 + 2?\n  base      {first['base'][:20]}" in shown
