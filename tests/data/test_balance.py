import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.data.config import BalanceBy, BalanceConfig, BalanceTarget
from trainer.data.selection.balance import balance_problems, resample_groups

LABEL = BalanceBy.label


def members(*sizes):
    """The group of each document, the groups mixed up in a fixed way."""
    return np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))


def names(number):
    return [f"g{n}" for n in range(number)]


def run(sizes, seed=0, **settings):
    group_of = members(*sizes)
    chosen, report = resample_groups(names(len(sizes)), group_of, BalanceConfig(by=LABEL, **settings), seed)
    return group_of, chosen, report


def after(report):
    return [row["after"] for row in report.values()]


CONFIGS = st.builds(
    BalanceConfig,
    by=st.just(LABEL),
    target=st.sampled_from([BalanceTarget.natural, BalanceTarget.temperature, BalanceTarget.uniform]),
    temperature=st.floats(1, 10),
    cap=st.none() | st.integers(1, 30),
    max_repeats=st.integers(1, 5),
)


@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=5).filter(any), config=CONFIGS, seed=st.integers(0, 2**40)
)
def test_balance_draw_keeps_order_caps_and_counts_for_any_sizes(sizes, config, seed):
    group_of = members(*sizes)
    chosen, report = resample_groups(names(len(sizes)), group_of, config, seed)
    assert chosen.dtype == np.int64 and (np.diff(chosen) >= 0).all()  # input order, repeats side by side
    assert chosen.tolist() == resample_groups(names(len(sizes)), group_of, config, seed)[0].tolist()
    uses = np.bincount(chosen, minlength=len(group_of))
    assert 0 < len(chosen) == sum(after(report)) and uses.max(initial=0) <= config.max_repeats
    for group, row in enumerate(report.values()):
        of_group = uses[group_of == group]
        assert row["before"] == sizes[group] and row["after"] == of_group.sum()
        assert row["dropped"] == (of_group == 0).sum() and row["repeats"] == of_group.max(initial=0)
        assert of_group.size == 0 or of_group.max() - of_group.min() <= 1
        assert (row["after"] > 0) == (sizes[group] > 0)  # no group vanishes
        assert config.cap is None or row["after"] <= config.cap
        if config.max_repeats > 1:
            assert row["after"] >= min(sizes[group], config.cap or sizes[group])
    for share in ("share_before", "share_after", "share_target"):
        assert math.isclose(sum(row[share] for row in report.values()), 1)


@given(sizes=st.lists(st.integers(1, 60), min_size=2, max_size=5), temperature=st.floats(1, 6))
def test_balance_shares_follow_the_temperature_within_rounding(sizes, temperature):
    _, _, report = run(sizes, target=BalanceTarget.temperature, temperature=temperature, max_repeats=100)
    powers = [size ** (1 / temperature) for size in sizes]
    for row, power in zip(report.values(), powers, strict=True):
        wanted = power / sum(powers)
        assert math.isclose(row["share_target"], wanted, rel_tol=1e-9)
        slack = (len(sizes) + 1) / sum(after(report))
        assert abs(row["share_after"] - wanted) <= slack


def test_balance_without_a_target_changes_nothing():
    chosen, report = resample_groups(names(2), members(30, 5), BalanceConfig(by=LABEL), 1)
    assert chosen.tolist() == list(range(35)) and after(report) == [30, 5]


def test_balance_uniform_repeats_and_leaves_out():
    assert after(run([30, 5, 10], target=BalanceTarget.uniform, max_repeats=100)[2]) == [30, 30, 30]
    assert after(run([30, 5, 10], target=BalanceTarget.uniform, max_repeats=1)[2]) == [5, 5, 5]


def test_balance_report_names_what_limits_a_short_group():
    _, _, report = run([100, 10], target=BalanceTarget.uniform)
    assert after(report) == [100, 40]
    assert [row["limited_by"] for row in report.values()] == [None, "max_repeats"]
    _, _, report = run([100, 10], target=BalanceTarget.shares, shares={"g0": 1, "g1": 9}, cap=50, max_repeats=50)
    assert after(report) == [50, 50] and report["g1"]["limited_by"] == "cap"
    assert report["g1"]["share_target"] == 0.9 and report["g1"]["share_after"] == 0.5


