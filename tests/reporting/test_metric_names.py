"""Names of metrics in trackers, and back to those of `metrics.jsonl`."""

import pytest

from trainer.reporting.metric_names import (
    TRACKED_METRIC_BY_NAME,
    XAxis,
    recorded_name,
    restore_rated_reward_names,
    tracked_name,
    tracked_row,
)

FAMILIES = ("step_tokens/web", "loss/web", "experts/unused", "gpu/3/power_w", "router/z_loss", "logits/z_loss", "kl")


def test_a_name_of_a_step_has_one_name_in_trackers_and_comes_back():
    names = [*TRACKED_METRIC_BY_NAME, *FAMILIES]
    tracked = [tracked_name(name) for name in names]
    assert len(set(tracked)) == len(names)
    assert [recorded_name(name) for name in tracked] == names
    assert {name.partition("/")[0] for name in tracked} == {
        *("train", "speed", "time", "memory", "data", "experts", "gpu"),
    }


@pytest.mark.parametrize("name", ["eval/loss", "eval/facts/exact_match", "test/loss", "forgetting", "forgetting/a"])
def test_a_name_of_an_evaluation_or_summary_is_the_same_everywhere(name):
    assert tracked_name(name) == name and recorded_name(name) is None
    assert tracked_name("final/loss") == "final/loss" and tracked_name("overfitting/gap") == "overfitting/gap"


def test_a_row_is_renamed_by_what_it_is_of():
    step = {"loss": 2.0, "lr": 1e-4, "tokens": 64, "epoch": 0.5, "accuracy": 0.75}
    counters = {"train/global_step": 3, "time/training_s": 1.5, "train/num_tokens": 64, "train/epoch": 0.5}
    named = {**counters, "train/loss": 2.0, "train/learning_rate": 1e-4}
    assert tracked_row(step, step=3, training_s=1.5) == {**named, "train/accuracy": 0.75}
    pairs = tracked_row({**step, "margin": 0.2}, step=3, training_s=1.5)
    assert pairs == {**named, "train/rewards/accuracies": 0.75, "train/rewards/margins": 0.2}
    assert recorded_name("train/rewards/accuracies") == "accuracy" and recorded_name("time/training_s") is None

    evaluation = {"eval/loss": 1.0, "eval/accuracy": 0.5, "mine/score": 3.0, "tokens": 64, "epoch": 0.5}
    unchanged = {"eval/loss": 1.0, "eval/accuracy": 0.5, "mine/score": 3.0}
    assert tracked_row(evaluation, step=3, training_s=1.5) == {**counters, **unchanged}


def test_rewards_of_rated_answers_have_the_names_of_pairs_in_runs_that_begin_now():
    step = {"loss": 0.5, "kl": 0.1, "desirable_reward": 0.3, "undesirable_reward": -0.2, "margin": 0.5, "accuracy": 1.0}
    tracked = tracked_row(step, step=3, training_s=1.5)
    assert (tracked["train/rewards/chosen"], tracked["train/rewards/rejected"]) == (0.3, -0.2)
    read = {recorded_name(name): value for name, value in tracked.items() if recorded_name(name)}
    assert restore_rated_reward_names(read) == {**step, "step": 3}
    # A run that began under the second edition goes on with the names that it has.
    earlier = tracked_row(step, step=3, training_s=1.5, edition=2)
    assert (earlier["train/desirable_reward"], earlier["train/undesirable_reward"]) == (0.3, -0.2)
    assert restore_rated_reward_names({"desirable_reward": 0.3}) == {"desirable_reward": 0.3}


def test_an_axis_is_a_counter_that_every_row_has():
    axes = {axis.tracked_name for axis in XAxis}
    assert axes == tracked_row({"tokens": 1, "epoch": 0.1}, step=1, training_s=0.0).keys()
