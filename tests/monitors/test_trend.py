"""Mann and Kendall's test against scipy's, and how often a run whose losses only hover is called overfitting."""

import itertools

import numpy as np
import pytest
import scipy

from trainer.monitors import overfitting
from trainer.monitors.base import Evidence
from trainer.monitors.config import OverfittingConfig, Reaction
from trainer.monitors.trend import rising_p_value


@pytest.mark.parametrize("count", [4, 7, 12])
def test_trend_test_is_that_of_scipy(count):
    drawn = np.random.default_rng(count)
    for _ in range(5):
        values = drawn.normal(size=count) + 0.2 * np.arange(count)
        theirs = scipy.stats.kendalltau(np.arange(count), values, alternative="greater", method="exact").pvalue
        assert rising_p_value(values.tolist()) == pytest.approx(theirs, rel=1e-9)


def test_trend_test_is_exact_for_every_order_of_five():
    found = [rising_p_value(order) for order in itertools.permutations(range(5))]
    for level in (1 / 120, 5 / 120, 0.2):
        assert np.mean(np.array(found) <= level + 1e-12) <= level + 1e-12
    assert min(found) == pytest.approx(1 / 120) and rising_p_value([1.0] * 9) == 1.0


def seen(train, held_out, planned=20):
    rows = [{"step": float(n), "train": t, "held_out": h} for n, (t, h) in enumerate(zip(train, held_out, strict=True))]
    return Evidence(len(rows), {}, planned, rows)


def alarmed(train, held_out) -> bool:
    config, counts = OverfittingConfig(), range(1, len(train) + 1)
    return any(overfitting.find_problem(config, seen(train[:n], held_out[:n], len(train))) for n in counts)


def test_trend_rarely_calls_a_hovering_run_overfitting_and_finds_a_real_one():
    drawn = np.random.default_rng(1)
    hover = [alarmed(*drawn.normal(size=(2, 20)).tolist()) for _ in range(150)]
    assert np.mean(hover) <= 0.01
    steps = np.arange(20)
    curve = 2 + 0.02 * (steps - 6) ** 2 + 0.01 * drawn.normal(size=20)
    assert alarmed((2.5 - 0.1 * steps).tolist(), curve.tolist())
    assert not alarmed(
        (2.5 - 0.1 * steps).tolist(), (2.6 - 0.09 * steps).tolist()
    )  # the gap alone, while it still learns


@pytest.mark.parametrize("count", [10, 20, 50])
def test_trend_of_a_drifting_held_out_loss_is_no_overfitting_while_the_gap_hovers(count):
    drawn, drift = np.random.default_rng(count), 0.3 * np.arange(count)
    drifted = [alarmed((drift + drawn.normal(size=count)).tolist(), drift.tolist()) for _ in range(150)]
    assert np.mean(drifted) <= 0.03


def test_trend_problem_names_the_best_step_and_what_to_type():
    train, held_out = [3.0, 2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7], [3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6]
    found = overfitting.find_problem(OverfittingConfig(action=Reaction.stop), seen(train, held_out, 8))
    assert found is not None and found.ends_run and found.numbers["best_step"] == 1
    assert found.numbers["p_held_out"] == pytest.approx(1 / 720)
    assert any("evaluation.patience" in word for word in found.remedies)
    assert overfitting.find_problem(OverfittingConfig(action=Reaction.off), seen(train, held_out, 8)) is None
    assert (
        overfitting.find_problem(OverfittingConfig(), seen(train[:7], held_out[:7], 8)) is None
    )  # five say too little for eight looks
    worse = [3.0 + 0.1 * n for n in range(8)]
    assert (
        overfitting.find_problem(OverfittingConfig(), seen(worse, [2 * loss for loss in worse], 8)) is None
    )  # both get worse
