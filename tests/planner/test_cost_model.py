"""One form of a step answers for every micro-batch as the simulation of that micro-batch does."""

import math
from dataclasses import astuple, replace

import pytest
import torch
import transformers

from strategies.base import Fsdp2Config
from strategies.tensor_inventory import MemoryKind
from tests.helpers.building import model_dir
from tests.helpers.covering import EVERYTHING, chosen, takes, values
from tests.simulated.cases import CHECKPOINTING, NATIVE, STRATEGIES, WHOLE, Case
from trainer.data.config import Layout
from trainer.planner.cost_model_fit import most_hosts_of_a_group
from trainer.planner.deferred_reduction import deferred_gradient_bytes, with_deferred_reduction
from trainer.planner.depth_extrapolation import DEFAULT_END_BLOCKS, shallow_depths
from trainer.planner.memory_tracker import ALLOCATION_GRAIN
from trainer.planner.model_blocks import block_pattern
from trainer.planner.simulation import simulate_cost_model_of_run, simulate_depth

WITHIN = 0.05
"""Of what is simulated, at most; what the product promises."""
MATRIX = [
    (Case(strategy, tuning, "bf16", checkpointing, offload, accumulation), layout)
    for strategy in STRATEGIES
    for tuning in ("full", "lora")
    for checkpointing in CHECKPOINTING
    for offload in (False, True)
    if not offload or strategy not in ("single", "ddp")
    for accumulation in (1, 2)
    for layout in ("padding_free", "padded")
]


