"""Experts distributed over ranks, simulated: what is gathered of them, what tokens exchange, and what a plan makes of both."""

from dataclasses import replace

import pytest

from tests.simulated.cases import DEALT, EXPERTS, LENGTHS, DealtExperts, simulated
from tests.simulated.goldens import golden, summary
from trainer.build.recomputation import placeholder_micro_batch
from trainer.config.parallel import ParallelConfig
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.planner.cost_model import ALL_TO_ALL
from trainer.planner.deferred_reduction import deferred_gradient_bytes
from trainer.planner.hardware import find_card, num_rank_groups
from trainer.planner.simulation import simulate_cost_model_of_run, simulate_run
from trainer.planner.speed import (
    COLLECTIVE_LATENCY_S,
    LINK_EFFICIENCY,
    MicroBatchLoad,
    estimate_step_time,
    token_all_to_all_s,
)

RANKS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("dealt")


def sizes_of(place):
    """(bytes of a layer's experts in bf16, layers, hidden size, experts of a token) of the tiny mixture."""
    case = DealtExperts("fsdp2", "experts", "bf16")
    config = load_model_config(ModelConfig(path=str(case.model_in(place))))
    elements = 3 * config.hidden_size * config.moe_intermediate_size * EXPERTS
    return 2 * elements, config.num_hidden_layers, config.hidden_size, config.num_experts_per_tok


def gathered_bytes(step, name="allgather"):
    return sum(each.num_bytes for each in step.collectives if each.name.startswith(name))


def test_expert_bytes_are_gathered_by_the_ranks_of_a_place_alone(place):
    """1/e of them where a place has several ranks, none where it has one; gradients are reduced likewise."""
    layer, layers, *_ = sizes_of(place)
    steps = {}
    for degree in (1, 2, 8):
        case = DealtExperts("fsdp2", "experts", "bf16", "full", experts=degree)
        steps[degree] = simulated(case, case.model_in(place), RANKS)
    all_experts = 2 * layers * layer  # for the forward pass and for the backward pass
    rest = gathered_bytes(steps[1]) - all_experts
    assert gathered_bytes(steps[2]) == rest + all_experts // 2
    assert gathered_bytes(steps[8]) == rest
    of_places = [each for each in steps[2].collectives if each.ranks == (0, 2, 4, 6) and "gather" in each.name]
    assert sum(each.num_bytes for each in of_places) == all_experts // 2
    reduced = {degree: gathered_bytes(step, "reduce_scatter") for degree, step in steps.items()}
    assert reduced[1] - reduced[2] == layers * layer * 2 // 2  # in float32
    # With one rank in a place nothing is scattered: its gradient is whole already.
    assert len(steps[8].collectives) > 0 and gathered_bytes(steps[8], "allreduce") < 64


@pytest.mark.parametrize(("mode", "passes"), [("none", 2), ("full", 3)])
def test_bytes_of_the_exchange_are_those_of_the_formula(place, mode, passes):
    """Every row goes there and back in each pass, and twice the mean arrives; ranks tell each other E numbers before."""
    _, layers, width, chosen = sizes_of(place)
    case = DealtExperts("fsdp2", "experts", "bf16", mode, experts=4)
    step = simulated(case, case.model_in(place), RANKS, imbalance=2.0)
    exchanges = [each for each in step.collectives if each.name.startswith(ALL_TO_ALL)]
    rows = [each for each in exchanges if each.dtype == "bfloat16"]
    counts = [each for each in exchanges if each.dtype == "int64"]
    assert len(rows) == layers * 2 * passes and all(each.ranks == (0, 1, 2, 3) for each in exchanges)
    assert sum(each.num_bytes for each in rows) == layers * 2 * passes * 2 * sum(LENGTHS) * chosen * width * 2
    assert [each.num_bytes for each in counts] == [8 * EXPERTS] * layers * (passes - 1)
    assert sum(step.host_reads.values()) == len(counts), "the host waits once for each layer's counts"


