"""Quantised and folded bases, and adapters that go on: the same steps as `single`, whatever is evaluated in between."""

import math

import pytest

from tests.helpers.covering import EVERYTHING, chosen, takes, values
from tests.helpers.learning import LEAST_LEARNED
from tests.helpers.uncompiled import bitsandbytes
from tests.parity.bases import CASES, ELSEWHERE, PREFERENCE, RESUMED, STRATEGIES
from tests.parity.methods import FEWER

bitsandbytes()

EXACT = 1e-5
MATRIX = [(case, name) for case, (_, _, names) in CASES.items() for name in names]


def assert_close(found, expected, rel=EXACT):
    assert len(found) == len(expected) == FEWER
    for (loss, norm), (right_loss, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=rel)
        assert norm == pytest.approx(right_norm, rel=rel)


def dear(case):
    """What gathers block by block takes longest, most so in products of 8 bits."""
    return takes(case) * (2 if "zero3" in case and "int8" in case else 1) + 0.5 * case[0].endswith("nf4")


@pytest.mark.parametrize(("case", "strategy"), chosen(MATRIX, values, dear))
def test_a_base_trains_alike_from_the_same_bytes(ask, case, strategy):
    found, lone = ask("bases", "curve", case, strategy), ask("bases", "lone", case)
    assert found["same"]
    assert_close(found["found"], lone["curve"])
    assert lone["learned"] > LEAST_LEARNED, "it learns nothing: the comparison is blind"


def test_quantised_and_folded_bases_differ_from_each_other(ask):
    """Losses of the first step: what is compared above is not everywhere the plain base."""
    first = {ask("bases", "lone", case)["curve"][0][0] for case in CASES}
    assert len(first) == len(CASES)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    chosen([(kind, name) for kind in ("nf4", "int8") for name in ("fsdp2", "zero3")], values, dear),
)
def test_evaluation_between_steps_changes_nothing(ask, kind, strategy):
    """bitsandbytes' own layer packs weights in eval mode on CPUs with bf16 instructions; gathered again, they are misread."""
    found = ask("bases", "evaluated", kind, strategy)
    assert found["with"] == found["without"]
    assert len(set(found["still"])) == 1


@pytest.mark.parametrize(
    ("case", "strategy"), chosen([(case, s) for case in RESUMED for s in ELSEWHERE], values, takes)
)
def test_resume_is_bit_equal_crosses_strategies_and_saves_no_base(ask, case, strategy):
    found = ask("bases", "resumed", case, strategy)
    assert found["resumed"] == found["uninterrupted"]
    for some, right in zip(found["elsewhere"], found["uninterrupted"], strict=True):
        assert some == pytest.approx(right, rel=EXACT)
    assert found["saved"]
    assert all(".lora_" in key for key in found["saved"])


@pytest.mark.parametrize(
    ("case", "strategy"), chosen([(case, s) for case in PREFERENCE for s in ("ddp", "fsdp2", "zero3")], values, dear)
)
def test_preference_tuning_compares_with_the_first_adapter(ask, case, strategy):
    found = ask("bases", "preference", case, strategy)
    assert found["expected"][0][0] == pytest.approx(math.log(2), rel=1e-6)
    assert_close(found["found"], found["expected"])
    assert found["learned"] > LEAST_LEARNED


# Under ZeRO-3 the other cases here have these bases, and test_features.py and test_methods.py bf16.
@pytest.mark.parametrize("strategy", ["fsdp2", *(["zero3", "ddp", "zero2"] if EVERYTHING else [])])
def test_half_precision_tracks_fp32(ask, strategy):
    """The band of the plain base, for rounding to 8 bits of mantissa."""
    found, expected = ask("bases", "half", strategy), ask("bases", "lone", "nf4")["curve"]
    assert_close(found, expected, rel=1e-2)
    assert found != expected


def test_every_strategy_is_met():
    assert {name for _, _, names in CASES.values() for name in names} == set(STRATEGIES)
