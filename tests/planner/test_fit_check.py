"""`run.must_fit`: a run that its GPUs cannot hold is refused before the model is built. The cards are stand-ins."""

import json
from dataclasses import replace

import pytest
import torch

import trainer.run
from launch.main import main
from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision
from strategies.errors import ConfigError, DoesNotFit
from strategies.runtime import Runtime
from tests.helpers.building import data_set, model_dir, run_config
from tests.helpers.tokenizers import write_chat_data
from trainer.config.parallel import ParallelConfig
from trainer.objectives.kto import KtoConfig
from trainer.planner import fit_check
from trainer.planner.fit_check import NotSimulated, SimulatedPeak, check_run_fits
from trainer.planner.simulation import simulate_depth

GIB = 2**30


def rank(device="cuda:0"):
    return Runtime(0, 1, 0, 1, torch.device(device), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration that asks, data)."""
    root = tmp_path_factory.mktemp("fit")
    config = run_config(model_dir(root), "single", "lora", micro=4)
    config.run.must_fit, config.batch["global"] = True, 8
    return config, data_set(root, uneven=False)


def card(monkeypatch, gib):
    monkeypatch.setattr(fit_check, "device_memory_gib", lambda runtime: gib)


def test_fit_check_decides_by_the_simulation(made, monkeypatch):
    """By a process of its own, in a worker's environment: the longest documents together, and what lies beside tensors."""
    config, data = made
    lengths = sorted(data.train.lengths.tolist())[-4:][::-1]
    found = simulate_depth(replace(config, precision=Precision.bf16), lengths)
    needed = (1.05 * found.peak_bytes + 0.75 * GIB) / GIB
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    card(monkeypatch, needed + 1e-6)
    told = check_run_fits(config, data, Precision.bf16, rank(), print)["must_fit"]
    assert told.live_gib == found.peak_bytes / GIB and told.when == str(found.peak_phase)
    assert told.needed_gib == pytest.approx(needed, abs=1e-8)
    monkeypatch.setattr(
        fit_check, "simulate_in_process", lambda *_: SimulatedPeak(found.peak_bytes, str(found.peak_phase), 0)
    )
    card(monkeypatch, needed - 1e-6)
    with pytest.raises(
        DoesNotFit, match=f"needs {needed:.2f} GiB on a GPU of {needed:.2f} GiB.*batch.micro below 4"
    ) as no:
        check_run_fits(config, data, Precision.bf16, rank(), print)
    assert no.value.exit_code == 69 and str(found.peak_phase) in str(no.value)
    assert "model.quantisation=nf4" in str(no.value) and "tuning=lora" not in str(no.value)


def test_a_step_of_kto_is_simulated_with_the_pass_over_mismatched_answers(made):
    """Besides its own forward and backward pass it takes three forward passes: of the reference, and of both looking ahead."""
    config = made[0]
    flops_of_sft = simulate_depth(config, [32] * 4).flops
    flops_of_kto = simulate_depth(replace(config, objective=KtoConfig()), [32] * 4).flops
    assert flops_of_kto > 1.8 * flops_of_sft, "without the passes ahead it would be 1.3 to 1.5 times as much"


def test_fit_check_counts_the_memory_of_process_groups(made, monkeypatch):
    monkeypatch.setattr(fit_check, "simulate_in_process", lambda *_: SimulatedPeak(2 * GIB, "forward", 2))
    card(monkeypatch, 2.1 + 0.75 + 0.81)
    assert check_run_fits(*made, Precision.bf16, rank(), print)["must_fit"].needed_gib == pytest.approx(
        2.1 + 0.75 + 0.8
    )
    card(monkeypatch, 2.1 + 0.75 + 0.79)
    with pytest.raises(DoesNotFit):
        check_run_fits(*made, Precision.bf16, rank(), print)


