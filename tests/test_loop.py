"""Whole runs in this process, through the command line: budgets, packing, early stopping, best checkpoint, divergence."""

import errno
import json
import os
from pathlib import Path

import pytest

from launch.main import main
from strategies import atomic_io
from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from trainer.loop import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("loop")
    model_dir(path)
    write_chat_data(path / "train.jsonl", 30)
    write_chat_data(path / "eval.jsonl", 8, seed=1)
    return path


def run(root: Path, run_dir: Path, **changes) -> int:
    settings = {
        "model.path": root / "llama",
        "data.path": root / "train.jsonl",
        "data.eval_path": root / "eval.jsonl",
        "data.cache_dir": root / "cache",
        "data.max_length": 256,
        "run.dir": run_dir,
        "run.device": "cpu",
        "launcher.processes": 1,
        "batch.global": 8,
        "batch.micro": 4,
        "optim.lr": 1e-3,
        "logging.wandb": "disabled",
        "export.at_end": "false",
    }
    settings.update({key.replace("__", "."): value for key, value in changes.items()})
    return main(["train", *(f"{key}={value}" for key, value in settings.items())])


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir) if "loss" in row]


def test_epochs_cover_every_document_and_reach_into_the_next(root, tmp_path):
    assert run(root, tmp_path, budget__epochs=2, batch__global=8) == 0
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))  # 60 documents in steps of 8
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["outcome"]["progress"]["samples"] == 64
    assert record["substitutions"]["run.matmul"].startswith(("auto -> blas (", "auto -> onednn ("))
    once = record["data_report"]["train"]["tokens"]
    assert steps[-1]["tokens"] > 2 * once > steps[-2]["tokens"]


def test_budget_of_tokens_ends_with_the_step_that_reaches_it(root, tmp_path):
    assert run(root, tmp_path, budget__tokens=1000) == 0
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert steps[-1]["tokens"] >= 1000 > steps[-2]["tokens"]


