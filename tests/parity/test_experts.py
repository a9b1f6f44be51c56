"""Mixtures of experts: the same steps as `single`, by the same experts, under every strategy, full and LoRA."""

import pytest
import torch

from tests.helpers.covering import chosen, takes
from tests.helpers.learning import LEAST_LEARNED
from tests.parity.experts import CASES, CLEAR, WORDS, marks
from tests.parity.methods import FEWER

EXACT = 1e-5


@pytest.mark.parametrize(("architecture", "tuning", "strategy", "losses"), chosen(CASES, marks, takes))
def test_experts_take_the_steps_of_one_process_under_every_strategy(ask, architecture, tuning, strategy, losses):
    expected = ask("experts", "lone", architecture, tuning, losses)
    assert expected["gap"] > CLEAR, "a tie: roundings choose the experts, and nothing can be compared"
    found = ask("experts", "curve", architecture, tuning, strategy, losses)
    assert found["counts"] == expected["counts"], "other experts were chosen"
    assert found["counted"] == expected["counted"], "other experts were chosen in some step"
    in_all = torch.tensor(found["counted"]).sum(0).tolist()
    assert in_all == [*expected["counts"].values()], "the run counts otherwise"
    assert len(found["curve"]) == len(expected["curve"]) == FEWER
    for step, right in zip(found["curve"], expected["curve"], strict=True):
        assert len(step) == (2 if losses == "none" else 4)
        assert step == pytest.approx(right, rel=EXACT)
    if strategy in ("fsdp2", "zero3") and tuning not in WORDS:  # three of five experts at most, and half of the rest
        assert max(found["read"]) < 0.65 * expected["read"], "a rank reads more of the model than it holds"
    assert expected["learned"] > LEAST_LEARNED, "it learns nothing: the comparison is blind"
