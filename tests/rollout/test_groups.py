"""Advantages, groups without spread, and weights of answers, beside plain arithmetic."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import DataError
from tests.helpers.covering import examples
from trainer.objectives.grpo_config import Baseline, Normalise, Scale
from trainer.rollout.groups import advantages, answer_weights, is_idle_group, normalised_sum

NAN = math.nan
ROUND = np.array(
    [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.2, NAN, 0.8, NAN], [NAN, NAN, NAN, NAN], [2.0, NAN, NAN, NAN]]
)


def scored(rewards: list[float]) -> list[float]:
    return [reward for reward in rewards if not math.isnan(reward)]


def by_hand(rewards: np.ndarray, baseline: Baseline, scale: Scale) -> list[list[float]]:
    """The same by definition, answer by answer."""
    everything = scored(rewards.ravel().tolist())
    found = []
    for group in rewards.tolist():
        row = []
        for place, reward in enumerate(group):
            others = scored(group[:place] + group[place + 1 :])
            mean = fmean(scored(group)) if scored(group) else 0.0
            bases = {Baseline.group: mean, Baseline.batch: fmean(everything), Baseline.none: 0.0}
            bases[Baseline.others] = fmean(others) if others else reward
            deviation = stdev(scored(group)) if len(scored(group)) > 1 else 0.0
            divisors = {Scale.std: deviation + 1e-4, Scale.batch_std: stdev(everything) + 1e-4}
            divisors |= {Scale.mean: mean or 1.0, Scale.none: 1.0}
            row.append(0.0 if math.isnan(reward) else (reward - bases[baseline]) / divisors[scale])
        found.append(row)
    return found


@pytest.mark.parametrize("baseline", Baseline)
@pytest.mark.parametrize("scale", Scale)
def test_advantages_are_those_of_their_definition(baseline, scale):
    found = advantages(ROUND, baseline, scale)
    np.testing.assert_allclose(found, by_hand(ROUND, baseline, scale), rtol=1e-12, atol=1e-12)


def test_several_rewards_become_the_advantages_of_trl():
    golden = json.loads((Path(__file__).parents[1] / "golden" / "grpo_advantages.json").read_text())
    assert golden["trl"] == "1.16.0"
    weights = dict(zip("abc", golden["weights"], strict=True))
    for case in golden["cases"]:
        rewards = np.array(case["rewards"], dtype=np.float64)  # [groups, answers, functions]; None becomes nan
        by_reward = dict(zip("abc", np.moveaxis(rewards, 2, 0), strict=True))
        is_unscored = np.isnan(rewards).all(axis=2)
        total = np.where(is_unscored, NAN, np.nansum(rewards * golden["weights"], axis=2))
        if case["aggregation"] == "sum_then_normalize":
            found = advantages(total, Baseline.group, Scale.std)
        else:
            combined = normalised_sum(by_reward, weights, total)
            assert is_idle_group(combined).tolist() == [False, False, True, False, False]
            found = advantages(combined, Baseline.batch, Scale.batch_std)
        np.testing.assert_allclose(found, case["advantages"], rtol=1e-6, atol=1e-6)


def test_a_reward_without_weight_and_an_unscored_answer_do_not_count_in_a_normalised_sum():
    by_reward = {"a": np.array([[1.0, 0.0, 5.0]]), "control": np.array([[9.0, 1.0, 4.0]])}
    total = np.array([[1.0, 0.0, NAN]])
    found = normalised_sum(by_reward, {"a": 2.0, "control": 0.0}, total)
    size = 2 * 0.5 / (math.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(found, [[size, -size, NAN]])


def test_advantages_are_those_that_trl_documents():
    """GRPO with its own numbers: (r - mean) / (std + 1e-4), unbiased, and RLOO's r - mean of the others."""
    rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(
        advantages(rewards, Baseline.group, Scale.std), [[1.4997, -0.4999, -0.4999, -0.4999]], atol=1e-4
    )
    np.testing.assert_allclose(advantages(rewards, Baseline.others, Scale.none), [[1.0, -1 / 3, -1 / 3, -1 / 3]])


GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-5, 5) | st.just(NAN), min_size=size, max_size=size), min_size=1, max_size=5
    )
)


@settings(max_examples=examples(60), deadline=None)
@given(GROUPS, st.floats(-3, 3), st.permutations(range(6)))
def test_advantages_of_a_group_sum_to_nothing_and_do_not_depend_on_place_or_offset(groups, offset, order):
    rewards = np.array(groups)
    found = advantages(rewards, Baseline.group, Scale.none)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-9)
    assert (found[np.isnan(rewards)] == 0).all()
    np.testing.assert_allclose(advantages(rewards + offset, Baseline.group, Scale.none), found, atol=1e-9)
    places = [place for place in order if place < rewards.shape[1]]
    np.testing.assert_allclose(
        advantages(rewards[:, places], Baseline.group, Scale.std),
        advantages(rewards, Baseline.group, Scale.std)[:, places],
        atol=1e-6,
    )
    # The others' mean leaves the answer itself out, which stretches every distance by n / (n - 1).
    number = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    stretched = found * number / np.maximum(number - 1, 1)
    np.testing.assert_allclose(advantages(rewards, Baseline.others, Scale.none), stretched, atol=1e-9)


def test_a_group_is_idle_if_its_scored_answers_score_alike():
    assert is_idle_group(ROUND).tolist() == [False, True, False, True, True]
    nearly = np.array([[0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.3001]])
    assert is_idle_group(nearly).tolist() == [True, False]


def test_dividing_by_a_negative_mean_is_an_error():
    with pytest.raises(DataError, match=r"objective.scale=mean: a reward is -0.5"):
        advantages(np.array([[1.0, -0.5]]), Baseline.group, Scale.mean)


@pytest.mark.parametrize(
    ("normalise", "weights", "count"),
    [
        (Normalise.token, [1, 1, 0], 6),
        (Normalise.answer, [1 / 4, 1 / 2, 0], 2),
        (Normalise.constant, [1 / 8, 1 / 8, 0], 2),
        (Normalise.sum, [1, 1, 0], 2),
    ],
)
def test_an_answer_that_is_not_learned_counts_in_no_sum(normalise, weights, count):
    found, found_count = answer_weights(np.array([4, 2, 0]), normalise, 8)
    assert (found.tolist(), found_count) == (weights, count)
    assert answer_weights(np.array([0]), normalise, 8) == (np.array([0.0]), 0)