def test_packing_trains_on_the_same_tokens_in_fewer_rows(root, tmp_path):
    assert run(root, tmp_path, budget__epochs=1, data__packing="true", batch__global=2, batch__micro=1) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    packs = -(-record["data_report"]["train"]["tokens"] // 256)
    assert record["total_steps"] in (-(-packs // 2), -(-(packs + 1) // 2))
    assert losses(tmp_path)[-1] < 7


def test_early_stopping_keeps_the_best(root, tmp_path):
    """At a rate that moves nothing, only the first evaluation is an improvement."""
    settings = {"optim__lr": 1e-12, "budget__steps": 50, "evaluation__every_steps": 2, "evaluation__patience": 3}
    assert (
        run(root, tmp_path, **settings, evaluation__min_delta=0.01, checkpoint__every_steps=2, checkpoint__keep=1) == 0
    )
    record = json.loads((tmp_path / "run.json").read_text())["outcome"]
    assert record["stopped_early"] and record["progress"]["step"] == 8
    assert record["progress"]["best_step"] == 2
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000008"]


def test_run_that_begins_with_the_state_of_one_that_patience_ended_trains(root, tmp_path):
    often = {"evaluation__every_steps": 1, "evaluation__min_delta": 0.01, "checkpoint__keep": 1}
    assert run(root, tmp_path / "ended", optim__lr=1e-12, budget__steps=4, evaluation__patience=1, **often) == 0
    (ended,) = [path for path in (tmp_path / "ended" / "checkpoints").iterdir() if path.name == "step-000002"]
    begins = {"run__resume": ended, "run__accept": "[optimizer]", "evaluation__patience": 1}
    assert run(root, tmp_path / "next", optim__lr=1e-2, budget__steps=4, **begins) == 0
    assert len(losses(tmp_path / "next")) == 2


def test_tasks_of_the_step_at_which_patience_ends_a_run_are_made_up_if_it_is_stopped_amid_them(
    root, tmp_path, monkeypatch
):
    """On the way `auto` computes the held-out loss alone, so that the step that becomes the last one is evaluated once more."""
    evaluate = Trainer._evaluate
    stopped = []

    def stopped_amid_tasks(trainer, evaluators):
        if trainer.progress.step and len(evaluators) == len(trainer.evaluators) and not stopped:
            stopped.append(trainer.progress.step)
            trainer._stop_for_signal()
        return evaluate(trainer, evaluators)

    monkeypatch.setattr(Trainer, "_evaluate", stopped_amid_tasks)
    settings = {"optim__lr": 1e-12, "budget__steps": 60, "evaluation__patience": 1, "evaluation__min_delta": 0.01}
    settings |= {"evaluation__tasks": "[bits_per_byte]", "evaluation__max_documents": 2}
    assert run(root, tmp_path, **settings) == 75 and stopped == [20]
    assert run(root, tmp_path, **settings) == 0
    assert [row["step"] for row in rows(tmp_path) if "eval/bits_per_byte/bits_per_byte" in row] == [0, 20]
    outcome = json.loads((tmp_path / "run.json").read_text())["outcome"]
    assert outcome["stopped_early"] and len(losses(tmp_path)) == 20
    assert "eval/bits_per_byte/bits_per_byte" in outcome["after"]


def test_early_stopping_on_an_unknown_metric_is_refused_before_the_first_step(root, tmp_path, capfd):
    assert run(root, tmp_path, budget__steps=2, evaluation__watch="eval/foo") == 64
    shown = capfd.readouterr().err
    assert "evaluation.watch=eval/foo: the evaluation yields eval/loss, eval/perplexity" in shown
    assert "Traceback" not in shown and not losses(tmp_path)


def test_best_checkpoint_stays_where_a_better_one_could_not_be_saved(root, tmp_path, monkeypatch):
    """What was noted as best, and was not there, used to stand for the one that was: the next save deleted that."""

    class Full(atomic_io.Disk):
        def open(self, path, flags):
            if "step-000004" in str(path) and flags & os.O_WRONLY:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return super().open(path, flags)

    measured = {2: 5.0, 4: 4.0, 6: 5.5}
    monkeypatch.setattr(atomic_io, "disk", Full())
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer, _: {"eval/loss": measured[trainer.progress.step]})
    settings = {"evaluation__every_steps": 2, "evaluation__at_start": "false", "checkpoint__every_steps": 5}
    assert run(root, tmp_path, **settings, checkpoint__keep=1, budget__steps=6) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000006"]
    progress = json.loads((tmp_path / "run.json").read_text())["outcome"]["progress"]
    assert (progress["best_step"], progress["best_metric"], progress["stale_evaluations"]) == (2, 5.0, 1)


def test_evaluating_does_not_change_training(root, tmp_path):
    often = {"evaluation__every_steps": 1, "evaluation__batch": 3}
    assert run(root, tmp_path / "often", budget__steps=5, model__dropout=0.1, **often) == 0
    assert run(root, tmp_path / "never", budget__steps=5, model__dropout=0.1, data__eval_path="null") == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "never")


def test_dropout_is_on_in_training_and_off_in_evaluation(root, tmp_path):
    assert run(root, tmp_path / "none", budget__steps=1) == 0
    assert run(root, tmp_path / "some", budget__steps=1, model__dropout=0.3) == 0
    assert losses(tmp_path / "none") != losses(tmp_path / "some")
    first = [next(r["eval/loss"] for r in rows(tmp_path / name) if r["step"] == 0) for name in ("none", "some")]
    assert first[0] == first[1]


def test_gradients_that_are_not_finite_stop_the_run(root, tmp_path, capfd):
    code = run(root, tmp_path, optim__lr=1e30, optim__max_grad_norm=0, budget__steps=40, logging__every_steps=2)
    shown = capfd.readouterr().err
    assert code == 70 and "not finite" in shown and "optim.lr" in shown and "Traceback" not in shown
    skipped = [row["step"] for row in rows(tmp_path) if row.get("skipped")]
    assert 10 <= len(skipped) <= 12 and skipped == list(range(skipped[0], skipped[0] + len(skipped)))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    took = json.loads((tmp_path / "run.json").read_text())["receipt"]["measured"]  # of a run that fails, too
    assert took["step_s"] > 0 and took["memory_gib"] == rows(tmp_path)[-1]["memory_gib"]
    assert took["checkpoint_bytes"] is None and took["checkpoint_s"] is None