def written(path, **sizes):
    """A directory with the configuration of a Llama of these sizes."""
    config = transformers.LlamaConfig(max_position_embeddings=8192, pad_token_id=0, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide and with many words, so that blocks and chunks of logits both count."""
    return written(
        tmp_path_factory.mktemp("form") / "llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=65536,
    )


def formed(model, case, layout, rows, length):
    """(configuration, form, its answer for `rows` sequences) of eight ranks, or of one."""
    world = 1 if case.strategy == "single" else 8
    config = case.config(model, world)
    config = replace(config, data=replace(config.data, layout=Layout(layout)))
    if isinstance(config.strategy, Fsdp2Config):
        config = replace(config, strategy=replace(config.strategy, defer_sync=False))
    config.batch["micro"], config.batch["global"] = rows, rows * world * case.accumulation
    form = simulate_cost_model_of_run(config, length, accumulation=case.accumulation, world_size=world)
    return config, form, form.memory_peak_at(rows if form.size_is_in_rows else rows * length)


def both(model, case, layout, rows, length):
    """(form, its answer for `rows` sequences, the simulation of them)."""
    config, form, taken = formed(model, case, layout, rows, length)
    world = 1 if case.strategy == "single" else 8
    return form, taken, simulate_depth(config, [length] * rows, world_size=world)


def marks(one):
    """Every value, and of strategies each way of keeping parameters: whole, gathered by block, gathered by ZeRO-3.

    What accumulates is in `test_cost_model_adds_waiting_gradients_to_everything_else`.
    """
    case, layout = one
    kept = "whole" if case.strategy in WHOLE else "blocks" if case.strategy in NATIVE else "zero3"
    return values((kept, *astuple(replace(case, accumulation=1))[1:], layout))


def dear(one):
    """Blocks that are computed again by choice are looked at most closely."""
    case, _ = one
    return takes([case.strategy]) * case.accumulation * (2 if case.checkpointing == "selective" else 1)


@pytest.mark.parametrize(("case", "layout"), chosen(MATRIX, marks, dear), ids=str)
def test_cost_model_equals_the_simulation_of_any_micro_batch(model, case, layout):
    form, taken, found = both(model, case, layout, 4, 512)
    assert form.layout == layout and form.size_is_in_rows == (layout == "padded")
    assert taken.total_bytes == pytest.approx(found.peak_bytes, rel=WITHIN)
    assert sum(taken.bytes_by_kind.values()) == pytest.approx(taken.total_bytes, rel=1e-3)
    assert form.micro_batch_work(2048 if not form.size_is_in_rows else 4, 4 * 512**2)[
        0
    ] * case.accumulation == pytest.approx(found.flops, rel=WITHIN)
    calls = {name: 0 for name, *_ in found.collective_totals}
    for (name, *_), (number, _) in form.collective_totals.items():
        calls[name] += number
    expected = dict.fromkeys(calls, 0)
    for (name, *_), (number, _) in found.collective_totals.items():
        expected[name] += number
    assert calls == expected


@pytest.mark.skipif(not EVERYTHING, reason="takes minutes: SHARDTUNE_TEST_ALL=1")
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "case", [Case("fsdp2", "full", "bf16", "full", False, 2), Case("zero2", "lora", "bf16")], ids=str
)
def test_cost_model_of_a_large_model(tmp_path, case, rows):
    written(
        tmp_path,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    _, taken, found = both(tmp_path, case, "padding_free", rows, 4096)
    assert taken.total_bytes == pytest.approx(found.peak_bytes, rel=0.01)


@pytest.mark.parametrize("checkpointing", ["full", *(["none"] if EVERYTHING else [])])
def test_cost_model_adds_waiting_gradients_to_everything_else(model, checkpointing):
    case = Case("fsdp2", "full", "bf16", checkpointing, False, 2)
    _, form, _ = formed(model, case, "padding_free", 2, 512)
    config = case.config(model, 8)
    config = replace(config, strategy=replace(config.strategy, defer_sync=True))
    found = simulate_depth(config, [512] * 2, world_size=8)
    later = with_deferred_reduction(form, deferred_gradient_bytes(form, 8)).memory_peak_at(1024)
    assert later.total_bytes == pytest.approx(found.peak_bytes, rel=WITHIN)
    assert sum(later.bytes_by_kind.values()) == pytest.approx(later.total_bytes, rel=1e-3)
    assert deferred_gradient_bytes(form, 8) > 2 * WITHIN * found.peak_bytes, "there is something to tell"


def test_cost_model_largest_micro_batch_is_where_the_peak_meets_the_limit(model):
    _, form, taken = formed(model, Case("fsdp2", "full", "bf16", "none"), "padding_free", 4, 512)
    most = form.max_rows_or_tokens_on_device(taken.total_bytes)
    assert form.memory_peak_at(most).total_bytes <= taken.total_bytes + ALLOCATION_GRAIN
    assert form.memory_peak_at(most + 64).total_bytes > taken.total_bytes
    assert form.max_rows_or_tokens_on_device(1) == 0


def test_cost_model_parameters_are_those_of_the_full_model(model):
    _, form, _ = formed(model, Case("zero2", "lora", "bf16"), "padding_free", 1, 64)
    with torch.device("meta"):
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(model))
    adapters = 4 * 7 * 2 * (256 + 256)  # rank 4 beside each of the projections of width 256
    assert form.num_parameters - form.num_trained_parameters == sum(p.numel() for p in made.parameters())
    assert form.num_trained_parameters >= adapters
    assert form.resting_bytes_by_kind[MemoryKind.parameters] > 0


def test_cost_model_of_few_blocks_simulates_the_full_model(tmp_path):
    path = model_dir(tmp_path)
    form, taken, found = both(path, Case("fsdp2", "full", "fp32"), "padding_free", 4, 512)
    assert form.num_blocks < 5
    assert taken.total_bytes == pytest.approx(found.peak_bytes, rel=WITHIN)


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "vocab_size": 512, "pad_token_id": 0}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
MIXED = {
    "one that is named has none": transformers.Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_experts=16, mlp_only_layers=[0], head_dim=16, num_hidden_layers=13
    ),
    "the first has no experts": transformers.DeepseekV3Config(
        **SIZES,
        **EXPERTS,
        **LATENT,
        n_routed_experts=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_hidden_layers=13,
    ),
    "every second has experts": transformers.Qwen2MoeConfig(
        **SIZES,
        **EXPERTS,
        num_experts=16,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=2,
        num_hidden_layers=20,
    ),
    "those named have none": transformers.Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_experts=16, mlp_only_layers=[0, 1], head_dim=16, num_hidden_layers=18
    ),
}


@pytest.mark.parametrize("kind", [*MIXED][: None if EVERYTHING else 1])  # test_model_blocks.py tells the others apart
def test_cost_model_of_mixtures_some_of_whose_blocks_have_no_experts(tmp_path, kind):
    """Fewer blocks say what all do, although some gather so much less than the others."""
    config = MIXED[kind]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    case = Case("fsdp2", "lora", "bf16", "full") if EVERYTHING else Case("fsdp2", "full", "bf16", "none")
    run = case.config(tmp_path, 8)
    blocks = block_pattern(run.model)
    assert shallow_depths(blocks.num_blocks, blocks.period, DEFAULT_END_BLOCKS + blocks.num_leading_blocks) is not None
    few, exact = (
        simulate_cost_model_of_run(run, 64, accumulation=1, world_size=8, exact=exact) for exact in (False, True)
    )
    found, whole = few.memory_peak_at(256), exact.memory_peak_at(256)
    assert found.phase == whole.phase and found.total_bytes == pytest.approx(whole.total_bytes, rel=1e-3)


@pytest.mark.parametrize("ranks_per_host", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_the_group_on_most_hosts_is_counted(degree, ranks_per_host):
    """All groups of neighbouring ranks are looked at, on as many hosts as it takes for them to end with a host."""
    ranks = range(math.lcm(degree, ranks_per_host))
    groups = [ranks[first : first + degree] for first in ranks[::degree]]
    hosts_of_groups = [len({rank // ranks_per_host for rank in group}) for group in groups]
    assert most_hosts_of_a_group(degree, ranks_per_host) == max(hosts_of_groups)
