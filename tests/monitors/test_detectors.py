"""What forgetting and degenerate answers are called: numbers by hand, scipy's tests, and false alarms."""

import numpy as np
import pytest
import scipy

from strategies.base import Progress
from trainer.evaluation.tasks.base import RatioOfSums, TaskMetric, TaskRow
from trainer.monitors import degenerate_answers, forgetting, instability
from trainer.monitors.base import Evidence, ModelAnswer
from trainer.monitors.config import (
    ChallengesConfig,
    ForgettingWatchConfig,
    OutputConfig,
    OverfittingConfig,
    Reaction,
    forgetting_limit,
)
from trainer.monitors.detectors import ChallengeDetectors

LOSS = TaskMetric("loss", "", greater_is_better=False, ratio_of_sums=RatioOfSums("nats", "targets"))


def rows(nats, targets):
    return [TaskRow("", "", "", "", {"nats": n, "targets": t}) for n, t in zip(nats, targets, strict=True)]


def compared(drawn, rise=0.0, noise=0.02, count=60):
    targets = drawn.integers(5, 50, count).astype(float)
    base = targets * drawn.normal(3, 0.5, count)
    now = base * (1 + rise + noise * drawn.normal(size=count))
    both = [float(each.sum() / targets.sum()) for each in (base, now)]
    return forgetting.compare_with_base(
        "general", LOSS, rows(base, targets), rows(now, targets), forgetting.BaseAndTunedValue(both[0], both[1])
    )


def test_forgetting_loss_and_its_error_are_those_of_the_jackknife():
    drawn = np.random.default_rng(0)
    targets, noise = np.full(40, 10.0), drawn.normal(size=40)
    base = 10 * drawn.normal(3, 0.5, 40)
    now = base * (1.05 + 0.02 * noise)
    found = forgetting.compare_with_base(
        "g",
        LOSS,
        rows(base, targets),
        rows(now, targets),
        forgetting.BaseAndTunedValue(base.sum() / 400, now.sum() / 400),
    )
    assert found.lost_share == pytest.approx(now.sum() / base.sum() - 1)
    left = np.array([np.delete(now, i).sum() / np.delete(base, i).sum() for i in range(40)])
    assert found.standard_error == pytest.approx(np.sqrt(39 / 40 * ((left - left.mean()) ** 2).sum()), rel=0.05)
    assert found.bound(0.01) == pytest.approx(
        found.lost_share - scipy.stats.t.ppf(0.99, 39) * found.standard_error, rel=1e-4
    )


def test_forgetting_has_few_false_alarms_and_is_found():
    drawn, config = np.random.default_rng(2), ForgettingWatchConfig()
    looks = 10
    null = [
        any(
            forgetting.find_problem(config, Evidence(5, {}, looks, compared_tasks=[compared(drawn, noise=0.3)]))
            for _ in range(looks)
        )
        for _ in range(100)
    ]
    assert np.mean(null) <= 0.08  # 5 %, and its chance
    found = forgetting.find_problem(config, Evidence(5, {}, looks, compared_tasks=[compared(drawn, rise=0.05)]))
    assert found is not None and not found.ends_run and found.numbers["forgetting"] == pytest.approx(0.05, abs=0.01)


def test_forgetting_limit_is_compared_with_the_number_itself():
    drawn = np.random.default_rng(3)
    seen = Evidence(5, {}, 10, compared_tasks=[compared(drawn, rise=0.05), compared(drawn, rise=-0.01)])
    assert forgetting.logged_metrics(seen)["forgetting"] == pytest.approx(0.05, abs=0.01)
    for limit, stops in (("3%", True), (0.03, True), ("8%", None), ("3 %", True)):
        found = forgetting.find_problem(ForgettingWatchConfig(limit=limit), seen)
        assert (found is None) if stops is None else (found is not None and found.ends_run)
    noted = forgetting.find_problem(ForgettingWatchConfig(limit="3%", action=Reaction.note), seen)
    assert noted is not None and not noted.ends_run
    for odd in ("three", "-1%", True, "nan"):
        with pytest.raises(ValueError, match=r"."):
            forgetting_limit(ForgettingWatchConfig(limit=odd))


