"""Whether whole gradients wait for the last micro-batch: by memory, alike on all ranks, and told."""

from dataclasses import replace

import pytest
import torch

from launch.plan.dry_run_memory import deferred_gradient_lines
from strategies.base import DdpConfig, Fsdp2Config, Precision, StrategyName, ZeroConfig
from strategies.parameters import named_parameters
from strategies.runtime import Runtime
from tests.helpers.building import data_set, model_dir, run_config
from trainer.build import gradient_sync
from trainer.build.gradient_sync import plan_gradient_reduction
from trainer.build.parts import build_model, largest_micro_batch
from trainer.build.recomputation import counted_activations, expected_activation_bytes, model_state_bytes
from trainer.config.validate import config_problems
from trainer.model.loading import load_tokenizer

RANKS = Runtime(3, 8, 3, 8, torch.device("cpu"), None)
FSDP2 = Fsdp2Config()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("reduction")
    data, config = data_set(root, uneven=False), run_config(model_dir(root), "single", "full", micro=4)
    built, _ = build_model(config, load_tokenizer(config.model), data, half_on_gpu=False)
    return built, largest_micro_batch(config, data)


def planned(made, strategy, monkeypatch, *, steps=4, memories=(64.0,)):
    """(decision, what is said of it) where the ranks have these GiB."""
    built, work = made
    built.step_module.plan.defer_sync = built.activation_bytes = None
    built.substitutions.clear()
    monkeypatch.setattr(gradient_sync.processes, "gather_objects", lambda value, runtime: list(memories))
    plan_gradient_reduction(built, work, strategy, Precision.bf16, RANKS, micro_batches=steps)
    return built.step_module.plan.defer_sync, built.substitutions.get("strategy.defer_sync", "")


def test_gradient_sync_waits_where_whole_gradients_fit_beside_everything_else(made, monkeypatch):
    """The bound is where state, activations and seven eighths of the gradients in fp32 fill what is planned with."""
    built, work = made
    trained = sum(p.numel() for _, p in named_parameters(built.step_module))
    activations = counted_activations(built, work, Precision.bf16)
    need = model_state_bytes(built, FSDP2, Precision.bf16, RANKS) + activations.peak_bytes(
        2 * [FSDP2.activation_checkpointing]
    )
    need += 4 * trained * 7 / 8
    for slack, decision in ((1.01, True), (0.99, False)):
        found, said = planned(made, replace(FSDP2, memory_gib=slack * need / 2**30), monkeypatch)
        assert found is decision
        assert said.startswith("null -> true" if decision else "null -> false, reduced in each micro-batch")
        assert f"{4 * trained * 7 / 8 / 2**30:.2f} GiB more" in said


def test_all_ranks_go_by_the_least_memory(made, monkeypatch):
    assert planned(made, FSDP2, monkeypatch, memories=(64.0, 64.0))[0] is True
    assert planned(made, FSDP2, monkeypatch, memories=(64.0, 1e-4))[0] is False


def test_replicas_keep_larger_shards(made, monkeypatch):
    """Two shards of four replicas: half of the gradients is there anyway."""
    hsdp = Fsdp2Config(name=StrategyName.hsdp, replicate=4)
    built, _ = made
    trained = sum(p.numel() for _, p in named_parameters(built.step_module))
    assert f"{2 * trained / 2**30:.2f} GiB more" in planned(made, replace(hsdp, memory_gib=1e-6), monkeypatch)[1]


def test_gradient_sync_is_not_planned_where_there_is_no_choice(made, monkeypatch):
    for strategy in (FSDP2, replace(FSDP2, memory_gib=1e-6)):
        assert planned(made, strategy, monkeypatch, steps=1) == (None, "")
    for asked in (True, False):
        assert planned(made, Fsdp2Config(defer_sync=asked), monkeypatch) == (None, "")
    for other in (DdpConfig(), ZeroConfig()):
        assert planned(made, other, monkeypatch) == (None, "")


def test_activations_that_cannot_be_counted_are_estimated(made, monkeypatch):
    monkeypatch.setattr(gradient_sync, "activation_peak_bytes", lambda *_: None)
    built, work = made
    built.activation_bytes = None
    trained = sum(p.numel() for _, p in named_parameters(built.step_module))
    need = model_state_bytes(built, FSDP2, Precision.bf16, RANKS) + expected_activation_bytes(
        built, work, FSDP2, Precision.bf16
    )
    need += 4 * trained * 7 / 8
    assert planned(made, replace(FSDP2, memory_gib=1.01 * need / 2**30), monkeypatch)[0] is True
    assert planned(made, replace(FSDP2, memory_gib=0.99 * need / 2**30), monkeypatch)[0] is False


def test_memory_gib_is_accepted_where_something_plans_with_it(tmp_path):
    def said(strategy):
        config = run_config(model_dir(tmp_path), strategy, "full", micro=4)
        return [line for line in config_problems(config) if "memory_gib" in line]

    assert not said(Fsdp2Config(memory_gib=4.0))
    assert said(Fsdp2Config(memory_gib=4.0, defer_sync=True)) and said(DdpConfig(memory_gib=4.0))


def test_dry_run_says_how_much_memory_waiting_gradients_would_add():
    def said(strategy, accumulation=4):
        return "".join(deferred_gradient_lines(strategy, 2**28, accumulation=accumulation))

    assert "1.00 GiB more at most; they wait only where they fit" in said(FSDP2)
    assert said(Fsdp2Config(defer_sync=True)).endswith("they wait")
    assert said(FSDP2, 1) == said(Fsdp2Config(defer_sync=False)) == said(DdpConfig()) == ""
