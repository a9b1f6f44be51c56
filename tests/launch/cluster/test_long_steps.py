"""A step longer than the time that SLURM leaves a job to save is told before the run, with the value to set."""

import json
from dataclasses import replace

import pytest

from launch.cluster.long_steps import (
    estimated_step_s,
    long_step_notes,
    longest_step_s,
    sufficient_signal_lead_s,
    sufficient_timeout_s,
)
from launch.config.compose import compose_config
from strategies.base import ActivationCheckpointing

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def config_of(tmp_path, *words):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    fixed = [f"model.path={tmp_path}", "launcher=slurm", "launcher.gpus_per_node=8", "launcher.gres=gpu:h100:8"]
    return compose_config([*fixed, "precision=bf16", "budget.steps=1", *words], check=False).config


def test_step_longer_than_the_lead_is_told_with_the_value_to_set(tmp_path):
    config = config_of(tmp_path)
    assert long_step_notes(config, 150.0, save_s=10.0) == []  # 170 of 180 s
    (note,) = long_step_notes(config, 150.0, save_s=20.0)
    assert "a step takes about 150 s and a checkpoint 20 s" in note
    # 1.25 steps and two saves are 227.5 s: four minutes, and one for SLURM's clock.
    assert note.endswith("set launcher.signal_lead_s=300") and sufficient_signal_lead_s(150.0, 20.0) == 300
    assert long_step_notes(config, None) == []
    assert long_step_notes(config_of(tmp_path, "launcher.signal_lead_s=0"), 400.0) == []
    local = compose_config([f"model.path={tmp_path}", "launcher=local", "budget.steps=1"], check=False).config
    assert long_step_notes(local, 200.0) == []
    config.launcher.signal_lead_s = sufficient_signal_lead_s(380.0, 30.0)
    assert long_step_notes(config, 380.0, 30.0) == []


def test_step_as_long_as_the_timeout_of_an_exchange_is_told(tmp_path):
    config = config_of(tmp_path, "launcher.signal_lead_s=3600")
    assert long_step_notes(config, 480.0) == []  # four fifths of 600 s
    (note,) = long_step_notes(config, 500.0)
    assert "run.timeout_s=600" in note and note.endswith(f"set run.timeout_s={sufficient_timeout_s(500.0)}")
    config.run.timeout_s = sufficient_timeout_s(500.0)
    assert long_step_notes(config, 500.0) == []
    alone = compose_config([f"model.path={tmp_path}", "launcher.processes=1", "budget.steps=1"], check=False).config
    assert long_step_notes(alone, 1e4) == []


def test_longest_step_is_estimated_from_the_sizes_of_the_model_and_the_cards(tmp_path):
    config = config_of(tmp_path, "data.max_length=1048576", "batch.global=1", "tuning=lora")
    config.strategy = replace(config.strategy, activation_checkpointing=ActivationCheckpointing.full)
    # 8.6e17 FLOPs for attention and 3.1e16 for frozen weights, a third more recomputed, at half of 8 x 989 TFLOP/s.
    seconds = longest_step_s(config, {"h100"})
    assert 250 < seconds < 400
    config.batch["global"] = 2
    assert longest_step_s(config, {"h100"}) == pytest.approx(2 * seconds)
    assert longest_step_s(config, {"h100", "nobody knows"}) is None and longest_step_s(config, set()) is None
    (tmp_path / "config.json").write_text("{}")
    assert longest_step_s(config, {"h100"}) is None


def test_estimated_step_goes_by_the_slowest_card(tmp_path):
    config = config_of(tmp_path)
    times = [estimated_step_s(config, 1e10, 1e6, kinds) for kinds in ({"h100"}, {"l4"}, {"h100", "l4"})]
    assert times[0] < times[1] == times[2]
