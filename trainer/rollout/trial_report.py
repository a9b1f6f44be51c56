"""What some groups of answers say about a run before it is started: how often rewards tell answers apart, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.rollout.record import prompt_text
from trainer.rollout.round import stack_rewards
from trainer.rollout.types import Group, GroupScores

GROUP_SIZES = (2, 4, 8, 16, 32)
SHOWN_CHARACTERS = 300


def trial_report(groups: Sequence[Group], scores: Sequence[GroupScores]) -> dict[str, Any]:
    """What a trial of the rewards shows before training, as JSON values: rewards, idle groups, lengths, and some answers.

    A group is all answers to one prompt; it is idle if all score alike. `scores`: one entry a group. A number is None if nothing
    was scored. Nested values: `reward` is a summary of the totals, `rewards` such a summary by reward ({"maths": {"mean": 0.4,
    ...}}), `idle_share_by_group_size` the expected share by size ({"2": 0.8, "4": 0.6, ...}).
    """
    rewards = stack_rewards(scores)
    answers: list[Any] = []
    for group in groups:
        answers += group.answers
    lengths = np.array([len(answer.ids) for answer in answers])
    by_reward: dict[str, Any] = {}
    for name in scores[0].by_reward:
        reward_values = np.stack([score.by_reward[name] for score in scores])  # [groups, answers]
        by_reward[name] = _summary(reward_values)
    truncated = [not answer.has_ended for answer in answers]
    idle_shares = {str(size): idle_share(rewards, size) for size in GROUP_SIZES}
    shown_groups = [_shown_group(group, score) for group, score in zip(groups, scores, strict=True)]
    return {
        "prompts": len(groups),
        "draws": len(groups[0].answers),
        "reward": _summary(rewards),
        "rewards": by_reward,
        "timed_out": sum(score.timed_out for score in scores),
        "idle_share_by_group_size": idle_shares,
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "truncated_share": float(np.mean(truncated)),
        "groups": shown_groups,
    }


def _summary(rewards: np.ndarray) -> dict[str, float | None]:
    """Mean, range, spread within groups, idle groups and unscored answers of `rewards [groups, answers]`, nan where unscored."""
    known = rewards[~np.isnan(rewards)]
    spreads = []
    for group in rewards:
        scored = group[~np.isnan(group)]
        if len(scored) > 1:
            spreads.append(float(scored.std(ddof=1)))
    return {
        "mean": float(known.mean()) if len(known) else None,
        "least": float(known.min()) if len(known) else None,
        "most": float(known.max()) if len(known) else None,
        "spread": float(np.mean(spreads)) if spreads else None,
        "idle_share": float(is_idle_group(rewards).mean()),
        "unscored": int(np.isnan(rewards).sum()),
    }


def idle_share(rewards: np.ndarray, size: int) -> float | None:
    """The expected share of groups of `size` answers that all score alike, by the rates seen; None where nothing was scored.

    `rewards`: float64 [groups, answers]. Answers to a prompt are taken as independent, so the chance is the sum of the rate of
    each score to the power of `size`. That of rare scores is underestimated by few answers.
    """
    shares = []
    for group in rewards:
        scored = group[~np.isnan(group)]
        if len(scored):
            _, counts = np.unique(scored, return_counts=True)
            rates = counts / len(scored)
            shares.append(float((rates**size).sum()))
    return float(np.mean(shares)) if shares else None


def _shown_group(group: Group, scores: GroupScores) -> dict[str, Any]:
    """A group (all answers to one prompt) for the report, with its best and its worst answer; without these if unscored.

    {"where": "prompts.jsonl:3", "prompt": "2 + 2?", "mean": 0.5, "best": {"reward": 1.0, "rewards": {"maths": 1.0}, "ended":
    true, "answer": "4"}, "worst": ...}.
    """
    shown: dict[str, Any] = {"where": group.prompt.origin, "prompt": prompt_text(group.prompt.text)[-SHOWN_CHARACTERS:]}
    scored = np.flatnonzero(~np.isnan(scores.total))  # numbers of the scored answers
    if not len(scored):
        return shown
    shown["mean"] = float(scores.total[scored].mean())
    best = int(scored[np.argmax(scores.total[scored])])
    worst = int(scored[np.argmin(scores.total[scored])])
    for name, number in (("best", best), ("worst", worst)):
        answer = group.answers[number]
        answer_rewards = {reward: _number(values[number]) for reward, values in scores.by_reward.items()}
        shown[name] = {
            "reward": float(scores.total[number]),
            "rewards": answer_rewards,
            "ended": answer.has_ended,
            "answer": answer.text[:SHOWN_CHARACTERS],
        }
    return shown


def _number(reward: float) -> float | None:
    """A reward as a JSON value: None for nan."""
    return None if np.isnan(reward) else float(reward)
