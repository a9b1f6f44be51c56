"""Law 1: the same job under any strategy takes the same steps (fp32, dropout off, lr 1e-3, clipping on)."""

import itertools

import pytest

from tests.helpers.covering import chosen, takes, values
from tests.helpers.learning import LEAST_LEARNED
from tests.parity.matrix import names_for

TOLERANCE = 1e-5
MASKS = ("even", "uneven", "weighted")
CASES = [
    (world, strategy, tuning, masks, accumulation)
    for world in (2, 4)
    for strategy, tuning, masks, accumulation in itertools.product(names_for(world), ("full", "lora"), MASKS, (1, 4))
]


def assert_close(found, expected):
    assert len(found) == len(expected) == 5
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)


def met(case):
    """Each strategy under either tuning; what masks weigh, however it is accumulated; on four ranks each way of sharding."""
    world, strategy, tuning, masks, accumulation = case
    found = {
        (strategy, tuning),
        (masks, accumulation),
        (world, accumulation),
        (2, strategy) if world == 2 else (4, "any"),
    }
    return found | ({(world, strategy)} if strategy in ("fsdp2", "hsdp", "zero3") else set())


def dear(case):
    """Four ranks take twice as long as two."""
    return case[0] * takes(case)


@pytest.mark.parametrize(("world", "strategy", "tuning", "masks", "accumulation"), chosen(CASES, met, dear))
def test_strategy_equals_single(ranks, world, strategy, tuning, masks, accumulation):
    found = ranks[world].ask("matrix", "curve", strategy, tuning, masks, accumulation)
    assert_close(found, ranks[world].ask("matrix", "lone", tuning, masks)["curve"])


@pytest.mark.parametrize(
    ("world", "strategy"), chosen([(world, name) for world in (2, 4) for name in names_for(world)], values, dear)
)
def test_strategy_equals_single_through_sockets_too(ranks, world, strategy):
    expected = ranks[world].ask("matrix", "lone", "full", "uneven")["curve"]
    assert_close(ranks[world].ask("matrix", "sockets", strategy), expected)


@pytest.mark.parametrize(("tuning", "masks"), list(itertools.product(("full", "lora"), MASKS)))
def test_the_oracle_learns_and_is_clipped(ranks, tuning, masks):
    """A matrix of runs that stand still, or that clipping never touches, would prove little."""
    lone = ranks[2].ask("matrix", "lone", tuning, masks)
    assert lone["learned"] > LEAST_LEARNED
    assert any(norm > 0.5 for _, norm in lone["curve"])


def test_shards_are_summed_in_each_micro_batch_and_replicas_once_a_step(ranks):
    found = ranks[4].ask("matrix", "reduced_each")
    assert_close(found["found"], ranks[4].ask("matrix", "lone", "full", "uneven")["curve"])
    assert found["deferred"] is False
    assert found["reductions"] == found["groups"] > 1


def test_every_group_keeps_to_the_timeout_of_the_run(ranks):
    """torch's own would be half an hour."""
    found = ranks[4].ask("matrix", "timeouts")
    (asked,) = found.pop("asked")
    assert asked != 1800 and {value for values in found.values() for value in values} == {asked}
    assert len(found["zero2"]) > 2 and len(found["hsdp"]) > 2  # of all, of a replica, between replicas; DeepSpeed's


def test_a_quantised_base_trains_alike_under_hsdp(ranks):
    pytest.importorskip("bitsandbytes")
    found = ranks[4].ask("matrix", "quantised_hsdp")
    assert_close(found["found"], found["expected"])
    assert found["expected"] != ranks[4].ask("matrix", "lone", "lora", "uneven")["curve"]
