"""Ranks that share rows, simulated: what they exchange, hold and compute beside a rank that has whole rows."""

from dataclasses import replace
from itertools import pairwise

import pytest
import transformers

from strategies.tensor_inventory import MemoryKind
from tests.helpers.building import model_dir, run_config
from tests.simulated.cases import Case
from trainer.config.parallel import ParallelConfig
from trainer.planner.cost_model import ALL_TO_ALL
from trainer.planner.hardware import find_card, num_rank_groups
from trainer.planner.simulation import simulate_cost_model_of_run, simulate_depth, simulate_run
from trainer.planner.speed import (
    COLLECTIVE_LATENCY_S,
    LINK_EFFICIENCY,
    MicroBatchLoad,
    estimate_step_time,
    token_all_to_all_s,
)

RANKS = 8
TOKENS = 32768
HEADS, KEY_HEADS, HEAD_SIZE, BLOCKS = 16, 8, 64, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough that tensors count, and not what is rounded up."""
    path = tmp_path_factory.mktemp("wide")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=HEADS * HEAD_SIZE,
        intermediate_size=3584,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        vocab_size=512,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
    ).save_pretrained(path)
    return path


def config_of(model, sequence, tuning="lora", mode="full", ranks=RANKS, micro=1):
    case = Case("fsdp2", tuning, "bf16", mode)
    config = run_config(model, case.strategy_config(ranks), tuning, micro=micro, precision="bf16")
    batch = {"global": micro * ranks // sequence, "micro": micro}
    return replace(config, parallel=ParallelConfig(sequence=sequence), batch=batch)


def row_exchanges(step):
    return [each for each in step.collectives if each.name.startswith(ALL_TO_ALL)]


def test_a_rank_holds_and_computes_its_share(model):
    """One row over eight ranks, beside one of the same length on each: an eighth of what one holds and computes for it."""
    whole = simulate_run(config_of(model, 1), [TOKENS], world_size=RANKS)
    shared = simulate_run(config_of(model, RANKS), [TOKENS], world_size=RANKS)
    assert shared.flops * RANKS == pytest.approx(whole.flops, rel=1e-6)

    def held(step):
        kinds = step.phase_and_peak[1].bytes_by_kind
        return kinds[MemoryKind.activations] + kinds.get(MemoryKind.communication, 0)

    activations = whole.phase_and_peak[1].bytes_by_kind[MemoryKind.activations]
    assert activations > 2**29
    of_weights = held(whole) - activations  # gradients on their way to their shards
    assert held(shared) - of_weights <= 1.01 / RANKS * activations


def test_bytes_of_the_exchange_are_those_of_the_formula(model):
    """Queries, keys and values to heads, and outputs back: forward, recomputed, and their gradients."""
    step = simulate_run(config_of(model, RANKS), [TOKENS], world_size=RANKS)
    exchanges = row_exchanges(step)
    assert len(exchanges) == BLOCKS * 4 * 3
    assert all(each.ranks == tuple(range(RANKS)) for each in exchanges)
    elements = TOKENS // RANKS * HEAD_SIZE * (2 * HEADS + 2 * KEY_HEADS)  # those that a rank keeps included
    assert sum(each.num_bytes for each in exchanges) == BLOCKS * 3 * 2 * elements
    cost = simulate_cost_model_of_run(config_of(model, RANKS), TOKENS // 2, accumulation=1, world_size=RANKS)
    (exchange,) = cost.token_all_to_alls
    assert exchange.num_calls == BLOCKS * 4 * 3 and exchange.num_ranks == RANKS
    assert cost.all_to_all_bytes(exchange, TOKENS) == BLOCKS * 3 * 2 * elements
    assert not any(name.startswith(ALL_TO_ALL) for name, *_ in cost.collective_totals)


@pytest.mark.parametrize("tokens", [None, 512])
def test_a_plan_holds_what_the_step_holds(model, tokens):
    """From two sizes of micro-batch, also if MLPs take tiles, of which a short row would be a single one."""
    config = config_of(model, RANKS)
    config = replace(config, strategy=replace(config.strategy, mlp_tokens=tokens))
    step = simulate_run(config, [TOKENS], world_size=RANKS)
    cost = simulate_cost_model_of_run(config, TOKENS, accumulation=1, world_size=RANKS)
    assert cost.memory_peak_at(TOKENS).total_bytes == pytest.approx(step.phase_and_peak[1].total_bytes, rel=0.01)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_uneven_heads_and_tokens_are_exchanged_by_the_formula(tmp_path, rank):
    """Four heads and two key-value heads over three ranks, and 64 tokens: what a rank sends and gets differ."""
    lengths, ranks, heads, head_size = [41, 23], 3, 4, 8
    config = config_of(model_dir(tmp_path), ranks, tuning="full", mode="none", ranks=ranks, micro=2)
    step = simulate_run(config, lengths, rank=rank, world_size=ranks)
    borders = [sum(lengths) * place // ranks for place in range(ranks + 1)]
    own_tokens = [stop - start for start, stop in pairwise(borders)][rank]
    queries = [(heads * place // ranks, heads * (place + 1) // ranks) for place in range(ranks)]
    keys = [(first // 2, -(-end // 2)) for first, end in queries]
    forward = []
    for shares in (queries, keys, keys, queries):
        own_heads = shares[rank][1] - shares[rank][0]
        of_slice = own_tokens * sum(end - first for first, end in shares)
        of_row = sum(lengths) * own_heads
        forward.append(max(of_slice, of_row) * head_size * 2)
    found = sorted(each.num_bytes for each in row_exchanges(step))
    assert found == sorted(forward * 2 * 2)  # two blocks, and the gradients of each exchange


def test_a_plan_goes_by_the_rank_with_most_heads(tmp_path):
    """Four heads over three ranks: the last has two of them, and so twice the attention of the first."""
    config = config_of(model_dir(tmp_path), 3, tuning="full", mode="none", ranks=3)
    first, busiest = (simulate_run(config, [TOKENS], rank=rank, world_size=3) for rank in (0, 2))
    assert busiest.flops > 1.5 * first.flops
    planned = simulate_depth(config, [TOKENS], world_size=3)
    assert planned.peak_bytes == busiest.phase_and_peak[1].total_bytes
    cost = simulate_cost_model_of_run(config, TOKENS, accumulation=1, world_size=3)
    assert cost.memory_peak_at(TOKENS).total_bytes == pytest.approx(busiest.phase_and_peak[1].total_bytes, rel=0.01)


def test_the_exchange_of_rows_is_waited_for(model):
    """A plan counts it as time that no arithmetic hides, and its group as one of its own."""
    card = find_card("NVIDIA H100 80GB HBM3")
    cost = simulate_cost_model_of_run(config_of(model, RANKS), TOKENS // 2, accumulation=1, world_size=RANKS)
    (exchange,) = cost.token_all_to_alls
    alone = replace(cost, token_all_to_alls=())
    load = MicroBatchLoad(TOKENS, TOKENS**2, 3)
    waited = token_all_to_all_s(cost, TOKENS, card)
    size = cost.all_to_all_bytes(exchange, TOKENS)
    of_links = size * 7 / 8 / (card.link_gb_s * 1e9 * LINK_EFFICIENCY)
    assert waited == pytest.approx(of_links + exchange.num_calls * COLLECTIVE_LATENCY_S)
    times = [estimate_step_time(each, load, card, "bf16", ranks_per_node=RANKS) for each in (cost, alone)]
    assert times[0].exposed_communication_s - times[1].exposed_communication_s == pytest.approx(3 * waited)
    assert num_rank_groups(cost) == num_rank_groups(alone) + 1
    # Over two hosts all eight cards of a host send through its links at a time.
    apart = replace(cost, token_all_to_alls=(replace(exchange, num_hosts=2),))
    assert token_all_to_all_s(apart, TOKENS, card) > waited
