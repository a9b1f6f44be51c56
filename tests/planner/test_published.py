"""Published measurements: their conditions, how their trainers held the step, and whether runs that died are said to fit."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.planning import RESULTS, answers, as_published, forms, judged, question, theirs_of
from trainer.planner.peer_memory import PeerSetting


def row(method, config):
    return {"id": "x", "model": "Mistral-7B-v0.1", "method": method, "strategy": "single", "gpus": "1"} | {
        "gpu": "A100-80GB",
        "seq": "4096",
        "micro_batch": "32",
        "framework_config": config,
    }


@pytest.mark.parametrize(
    ("method", "config", "theirs"),
    [
        ("full", "none", [PeerSetting.pure_bf16, PeerSetting.stock_loss]),
        ("LoRA", "foak-fast-kernels", [PeerSetting.fused_loss]),
        ("QLoRA", "baseline-peft-bnb", [PeerSetting.fp32_head]),
        ("QLoRA", "accelerated-peft-bnb-foak-liger", []),
        ("full", "foak-fast-kernels-liger", [PeerSetting.pure_bf16]),
    ],
)
def test_published_measurement_has_the_conditions_of_its_source(method, config, theirs):
    made = as_published(row(method, config))
    assert theirs_of(made) == theirs
    asked = question(made)
    assert (asked.recompute, asked.accumulation) == ("full", 1)
    assert (asked.tuning, asked.quantised) == (
        "full" if method == "full" else "lora",
        "nf4" if method[0] == "Q" else "none",
    )


def test_published_measurement_counts_memory_beside_tensors():
    job = SimpleNamespace(card=SimpleNamespace(memory_gib=79.0))
    found = judged(as_published(row("LoRA", "none")), {"predicted_gib": 74.0, "as_theirs_gib": 75.0}, job)
    assert (found["predicted_gib"], found["predicted_fits"]) == (
        78.45,
        True,
    )  # 5 % for the allocator, 0.75 GiB for libraries
    assert (found["as_theirs_gib"], found["as_theirs_fits"]) == (79.5, False)


def test_published_measurements_on_the_page_are_what_the_planner_says(tmp_path):
    """Rows of one model with and without their loss, weights in pure bf16: measured, and predicted when the page was written."""
    written = {one["id"]: one for one in json.loads(RESULTS.read_text())["rows"]}
    conditions = {
        "gpu": "A100-80GB",
        "grad_accum": "1",
        "act_ckpt": "full",
        "notes": "framework_config=none; stock HF SFTTrainer",
    }
    rows = [{key: str(value) for key, value in written[each].items()} | conditions for each in ("fms-001", "fms-003")]
    ((_, form, job),) = forms(list(dict.fromkeys(map(question, rows))), tmp_path)
    for one in rows:
        found, page = answers(one, form, job), written[one["id"]]
        assert round(found["predicted_gib"], 2) == page["predicted_gib"]
        assert round(found["as_theirs_gib"], 2) == page["as_theirs_gib"] != page["predicted_gib"]
