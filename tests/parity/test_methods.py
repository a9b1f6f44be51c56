"""Law 1 for every tuning method: the same steps as `single`, from the same start, resumed bit for bit."""

import pytest

from tests.helpers.launching import run_job
from tests.parity.methods import ALSO, RESUMED, STEPS, TURNS, turns

TOLERANCE = 1e-5
CASES = [(case, name) for case, names in turns().items() for name in names]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_job("tests.parity.methods", 2, tmp_path_factory.mktemp("methods"))


def assert_close(found, expected):
    assert len(found) == len(expected)
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=TOLERANCE)
        assert norm == pytest.approx(right_norm, rel=TOLERANCE)


@pytest.mark.parametrize(("case", "strategy"), CASES)
def test_a_method_takes_the_same_steps_as_single_from_the_same_start(report, case, strategy):
    found = report["curves"][case]
    assert found[strategy]["start"] == 0.0
    assert len(found["expected"]) == STEPS
    assert_close(found[strategy]["found"], found["expected"])
    seen = max(
        abs(norm / still - 1) for (_, norm), (_, still) in zip(found["expected"], found["standing"], strict=True)
    )
    assert seen > 30 * TOLERANCE, "updates change too little: the comparison is blind"


def test_every_strategy_is_met():
    assert {name for _, name in CASES} == {*TURNS, *ALSO}


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_bit_equal_and_crosses_strategies(report, case, strategy):
    found = report["resume"][f"{case} {strategy}"]
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])
