"""An update that is left out, or samples that are given up, under every strategy: the curve of a process that never met them."""

import pytest

from tests.helpers.covering import EVERYTHING, whole
from tests.parity.guards import BATCH, FLIPPED, HIT, ODD, STEPS

EXACT = 1e-5
STRATEGIES = ("fsdp2", "zero2", *(("ddp", "hsdp", "zero1", "zero3") if EVERYTHING else ()))


def assert_close(found, expected, rel):
    """But for the odd step itself, whose gradients the oracle has dropped."""
    assert len(found) == len(expected) == STEPS
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True), 1):
        assert mine[0] == pytest.approx(theirs[0], rel=rel), step
        assert step == ODD or mine[1] == pytest.approx(theirs[1], rel=rel), step


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_moves_nothing_under_any_strategy(ask, strategy):
    found = ask("guards", "skipped", strategy)
    assert_close(found["found"], found["expected"], EXACT)
    assert found["skipped"] == found["outliers"] == [ODD]
    assert (found["updates"], found["window"]) == (STEPS - 1, 10)
    if not strategy.startswith("zero"):  # with torch's fused optimizers nothing waits for the device
        assert found["reads"] == [0] * STEPS


@whole("one rank's gradients that are not finite are left out by all ranks, which the next test shows")
def test_a_skipped_step_moves_nothing_with_expert_parallelism(ask):
    found = ask("guards", "skipped", "fsdp2", 2)
    assert_close(found["found"], found["expected"], EXACT)
    assert found["skipped"] == found["outliers"] == [ODD]
    assert (found["updates"], found["window"]) == (STEPS - 1, 10)


def test_a_step_whose_experts_of_one_rank_are_not_finite_is_left_out_by_all(ask):
    """Each of two ranks has half of the experts, and one value of the gradient of one of them is not a number."""
    found = ask("guards", "not_finite", "fsdp2", 2)
    assert_close(found["found"], found["expected"], EXACT)
    assert found["skipped"] == [ODD]


@whole("a rollback loads a checkpoint, as tests/parity/test_matrix_experts.py does, and passes samples over")
def test_a_rollback_is_the_run_that_never_saw_the_samples_with_expert_parallelism(ask):
    assert_never_seen(ask("guards", "rolled_back", "fsdp2", 2))


def test_zero2_in_bf16_skips_without_the_host(ask):
    found = ask("guards", "skipped_on_device")
    assert found["reads"] == [0] * STEPS
    assert found["skipped"] == found["outliers"] == [ODD] and found["updates"] == STEPS - 1
    assert_close(found["found"], found["expected"], 1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rollback_is_the_run_that_never_saw_the_samples_under_any_strategy(ask, strategy):
    assert_never_seen(ask("guards", "rolled_back", strategy))


def assert_never_seen(found):
    """The steps of a process that never had the samples, told alike on both ranks."""
    assert len(found["found"]) == STEPS
    for step, (mine, theirs) in enumerate(zip(found["found"], found["expected"], strict=True), 1):
        assert mine == pytest.approx(theirs, rel=EXACT), step
    passed = [{"first": (ODD - 1) * BATCH, "count": BATCH}]
    assert found["progress"] == [STEPS, 1, passed, STEPS * BATCH]
    assert found["told"] == [[1, passed]] * 2


@pytest.mark.parametrize(
    ("strategy", "tuning"),
    [
        ("ddp", "full"),
        ("hsdp", "full"),
        *([("zero2", "lora"), ("ddp", "lora"), ("hsdp", "lora")] if EVERYTHING else ()),
    ],
)
def test_a_flipped_bit_of_a_replica_ends_the_run_before_it_is_saved(ask, strategy, tuning):
    found = ask("guards", "replicas", strategy, tuning, True)
    assert found["said"][0] == found["said"][1]
    assert f"step {FLIPPED + 1}: " in found["said"][0] and f"after step {FLIPPED - 1}: " in found["said"][0]
    assert f"{HIT} than ranks" in found["said"][0]
    assert found["step"] == FLIPPED + 1 and max(found["checkpoints"]) == "step-000006"


@pytest.mark.parametrize("strategy", ["zero2", *(["ddp", "hsdp", "zero1", "fsdp2", "zero3"] if EVERYTHING else [])])
def test_replicas_that_nothing_befell_are_alike(ask, strategy):
    found = ask("guards", "replicas", strategy, "full", False)
    assert found["said"] == ["", ""] and found["step"] == STEPS
    assert (found["held"] == 0) == (strategy in ("fsdp2", "zero3"))
