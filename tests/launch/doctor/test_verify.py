"""`shardtune doctor --verify`: its words, its answer and its exit codes. tests/parity/test_verifying.py compares more runs."""

import json
from dataclasses import replace

import pytest
import torch

from launch.doctor import verify
from launch.main import main
from strategies.base import ActivationCheckpointing, Precision
from tests.helpers.building import STRATEGIES, model_dir, run_config
from tests.helpers.launching import clean_environment
from tests.helpers.nursery import FAULT
from tests.helpers.warm import command_warm
from trainer.config.parallel import ParallelConfig
from trainer.config.run import Device
from trainer.verification.small_run import fewest_ranks_of_group, num_ranks_for_verification, small_run_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("models"), "llama", num_hidden_layers=4)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name, value in clean_environment(HOME=str(tmp_path)).items():
        monkeypatch.setenv(name, value)


def refused(capsys, *words) -> str:
    assert main(["doctor", "--verify", *words]) == 64
    return capsys.readouterr().err


def test_a_sound_run_agrees(capsys, model):
    words = [f"model.path={model}", "strategy=fsdp2", "tuning=lora", "tuning.dropout=0.1", "tuning.rank=64"]
    assert command_warm(["doctor", "--verify", *words]) == 0
    answer, said = capsys.readouterr()
    assert max(map(len, answer.splitlines())) <= 80
    flat = " ".join(answer.split())
    assert "a small copy of this llama" in flat and "num_hidden_layers 4 -> 2" in flat
    assert "num_attention_heads 4, num_key_value_heads 2" in flat
    assert "strategy=fsdp2 tuning=lora objective=sft on 2 ranks (cpu)" in flat
    assert "tuning.dropout=0.1 -> 0" in flat and "tuning.rank=64 -> 16" in flat
    assert any(line.startswith("adapters, attention ") and "1.0e-05" in line for line in answer.splitlines())
    assert "every pass attention shardtune_varlen" in flat
    assert answer.endswith("the run computes what one process computes\n")
    assert "starting 2 processes\n  one process, fp32\n  as configured, fp32\n" in said


def test_a_planted_fault_gives_69_in_words_and_json(capsys, model, monkeypatch):
    monkeypatch.setenv(FAULT, "tests.launch.doctor.scaled_by_half")
    assert command_warm(["doctor", "--verify", "--json", f"model.path={model}", "strategy=ddp"]) == 69
    found = json.loads(capsys.readouterr().out)
    assert not found["agrees"] and found["compared"]["strategy"] == "ddp"
    beyond = {row["quantity"]: row["distance"] for row in found["differences"] if row["exceeded"]}
    assert set(beyond) == {"attention", "MLP", "norms", "embeddings", "head"}
    assert all(distance == pytest.approx(0.5, rel=1e-3) for distance in beyond.values())
    shown = verify.verification_lines(found)
    assert [line.split()[0] for line in shown if line.endswith("  differs")] == list(beyond)
    assert not any("computes what" in line for line in shown)


def test_a_planted_factor_of_dealt_experts_gives_69(capsys, tmp_path, monkeypatch):
    """Four processes, of which two hold the same experts: all but the experts agrees."""
    monkeypatch.setenv(FAULT, "tests.launch.doctor.divided_by_holders")
    mixture = model_dir(tmp_path, "qwen3_moe", num_experts=8)
    capsys.readouterr()  # what libraries print when they are imported first
    words = [f"model.path={mixture}", "strategy=fsdp2", "parallel.experts=4"]
    assert command_warm(["doctor", "--verify", "--json", *words]) == 69
    found = json.loads(capsys.readouterr().out)
    assert (found["compared"]["experts"], found["compared"]["ranks"]) == (2, 4)
    kept = found["model"]["kept"]
    assert {"num_experts": 8, "num_local_experts": 8}.items() & kept.items() and kept["num_experts_per_tok"] == 2
    beyond = {row["quantity"]: row["distance"] for row in found["differences"] if row["exceeded"]}
    assert set(beyond) == {"experts"} and beyond["experts"] == pytest.approx(1.0, rel=1e-3), "twice what it should be"
    shown = " ".join(" ".join(verify.verification_lines(found)).split())
    assert "parallel.experts=2 on 4 ranks" in shown and "parallel.experts=4 -> 2: the fewest ranks" in shown