def test_a_plan_counts_whole_experts_and_holds_what_the_step_holds(place):
    case = DealtExperts("fsdp2", "experts", "bf16", "full", experts=4)
    config = case.config(case.model_in(place), RANKS)
    length = 4096
    whole = replace(config, parallel=ParallelConfig())
    costs = [
        simulate_cost_model_of_run(each, length, accumulation=1, world_size=RANKS, expert_imbalance=2.0)
        for each in (whole, config)
    ]
    assert (
        costs[0].num_parameters == costs[1].num_parameters
        and costs[0].num_trained_parameters == costs[1].num_trained_parameters
    )
    layer, layers, *_ = sizes_of(place)
    assert costs[1].num_trained_expert_parameters == layers * layer // 2 and costs[0].num_trained_expert_parameters == 0
    step = simulate_run(config, [length], world_size=RANKS, expert_imbalance=2.0)
    assert costs[1].memory_peak_at(length).total_bytes == pytest.approx(step.phase_and_peak[1].total_bytes, rel=0.01)
    # Gradients that wait are those of a place's experts alone.
    rest = 4 * (costs[1].num_trained_parameters - costs[1].num_trained_expert_parameters) * 7 / 8
    assert deferred_gradient_bytes(costs[1], 8, 4) == round(
        rest + 4 * costs[1].num_trained_expert_parameters * (1 / 4 - 1 / 8)
    )
    # The exchange is time that no arithmetic hides, and its group one of its own.
    card = find_card("NVIDIA H100 80GB HBM3")
    (exchange,) = costs[1].token_all_to_alls
    waited = token_all_to_all_s(costs[1], length, card)
    of_links = costs[1].all_to_all_bytes(exchange, length) * 3 / 4 / (card.link_gb_s * 1e9 * LINK_EFFICIENCY)
    assert waited == pytest.approx(of_links + exchange.num_calls * COLLECTIVE_LATENCY_S)
    alone = replace(costs[1], token_all_to_alls=())
    load = MicroBatchLoad(length, length**2, 3)
    times = [estimate_step_time(each, load, card, "bf16", ranks_per_node=RANKS) for each in (costs[1], alone)]
    assert times[0].exposed_communication_s - times[1].exposed_communication_s == pytest.approx(3 * waited)
    assert num_rank_groups(costs[1]) == num_rank_groups(alone) + 1


@pytest.mark.parametrize(("case", "world"), DEALT, ids=str)
def test_the_step_takes_what_it_took(place, case, world):
    row = golden(case, world)
    if row is None:
        pytest.skip("goldens of other versions")
    assert summary(simulated(case, case.model_in(place), world)) == row, "numbers moved: see tests/simulated/goldens.py"


def test_recomputation_is_planned_with_the_rows_that_arrive(place):
    """Of twice the mean of rows, a block keeps more than of its own tokens' rows; recomputed, it keeps what it did."""
    from strategies.activation_plan import count_activations
    from strategies.base import Precision
    from strategies.simulation import simulated_rank
    from trainer.planner.simulation import build_step_parts

    kept = {}
    for degree in (1, 4):
        case = DealtExperts("fsdp2", "experts", "bf16", experts=degree)
        with simulated_rank(0, RANKS) as runtime:
            built = build_step_parts(case.config(case.model_in(place), RANKS), LENGTHS, runtime).built
            batch = placeholder_micro_batch(built, LENGTHS, None)
            kept[degree] = count_activations(built.step_module, batch, Precision.bf16)
    _, layers, width, chosen = sizes_of(place)
    rows = sum(LENGTHS) * chosen
    more = [
        dealt - whole
        for dealt, whole in zip(kept[4].bytes_by_block_if_none, kept[1].bytes_by_block_if_none, strict=True)
    ]
    assert len(more) == layers and all(each >= 2 * rows * width for each in more), "at least the rows of others"
    assert kept[4].bytes_by_block_if_full == kept[1].bytes_by_block_if_full
