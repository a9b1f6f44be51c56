"""Which points of a comparison must have the same loss."""

from types import SimpleNamespace

import pytest

from launch.compare.curves import loss_relevant_settings

CONFIG = {
    "strategy.name": "fsdp2",
    "parallel.sequence": 1,
    "batch.global": 8,
    "optim.lr": 1e-4,
    "run.seed": 0,
    "run.dir": "a",
}


@pytest.mark.parametrize(
    ("key", "value", "computes_the_same"),
    [
        ("strategy.name", "zero3", True),
        ("parallel.sequence", 2, True),
        ("run.dir", "b", True),
        ("run.seed", 1, False),
        ("optim.lr", 1e-3, False),
        ("batch.global", 16, False),
    ],
)
def test_points_that_differ_in_how_they_compute_must_have_the_same_loss(key, value, computes_the_same):
    first, second = (SimpleNamespace(config=config) for config in (CONFIG, {**CONFIG, key: value}))
    assert (loss_relevant_settings(first) == loss_relevant_settings(second)) == computes_the_same
