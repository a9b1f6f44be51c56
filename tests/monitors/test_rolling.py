"""Scores by median and median absolute deviation, against numpy's, and what joins the window."""

import numpy as np
import pytest
import torch

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
