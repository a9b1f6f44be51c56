"""Which checkpoint leaves a run, and the closing sentence, on hand-made ends of runs."""

from pathlib import Path

import pytest

from strategies.base import Progress
from trainer.export.config import ExportedCheckpoint
from trainer.export.exported_checkpoint import choose_exported_checkpoint, recorded_export_step
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RunRecord
from trainer.session.closing import closing_sentence
from trainer.session.last_lines import end_text

auto, best, last = ExportedCheckpoint.auto, ExportedCheckpoint.best, ExportedCheckpoint.last


@pytest.mark.parametrize(
    ("setting", "value", "facts", "saved", "chosen"),
    [
        (auto, 2.0, {}, [20, 30], (20, "best")),  # worse than the best, 1.5
        (auto, 1.5, {}, [20, 30], (30, "last")),  # no worse
        (auto, 1.5, {"stopped_early": True}, [20, 30], (20, "best")),
        (auto, 1.4, {"stopped_early": True}, [20, 30], (30, "last")),  # better by less than min_delta
        (auto, 1.0, {"greater_is_better": True}, [20, 30], (20, "best")),
        (auto, 2.0, {"greater_is_better": True}, [20, 30], (30, "last")),
        (auto, 2.0, {}, [30], (30, "last")),  # its checkpoint is gone
        (best, 1.5, {}, [20, 30], (20, "best")),
        (last, 2.0, {}, [20, 30], (30, "last")),
        (auto, None, {}, [20, 30], (30, "last")),  # nothing was evaluated at the end
        (auto, float("nan"), {}, [20, 30], (20, "best")),  # the weights overflowed on the way
    ],
)
def test_checkpoint_that_leaves_a_run(setting, value, facts, saved, chosen):
    after = {} if value is None else {"eval/loss": value}
    outcome = TrainingOutcome(Progress(step=30, best_metric=1.5, best_step=20), last_metrics=after, **facts)
    found = choose_exported_checkpoint(setting, outcome, saved)
    assert (found.step, found.which) == chosen and found.reason


def test_checkpoint_whose_loss_is_no_number_is_never_the_best():
    progress = Progress(step=30, best_metric=float("nan"), best_step=20)
    outcome = TrainingOutcome(progress, last_metrics={"eval/loss": 2.0}, stopped_early=True)
    assert choose_exported_checkpoint(auto, outcome, [20, 30]).step == 30


def test_last_checkpoint_is_not_called_the_best_where_a_better_one_was_not_saved():
    progress = Progress(step=30, best_metric=1.5, best_step=30, seen_metric=1.2, seen_step=20)
    chosen = choose_exported_checkpoint(auto, TrainingOutcome(progress, last_metrics={"eval/loss": 1.5}), [30])
    assert chosen.which == "last" and "step 20 had a better eval/loss (1.2000), and was not saved" in chosen.reason
    progress.seen_metric, progress.seen_step = 1.5, 30
    assert (
        "also the best"
        in choose_exported_checkpoint(auto, TrainingOutcome(progress, last_metrics={"eval/loss": 1.5}), [30]).reason
    )


def test_recorded_step_is_none_for_runs_without_a_choice():
    assert recorded_export_step({"exported_checkpoint": {"step": 14}}) == 14
    assert recorded_export_step({}) is None and recorded_export_step({"exported_checkpoint": {"step": "14"}}) is None


def sentence(held_out, train=None, *, before=4.0, from_rewards=False):
    train = train or held_out
    rows = [{"step": 0.0, "train": before, "held_out": before}] if before is not None else []
    for number, (value, trained) in enumerate(zip(held_out, train, strict=True), 1):
        rows.append({"step": 10.0 * number, "held_out": value, "train": trained})
    return closing_sentence(
        TrainingOutcome(Progress(step=10 * len(held_out), evaluations=rows)), from_rewards=from_rewards
    )


def test_last_lines_of_a_run_without_a_signal_advise_no_other_rate():
    block = {"steps": 2.0, "reward": 0.0, "frac_reward_zero_std": 2.0, "completions/clipped_ratio": 2.0}
    evaluations = [{"step": step, "train": 0.0, "held_out": 0.0} for step in (0.0, 2.0)]
    outcome = TrainingOutcome(Progress(step=2, evaluations=evaluations, reward_blocks=[block]))
    found = closing_sentence(outcome, from_rewards=True)
    assert found.startswith("in every step all answers to a prompt scored alike")
    assert "a larger objective.rollout.max_new_tokens" in found and "lower" not in found
    last_line = end_text(RunRecord(), Path("runs/idle"), outcome, None, []).splitlines()[-1]
    assert last_line.startswith(
        "next:       train again in another run.dir, with a larger objective.rollout.max_new_tokens"
    )


@pytest.mark.parametrize(
    ("found", "begins", "ends"),
    [
        (sentence([], before=None), "nobody can know", "one document in twenty"),
        (sentence([2.0]), "one evaluation cannot tell (held-out loss 4.0000 before, 2.0000 at the end)", "on the way"),
        (sentence([4.5]), "held-out loss 4.0000 before, 4.5000 at the end", "not more steps"),
        (sentence([3.0, 2.5, 2.2, 2.0]), "no sign of it: held-out loss best at step 40 (2.0000), 10%", "may help"),
        (sentence([3.0, 2.001, 2.0, 2.005]), "no sign of it: held-out loss best at step 30", "would gain little"),
        (sentence([3.0, 2.0, 2.6], [3.0, 2.0, 1.0]), "yes: held-out loss best at step 20 (2.0000), 30%", "more data"),
        (sentence([3.0, 2.0, 2.6], [3.0, 2.0, 2.5]), "no, but it got worse", "not more steps"),
        (sentence([5.0, 4.5, 4.2]), "no step is better than the model before training (4.0000)", "not more steps"),
        (
            sentence([0.2, 0.5, 0.3], [0.2, 0.5, 0.9], before=0.1, from_rewards=True),
            "yes: held-out reward best",
            "data",
        ),
    ],
)
def test_closing_sentence_answers_both_questions(found, begins, ends):
    assert found.startswith(begins) and found.endswith(ends)