GOOD = [f"The answer to number {n} is written in plain words and ends here." for n in range(12)]


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["", " ", "."] * 4, "empty"),
        (["so it goes on and on " * 10] * 12, "repeated"),
        (["重复的话" * 20] * 12, "repeated"),
        ([f"Das ist eine ganz andere Sprache, und zwar Deutsch, Nummer {n}." for n in range(12)], "foreign"),
    ],
)
def test_degenerate_answers_are_found(texts, kind):
    answers = [ModelAnswer(text, right) for text, right in zip(texts, GOOD, strict=True)]
    found = degenerate_answers.find_problem(OutputConfig(), Evidence(3, {}, 5, answers=answers))
    assert found is not None and found.numbers[kind] > 0.9 and set(found.numbers) <= {kind, "foreign"}
    assert (
        degenerate_answers.find_problem(OutputConfig(action=Reaction.off), Evidence(3, {}, 5, answers=answers)) is None
    )
    assert degenerate_answers.find_problem(OutputConfig(), Evidence(0, {}, 5, answers=answers)) is None  # the base's


def test_degenerate_answers_are_neither_good_ones_nor_single_bad_ones():
    answers = [ModelAnswer(text, right) for text, right in zip(["", "", *GOOD[2:]], GOOD, strict=True)]
    assert degenerate_answers.find_problem(OutputConfig(), Evidence(3, {}, 5, answers=answers)) is None
    for bad, other, of in ((5, 0, 12), (6, 3, 20), (3, 3, 9)):
        theirs = scipy.stats.fisher_exact([[bad, of - bad], [other, of - other]], alternative="greater").pvalue
        assert degenerate_answers.fisher_p_value_of_more_degenerate(bad, other, of) == pytest.approx(theirs)


@pytest.mark.parametrize(("action", "step", "ends"), [("stop", 100, True), ("stop", 105, False), ("note", 100, False)])
def test_run_that_overfitting_ended_stays_ended_when_it_goes_on(action, step, ends):
    """As after a kill in its export. At a step after the evaluation, training had gone on."""
    held_out = [4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8]
    evaluations = []
    for number, loss in enumerate(held_out):
        evaluations.append({"step": 10.0 * number, "held_out": loss, "train": 4.0 - 0.3 * number})
    challenges = ChallengeDetectors(
        ChallengesConfig(overfitting=OverfittingConfig(action=Reaction(action))), 10, "loss"
    )
    challenges.restore_findings(Progress(step=step, evaluations=evaluations))
    assert (challenges.early_stopping_text() is not None) is ends
    assert challenges.findings_by_detector.get("overfitting", {}).get("found", False) is ends


def test_run_that_goes_on_after_a_kill_in_its_export_records_what_it_found_before(tmp_path):
    """No further step is taken, in which anything could be found again; and nothing is written into the events twice."""
    events = tmp_path / "events.jsonl"
    progress = Progress()

    def start():
        config = ChallengesConfig(overfitting=OverfittingConfig(action=Reaction("note")))
        return ChallengeDetectors(config, 10, "loss", events_file=events)

    killed = start()
    for number, loss in enumerate([4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8]):
        progress.step = 10 * number
        progress.interval_steps, progress.interval_loss = 1, 4.0 - 0.3 * number
        killed.run_detectors(progress, {"eval/loss": loss})
    assert killed.findings_by_detector["overfitting"]["found"]
    found = {name: value for name, value in killed.findings_by_detector["overfitting"].items() if name != "last"}
    lines = events.read_text().splitlines()

    resumed = start()
    resumed.restore_findings(progress)
    resumed.record_findings_of_whole_run(progress)
    assert resumed.findings_by_detector["overfitting"] == found
    assert events.read_text().splitlines() == lines
    earlier = start()
    earlier.restore_findings(Progress(step=found["step"] - 10))  # of a checkpoint before it
    assert earlier.findings_by_detector == {}


def test_instability_needs_more_than_an_odd_batch():
    assert instability.find_instability(Progress(step=100, outliers=1)) is None
    found = instability.find_instability(Progress(step=100, outliers=4, skipped_steps=2))
    assert found is not None and "4 steps" in found.message
    assert instability.find_instability(Progress(step=100, rollbacks=1)) is not None