def test_balance_cap_comes_before_the_shares():
    _, _, report = run([1000, 9], target=BalanceTarget.temperature, temperature=2, cap=81, max_repeats=9)
    assert report["g0"]["share_target"] == 0.75 and after(report) == [81, 27]


def test_balance_by_set_shares_leaves_a_group_of_share_zero_out():
    _, chosen, report = run([40, 40, 40], target=BalanceTarget.shares, shares={"g0": 3, "g1": 1, "g2": 0})
    assert after(report) == [120, 40, 0] and report["g0"]["share_target"] == 0.75
    group_of, chosen, report = run(
        [40, 40, 9],
        target=BalanceTarget.shares,
        shares={"g0": 0.8, "g1": 0.2, "g2": 0},
        max_repeats=1,
    )
    assert after(report) == [40, 10, 0] and report["g2"]["dropped"] == 9
    assert Counter(group_of[chosen].tolist()) == {0: 40, 1: 10}


def test_balance_keeps_a_document_of_a_group_with_a_tiny_share():
    _, _, report = run([20, 20], target=BalanceTarget.shares, shares={"g0": 1, "g1": 1e-6}, max_repeats=1)
    assert after(report) == [20, 1]
    _, _, report = run([20, 20], target=BalanceTarget.shares, shares={"g0": 1, "g1": 1e-30}, max_repeats=1000)
    assert after(report) == [20_000, 20] and report["g0"]["limited_by"] == "max_repeats"


def test_balance_draws_depend_on_the_seed_and_are_fair():
    uses = sum(
        np.bincount(run([40, 10], seed=seed, cap=10)[1], minlength=50)[members(40, 10) == 0] for seed in range(400)
    )
    assert uses.sum() == 4000 and (abs(uses - 100) < 5 * math.sqrt(100 * 0.75)).all()


def test_balance_with_a_larger_cap_keeps_what_a_smaller_cap_kept():
    small, large = (set(run([40, 3], cap=cap)[1].tolist()) for cap in (5, 9))
    assert small < large


def test_balance_draw_never_changes_between_versions():
    assert resample_groups(["a"], np.zeros(12, dtype=np.int64), BalanceConfig(by=LABEL, cap=5), 42)[0].tolist() == [
        1,
        4,
        7,
        9,
        11,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": BalanceTarget.shares}, r"data\.balance\.shares is empty"),
        ({"shares": {"g0": 1}}, r"set data\.balance\.target=shares to use it"),
        ({"target": BalanceTarget.shares, "shares": {"g0": -1, "g1": 1}}, r"data\.balance\.shares\.g0=-1: must be"),
        ({"target": BalanceTarget.shares, "shares": {"g0": 1}}, r"no share for g1"),
        ({"target": BalanceTarget.shares, "shares": {"g0": 0, "g1": 0}}, r"every share is 0"),
        (
            {"target": BalanceTarget.shares, "shares": {"g0": 1, "g1": 1, "g11": 1}},
            r"g11=1: no document.*did you mean g1",
        ),
    ],
)
def test_balance_settings_that_cannot_be_met_are_refused(settings, message):
    if found := [*balance_problems(BalanceConfig(by=LABEL, **settings))]:  # before any document is read
        assert re.search(message, "\n".join(found))
        return
    with pytest.raises(ConfigError, match=message):
        run([5, 6], **settings)


def test_balance_share_for_a_group_without_documents_is_refused():
    config = BalanceConfig(by=LABEL, target=BalanceTarget.shares, shares={"a": 1, "b": 1})
    with pytest.raises(ConfigError, match=r"data\.balance\.shares\.b=1: no document is in that group"):
        resample_groups(["a", "b"], np.zeros(3, dtype=np.int64), config, 0)
