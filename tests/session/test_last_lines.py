"""The last lines of a run: which weights are the best, beside those before training, and what to do next."""

from pathlib import Path

import pytest

from strategies.base import Progress
from trainer.reporting.outcome import TrainingOutcome
from trainer.reporting.run_record import RunRecord
from trainer.session.last_lines import end_text

RUN = Path("my runs/a")
EXPORT = RUN / "export"
OF_BEST = "shardtune export 'my runs/a' checkpoint=best"


def lines_of(outcome, *, export=EXPORT, **facts):
    """(the lines that begin with `best:`, the last line) of a run."""
    record = RunRecord(**{"objective": "sft", **facts})
    lines = end_text(record, RUN, outcome, export, [("W&B", "wandb sync x")]).splitlines()
    return [line for line in lines if line.startswith("best:")], lines[-1]


def outcome(before, best, best_step, *, after=2.0, **facts):
    progress = Progress(step=30, best_metric=best, best_step=best_step)
    return TrainingOutcome(
        progress, metrics_before_training={"eval/loss": before}, last_metrics={"eval/loss": after}, **facts
    )


def test_best_weights_are_those_before_training_if_no_step_is_better():
    best, last = lines_of(outcome(1.5, 1.75, 20))
    assert best == ["best:       no checkpoint has a better eval/loss than before training (1.5000)"]
    assert last == "next:       train again in another run.dir, with a lower optim.lr"
    found = {"overfitting": {"found": True, "first_step": 9, "says": "x", "remedies": ["fewer epochs", "y"]}}
    _, last = lines_of(outcome(1.5, 1.75, 20, findings_by_detector=found))
    assert last.endswith("with fewer epochs")
    best, last = lines_of(outcome(1.5, 1.75, 20, after=1.6, greater_is_better=True))
    assert best == [f"best:       step 20 had eval/loss 1.7500: {OF_BEST}"]


def test_best_step_before_the_last_one_is_exported_next_also_without_a_finding():
    best, last = lines_of(outcome(2.5, 1.75, 20))
    assert best == [f"best:       step 20 had eval/loss 1.7500: {OF_BEST}"]
    assert last == f"next:       {OF_BEST}"


@pytest.mark.parametrize(
    ("objective", "export", "gates", "last"),
    [
        ("sft", EXPORT, {}, "next:       shardtune chat 'my runs/a'"),
        ("dpo", EXPORT, {}, "next:       shardtune chat 'my runs/a'"),
        ("reward", EXPORT, {}, f"next:       read {EXPORT / 'README.md'}, the model card"),
        ("sft", None, {}, "next:       shardtune export 'my runs/a'"),
        ("sft", None, {"passed": False}, "W&B:        wandb sync x"),
    ],
)
def test_last_line_says_what_to_do_next(objective, export, gates, last):
    best, said = lines_of(outcome(2.5, 1.75, 30), export=export, objective=objective, gates=gates)
    assert said == last and not best
    nothing_measured = TrainingOutcome(Progress(step=30))
    assert lines_of(nothing_measured, export=export, objective=objective, gates=gates)[1] == last


@pytest.mark.parametrize(
    ("export", "facts", "begins"),
    [
        (EXPORT, {}, f"model:      {EXPORT} ("),
        (None, {}, "not exported: export.at_end=false; chosen was "),
        (None, {"gates": {"gates": [{"passed": True}]}}, "not exported: export.at_end=false; chosen was "),
        (None, {"gates": {"gates": [{"passed": False}]}}, "not exported: for the reason above; chosen was "),
        (None, {"not_exported": ["model.safetensors"]}, "not exported: for the reason above; chosen was "),
        (None, {"export_problem": "a file is damaged"}, "not exported: for the reason above; chosen was "),
    ],
)
def test_weights_that_were_chosen_are_named_in_a_whole_sentence(export, facts, begins):
    chosen = {"step": 30, "which": "last", "reason": "no step had a better eval/loss"}
    record = RunRecord(objective="sft", exported_checkpoint=chosen, **facts)
    line = begins + "step 30, the last: no step had a better eval/loss" + (")" if begins.endswith("(") else "")
    assert line in end_text(record, RUN, outcome(2.5, 1.75, 30), export, []).splitlines()
