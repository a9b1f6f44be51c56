"""Mixtures of experts: the same steps as `single`, by the same experts, under every strategy, full and LoRA."""

import pytest

from tests.helpers.covering import chosen, values
from tests.helpers.learning import LEAST_LEARNED, learned
from tests.parity.experts import CASES, CLEAR, STEPS

EXACT = 1e-5


@pytest.mark.parametrize(("architecture", "tuning", "strategy"), chosen(CASES, values))
def test_experts_take_the_steps_of_one_process(ask, architecture, tuning, strategy):
    expected = ask("experts", "lone", architecture, tuning)
    assert expected["gap"] > CLEAR, "a tie: roundings choose the experts, and nothing can be compared"
    found = ask("experts", "curve", architecture, tuning, strategy)
    assert found["counts"] == expected["counts"], "other experts were chosen"
    assert len(found["curve"]) == len(expected["curve"]) == STEPS
    for (loss, norm), (right_loss, right_norm) in zip(found["curve"], expected["curve"], strict=True):
        assert loss == pytest.approx(right_loss, rel=EXACT)
        assert norm == pytest.approx(right_norm, rel=EXACT)
    if strategy in ("fsdp2", "zero3"):  # three of five experts at most, and half of the rest
        assert max(found["read"]) < 0.65 * expected["read"], "a rank reads more of the model than it holds"
    assert learned(expected["curve"], expected["still"]) > LEAST_LEARNED, "it learns nothing: the comparison is blind"
