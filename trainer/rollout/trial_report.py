"""What some groups of answers say about a run before it is started: how often rewards tell answers apart, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.rollout.groups import is_idle_group
from trainer.rollout.record import json_number_or_none, prompt_as_text
from trainer.rollout.round import stack_rewards
from trainer.rollout.types import AnswerGroup, GroupScores, all_answers

GROUP_SIZES = (2, 4, 8, 16, 32)
SHOWN_CHARACTERS = 300
"""Characters of a prompt, from its end, where its question stands, and of an answer, from its beginning."""


def trial_report(groups: Sequence[AnswerGroup], scores: Sequence[GroupScores]) -> dict[str, Any]:
    """What a trial of the rewards shows before training, as JSON values: rewards, idle groups, lengths, and some answers.

    A group is all answers to one prompt; it is idle if all score alike, so that it teaches nothing. `scores`: one entry for each
    group. A number is None if nothing was scored. Nested values:

    - `reward`: a summary of the total rewards; `rewards`: such a summary by reward ({"maths": {"mean": 0.4, ...}}).
    - `idle_share_by_group_size`: the expected share of idle groups by size ({"2": 0.8, "4": 0.6, ...}).
    - `groups`: an entry for each group (`_group_record`).
    """
    rewards = stack_rewards(scores)
    answers = all_answers(groups)
    lengths = np.array([len(answer.ids) for answer in answers])
    summary_by_reward: dict[str, Any] = {}
    for name in scores[0].scores_by_reward:
        reward_values = np.stack([score.scores_by_reward[name] for score in scores])  # [groups, answers]
        summary_by_reward[name] = _reward_summary(reward_values)
    is_truncated = [not answer.has_ended for answer in answers]
    idle_shares = {str(size): expected_idle_share(rewards, size) for size in GROUP_SIZES}
    group_records = [_group_record(group, group_scores) for group, group_scores in zip(groups, scores, strict=True)]
    return {
        "prompts": len(groups),
        "draws": len(groups[0].answers),  # answers to each prompt
        "reward": _reward_summary(rewards),
        "rewards": summary_by_reward,
        "timed_out": sum(score.num_timed_out for score in scores),
        "idle_share_by_group_size": idle_shares,
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
        "truncated_share": float(np.mean(is_truncated)),
        "groups": group_records,
    }


def _reward_summary(rewards: np.ndarray) -> dict[str, float | None]:
    """Summarise the rewards of a trial by name: mean, range, deviation, share of idle groups, number of unscored answers.

    `rewards`: float64 [groups, answers], nan where unscored; a group is all answers to one prompt. A number is None if nothing
    was scored.
    """
    scored_rewards = rewards[~np.isnan(rewards)]
    deviations = []
    for group_rewards in rewards:
        scored = group_rewards[~np.isnan(group_rewards)]
        if len(scored) > 1:
            deviations.append(float(scored.std(ddof=1)))
    return {
        "mean": float(scored_rewards.mean()) if len(scored_rewards) else None,
        "least": float(scored_rewards.min()) if len(scored_rewards) else None,
        "most": float(scored_rewards.max()) if len(scored_rewards) else None,
        "spread": float(np.mean(deviations)) if deviations else None,
        "idle_share": float(is_idle_group(rewards).mean()),
        "unscored": int(np.isnan(rewards).sum()),
    }


def expected_idle_share(rewards: np.ndarray, group_size: int) -> float | None:
    """Estimate for another group size the share of groups whose answers would all score alike; None if nothing was scored.

    `rewards`: float64 [groups, answers], nan where unscored. Answers to a prompt are assumed to be independent: if a share p of
    them has some score, all `group_size` have it with the chance p ** group_size. Few answers underestimate rare scores.
    """
    chances = []  # for each prompt, that all answers score alike
    for group_rewards in rewards:
        scored = group_rewards[~np.isnan(group_rewards)]
        if len(scored):
            _, counts = np.unique(scored, return_counts=True)
            score_shares = counts / len(scored)
            chances.append(float((score_shares**group_size).sum()))
    return float(np.mean(chances)) if chances else None


def _group_record(group: AnswerGroup, scores: GroupScores) -> dict[str, Any]:
    """Show a group (all answers to one prompt) as JSON values: its mean reward, best and worst answer, unless none is scored.

    {"where": "prompts.jsonl:3", "prompt": "2 + 2?", "mean": 0.5, "best": {"reward": 1.0, "rewards": {"maths": 1.0}, "ended":
    true, "answer": "4"}, "worst": ...}.
    """
    record: dict[str, Any] = {
        "where": group.prompt.origin,
        # The end of a prompt, where its question stands; of an answer, the beginning.
        "prompt": prompt_as_text(group.prompt.text)[-SHOWN_CHARACTERS:],
    }
    scored = np.flatnonzero(~np.isnan(scores.total))  # indices of the scored answers
    if not len(scored):
        return record
    record["mean"] = float(scores.total[scored].mean())
    best = int(scored[np.argmax(scores.total[scored])])
    worst = int(scored[np.argmin(scores.total[scored])])
    for name, index in (("best", best), ("worst", worst)):
        answer = group.answers[index]
        answer_rewards = {
            reward: json_number_or_none(values[index]) for reward, values in scores.scores_by_reward.items()
        }
        record[name] = {
            "reward": float(scores.total[index]),
            "rewards": answer_rewards,
            "ended": answer.has_ended,
            "answer": answer.text[:SHOWN_CHARACTERS],
        }
    return record