def test_fit_check_simulates_expert_parallelism(tmp_path, monkeypatch):
    """With experts over two ranks, of which the busiest gets twice the mean of rows."""
    config = run_config(model_dir(tmp_path, "qwen3_moe", num_experts=8), "fsdp2", "lora", micro=4)
    config = replace(
        config, parallel=ParallelConfig(experts=2), batch={"global": 8, "micro": 4}, precision=Precision.bf16
    )
    config.run.must_fit = True
    data = data_set(tmp_path, uneven=False)
    two_ranks = Runtime(0, 2, 0, 2, torch.device("cuda:0"), None)
    monkeypatch.setattr(fit_check, "gather_objects", lambda value, runtime: [value, value])
    monkeypatch.setattr(fit_check, "broadcast_object", lambda value, runtime: value)
    monkeypatch.setattr(fit_check, "simulate_in_process", lambda *given: fit_check._simulate_peak(*given[:3]))
    card(monkeypatch, 80.0)
    told = check_run_fits(config, data, Precision.bf16, two_ranks, print)["must_fit"]
    lengths = sorted(data.train.lengths.tolist())[-4:][::-1]
    live = {}
    for experts, imbalance in ((2, 2.0), (2, 1.0), (1, 1.0)):
        way = replace(config, parallel=ParallelConfig(experts=experts))
        found = simulate_depth(way, lengths, world_size=2, local_world_size=2, expert_imbalance=imbalance)
        live[experts, imbalance] = found.peak_bytes / GIB
    assert told.live_gib == live[2, 2.0]
    assert len(set(live.values())) == 3
    card(monkeypatch, told.needed_gib - 1e-6)
    with pytest.raises(DoesNotFit, match=r"run.must_fit=true: the run needs"):
        check_run_fits(config, data, Precision.bf16, two_ranks, print)


def test_fit_check_that_cannot_be_simulated_is_refused_with_the_reason(made, monkeypatch):
    config, data = made
    card(monkeypatch, 80.0)
    monkeypatch.setattr(
        fit_check, "simulate_in_process", lambda *_: NotSimulated("its step cannot be simulated yet (KeyError: x)")
    )
    with pytest.raises(
        DoesNotFit, match="it is not known whether the run fits, since its step cannot be simulated yet"
    ):
        check_run_fits(config, data, Precision.bf16, rank(), print)
    with pytest.raises(ConfigError, match=r"run.must_fit=true: asks for the memory of GPUs"):
        check_run_fits(config, data, Precision.bf16, rank("cpu"), print)
    not_asked = replace(config, run=replace(config.run, must_fit=False))
    assert check_run_fits(not_asked, data, Precision.bf16, rank("cpu"), print) == {}


def test_fit_check_simulates_open_choices_at_their_smallest(made):
    strategy = Fsdp2Config(activation_checkpointing=ActivationCheckpointing.auto, compile=True)
    config = replace(made[0], strategy=strategy, batch={"global": 64, "micro": 2})
    step = fit_check.single_step_config(config, 4, mode_if_auto=ActivationCheckpointing.full)
    assert step.strategy.activation_checkpointing is ActivationCheckpointing.full
    assert step.strategy.defer_sync is False and step.strategy.compile is False
    assert step.batch == {"global": 16, "micro": 2}
    asked = replace(strategy, activation_checkpointing=ActivationCheckpointing.none, defer_sync=True)
    kept = fit_check.single_step_config(
        replace(config, strategy=asked), 4, mode_if_auto=ActivationCheckpointing.full
    ).strategy
    assert kept.activation_checkpointing is ActivationCheckpointing.none and kept.defer_sync is True


def test_fit_check_ends_the_command_with_69_before_the_model_is_built(monkeypatch, tmp_path, capfd):
    words = [f"model.path={model_dir(tmp_path)}", f"data.path={write_chat_data(tmp_path / 'train.jsonl', 12)}"]
    words += [f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "budget.steps=1", "batch.global=4"]
    words += ["run.device=cpu", "launcher.processes=1", "logging.wandb=disabled"]
    assert main(["train", *words, "run.must_fit=true"]) == 64
    assert "run.must_fit=true: asks for the memory of GPUs" in capfd.readouterr().err

    def refuse(config, data, precision, runtime, print_line):
        raise DoesNotFit("run.must_fit=true: the run needs 90.00 GiB")

    monkeypatch.setattr(trainer.run, "check_run_fits", refuse)
    monkeypatch.setattr(trainer.run, "build_engine", None)
    assert main(["train", *words]) == 69
    said = capfd.readouterr().err
    assert "the run needs 90.00 GiB" in said and "Traceback" not in said
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["exit_code"] == 69 and failure["phase"] == "simulating whether the run fits"
