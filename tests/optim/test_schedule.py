"""Shapes of the learning-rate schedule, against transformers' where it has the same."""

from itertools import pairwise

import pytest
import torch

from trainer.optim.schedule import ScheduleConfig, ScheduleName, lr_factor_at

TOTAL = 100


def curve(**settings):
    config = ScheduleConfig(**settings)
    return [lr_factor_at(config, step, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_has_the_shape_of_transformers(name):
    """Theirs wastes the first warm-up step at rate zero; the decay is the same."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=TOTAL)
    expected = []
    for _ in range(TOTAL):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = curve(name=ScheduleName(name), warmup_steps=10)
    assert found[10:] == pytest.approx(expected[10:], abs=1e-9)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_schedule_constant_and_wsd():
    assert curve(name=ScheduleName.constant, warmup_share=0.0) == [1.0] * TOTAL
    wsd = curve(name=ScheduleName.wsd, warmup_share=0.1, decay_share=0.2, min_factor=0.1)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a > b for a, b in pairwise(wsd[80:]))


@pytest.mark.parametrize("name", list(ScheduleName))
@pytest.mark.parametrize("total", [1, 2, 3])
def test_schedule_of_a_short_run_is_never_zero(name, total):
    config = ScheduleConfig(name=name)
    assert all(0 < lr_factor_at(config, step, total) <= 1 for step in range(total))
