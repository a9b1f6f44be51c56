"""Every optimizer under every strategy that runs it: the steps of `single`, resumed bit for bit."""

import itertools

import pytest

from tests.helpers.covering import EVERYTHING, chosen, values, whole
from tests.parity.optimizers import GROUPED, INSTALLED, OPTIMIZERS, runs

TOLERANCE = 1e-5
CASES = [(name, strategy) for name in OPTIMIZERS for strategy in runs(OPTIMIZERS[name])]
TUNED = [(name, strategy, tuning) for name, strategy in CASES for tuning in ("full", "lora")]


def needs(name):
    if name not in INSTALLED:
        pytest.skip(f"{OPTIMIZERS[name].name} needs a package that is not installed")


def assert_close(found, expected):
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)


def kind(case):
    """Each optimizer, and each kind of engine; each optimizer under each engine is in test_methods.py too."""
    name, strategy, *_ = case
    return {name, ("engine", strategy.startswith("zero"), strategy in ("fsdp2", "hsdp", "zero3"))}


def dear(case):
    """The states of DeepSpeed's stages take longest."""
    return 2.0 if case[1].startswith("zero") else 1.0


@whole("each optimizer under each engine is in test_methods.py, and resumes below")
@pytest.mark.parametrize(("name", "strategy", "tuning"), chosen(TUNED, lambda case: {*kind(case), case[2]}, dear))
def test_strategy_equals_single(ask, name, strategy, tuning):
    needs(name)
    found = ask("optimizers", "curve", name, strategy, tuning)
    assert len(found) == 5
    assert_close(found, ask("optimizers", "lone", name, tuning))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_oracles_differ_and_are_clipped(ask, tuning):
    """Optimizers that could not be told apart within the tolerance would prove little."""
    curves = {name: ask("optimizers", "lone", name, tuning) for name in INSTALLED}
    for (left, a), (right, b) in itertools.combinations(curves.items(), 2):
        if {left, right} != {"adamw", "adamw_8bit"}:  # of a few hundred elements most moments are kept in 32 bits
            assert abs(a[-1][0] / b[-1][0] - 1) > 10 * TOLERANCE, (left, right, tuning)
    assert all(norm > 0.5 for curve in curves.values() for _, norm in curve)


@pytest.mark.parametrize(
    ("name", "strategy"),
    chosen([(name, strategy) for name, optim in GROUPED.items() for strategy in runs(optim)], kind, dear),
)
def test_groups_have_their_own_rates_under_every_strategy(ask, name, strategy):
    expected = ask("optimizers", "lone", name, "full")
    assert_close(ask("optimizers", "curve", name, strategy, "full"), expected)
    plain = ask("optimizers", "lone", GROUPED[name].name, "full")
    assert abs(expected[-1][0] / plain[-1][0] - 1) > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "strategy"), chosen(CASES, values, dear))
def test_resuming_is_bit_equal_and_crosses_where_both_run(ask, name, strategy):
    needs(name)
    found = ask("optimizers", "resuming", name, strategy)
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", *(["fsdp2, kept gathered"] if EVERYTHING else [])])
def test_looking_at_the_average_changes_nothing(ask, strategy):
    needs("schedule_free")
    found, single = ask("optimizers", "averaging", strategy), ask("optimizers", "averaging", "single")
    assert found["looked at"] == found["plain"]
    assert found["averaged"] == pytest.approx(single["averaged"], rel=TOLERANCE)
    assert all(abs(a / t - 1) > TOLERANCE for a, t in zip(found["averaged"][1:], found["trained"][1:], strict=True))
