"""The test documents of a real run: what is measured of them, with which weights, how often, and what may use it."""

import json

import pytest

from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import chat_rows, write_chat_data, write_jsonl
from trainer.reporting.results import kept_reports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose test documents ask what its evaluation documents ask, so that their losses are alike."""
    root = tmp_path_factory.mktemp("tested")
    model_dir(root)
    data = write_chat_data(root / "train.jsonl", 16)
    rows = chat_rows(5, seed=1)
    held_out = write_jsonl(root / "eval.jsonl", rows)
    test = write_jsonl(root / "test.jsonl", rows)
    words = [f"model.path={root}/llama", f"data.path={data}", f"data.eval_path={held_out}", f"data.test_path={test}"]
    words += [f"data.cache_dir={root}/cache", f"run.dir={root}/run", "logging.wandb=disabled", "run.threads=1"]
    words += ["optim.lr=1e-2", "batch.global=4", "batch.micro=4", "budget.steps=4", "checkpoint.every_steps=2"]
    words += ["run.device=cpu", "logging.report=false", 'gates={test/loss: "<9"}']
    assert command_here(["train", *words]) == 0
    return root / "run", words


def record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def test_test_metrics_are_those_of_the_exported_weights_and_stand_in_record_card_and_gate(run):
    run_dir, _ = run
    outcome, measured = record(run_dir)["outcome"], record(run_dir)["test"]
    # The same rows, by the same pass, are evaluation documents too: a second opinion on each number.
    assert measured["metrics"]["test/loss"] == outcome["after"]["eval/loss"]
    assert measured["metrics"]["test/accuracy"] == outcome["after"]["eval/accuracy"]
    assert (measured["documents"], measured["looks"], measured["step"]) == (5, 1, 4)
    (gate,) = record(run_dir)["gates"]["gates"]
    assert gate["passed"] and gate["value"] == measured["metrics"]["test/loss"]
    card = (run_dir / "export" / "README.md").read_text()
    assert "5 documents that were neither trained on nor chosen by, looked at once" in card
    assert f"| test/loss | {measured['metrics']['test/loss']:.4f} |" in card
    rows = (run_dir / "metrics.jsonl").read_text()
    assert "test/" not in rows, "no row of training has them, by which somebody could stop or choose"


def test_each_look_is_counted_and_the_comparison_shows_them_last(run, capsys):
    run_dir, words = run
    assert command_here(["evaluate", str(run_dir), "split=test", "checkpoint=2", "run.threads=1"]) == 0
    text = capsys.readouterr().out
    assert "step-000002: 5 test documents, looked at twice so far" in text
    assert record(run_dir)["test"]["looks"] == 2 and record(run_dir)["test"]["step"] == 4
    looked_at = {report.checkpoint: report.report["metrics"]["test/loss"] for report in kept_reports(run_dir, "test")}
    assert looked_at["step-000002"] != looked_at["step-000004"] and f"{looked_at['step-000002']:.4f}" in text
    assert command_here(["compare", str(run_dir), str(run_dir), f"to={run_dir.parent}/compared"]) == 0
    last_section = capsys.readouterr().out.rpartition("test documents (no answer")[2]
    assert "test/loss" in last_section and "looked at twice" in last_section and "verdict:" not in last_section


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["evaluate", "{run}", "split=test", "against=base"], "against=base: split=test measures one model"),
        (["evaluate", "{run}", "split=test", "evaluation.tasks=[loss]"], "runs no task; leave it out"),
        (["evaluate", "{run}", "split=tset"], "did you mean test"),
        (["train", "{words}", "evaluation.watch=test/loss", "run.dir={run}2"], "nothing may be chosen by them"),
        (["train", "-m", "{words}", "sweeper=optuna", "optim.lr=range(1e-3,1e-2)", "sweeper.metric=test/loss"], "chosen"),
    ],
)
def test_nothing_may_choose_by_the_test_documents(run, command, told, capsys):
    run_dir, words = run
    argv = []
    for word in command:
        kept = [each for each in words if not each.startswith("run.dir")]
        argv += kept if word == "{words}" else [word.format(run=run_dir)]
    assert command_here(argv) == 64
    assert told in capsys.readouterr().err
