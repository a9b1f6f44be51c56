"""Whole runs in this process: an odd batch is noted or skipped, named, and judged alike after a resume."""

import gc
import hashlib
import json
from pathlib import Path

import pytest
import torch

from launch.main import main
from strategies.native import NativeEngine
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import WORDS
from trainer.evaluation.loss import LossEvaluator
from trainer.monitors.anomalies import Guards

BATCH, STEPS, ODD = 4, 12, 9


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data in its own order, whose documents of step ODD say one word again and again."""
    path = tmp_path_factory.mktemp("guards")
    model_dir(path)
    write(path / "train.jsonl", list(range(STEPS * BATCH)))
    return path


def write(path: Path, numbers: list[int]) -> None:
    words = WORDS.split()
    with path.open("w") as file:
        for number in numbers:
            odd = number // BATCH + 1 == ODD
            said = [words[(number * number + 7 * place + place * place // 3) % len(words)] for place in range(24)]
            answer = " ".join(["fox"] * 48 if odd else said)
            turns = [("user", f"question {number}"), ("assistant", answer)]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")


def run(root: Path, run_dir: Path, *words: str) -> int:
    settings = {
        "model.path": root / "llama",
        "data.path": root / "train.jsonl",
        "data.cache_dir": root / "cache",
        "data.shuffle": "false",
        "run.dir": run_dir,
        "run.device": "cpu",
        "run.matmul": "blas",
        "launcher.processes": 1,
        "batch.global": BATCH,
        "batch.micro": BATCH,
        "budget.steps": STEPS,
        "schedule": "constant",
        "optim.lr": 1e-4,
        "guards.window": 10,
        "logging.wandb": "disabled",
        "logging.every_steps": 5,
        "export.at_end": "false",
    }
    return main(["train", *(f"{key}={value}" for key, value in settings.items()), *words])


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def outliers(run_dir):
    """What the guards noted; what detectors say of a whole run stands there, too."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "outlier"]


def curve(run_dir: Path) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(run_dir)]


def test_anomaly_is_noted_with_the_documents_of_its_batch(root, tmp_path, capfd):
    assert run(root, tmp_path) == 0
    assert [row["step"] for row in rows(tmp_path) if "outlier/grad_norm" in row] == [ODD]
    [event] = outliers(tmp_path)
    assert (event["step"], event["action"], event["places"]) == (ODD, "note", [[32, BATCH]])
    assert event["values"]["grad_norm"] == next(r["grad_norm"] for r in rows(tmp_path) if r["step"] == ODD)
    lines = (root / "train.jsonl").read_text().splitlines()
    assert [each["line"] for each in event["documents"]] == [33, 34, 35, 36]
    for each in event["documents"]:
        said = {"messages": json.loads(lines[each["line"] - 1])["messages"]}
        assert each["file"].endswith("train.jsonl")
        assert each["sha256"] == hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(), said
    shown = capfd.readouterr().out
    assert f"step {ODD}: " in shown and "train.jsonl:33, " in shown and "Samples 32 to 35" in shown
    assert json.loads((tmp_path / "run.json").read_text())["outcome"]["progress"]["outliers"] == 1


def test_anomaly_skip_is_judged_alike_after_a_resume(root, tmp_path):
    words = ("guards.grad_norm=skip", "checkpoint.every_steps=7")
    assert run(root, tmp_path / "whole", *words) == 0
    assert [row["step"] for row in rows(tmp_path / "whole") if row.get("skipped")] == [ODD]
    state = tmp_path / "whole" / "checkpoints" / "step-000007"
    assert run(root, tmp_path / "resumed", *words, f"run.resume={state}") == 0
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")[7:]
    assert [row["step"] for row in rows(tmp_path / "resumed") if row.get("skipped")] == [ODD]


def test_a_run_that_only_skips_is_stopped(root, tmp_path, capfd):
    words = ("guards.loss=skip", "guards.threshold=1e-9", "optim.max_skipped_steps=3", "optim.lr=1e-9")
    code = run(root, tmp_path, *words, "logging.every_steps=1", "budget.steps=60")
    shown = capfd.readouterr().err
    assert code == 70 and "the updates of 3 steps in a row were left out" in shown and "Traceback" not in shown
    assert "guards.threshold" in shown and "optim.max_skipped_steps" in shown


