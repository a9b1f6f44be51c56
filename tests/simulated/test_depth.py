"""A model's step out of two shallow ones is that of the model itself: bytes, kinds, moment, exchanges and arithmetic."""

from dataclasses import asdict, astuple, replace

import pytest
import transformers

from tests.helpers.covering import EVERYTHING, chosen, values
from tests.simulated.cases import CHECKPOINTING, STRATEGIES, Case
from trainer.planner import depth_extrapolation
from trainer.planner.depth_extrapolation import shallow_depths
from trainer.planner.memory_tracker import ALLOCATION_GRAIN
from trainer.planner.simulation import num_end_blocks_of, simulate_depth

SIZES = {
    "moderate": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7, "vocab_size": 4096},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
}
FLAT = 16
"""Flat buffers of ZeRO at most: parameters, gradients, masters, moments, by group."""
HEADS = {"moderate": 8, "3B": 24, "8B": 32, "70B": 64}
MATRIX = [
    Case(strategy, tuning, precision, checkpointing, False, accumulation)
    for strategy in STRATEGIES[:-1]  # of a small model ZeRO-3 keeps all blocks gathered: it is simulated whole
    for tuning in ("full", "lora")
    for precision in ("bf16", "fp32")
    for checkpointing in CHECKPOINTING
    for accumulation in (1, 2)
]
LARGE = [
    ("8B", Case("fsdp2", "full", "bf16", "full", False, 2), 8),
    ("8B", Case("zero2", "full", "bf16", "full"), 8),
    ("8B", Case("zero2", "full", "bf16", "none"), 8),
    ("3B", Case("zero2", "full", "bf16", "full"), 8),
    ("8B", Case("zero3", "lora", "bf16", "none"), 8),
    ("70B", Case("fsdp2", "full", "bf16", "full"), 64),
]
NEAR = 0.005
"""How near a large model's peak under ZeRO-2 is to its own, whose buckets are full at other blocks than in shallow ones."""


def model(place, size):
    heads = {"num_attention_heads": HEADS[size], "num_key_value_heads": 8, "max_position_embeddings": 8192}
    config = transformers.LlamaConfig(**SIZES[size], **heads, pad_token_id=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place / size)
    return place / size


def marks(case):
    """A case's values, with strategies that keep the same of a block taken for one; test_cost_model.py accumulates."""
    kept = {"ddp": "single", "hsdp": "fsdp2", "zero2": "zero1"}.get(case.strategy, case.strategy)
    return values((kept, *astuple(replace(case, accumulation=1))[1:]))


def agree(path, case, world, lengths):
    config = case.config(path, world)
    options = {"world_size": world, "rank": world - 1}
    found, exact = (asdict(simulate_depth(config, lengths, exact=e, **options)) for e in (False, True))
    if case.strategy == "zero2" and config.model.path.endswith("B"):
        _near(found, exact)
        return
    # ZeRO joins parameters into a few flat buffers, each of which is rounded once, whatever the depth.
    slack = FLAT * ALLOCATION_GRAIN if case.strategy.startswith("zero") else 0
    for part in ("peak_bytes_by_kind", "resting_bytes_by_kind"):
        one, other = found.pop(part), exact.pop(part)
        assert one.keys() == other.keys()
        assert all(abs(one[kind] - other[kind]) <= slack for kind in one), part
    assert abs(found.pop("peak_bytes") - exact.pop("peak_bytes")) <= slack
    assert found == exact


def _near(found, exact):
    """As `agree`, where buckets are filled: the peak is what a full one takes wherever it comes."""
    assert abs(found.pop("peak_phase")["place"] - exact.pop("peak_phase")["place"]) <= 1
    assert found.pop("peak_bytes") == pytest.approx(exact.pop("peak_bytes"), rel=NEAR)
    assert sum(found.pop("peak_bytes_by_kind").values()) == pytest.approx(
        sum(exact.pop("peak_bytes_by_kind").values()), rel=NEAR
    )
    calls = [part.pop("collective_totals") for part in (found, exact)]
    assert calls[0].keys() == calls[1].keys()
    assert all(calls[0][key][1] == calls[1][key][1] for key in calls[0]), "bytes exchanged"
    resting, exact_resting = found.pop("resting_bytes_by_kind"), exact.pop("resting_bytes_by_kind")
    assert all(abs(size - exact_resting[kind]) <= FLAT * ALLOCATION_GRAIN for kind, size in resting.items())
    assert found == exact


@pytest.mark.parametrize("case", chosen(MATRIX, marks, cost=lambda case: case.accumulation), ids=str)
def test_depth_extrapolation_equals_the_full_simulation_of_a_moderate_model(tmp_path, case, monkeypatch):
    # Of seven blocks the whole is simulated, which takes no longer than the two shallow models: here they are compared with it.
    monkeypatch.setattr(
        depth_extrapolation, "shallow_depths", lambda *_, ends_may_overlap: (3, 4) if ends_may_overlap else (4, 5)
    )
    agree(model(tmp_path, "moderate"), case, 1 if case.strategy == "single" else 8, [256, 100])


@pytest.mark.skipif(not EVERYTHING, reason="takes minutes: SHARDTUNE_TEST_ALL=1")
@pytest.mark.parametrize(("size", "case", "world"), LARGE, ids=str)
def test_depth_extrapolation_equals_the_full_simulation_of_a_large_model(tmp_path, size, case, world):
    agree(model(tmp_path, size), case, world, [2048, 2048])


def test_two_depths_are_of_the_remainder():
    assert shallow_depths(32) == (4, 5)
    assert shallow_depths(32, ends_may_overlap=True) == (3, 4)
    assert shallow_depths(32, 2, ends_may_overlap=True) == shallow_depths(32, 2), "a middle block has one kind"
    assert shallow_depths(5) is None
    assert shallow_depths(62, 6) == (26, 32)
    assert shallow_depths(20, 6) is None
    assert shallow_depths(8) is None, "two of four and five blocks take longer"
    assert shallow_depths(32, num_end_blocks=5) == (10, 11)


def test_depth_extrapolation_allows_for_blocks_that_zero3_keeps_gathered(tmp_path):
    """Where it holds the blocks of both shallow models, their difference says nothing of further blocks."""
    wide = Case("zero3", "lora", "bf16").config(model(tmp_path, "8B"), 8)
    assert num_end_blocks_of(wide) == 5  # four of 218 million each beside that in use
    narrow = Case("zero3", "lora", "bf16").config(model(tmp_path, "moderate"), 8)
    assert shallow_depths(80, num_end_blocks=num_end_blocks_of(narrow)) is None
