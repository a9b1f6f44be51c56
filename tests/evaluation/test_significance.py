"""Groups that are looked at together: how often chance alone makes a line or a verdict of one of them."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.intervals import ShareCounts, share_counts, unpaired_difference, wilson_interval
from trainer.evaluation.report.permutation_test import family_p_values
from trainer.evaluation.tasks import counterfactual
from trainer.evaluation.tasks.base import RatioOfSums, TaskMetric, TaskRow
from trainer.evaluation.tasks.counterfactual import _effects_row
from trainer.evaluation.tasks.registry import TASK_KINDS
from trainer.evaluation.tasks.source import read_cases


def task(kind, **settings):
    return TASK_KINDS[kind]("mine", TaskConfig(kind=kind, **settings))


def shipped(drawn, apart=0.0, common=None):
    """Rows of the shipped templates: each group's value is chance, heavy-tailed, more in some cases; one group is apart."""
    kind, rows = task("counterfactual"), []
    for number, case in enumerate(read_cases(kind)):
        scale, groups = np.exp(drawn.normal()), dict.fromkeys(each.group for each in case.fields["variants"])
        values = {group: scale * drawn.standard_t(3) + apart * (group == "without") for group in groups}
        told = common[number] if common else dict.fromkeys(groups, 0.0)
        rows.append(_effects_row(case, {group: np.array([value + told[group]]) for group, value in values.items()}))
    return kind, rows


def test_significance_of_groups_is_seldom_found_where_a_model_treats_them_alike(monkeypatch):
    """13 groups in three attributes: 71 % of such reports had a line while each group had an interval of its own."""
    monkeypatch.setattr(counterfactual, "NUM_PERMUTATIONS", 400)

    def told(seed, apart):
        kind, rows = shipped(np.random.default_rng(seed), apart)
        return list(kind.notes(rows, defaultdict(lambda: (0.0, 0.0))))

    assert sum(bool(told(seed, 0.0)) for seed in range(100)) <= 13  # 5 of 100; more than 13 once in 2,000 times
    beginning = "without: the model holds these texts likelier than about the other groups, by "
    found = [line.removeprefix(beginning) for line in told(1, 30.0) if line.startswith(beginning)]
    assert len(found) == 1 and found[0][0].isdigit()


def test_significance_between_equal_models_is_seldom_found_by_any_group():
    """One interval for each group told one in 66 % of such comparisons."""

    def judged(seed, apart):
        drawn = np.random.default_rng(seed)
        kind, base = shipped(drawn)
        common = [{name[3:]: value for name, value in row.scores.items() if name.startswith("of_")} for row in base]
        sides = [shipped(drawn, more, common)[1] for more in (apart, 0.0)]
        return family_p_values(kind, kind.metrics_for(base)[1:], *sides, seed)

    assert (
        sum(min(judged(seed, 0.0).values()) < 0.05 for seed in range(60)) <= 9
    )  # 3 of 60; more than 9 once in 1,000 times
    found = judged(1, 30.0)
    assert found["effect_without"] < 0.01 < found["effect_female"]


def test_significance_corrected_p_is_that_of_all_exchanges():
    """Three rows, two groups: all eight exchanges of the models by hand."""
    kind, given = task("counterfactual"), [(1.0, 2.0), (3.0, -1.0), (2.0, 0.5)]
    sides = [
        [
            TaskRow(f"a:{n}", "", "", "", {"of_x": w * x, "in_x": 1.0, "of_y": w * y, "in_y": 1.0})
            for n, (x, y) in enumerate(given)
        ]
        for w in (1.0, 0.0)
    ]
    found, signs = np.array(given), np.array(list(product((1, -1), repeat=3)))
    chance = signs @ found
    spread = np.sqrt((chance**2).mean(0))
    wanted = (np.abs(chance / spread).max(1)[:, None] >= np.abs(found.sum(0)) / spread - 1e-12).mean(0)
    metrics = [metric for metric in kind.metrics_for(sides[0]) if metric.in_correction_family]
    assert list(family_p_values(kind, metrics, *sides, 0).values()) == pytest.approx(
        wanted, abs=0.04
    )  # 2,000 draws of eight


def test_a_family_of_metrics_that_are_no_ratio_is_exchanged_too():
    """BBQ's bias by category: the same p as that of the ratio which it is of disambiguated rows."""
    drawn, kind = np.random.default_rng(3), task("bbq", path="x")
    sides = [[], []]
    for number in range(60):
        for side, shift in zip(sides, (0.9, 0.2), strict=True):
            lean = 1.0 if drawn.random() < shift else -1.0
            scores = {"right": 0.0, "disambiguated": 1.0, "lean_disambiguated": lean, "named_disambiguated": 1.0}
            side.append(TaskRow(f"a:{number}", "", "", "", scores, "AB"[number % 2]))
    metrics = [each for each in kind.metrics_for(sides[0]) if each.name.startswith("bias_disambiguated_")]
    assert len(metrics) == 2 and max(family_p_values(kind, metrics, *sides, 0).values()) < 0.01
    same = family_p_values(kind, metrics, sides[0], sides[0], 0)
    assert list(same.values()) == [1.0, 1.0]


def test_significance_against_a_fixed_number_has_wider_intervals_for_a_family():
    mine = np.random.default_rng(0).normal(2.2, 1.0, 10000)
    alone, many = (unpaired_difference(2.2, 0.0, mine, greater_is_better=None, family_size=size) for size in (1, 20))
    assert (alone.verdict, many.verdict) == ("differs", "no difference shown") and alone.low == many.low


@pytest.mark.parametrize(("successes", "cases"), [(0, 4), (4, 4), (3, 17), (50, 100), (1, 1)])
def test_shares_have_the_interval_of_wilson(successes, cases):
    from scipy.stats import binomtest

    for level in (0.05, 0.05 / 20):
        theirs = binomtest(successes, cases).proportion_ci(confidence_level=1 - level, method="wilson")
        assert wilson_interval(ShareCounts(successes, cases), level) == pytest.approx(
            (theirs.low, theirs.high), abs=1e-12
        )


def test_only_rows_that_are_right_or_wrong_are_a_share():
    def rows(tops, bottoms):
        return [TaskRow("", "", "", "", {"x": x, "of": of}) for x, of in zip(tops, bottoms, strict=True)]

    plain, some = (
        TaskMetric("m", "", ratio_of_sums=RatioOfSums("x")),
        TaskMetric("m", "", ratio_of_sums=RatioOfSums("x", "of")),
    )
    assert share_counts(plain, rows([1.0, 0.0, 1.0], [1.0] * 3)) == (2, 3)
    assert share_counts(some, rows([1.0, 0.0, 0.0], [1.0, 1.0, 0.0])) == (1, 2)
    assert share_counts(plain, rows([0.5, 0.0], [1.0] * 2)) is None  # the mean of draws
    assert share_counts(some, rows([1.0, 0.0], [0.0, 1.0])) is None  # no share: its case does not count
    assert share_counts(some, rows([3.0, 1.0], [10.0, 7.0])) is None  # tokens, which differ in number
    assert share_counts(some, rows([0.0], [0.0])) is None
    assert share_counts(TaskMetric("m", "", ratio_of_sums=None), rows([1.0], [1.0])) is None
