"""Quantised and folded bases, and adapters that go on: the same steps as `single`, whatever is evaluated in between."""

import math

import pytest

from tests.helpers.launching import run_job

pytest.importorskip("bitsandbytes")
from tests.parity.bases import CASES, STEPS, STRATEGIES

EXACT = 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run_job("tests.parity.bases", 2, tmp_path_factory.mktemp("bases"))


def assert_close(found, expected, rel=EXACT):
    assert len(found) == len(expected)
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=rel)
        assert norm == pytest.approx(right_norm, rel=rel)


@pytest.mark.parametrize(
    ("case", "strategy"), [(case, name) for case, (_, _, names) in CASES.items() for name in names]
)
def test_a_base_trains_alike_from_the_same_bytes(report, case, strategy):
    found = report["curves"][case]
    assert found[strategy]["same"]
    assert len(found["expected"]) == STEPS
    assert_close(found[strategy]["found"], found["expected"])
    assert found["expected"][0][0] - found["expected"][-1][0] > 0.004, "it learns nothing: the comparison is blind"


def test_each_base_is_another(report):
    """Losses of the first step: what is compared above is not everywhere the plain base."""
    first = {report["curves"][case]["expected"][0][0] for case in CASES}
    assert len(first) == len(CASES)


@pytest.mark.parametrize("case", [f"{kind} {name}" for kind in ("nf4", "int8") for name in ("fsdp2", "zero3")])
def test_evaluation_between_steps_changes_nothing(report, case):
    """bitsandbytes' own layer packs weights in eval mode on CPUs with bf16 instructions; gathered again, they are misread."""
    found = report["evaluated"][case]
    assert found["with"] == found["without"]
    assert len(set(found["still"])) == 1


@pytest.mark.parametrize("case", ["nf4 fsdp2", "nf4 zero3", "from, nf4 fsdp2", "from, nf4 zero3"])
def test_resume_is_bit_equal_crosses_strategies_and_saves_no_base(report, case):
    found = report["resumed"][case]
    assert found["resumed"] == found["uninterrupted"]
    assert_close(found["elsewhere"], found["uninterrupted"])
    assert found["saved"]
    assert all(".lora_" in key for key in found["saved"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("case", ["plain", "nf4"])
def test_preference_tuning_compares_with_the_first_adapter(report, case, strategy):
    found = report["preference"][case]
    assert found["expected"][0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert_close(found[strategy], found["expected"])
    assert found["expected"][-1][0] < math.log(2) - 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_half_precision_tracks_fp32(report, strategy):
    """The band of the plain base, for rounding to 8 bits of mantissa."""
    expected = report["curves"]["nf4"]["expected"]
    assert_close(report["halves"][strategy], expected, rel=1e-2)
    assert report["halves"][strategy] != expected


def test_every_strategy_is_met():
    assert {name for _, _, names in CASES.values() for name in names} == set(STRATEGIES)
