"""Scores by median and median absolute deviation, against numpy's, and what joins the window."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainer.monitors.anomalies import Guards
from trainer.monitors.guard_config import Action, GuardsConfig
from trainer.monitors.rolling import DEVIATIONS_PER_MAD, MAX_SCORE, MIN_SPREAD, RollingWindow

CPU = torch.device("cpu")


def expected(before, value):
    """Of one column, by numpy alone."""
    middle = np.median(before)
    spread = max(DEVIATIONS_PER_MAD * np.median(np.abs(before - middle)), MIN_SPREAD * abs(middle))
    return (value - middle) / spread


@pytest.mark.parametrize("window", [10, 11, 20])
def test_scores_are_numpys_over_the_last_steps(window):
    values = np.random.default_rng(0).lognormal(size=(40, 2)) + 1
    rolling = RollingWindow(window, CPU)
    for number, row in enumerate(values):
        scores = rolling.scores(torch.tensor(row)).tolist()
        before = values[max(0, number - window) : number]
        if number < max(5, window // 4):
            assert np.isnan(scores).all()
        else:
            assert scores == pytest.approx([expected(before[:, i], row[i]) for i in range(2)], rel=1e-12)
        rolling.push(torch.tensor(row), torch.tensor(True))
    assert rolling.rows() == values[-window:].tolist()
    again = RollingWindow(window, CPU, rolling.rows())
    assert torch.equal(again.window, rolling.window)


def test_rolling_window_leaves_outliers_out_and_a_flat_curve_has_none():
    rolling = RollingWindow(10, CPU)
    for _ in range(10):
        rolling.push(torch.tensor([2.0, 1.0]).double(), torch.tensor(True))
    kept = rolling.window
    rolling.push(torch.tensor([99.0, 99.0]).double(), torch.tensor(False))
    assert torch.equal(rolling.window, kept)
    # One hundredth of the median is one standard deviation, where nothing moves.
    assert rolling.scores(torch.tensor([2.02, 1.0]).double()).tolist() == pytest.approx([1.0, 0.0])
    for odd in ([torch.nan, 9.0], [9.0, torch.inf]):  # alike, however a strategy says that a norm is not finite
        assert np.isnan(rolling.scores(torch.tensor(odd).double()).tolist()).all()
    assert rolling.scores(torch.tensor([1e30, 1.0]).double()).tolist()[0] == MAX_SCORE


def test_the_spread_of_few_steps_is_widened():
    """From the sixth step on, so that a run that breaks early is seen; by five times the spread at first."""
    rolling = RollingWindow(100, CPU)
    values = np.random.default_rng(1).lognormal(size=(30, 2)) + 1
    for number, row in enumerate(values):
        scores = rolling.scores(torch.tensor(row)).tolist()
        if number < 5:
            assert np.isnan(scores).all()
        else:
            wide = max(25 / number, 1)
            assert scores == pytest.approx([expected(values[:number, i], row[i]) / wide for i in range(2)], rel=1e-12)
        rolling.push(torch.tensor(row), torch.tensor(True))


def judged(losses, action=Action.note, norms=None):
    """The steps that stand out by their loss or norm (1 if not given), and the median loss that the window ends with."""
    runtime = SimpleNamespace(device=CPU, is_main=True, world_size=1)
    told = []
    guards = Guards(GuardsConfig(loss=action), 10, runtime, lambda outlier: told.append(outlier.step))
    for number, loss in enumerate(losses, 1):
        row = {"step": number, "loss": loss, "grad_norm": 1.0 if norms is None else norms[number - 1]}
        guards.record_step(number)
        guards.mark_outliers([row])
        assert any(key.startswith("outlier/") for key in row) == (number in told)
        if number % 7 == 0:  # a run that is resumed judges likewise
            guards.restore_recent_steps(guards.recent_steps(), [dict(each) for each in guards.level_shifts.rows])
    return told, float(np.median([step["loss"] for step in guards.recent_steps()]))


def test_a_level_that_stays_is_told_once_and_does_not_become_the_median():
    noise = np.random.default_rng(0).normal(0, 0.05, size=200)
    told, median = judged([(10.0 if n < 30 else 127.0) + noise[n] for n in range(200)])
    assert told == [31] and median == pytest.approx(10, abs=0.1)
    # Its gradient norms are higher, too, from the first step or from a later one: that is the same news.
    for first in (30, 34):
        norms = [1.0 if n < first else 40.0 for n in range(200)]
        assert judged([(10.0 if n < 30 else 127.0) + noise[n] for n in range(200)], norms=norms)[0] == [31]
    # It comes back, and another jump is another one. A lone step joins as ever.
    told, median = judged([(127.0 if 40 <= n < 60 or n in (80, 100) else 10.0) + noise[n] for n in range(120)])
    assert told == [41, 81, 101] and median == pytest.approx(10, abs=0.1)


def test_a_jump_at_the_seventh_step_is_seen_and_a_curve_that_falls_has_none():
    assert judged([10.9, 10.8, 10.7, 10.6, 10.5, 10.4, 781.0, 500.0, 127.0])[0] == [7]
    rng = np.random.default_rng(3)
    for _ in range(20):
        falling = 3 + 8 * np.exp(-np.arange(60) / 10) + rng.normal(0, 0.1, size=60)
        assert judged(falling.tolist())[0] == []
