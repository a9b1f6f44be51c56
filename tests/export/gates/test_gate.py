"""Exports of a real run against its gates: what training, evaluations and other weights count for, and what is recorded."""

import json
import re
import shutil

import pytest

from launch.main import main
from tests.helpers.building import model_dir
from tests.helpers.launching import command_here
from tests.helpers.tokenizers import write_chat_data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two checkpoints of a run whose gate at the end says no, the last one evaluated."""
    root = tmp_path_factory.mktemp("gates")
    model_dir(root)
    data, held_out = write_chat_data(root / "train.jsonl", 16), write_chat_data(root / "eval.jsonl", 4, seed=1)
    words = [
        f"model.path={root}/llama",
        f"data.path={data}",
        f"data.eval_path={held_out}",
        f"data.cache_dir={root}/cache",
    ]
    words += [
        "tuning=lora",
        "optim.lr=1e-2",
        "batch.global=4",
        "batch.micro=4",
        "budget.steps=4",
        "checkpoint.every_steps=2",
    ]
    words += [
        "evaluation.every_steps=4",
        "run.threads=1",
        "logging.wandb=disabled",
        f"run.dir={root}/run",
        "run.device=cpu",
    ]
    assert command_here(["train", *words, 'gates={eval/loss: "<0.1", general/loss: "<100", memorised: 0}']) == 0
    general = ["evaluation.tasks.general.kind=loss", f"evaluation.tasks.general.path={held_out}"]
    assert (
        command_here(["evaluate", f"{root}/run", *general, "against=base", "run.threads=1", f"to={root}/elsewhere"])
        == 0
    )
    return root / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def export(run, *words):
    return command_here(["export", str(run), f"to={run.parent}/to", *words])


def record(run):
    return json.loads((run / "run.json").read_text())


def test_gate_that_fails_stops_the_export_and_says_what_to_do(trained):
    assert not (trained / "export").exists()
    log = next((trained / "logs").glob("rank-0*.log")).read_text()
    assert re.search(r"not exported, since \d of \d gates failed:", log) and f"then: shardtune export {trained}" in log
    gates = {gate["metric"]: gate for gate in record(trained)["gates"]["gates"]}
    after = record(trained)["outcome"]["after"]["eval/loss"]
    assert gates["eval/loss"]["value"] == after and not gates["eval/loss"]["passed"]
    assert gates["memorised"]["value"] is None


def test_gate_reasons_have_value_bound_and_place_or_the_command_that_measures_it(run, capsys):
    assert export(run) == 69
    said = capsys.readouterr().err
    loss = record(run)["outcome"]["after"]["eval/loss"]
    assert f"eval/loss: {loss:.4g}, must be below 0.1; training's evaluation at step 4" in said
    assert "memorised: must be equal to 0, and was never measured: shardtune evaluate" in said
    assert "general/loss" not in said.partition("measured are")[0], "it passed, though its report lies elsewhere"
    assert "2 of 3 gates failed" in said and not (run.parent / "to").exists()


def test_gate_override_exports_and_is_written_into_card_and_record(run, capsys):
    assert export(run, 'gates.override="agreed with the clinic"') == 0
    assert "gate passed over (agreed with the clinic): eval/loss" in capsys.readouterr().out
    card = (run.parent / "to" / "README.md").read_text()
    assert "agreed with the clinic" in card and "| memorised | `0` | not measured | **not passed** |" in card
    (noted,) = record(run)["exports"]
    assert noted["override"] == "agreed with the clinic" and noted["checkpoint"] == "step-000004"
    assert [gate["passed"] for gate in noted["gates"]] == [False, True, False]


def test_gate_ignores_measurements_of_other_weights(run, capsys):
    assert export(run, "checkpoint=2") == 69
    said = capsys.readouterr().err
    assert "general/loss:" in said and "belongs to other weights than step 2 and does not count" in said
    assert "training's evaluation at step 4 belongs to other weights than step 2" in said
    (report,) = (run / "reports").glob("*.json")
    changed = json.loads(report.read_text())
    changed["model"]["artefact"] = "0" * 64
    report.write_text(json.dumps(changed))
    assert export(run) == 69 and "general/loss:" in capsys.readouterr().err


def test_gate_forgetting_is_the_share_by_which_the_base_was_better(run, capsys):
    assert export(run, 'gates={forgetting: "<-99%"}') == 69
    said = capsys.readouterr().err
    (report,) = (run / "reports").glob("*.json")
    told = json.loads(report.read_text())
    base = told["against"]["tasks"]["general"]["metrics"]["loss"]["value"]
    worse = told["tasks"]["general"]["metrics"]["loss"]["value"] / base - 1
    assert f"forgetting: {worse:.4g} [" in said and "(general/forgetting), must be below -99%" in said


def test_gate_of_the_run_cannot_be_loosened_at_its_export(run, capsys):
    assert export(run, 'gates={eval/loss: "<100"}') == 64
    assert "the run has <0.1, which stays" in capsys.readouterr().err
    assert main(["export", str(run), "gates.eval/loss=low"]) == 64
    assert "gates: eval/loss: low: must be" in capsys.readouterr().err


def test_gate_on_an_unknown_metric_suggests_known_ones(run, capsys):
    assert export(run, 'gates={general/los: "<1"}') == 69
    assert "did you mean general/loss?" in capsys.readouterr().err
