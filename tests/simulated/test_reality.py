"""What is simulated is what happens: live bytes, exchanges and arithmetic of fake CPU tensors and of real ones are equal."""

import json
from dataclasses import astuple, replace

import pytest
import torch

from strategies.base import Precision
from strategies.memory import estimated_state_bytes
from strategies.parameters import named_parameters
from strategies.runtime import SIMULATED
from strategies.simulation import simulated_rank
from strategies.tensor_inventory import MemoryKind
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING, chosen, values
from tests.helpers.ranks import Ranks
from tests.simulated.cases import (
    CHECKPOINTING,
    LENGTHS,
    NATIVE,
    Case,
    DealtExperts,
    LongRows,
    comparable,
    real_alone,
    simulated,
)
from trainer.planner.simulate import simulate
from trainer.planner.simulation import build_step_parts

CPU = torch.device("cpu")
MATRIX = [
    (Case(strategy, tuning, precision, checkpointing, False, accumulation), world, architecture)
    for strategy in NATIVE  # ZeRO looks whether gradients are finite, which made-up ones are not
    for world in ((1,) if strategy == "single" else (8,))
    for tuning in ("full", "lora")
    for precision in ("fp32", "bf16")
    for checkpointing in CHECKPOINTING
    for accumulation in (1, 4)
    for architecture in ("llama", "gemma2", "gpt2")
]
ATTEMPTS = 24
"""Times that two ranks are asked, until in each moment they were seen to hold what is simulated."""
TOGETHER = [
    Case("ddp", "full", "bf16", "none", False, 2),
    Case("fsdp2", "full", "bf16", "selective", False, 2),
    Case("fsdp2", "lora", "fp32", "full"),
    Case("hsdp", "full", "bf16", "none"),
    Case("zero1", "full", "fp32", "full"),
    Case("zero2", "lora", "bf16", "none", False, 2),
    Case("zero2", "full", "bf16", "selective"),
    Case("zero3", "lora", "fp32", "full"),
    LongRows("fsdp2", "lora", "fp32", "full"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated")
    model_dir(path)
    DealtExperts("fsdp2", "experts").model_in(path)
    return path


@pytest.fixture(scope="module")
def ranks(place):
    two = Ranks("tests.simulated.job", 2, place, also="deepspeed")
    yield two
    two.stop()


def kept(case):
    """Each way in which a strategy keeps and reduces, with adapters and without; stages 1 and 2 of ZeRO reduce alike."""
    return {"zero2" if case.strategy == "zero1" else case.strategy, case.tuning, case.checkpointing, type(case)}


def as_json(found):
    return json.loads(json.dumps(comparable(found)))


@pytest.mark.parametrize(
    ("case", "world", "architecture"),
    chosen(MATRIX, lambda case: values((*astuple(case[0]), *case[1:])), lambda case: case[0].accumulation),
    ids=str,
)
def test_simulation_equals_real_tensors_of_one_rank(place, case, world, architecture):
    """To the byte, in every moment and by kind; and every exchange. Only the other ranks are made up."""
    model = model_dir(place, architecture)
    found = as_json(simulated(case, model, world, world - 1, device=CPU))
    assert found == as_json(real_alone(case, model, world, world - 1))


@pytest.mark.parametrize(
    "case", [LongRows("fsdp2", "lora", "bf16", "full"), LongRows("ddp", "full", "fp32", "none")], ids=str
)
def test_simulation_of_tiles_equals_real_tensors(place, case):
    """Tiles that do not divide the row, in a block that is recomputed and in one that is not."""
    found = as_json(simulated(case, place / "llama", 8, 7, device=CPU))
    assert found == as_json(real_alone(case, place / "llama", 8, 7))


@pytest.mark.parametrize("case", chosen(TOGETHER, kept), ids=str)
def test_simulation_equals_two_real_ranks(place, ranks, case):
    """With gloo between them, to the byte in every moment and by kind.

    A thread of gloo may still hold something when a step is counted, another time nothing: then the rank is asked again. It
    never holds less. A moment's total and its kinds are counted in two steps, so each is waited for by itself. DDP's reducer
    calls the process group unseen, so that its buckets are taken for the gradients in them.
    """
    found = as_json(simulated(case, place / "llama", 2, device=CPU))
    totals = {moment: total for moment, (total, _) in found["moments"].items()}
    kinds = {moment: of_ddp(case, held) for moment, (_, held) in found["moments"].items()}
    for attempt in range(ATTEMPTS):
        measured = ranks.ask(attempt, *astuple(case))
        collective_totals = [each for each in measured["collectives"] if each[0] != "broadcast"]
        assert found["collectives"] == collective_totals or (case.strategy == "ddp" and not collective_totals)
        assert found["flops"] == measured["flops"] and measured["moments"].keys() == found["moments"].keys()
        for moment, (total, held) in measured["moments"].items():
            assert total >= found["moments"][moment][0], moment
            if total == totals.get(moment):
                del totals[moment]
            if of_ddp(case, held) == kinds.get(moment):
                del kinds[moment]
        if not totals and not kinds:
            return
    pytest.fail(f"in no step of {ATTEMPTS} asked for: {totals}, {kinds}; the last held {measured['moments']}")


def test_simulated_experts_exchange_what_two_real_ranks_exchange(place, ranks):
    """Every collective with its bytes, and the arithmetic; and what is held in every moment, to the byte.

    As above, a thread of gloo may hold something longer: then the ranks are asked again. Weights are zeros, and all experts are
    equally good: which of them the router takes is up to its kernel. So rank 0 gets half of the rows, all of them or none, as
    its arithmetic tells.
    """
    case = DealtExperts("fsdp2", "experts", "bf16", "full")
    by_flops = {}
    for imbalance in (0.0, 1.0, 2.0):
        found = as_json(simulated(case, case.model_in(place), 2, device=CPU, imbalance=imbalance))
        by_flops[found["flops"]] = found
    assert len(by_flops) == 3
    differing = set()
    for attempt in range(ATTEMPTS):
        measured = ranks.ask(attempt, *astuple(case))
        found = by_flops[measured["flops"]]
        assert [each for each in measured["collectives"] if each[0] != "broadcast"] == found["collectives"]
        assert measured["moments"].keys() == found["moments"].keys()
        held_in = {moment: (total, found["moments"][moment][0]) for moment, (total, _) in measured["moments"].items()}
        assert all(total >= simulated_total for total, simulated_total in held_in.values()), held_in
        differs = {moment for moment, (total, simulated_total) in held_in.items() if total != simulated_total}
        differing = differs if attempt == 0 else differing & differs
        if not differing:
            return
    pytest.fail(f"in no step of {ATTEMPTS} as simulated: {differing}")


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", *(["ddp", "zero3"] if EVERYTHING else [])])
def test_an_average_of_the_weights_is_counted(place, strategy):
    """Four bytes a trained weight, sharded as the weights are, at rest and at the peak, and in what a run reckons with."""
    world, case = 2, Case(strategy, "full", "bf16")
    plain = case.config(place / "llama", world)
    found = {}
    for decay in (0.0, 0.99):
        config = replace(plain, optim=replace(plain.optim, ema_decay=decay))
        with simulated_rank(0, world, device=SIMULATED) as runtime:
            parts = build_step_parts(config, LENGTHS, runtime)
            sizes = [p.numel() for _, p in named_parameters(parts.built.step_module) if p.requires_grad]
            of_run = (parts.built.step_module, config.strategy, Precision.bf16)
            found["estimated", decay] = estimated_state_bytes(*of_run, world_size=world, num_replicas=1)
            simulated_step = simulate(parts, runtime)
        found["rest", decay] = simulated_step.resting_bytes_by_kind[MemoryKind.optimizer]
        found["peak", decay] = max(moment.total_bytes for moment in simulated_step.peak_by_phase.values())
    least = 4 * sum(sizes) / (1 if strategy == "ddp" else world)
    for what in ("rest", "peak", "estimated"):
        more = found[what, 0.99] - found[what, 0.0]
        assert least <= more <= least + 512 * len(sizes), (
            what
        )  # what an allocation is rounded up to, and padding of ZeRO


def of_ddp(case, kinds):
    if case.strategy != "ddp":
        return kinds
    buckets = {kind: kinds.get(kind, 0) for kind in ("gradients", "communication")}
    return {**kinds, "gradients": sum(buckets.values()), "communication": 0}
