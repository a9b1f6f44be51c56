"""The receipt of a run: what `run.json` says was expected and measured, beside the files and rows that the run left."""

import json
import time
from statistics import median

import pytest

from tests.helpers.building import model_dir
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import command_warm

STEPS = 6


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """(run directory of two sharding ranks with a checkpoint, seconds that the command took)."""
    root = tmp_path_factory.mktemp("receipt")
    write_chat_data(root / "train.jsonl", 24)
    write_chat_data(root / "eval.jsonl", 8, seed=1)
    words = [f"model.path={model_dir(root)}", f"data.path={root / 'train.jsonl'}", "data.max_length=128"]
    words += [f"data.eval_path={root / 'eval.jsonl'}", f"data.cache_dir={root / 'cache'}", f"run.dir={root / 'run'}"]
    words += ["strategy=fsdp2", "launcher.processes=2", "run.device=cpu", f"budget.steps={STEPS}", "batch.global=8"]
    words += ["batch.micro=2", "logging.wandb=disabled", "logging.every_steps=1", "export.at_end=false"]
    began = time.monotonic()
    assert command_warm(["train", *words]) == 0
    return root / "run", time.monotonic() - began


def record(run_dir):
    return json.loads((run_dir / "run.json").read_text())


def test_receipt_measurements_are_those_of_rows_and_files(left):
    run_dir, whole_s = left
    took = record(run_dir)["receipt"]["measured"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if "loss" in row]
    assert len(steps) == STEPS
    assert took["step_s"] == pytest.approx(median(row["step_s"] for row in steps[1:]))
    assert took["memory_gib"] == steps[-1]["memory_gib"] and "resident set" in took["memory_of"]
    assert 0 < took["evaluation_before_s"] < took["start_s"] < whole_s
    assert took["start_s"] + sum(row["step_s"] for row in steps) + took["checkpoint_s"] < whole_s
    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert took["checkpoint_bytes"] == sum(path.stat().st_size for path in files)


def test_receipt_exchange_is_as_much_as_predicted(left):
    run_dir, _ = left
    expected, took = (record(run_dir)["receipt"][key] for key in ("predicted", "measured"))
    for name, size in expected["exchanged_bytes"].items():
        assert took["exchanged_bytes"][name] == pytest.approx(size, rel=0.02), name
    assert expected["exchanged_bytes"].keys() == {"all_gather", "reduce_scatter"}
    assert 0 < took["exposed_s"] < took["start_s"]


def test_receipt_has_the_prediction_beside_the_measurement(left):
    run_dir, _ = left
    facts = record(run_dir)
    expected, took = facts["receipt"]["predicted"], facts["receipt"]["measured"]
    trained = facts["sharding"]["trainable_parameters"]
    assert expected["checkpoint_bytes"] == 12 * trained  # fp32, and two moments of AdamW
    assert expected["checkpoint_bytes"] == pytest.approx(took["checkpoint_bytes"], rel=0.05)
    # Half of the parameters with gradients and moments, and blocks gathered whole: between a half and the whole state.
    assert 8 * trained < expected["state_gib"] * 2**30 < 16 * trained
    assert expected["memory_gib"] == pytest.approx(expected["state_gib"] + expected["activations_gib"])
    assert 0 < expected["activations_gib"] < took["memory_gib"] and expected["memory_by"].startswith("estimate: ")
    flops = facts["flops_per_token"] * facts["tokens_per_step"] / 2
    assert expected["step_s"] == pytest.approx(flops / (0.75e12 * facts["reference_tflops"]))
    assert expected["step_by"].startswith("matrix products and attention alone")


def test_receipt_says_how_many_bytes_of_weights_each_rank_read(left):
    run_dir, _ = left
    read = record(run_dir)["weights_read_bytes"]
    whole = sum(path.stat().st_size for path in next(run_dir.parent.glob("llama*")).glob("*.safetensors"))
    assert len(read) == 2 and 0.95 * whole < sum(read) < 1.05 * whole
    assert max(read) < 0.55 * whole
