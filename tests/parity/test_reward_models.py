"""Reward models score alike in one process and on ranks that share them, and the steps that follow are the same."""

import numpy as np
import pytest

from tests.helpers.covering import chosen, values

CASES = [
    (strategy, tuning)
    for strategy in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "distributed experts")
    for tuning in ("full", "lora")
]


@pytest.mark.parametrize(("strategy", "tuning"), chosen(CASES, values))
def test_reward_models_score_as_in_one_process(ranks, strategy, tuning):
    world = 4 if strategy in ("hsdp", "distributed experts") else 2
    found, expected = ranks[world].ask("reward_models", "compare", strategy, tuning)
    assert len(found) == len(expected) == 2
    for ours, right in zip(found, expected, strict=True):
        assert ours["texts"] == right["texts"]
        for name, rewards in right["rewards"].items():
            assert np.std(rewards) > 1e-3, "rewards that are all alike compare nothing"
            np.testing.assert_allclose(ours["rewards"][name], rewards, rtol=1e-5, atol=1e-5)
        assert right["grad_norm"] > 1e-3
        assert ours["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