def test_anomaly_rollback_is_the_run_on_data_without_those_documents(root, tmp_path, capfd):
    clean = tmp_path / "clean.jsonl"
    numbers = list(range((STEPS + 1) * BATCH))
    write(tmp_path / "all.jsonl", numbers)
    write(clean, [number for number in numbers if number // BATCH + 1 != ODD])
    assert run(root, tmp_path / "never", f"data.path={clean}") == 0
    every = ("logging.every_steps=2", "checkpoint.every_steps=5", f"data.path={tmp_path / 'all.jsonl'}")
    words = (*every, "guards.grad_norm=rollback")
    assert run(root, tmp_path / "back", *words) == 0
    assert curve(tmp_path / "back") == curve(tmp_path / "never")
    assert not [row for row in rows(tmp_path / "back") if "outlier/grad_norm" in row]  # its row is given up, too
    progress = json.loads((tmp_path / "back" / "run.json").read_text())["outcome"]["progress"]
    assert (progress["rollbacks"], progress["outliers"], progress["samples"]) == (1, 1, STEPS * BATCH)
    assert progress["passed"] == [{"first": 32, "count": BATCH}]
    [event] = outliers(tmp_path / "back")
    assert (event["step"], event["action"], [each["line"] for each in event["documents"]]) == (
        ODD,
        "rollback",
        [33, 34, 35, 36],
    )
    assert "the run goes back to a checkpoint from before it" in capfd.readouterr().out
    # What was given up stays so in a run that goes on from here.
    state = tmp_path / "back" / "checkpoints" / "step-000010"
    assert run(root, tmp_path / "on", *words, f"run.resume={state}") == 0
    assert curve(tmp_path / "on") == curve(tmp_path / "never")[10:]


def test_anomaly_rollback_before_the_first_checkpoint_has_one_to_go_back_to(root, tmp_path, monkeypatch):
    take_step, frozen_objects = NativeEngine.step, []

    def counting_step(engine, *args, **kwargs):
        frozen_objects.append(gc.get_freeze_count())
        return take_step(engine, *args, **kwargs)

    monkeypatch.setattr(NativeEngine, "step", counting_step)
    words = ("guards.loss=rollback", "checkpoint.every_minutes=0", "budget.steps=10")
    assert run(root, tmp_path / "back", *words) == 0
    progress = json.loads((tmp_path / "back" / "run.json").read_text())["outcome"]["progress"]
    assert progress["rollbacks"] == 1
    assert [row["step"] for row in rows(tmp_path / "back")] == list(range(1, 11))
    assert min(frozen_objects) > 10_000, "the garbage collector would walk all objects again after a rollback"


def test_a_level_in_a_run_is_undone_from_before_it_began(root, tmp_path, monkeypatch):
    """The loss of steps 30 to 37 rises, once, and stays, while checkpoints are written every four steps."""
    write(tmp_path / "all.jsonl", [number % (8 * BATCH) for number in range(60 * BATCH)])
    real = Guards.mark_outliers

    def mark_outliers(guards, rows):
        for row in rows:
            if guards._last_rollback_step < 0:
                row["loss"] *= 1 + 0.02 * min(max(row["step"] - 29, 0), 8)
        real(guards, rows)

    monkeypatch.setattr(Guards, "mark_outliers", mark_outliers)
    words = (
        "guards.loss=rollback",
        "guards.window=40",
        "checkpoint.every_steps=4",
        f"data.path={tmp_path / 'all.jsonl'}",
    )
    assert run(root, tmp_path / "back", *words, "budget.steps=48", "optim.lr=1e-6") == 0
    progress = json.loads((tmp_path / "back" / "run.json").read_text())["outcome"]["progress"]
    [event] = outliers(tmp_path / "back")
    began, step = event["began"], event["step"]
    assert 28 <= began <= 32 and began < step <= 45 and progress["rollbacks"] == 1
    # Checkpoints from the update on that led to its first step are given up, and the samples from there on left out.
    given_up = sorted(path.name for path in (tmp_path / "back" / "checkpoints" / "given-up-1").glob("step-*"))
    assert given_up and given_up[0] <= "step-000032" and (began - 1) <= int(given_up[0].removeprefix("step-"))
    [passed] = progress["passed"]
    assert passed["first"] == BATCH * (began - 2) and passed["first"] + passed["count"] == BATCH * step
    losses = [row["loss"] for row in rows(tmp_path / "back")]
    assert len(losses) == 48 and max(losses[30:]) < 1.1 * max(losses[:28])


def test_anomaly_rollbacks_without_end_stop_the_run(root, tmp_path, capfd):
    words = ("guards.loss=rollback", "guards.threshold=1e-9", "guards.max_rollbacks=2", "optim.lr=1e-9")
    code = run(root, tmp_path, *words, "logging.every_steps=1", "budget.steps=60")
    shown = capfd.readouterr().err
    assert code == 70 and "guards.max_rollbacks" in shown and "Traceback" not in shown
    assert len(outliers(tmp_path)) == 3


def test_out_of_memory_in_a_step_says_what_it_held_and_what_helps(root, tmp_path, monkeypatch, capfd):
    real, taken = NativeEngine.backward, []

    def backward(engine, loss, *, last):
        taken.append(loss)
        if len(taken) == 6:  # the second micro-batch of step 3
            torch.empty(2**50)
        real(engine, loss, last=last)

    monkeypatch.setattr(NativeEngine, "backward", backward)
    assert run(root, tmp_path / "train", "batch.micro=2") == 69
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and len(taken) == 6
    for said in (
        "step 3: rank 0 on ",
        "ran out of memory ([enforce fail",
        "at most so far (with libraries",
        "expected 0.0",
        "its micro-batches: 2, the largest ",
        "batch.micro=1 (or auto), which keeps batch.global=4; strategy.activation_checkpointing=full; ",
    ):
        assert said in shown, shown
    failure = json.loads((tmp_path / "train" / "failure.json").read_text())
    assert (failure["exit_code"], failure["step"], failure["user_error"]) == (69, 3, True)

    def evaluate(self, engine):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(LossEvaluator, "run", evaluate)
    held_out = f"data.eval_path={root / 'train.jsonl'}"
    assert run(root, tmp_path / "evaluate", held_out) == 69
    shown = capfd.readouterr().err
    assert "the evaluation at step 0: rank 0 on " in shown and "lower evaluation.batch (it is 8)" in shown
