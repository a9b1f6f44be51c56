"""Groups that are looked at together: how often chance alone makes a line or a verdict of one of them."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from trainer.evaluation.base import TaskConfig
from trainer.evaluation.report.comparison import compare_task, regression_lines
from trainer.evaluation.report.intervals import (
    Bootstrap,
    ShareCounts,
    resample_metrics,
    share_counts,
    unpaired_difference,
    wilson_interval,
)
from trainer.evaluation.report.permutation_test import exact_sign_flip_test, family_p_values
from trainer.evaluation.report.record import EvaluatedModel
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


def answered(kind, scores):
    """The rows of one model: `scores` of the score that the first metric of the task is the mean of."""
    name = kind.metrics[0].ratio_of_sums.numerator
    return [TaskRow(f"a:{number}", "", "", "", {name: score}) for number, score in enumerate(scores)]


def compared(kind, mine, theirs, *, paired=True):
    """The comparison of two models in a task, from the score of each row; not `paired`: the other's rows are not known."""
    rows, others, how = answered(kind, mine), answered(kind, theirs), Bootstrap(2000, 0)
    model = EvaluatedModel(rows={kind.name: rows}, metrics={kind.name: kind.compute_metrics(rows)})
    other_rows = others if paired else None
    return compare_task(kind, model, resample_metrics(kind, rows, how), other_rows, kind.compute_metrics(others), how)


@pytest.mark.parametrize(
    ("name", "num_rows", "verdict"),
    [("rouge", 3, "too few cases"), ("rouge", 5, "too few cases"), ("rouge", 6, "worse"), ("exact_match", 3, "worse")],
)
def test_few_rows_give_no_verdict_against_a_model_whose_rows_are_unknown(name, num_rows, verdict):
    """A bootstrap of three equal rows has an interval without width, unlike Wilson's of shares."""
    kind = task(name, path="x")
    metric = kind.metrics[0]
    own_score = 0.0 if name == "exact_match" else 0.25
    found = compared(kind, [own_score] * num_rows, [1.0] * num_rows, paired=False)
    assert not found["paired"] and found["metrics"][metric.name]["verdict"] == verdict
    assert found["metrics"][metric.name]["p"] is None
    assert bool(regression_lines(kind, found["metrics"])) == (verdict == "worse")


def test_few_rows_are_tested_exactly_and_a_note_says_so():
    """Three rows, all of them better: a bootstrap alone said p = 0.001 and better."""
    kind = task("exact_match", path="x")
    found = compared(kind, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    metric = found["metrics"]["exact_match"]
    assert (metric["p"], metric["verdict"]) == (0.25, "no difference shown")
    assert "few rows" in found["notes"][0] and "below 0.25, so no verdict" in found["notes"][0]
    # Rows in which the models agree say nothing about which is better, however many there are.
    same = compared(kind, [1.0] * 60, [0.0] * 5 + [1.0] * 55)
    assert (same["metrics"]["exact_match"]["p"], same["metrics"]["exact_match"]["verdict"]) == (
        0.0625,
        "no difference shown",
    )
    worse = compared(kind, [0.0] * 8, [1.0] * 8)
    assert (worse["metrics"]["exact_match"]["p"], worse["metrics"]["exact_match"]["verdict"]) == (2**-7, "worse")
    many = compared(kind, [1.0] * 13, [0.0] * 13)
    assert "notes" not in many and many["metrics"]["exact_match"]["verdict"] == "better"


@pytest.mark.parametrize(("won", "lost"), [(1, 0), (3, 0), (7, 1), (6, 6), (11, 1)])
def test_exact_test_of_right_and_wrong_rows_is_that_of_mcnemar(won, lost):
    from scipy.stats import binomtest

    kind = task("exact_match", path="x")
    mine, theirs = [1.0] * won + [0.0] * lost + [1.0] * 4, [0.0] * won + [1.0] * lost + [1.0] * 4
    found = exact_sign_flip_test(kind, kind.metrics[0], answered(kind, mine), answered(kind, theirs))
    assert found.num_pairs == won + lost
    assert found.p == pytest.approx(binomtest(won, won + lost).pvalue, abs=1e-12)


def test_exact_test_of_values_is_that_of_all_signs():
    kind, differences = task("rouge", path="x"), [0.3, 0.1, -0.2, 0.4, 0.25, 0.35]
    sums = np.abs(np.array(list(product((1, -1), repeat=6))) @ np.array(differences))
    mine = [0.5, *(0.5 + one for one in differences), 0.5]  # the first row and the last are equal
    found = exact_sign_flip_test(kind, kind.metrics[0], answered(kind, mine), answered(kind, [0.5] * 8))
    assert found.p == pytest.approx((sums >= sum(differences) - 1e-9).mean(), abs=1e-12)


def test_exact_test_of_a_metric_that_is_no_mean_exchanges_rows():
    """The largest score of all rows: the same p as that of all exchanges by hand."""
    kind = task("exact_match", path="x")
    metric = TaskMetric("m", "", ratio_of_sums=None)
    rows, others = answered(kind, [1.0, 2.0, 4.0]), answered(kind, [0.0, 0.0, 5.0])
    name = next(iter(rows[0].scores))

    def largest(given):
        values = np.array([row.scores[name] for row in given])
        return {"m": lambda weights: float((values * weights).max())}

    kind.weighted_metric_functions = largest
    found = []
    for signs in product((False, True), repeat=3):
        pairs = [
            (b, a) if is_exchanged else (a, b) for is_exchanged, a, b in zip(signs, [1, 2, 4], [0, 0, 5], strict=True)
        ]
        found.append(max(a for a, _ in pairs) - max(b for _, b in pairs))
    wanted = np.mean([abs(one) >= abs(found[0]) for one in found])
    assert exact_sign_flip_test(kind, metric, rows, others).p == pytest.approx(wanted)
