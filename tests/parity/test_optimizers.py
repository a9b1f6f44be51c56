"""Every optimizer under every strategy that runs it: the steps of `single`, resumed bit for bit."""

import itertools

import pytest

from tests.helpers.launching import run_job
from tests.parity.optimizers import GROUPED, INSTALLED, OPTIMIZERS, runs

TOLERANCE = 1e-5
CASES = [(name, strategy) for name in OPTIMIZERS for strategy in runs(OPTIMIZERS[name])]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_job("tests.parity.optimizers", 2, tmp_path_factory.mktemp("optimizers"))


def needs(name):
    if name not in INSTALLED:
        pytest.skip(f"{OPTIMIZERS[name].name} needs a package that is not installed")


def assert_close(found, expected):
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_strategy_equals_single(report, name, strategy, tuning):
    needs(name)
    curves = report["optimizers"][f"{name} {strategy} {tuning}"]
    assert len(curves["found"]) == 5
    assert_close(curves["found"], curves["expected"])


def test_the_oracles_differ_and_are_clipped(report):
    """Optimizers that could not be told apart within the tolerance would prove little."""
    for tuning in ("full", "lora"):
        curves = {name: report["optimizers"][f"{name} ddp {tuning}"]["expected"] for name in INSTALLED}
        for (left, a), (right, b) in itertools.combinations(curves.items(), 2):
            if {left, right} != {"adamw", "adamw_8bit"}:  # of a few hundred elements most moments are kept in 32 bits
                assert abs(a[-1][0] / b[-1][0] - 1) > 10 * TOLERANCE, (left, right, tuning)
        assert all(norm > 0.5 for curve in curves.values() for _, norm in curve)


@pytest.mark.parametrize(("name", "strategy"), [(n, s) for n, optim in GROUPED.items() for s in runs(optim)])
def test_groups_have_their_own_rates_under_every_strategy(report, name, strategy):
    curves = report["groups"][f"{name} {strategy} full"]
    assert_close(curves["found"], curves["expected"])
    plain = report["optimizers"][f"{GROUPED[name].name} ddp full"]["expected"]
    assert abs(curves["expected"][-1][0] / plain[-1][0] - 1) > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_resuming_is_bit_equal_and_crosses_where_both_run(report, name, strategy):
    needs(name)
    found = report["resuming"][f"{name} {strategy}"]
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, kept gathered"])
def test_looking_at_the_average_changes_nothing(report, strategy):
    needs("schedule_free")
    found = report["averaging"][strategy]
    assert found["looked at"] == found["plain"]
    assert found["averaged"] == pytest.approx(report["averaging"]["single"]["averaged"], rel=TOLERANCE)
    assert all(abs(a / t - 1) > TOLERANCE for a, t in zip(found["averaged"][1:], found["trained"][1:], strict=True))
