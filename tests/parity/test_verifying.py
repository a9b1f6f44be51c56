"""`shardtune doctor --verify` agrees with sound runs of every strategy, method and objective, and finds planted faults."""

import itertools

import pytest

from tests.helpers.covering import chosen, takes, values, whole
from tests.parity.verifying import ALTERED, FAULTS, OBJECTIVES, SEQ2SEQ, TUNINGS

STRATEGIES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
ARCHITECTURES = ("llama", "qwen3_moe", "gpt2")
PAIRS = ("dpo", "kto", "orpo", "simpo")
UNPACKED = (*PAIRS, "classification", "reward", SEQ2SEQ)


def legal(case):
    architecture, strategy, tuning, objective, altered = case
    if objective == SEQ2SEQ:
        return architecture == "t5" and tuning in ("full", "lora") and altered in ("plain", "bf16", "accumulating")
    if architecture == "t5" or (altered == "packing" and objective in UNPACKED):
        return False
    if tuning == "vera" and "bf16" in altered and strategy != "ddp":
        return False  # most of them are refused when a run is composed
    if tuning == "lora on all parts":
        return architecture == "qwen3_moe" and objective not in ("classification", "reward")
    return architecture == "llama" or tuning in ("full", "lora")


def ranks_of(case):
    """Those that share rows are two of four, and hsdp has two replicas of two shards."""
    return 4 if case[1] == "hsdp" or "sequence" in case[4] else 2


CASES = [
    case for case in itertools.product((*ARCHITECTURES, "t5"), STRATEGIES, TUNINGS, OBJECTIVES, ALTERED) if legal(case)
]


def marks(case):
    """Each value, and each strategy with rows that are shared and that are not, and with weights and adapters."""
    return values(case) | {("rows", case[1], "sequence" in case[4]), ("weights", case[1], case[2] == "full")}


@pytest.mark.parametrize("case", chosen(CASES, marks, takes), ids="/".join)
def test_a_sound_run_agrees_with_one_process(ranks, case):
    found = ranks[ranks_of(case)].ask("verifying", "verdict", *case)
    assert found["problems"] == [] and found["agrees"]
    distances = {(row["precision"], row["quantity"]): row["distance"] for row in found["differences"]}
    assert all(distance is not None for distance in distances.values())
    assert (("bf16", "loss") in distances) == ("bf16" in case[4])
    # Not compared with itself: summed over ranks, some number is another one.
    assert max(distances.values()) > 0
    assert found["ranks"] == ranks_of(case)
    heads = {name: number for name, number in found["model"]["kept"].items() if "head" in name}
    assert heads and set(found["kernels"]) >= {"one process, fp32", "as configured, fp32"}
    if case[0] == "qwen3_moe":
        assert found["model"]["decided_routers"] == 2 and found["notes"] == []


WITH_A_FAULT = whole("tests/launch/doctor shows it with a fault of its experts alone")


@pytest.mark.parametrize(
    ("strategy", "tuning"),
    [pytest.param("fsdp2", "full", marks=WITH_A_FAULT), ("hsdp", "lora on all parts")],
)
def test_dealt_experts_agree_with_one_process(ranks, strategy, tuning):
    """Two ranks of one replica hold the same experts, or one of each of two replicas."""
    found = ranks[4].ask("verifying", "verdict", "qwen3_moe", strategy, tuning, "sft", "experts")
    assert found["problems"] == [] and found["agrees"] and found["ranks"] == 4
    assert found["model"]["decided_routers"] == 2 and found["notes"] == []
    assert max(row["distance"] for row in found["differences"]) > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(ranks, fault):
    case = ("llama", "ddp", "lora", "dpo", FAULTS[fault])
    found = ranks[ranks_of(case)].ask("verifying", "verdict", *case, fault)
    assert not found["agrees"]
    assert any(problem.startswith("fp32: adapters, attention: gradients differ by ") for problem in found["problems"])
