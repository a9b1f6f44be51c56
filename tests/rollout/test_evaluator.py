"""`eval/reward` and its company from groups and scores."""

from itertools import combinations

import numpy as np
import pytest

from trainer.rollout.evaluator import expected_best_of_k, reward_metrics
from trainer.rollout.types import Answer, AnswerGroup, GroupScores, Prompt


def group(place, lengths, source=""):
    prompt = Prompt(place, [1], "q", {}, f"f:{place}", source)
    return AnswerGroup(
        prompt, [Answer(draw, [1] * length, np.zeros(length), "", length < 4) for draw, length in enumerate(lengths)]
    )


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_choices(k):
    rewards = np.array([0.5, -1.0, 2.0, 0.5, 0.0])
    assert expected_best_of_k(rewards, k) == pytest.approx(
        np.mean([max(choice) for choice in combinations(rewards, k)])
    )


def test_metrics_leave_out_answers_without_a_score():
    groups = [group(0, [1, 2, 4, 4], "a"), group(1, [3, 3, 3, 3], "b")]
    first = GroupScores(
        np.array([0.0, 1.0, 1.0, 1.0]), {"right": np.array([0.0, 1.0, 1.0, 1.0]), "brief": np.full(4, np.nan)}
    )
    second = GroupScores(
        np.array([0.0, 0.0, 0.0, np.nan]), {"right": np.array([0.0, 0.0, 0.0, np.nan]), "brief": np.full(4, 2.0)}
    )
    metrics = reward_metrics(groups, [first, second], num_samples=4)
    assert metrics == {
        "eval/reward": pytest.approx(3 / 7),
        "eval/rewards/right/mean": pytest.approx(3 / 7),
        "eval/rewards/brief/mean": 2.0,
        "eval/completions/mean_length": pytest.approx(23 / 8),
        "eval/completions/clipped_ratio": 0.25,
        "eval/answers/unscored": 1.0,
        "eval/reward/a": 0.75,
        "eval/reward/b": 0.0,
        "eval/pass_at_2": 1.0,
        "eval/pass_at_4": 1.0,
    }
