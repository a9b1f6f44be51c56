"""`strategy=auto`: what is proposed on known and unknown devices, what two steps say of it, and when it is chosen anew."""

import re
from dataclasses import replace

import pytest
import torch

from strategies.base import AutoConfig, DdpConfig, Fsdp2Config, Precision, SingleConfig, StrategyName
from strategies.errors import DoesNotFit, OutOfMemory
from tests.helpers.building import data_set, model_dir, run_config
from trainer.build.inputs import RunInputs
from trainer.config.run import AUTO, MICRO_BATCH_KEY, STRATEGY_KEY
from trainer.model.loading import load_tokenizer
from trainer.optim.config import MuonConfig
from trainer.planner import micro_batch, oom_probe
from trainer.planner import strategy_choice as strategy_module
from trainer.planner.hardware import find_card
from trainer.planner.micro_batch import needed_device_gib
from trainer.planner.strategy_choice import Planner, RankDevices, StrategyProposal, propose_strategies, resolve_strategy
from trainer.reporting.resolution import ResolvedSetting


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(configuration that asks, data): a model whose parameters count, and an optimizer that ZeRO has not."""
    root = tmp_path_factory.mktemp("auto")
    path = model_dir(root, hidden_size=128, intermediate_size=512)
    config = replace(run_config(path, "single", "full", micro=4), strategy=AutoConfig(), optim=MuonConfig(lr=2e-5))
    return config, data_set(root, uneven=False)


@pytest.fixture(scope="module")
def shared(made):
    """The same for three ranks, which are no two groups of alike size."""
    return replace(made[0], batch={"global": 12, "micro": 4}), made[1]


@pytest.fixture(scope="module")
def at_once():
    """Simulations in this process, each once; what was simulated."""
    known = {}

    def answered(ask, given, patience_s):
        key = str(given)
        if key not in known:
            known[key] = ask(*given)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "call_in_process", answered)
        patch.setattr(strategy_module, "PARALLEL_SIMULATIONS", 1)
        yield known


def names(found):
    return [proposal.name for proposal in found]


def test_strategy_auto_on_an_unknown_device_shards_least_of_what_fits(shared, at_once):
    config, data = shared

    def proposed(gib):
        return propose_strategies(config, data, Precision.fp32, RankDevices(3, 3, "cpu", gib, None), 1.0)

    first = next(proposed(16.0))
    assert len(at_once) == 1, "the others are simulated where they are asked for"
    assert re.fullmatch(r"planned 1\.\d\d of 16\.00 GiB; .* it shards least", first.reason)
    assert names(proposed(16.0)) == ["ddp", "fsdp2"]  # muon needs whole parameters, which ZeRO cuts
    planner = Planner(config, data, Precision.fp32, RankDevices(3, 3, "cpu", 16.0, None), 1.0)
    needed = {
        str(each.name): needed_device_gib(
            planner.simulate_cost_model(each, each.activation_checkpointing), 4, planner.lengths, 16.0
        )
        for each in strategy_module.runnable_strategies(config, 3)[0]
    }
    assert needed["fsdp2"] < needed["ddp"]
    assert names(proposed((needed["fsdp2"] + needed["ddp"]) / 2)) == ["fsdp2", "ddp"]
    (least,) = proposed(0.5)
    assert least.name == min(needed, key=needed.get) and "the least of all" in least.reason


def test_strategy_auto_on_a_known_card_takes_the_fastest_that_fits(shared, at_once):
    config, data = shared
    card = find_card("NVIDIA A10G")
    assert card.memory_gib > 20 and find_card("NVIDIA A") is None

    def proposed(gib):
        return list(propose_strategies(config, data, Precision.fp32, RankDevices(3, 3, "cpu", gib, card), 1.0))

    found = proposed(20.0)
    speeds = [float(re.search(r"([\d,]+) tokens/s", each.reason)[1].replace(",", "")) for each in found]
    assert len(found) == 2 and speeds == sorted(speeds, reverse=True)
    needed = {each.name: float(re.search(r"planned ([\d.]+) of 20.00", each.reason)[1]) for each in found}
    (least,) = proposed(0.5)
    assert needed[least.name] == min(needed.values()) and "the least of all" in least.reason


@pytest.fixture
def two(made, runtime, monkeypatch):
    """Chooses as on two ranks, whose steps this one takes alone; tells what was tried."""
    config, data = made
    taken, real = [], oom_probe.take_probe_steps
    monkeypatch.setattr(strategy_module, "gather_rank_devices", lambda _: RankDevices(2, 2, "cpu", 16.0, None))
    order = [StrategyProposal(DdpConfig(), "planned"), StrategyProposal(SingleConfig(), "planned too")]
    monkeypatch.setattr(strategy_module, "propose_strategies", lambda *_: iter(order))

    def choose(holds, config=config):
        said, frozen = [], []

        def take(config, given):
            real(config, given)
            taken.append(str(config.strategy.name))
            if taken[-1] not in holds:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        monkeypatch.setattr(oom_probe, "take_probe_steps", take)
        given = RunInputs(load_tokenizer(config.model), data, Precision.fp32, runtime)
        return resolve_strategy(config, given, said.append, frozen.append), said, frozen

    return choose, taken


def test_strategy_auto_takes_the_next_when_memory_runs_out(two):
    choose, taken = two
    settled, said, frozen = choose({"single"})
    assert taken == ["ddp", "single"] and frozen == [settled] and settled.strategy == SingleConfig()
    note = "auto -> single (planned too; 2 steps of the longest documents held; ddp ran out of memory)"
    assert (
        str(settled.substitutions[STRATEGY_KEY]) == note
        and said[-1] == "strategy=ddp runs out of memory; trying the next"
    )
    again, said, frozen = choose(set(), settled)
    assert again == settled and taken == ["ddp", "single"] and not frozen  # chosen once


def test_strategy_auto_does_not_try_what_ran_out_at_an_earlier_start(made, two):
    choose, taken = two
    before = replace(made[0], substitutions={STRATEGY_KEY: "auto (ddp ran out of memory)"})
    settled, _, _ = choose({"ddp", "single"}, before)
    assert taken == ["single"] and "ddp ran out of memory" in str(settled.substitutions[STRATEGY_KEY])


def test_strategy_auto_reopens_a_micro_batch_chosen_for_other_ranks(made, two):
    """Else the steps on trial could not be cut into it; the micro-batch is chosen after the strategy."""
    choose, taken = two
    too_large = made[0].batch["global"] + 1
    batch = {**made[0].batch, "micro": too_large}
    before = replace(
        made[0], batch=batch, substitutions={MICRO_BATCH_KEY: ResolvedSetting(MICRO_BATCH_KEY, AUTO, too_large)}
    )
    settled, _, frozen = choose({"ddp"}, before)
    assert taken == ["ddp"] and settled.batch["micro"] == AUTO and frozen == [settled]


def test_strategy_auto_on_one_rank_is_single(made, runtime):
    given = RunInputs(load_tokenizer(made[0].model), made[1], Precision.fp32, runtime)
    settled = resolve_strategy(made[0], given, print, print)
    assert settled.strategy == SingleConfig()
    assert {key: str(note) for key, note in settled.substitutions.items()} == {
        STRATEGY_KEY: "auto -> single (one rank has nothing to share)"
    }


def test_strategy_auto_without_any_that_fits_ends_the_run(two):
    with pytest.raises(DoesNotFit, match=r"every strategy that can run this \(ddp, single\)"):
        two[0](set())


def test_strategy_auto_with_one_rank_out_of_memory_ends_a_run_that_may_restart(two, monkeypatch):
    def one_rank_out(config, given, trial):
        raise DoesNotFit(f"{trial.setting}=auto: with {trial.choice} rank 1 runs out of memory; {trial.remedy}")

    monkeypatch.setattr(strategy_module, "probe_runs_out_of_memory", one_rank_out)
    with pytest.raises(OutOfMemory, match=r"with strategy=ddp rank 1 .* launcher.retry") as caught:
        two[0]({"ddp"})
    assert caught.value.ran_out_with == {STRATEGY_KEY: "ddp"}


def test_strategy_auto_is_chosen_again_for_another_number_of_ranks(made, two):
    choose, taken = two
    before = replace(made[0], strategy=DdpConfig(bucket_mib=7), substitutions={STRATEGY_KEY: "auto -> ddp (x)"})
    assert choose({"ddp"}, before)[0] == before and not taken
    hsdp = Fsdp2Config(name=StrategyName.hsdp, replicate=0)  # not on the one rank that is here
    anew, _, _ = choose({"ddp"}, replace(before, strategy=hsdp, substitutions={STRATEGY_KEY: "auto -> hsdp (x)"}))
    assert taken == ["ddp"] and anew.strategy == DdpConfig()
    typed = replace(before, strategy=hsdp, substitutions={})
    assert choose({"ddp"}, typed)[0] == typed  # it is refused elsewhere