def test_words_that_leave_nothing_to_compare_are_refused(capsys, model, tmp_path):
    assert "needs the settings of a run" in refused(capsys)
    assert "strategy=single: is the one process" in refused(capsys, f"model.path={model}", "strategy=single")
    assert "strategy=auto: becomes one of the others" in refused(capsys, f"model.path={model}", "strategy=auto")
    assert "did you mean strategy.bucket_mib" in refused(
        capsys, f"model.path={model}", "strategy=ddp", "strategy.bucket_mb=1"
    )
    missing = refused(capsys, f"model.path={tmp_path / 'nowhere'}", "strategy=ddp")
    assert f"model.path={tmp_path / 'nowhere'}" in missing and "Traceback" not in missing
    assert "model.path: not set" in refused(capsys, "strategy=ddp")
    # Nothing about data, budget or the place of a run, which a verification does without.
    assert "data" not in missing and "budget" not in missing
    assert "adalora" in refused(capsys, f"model.path={model}", "strategy=fsdp2", "tuning=adalora")


def test_ranks_without_a_gpu_each_are_compared_on_cpus(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = replace(run_config(model, "fsdp2", "full", micro=2), precision=Precision.fp16)
    config.run.device = Device.cuda
    config.substitutions["run.device"] = "auto -> cuda"
    assert (
        verify.move_to_cpus_without_gpus(config, 2)[0]
        == "run.device -> cpu: 2 ranks are compared, and this host has 1 GPU"
    )
    assert (config.run.device, config.precision) == (Device.cpu, Precision.bf16)
    config.run.device = Device.cuda
    assert verify.move_to_cpus_without_gpus(config, 1) == [] and config.run.device is Device.cuda
    del config.substitutions["run.device"]  # as where run.device=cuda was typed
    with pytest.raises(verify.ConfigError, match="this host has 1; leave "):
        verify.move_to_cpus_without_gpus(config, 2)


def test_the_fewest_ranks_have_two_readers_replicas_and_places(model):
    ranks = {
        name: num_ranks_for_verification(run_config(model, name, "full", micro=1))
        for name in STRATEGIES
        if name != "single"
    }
    assert ranks == {"ddp": 2, "fsdp2": 2, "hsdp": 4, "zero1": 2, "zero2": 2, "zero3": 2}
    degrees = {}
    for degree in (2, 3, 8, 9):
        config = run_config(model, "hsdp", "full", micro=1, parallel=ParallelConfig(sequence=degree))
        degrees[degree] = fewest_ranks_of_group(degree), num_ranks_for_verification(config)
    assert degrees == {2: (2, 4), 3: (3, 6), 8: (2, 4), 9: (3, 6)}
    dealt = {}
    for degree in (2, 3, 8):
        for name in ("fsdp2", "hsdp"):
            config = run_config(model, name, "full", micro=1, parallel=ParallelConfig(experts=degree))
            small = small_run_config(config, model, None, user_ranks=24)
            dealt[name, degree] = small.config.parallel.experts, small.ranks
    assert dealt == {
        ("fsdp2", 2): (2, 4),
        ("hsdp", 2): (2, 4),
        ("fsdp2", 3): (3, 6),
        ("hsdp", 3): (3, 12),
        ("fsdp2", 8): (2, 4),
        ("hsdp", 8): (2, 4),
    }


def test_micro_batches_are_as_many_as_show_a_fault(model):
    config = run_config(model, "fsdp2", "full", micro=4, parallel=ParallelConfig(sequence=2))  # of 16 documents a step
    micro_batches = {
        ranks: small_run_config(config, model, None, user_ranks=ranks).accumulation for ranks in (None, 1, 2, 4, 8)
    }
    assert micro_batches == {None: 2, 1: 2, 2: 2, 4: 2, 8: 1}


def test_what_a_small_copy_would_not_meet_is_made_smaller(model):
    config = run_config(model, "zero3", "full", micro=4)
    config.strategy = replace(config.strategy, mlp_tokens=8192, offload_parameters="nvme")
    config.strategy.activation_checkpointing = ActivationCheckpointing.auto
    small = small_run_config(config, model, None, user_ranks=2)
    assert (small.config.strategy.mlp_tokens, small.config.strategy.persistence_threshold) == (16, 100)
    assert (
        small.config.strategy.activation_checkpointing == "full" and small.config.strategy.offload_parameters == "cpu"
    )
    assert [change.partition("=")[0] for change in small.changes] == [
        "strategy.activation_checkpointing",
        "strategy.mlp_tokens",
        "strategy.offload_parameters",
    ]


def test_a_rank_that_fails_is_reported_with_its_code(capsys, model, monkeypatch):
    monkeypatch.setenv(FAULT, "tests.launch.doctor.refuses")
    assert command_warm(["doctor", "--verify", f"model.path={model}", "strategy=ddp"]) == 64
    assert "tuning.targets: planted" in capsys.readouterr().err
