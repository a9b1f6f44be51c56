"""Scores of a review: win rates with intervals, agreement, disputed items, careless reviewers; and their record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from launch.review.agreement import TIE, TUNED_WINS, Votes, alpha, pairwise_kappas, winner
from launch.review.answers import Reviewer
from launch.review.careless_reviewers import RULES, carelessness_flags
from launch.review.sheet import BASE, TUNED
from trainer.config.review import OVERALL

RESAMPLES = 10_000
MAX_LISTED = 50
WIN_VALUE = {TUNED_WINS: 1.0, TIE: 0.5}
METHOD = (
    "share of prompts that the tuned model wins, ties and equal answers as halves, reviewers of a prompt as their mean; "
    f"bootstrap over prompts, {RESAMPLES} resamples, seed 0, 95 % percentile interval"
)


def score_review(review: str, key: dict[str, Any], reviewers: list[Reviewer], dropped: list[str]) -> dict[str, Any]:
    """The record of a review, JSON values; `dropped` are reviewers of these whose votes do not count."""
    counted = [reviewer for reviewer in reviewers if reviewer.name not in dropped]
    votes = {question: _votes(counted, key, question) for question in [OVERALL, *key["rubric"]]}
    # Also those of dropped reviewers: the record shows why they were dropped.
    flags_by_name = {}
    for reviewer in reviewers:
        flags_by_name[reviewer.name] = carelessness_flags(reviewer, key, _majority(reviewer, reviewers, key))
    arms = [arm for arm in key["arms"] if arm != TUNED]
    unflagged = [reviewer for reviewer in counted if not flags_by_name[reviewer.name]]
    without_flagged = None
    if 0 < len(unflagged) < len(counted):
        without_flagged = _metrics({OVERALL: _votes(unflagged, key, OVERALL)}, key, arms)["win_rate"]
    summaries = []
    for reviewer in reviewers:
        is_dropped = reviewer.name in dropped
        summaries.append(_reviewer_summary(reviewer, key, flags_by_name[reviewer.name], is_dropped))
    return {
        "version": 1,
        "review": review,
        "time": time.time(),
        "model": key["model"],
        "arms": key["arms"],
        "method": METHOD,
        "num_prompts": key["num_prompts"],
        "num_same": dict(Counter(pair["other"] for pair in key["same"])),
        "rubric": key["rubric"],
        "reviewers": summaries,
        "rules": RULES,
        "metrics": _metrics(votes, key, arms),
        "without_flagged": without_flagged,
        "kappa": pairwise_kappas(votes[OVERALL]),
        "disagreements": _disagreements(votes[OVERALL], counted, key),
    }


def _votes(reviewers: Iterable[Reviewer], key: dict[str, Any], question: str) -> Votes:
    """Who won, by (reviewer, item); repeated items are for the reviewer's own consistency alone."""
    items = {item["id"]: item for item in key["items"] if item["repeats"] is None}
    votes = {}
    for reviewer in reviewers:
        for item_id, answer in reviewer.items.items():
            if item_id in items and question in answer.answers:
                votes[reviewer.name, item_id] = winner(answer.answers[question], items[item_id])
    return votes


def _metrics(votes: dict[str, Votes], key: dict[str, Any], arms: list[str]) -> dict[str, dict[str, Any]]:
    """Win rates and agreement by the names that gates use; `arms`: those that the tuned model is compared with."""
    metrics: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for question, votes_on_question in votes.items():
            metrics[f"win_rate/{arm}{_suffix(question)}"] = _win_rate(votes_on_question, key, arm)
    # Without a name of an arm: the base, or else the arm against which the tuned model does worst (one without votes last).
    values = {arm: metrics[f"win_rate/{arm}"]["value"] for arm in arms}
    main_arm = BASE if BASE in arms else min(arms, key=lambda arm: (values[arm] is None, values[arm] or 0))
    for question, votes_on_question in votes.items():
        suffix = _suffix(question)
        metrics[f"win_rate{suffix}"] = metrics[f"win_rate/{main_arm}{suffix}"]
        metrics[f"alpha{suffix}"] = {"value": alpha(votes_on_question)}
    metrics["num_reviewers"] = {"value": float(len({reviewer for reviewer, _ in votes[OVERALL]}))}
    in_order = sorted(metrics, key=lambda name: (name.count("/"), name != "win_rate", name))
    return {name: metrics[name] for name in in_order}


def _suffix(question: str) -> str:
    return "" if question == OVERALL else f"/{question}"


def _win_rate(votes: Votes, key: dict[str, Any], arm: str) -> dict[str, Any]:
    """The win rate against one arm, with its interval; None for both where nobody judged."""
    items = {item["id"]: item for item in key["items"] if item["other"] == arm}
    worth_by_prompt: dict[int, list[float]] = {}
    counts = Counter[str]()
    for (_, item_id), vote in votes.items():
        if item_id in items:
            worth_by_prompt.setdefault(items[item_id]["prompt"], []).append(WIN_VALUE.get(vote, 0.0))
            counts[vote] += 1
    outcomes = {
        "wins": counts[TUNED_WINS],
        "ties": counts[TIE],
        "losses": counts.total() - counts[TUNED_WINS] - counts[TIE],
    }
    if not worth_by_prompt:
        return {"value": None, "low": None, "high": None, "num_prompts": 0, **outcomes}
    num_equal = sum(pair["other"] == arm for pair in key["same"])
    # Equal answers were not shown: they are ties.
    means = np.array([np.mean(worth) for worth in worth_by_prompt.values()] + [WIN_VALUE[TIE]] * num_equal)
    resampled = np.random.default_rng([0, len(means)]).integers(0, len(means), (RESAMPLES, len(means)))
    # Prompts are resampled, not votes: several votes on one prompt are not independent.
    low, high = np.percentile(means[resampled].mean(axis=1), [2.5, 97.5])
    rate = {"value": float(means.mean()), "low": float(low), "high": float(high), "greater_is_better": True}
    return {**rate, "num_prompts": len(means), "num_equal": num_equal, **outcomes}


def _majority(reviewer: Reviewer, reviewers: list[Reviewer], key: dict[str, Any]) -> dict[str, str]:
    """Who won for most of the other reviewers, by item; of items that at least two of them judged."""
    votes = _votes([other for other in reviewers if other is not reviewer], key, OVERALL)
    counts_by_item: dict[str, Counter[str]] = {}
    for (_, item_id), vote in votes.items():
        counts_by_item.setdefault(item_id, Counter())[vote] += 1
    majority = {}
    for item_id, counts in counts_by_item.items():
        if counts.total() > 1:
            majority[item_id] = counts.most_common(1)[0][0]
    return majority


def _reviewer_summary(
    reviewer: Reviewer, key: dict[str, Any], reviewer_flags: list[str], is_dropped: bool
) -> dict[str, Any]:
    """One entry of the record's `reviewers`; `left` is the share of items in which the answer on the left won."""
    judgements = [answer for answer in reviewer.items.values() if OVERALL in answer.answers]
    seconds = [answer.seconds for answer in judgements if answer.seconds is not None]
    left_side = sum(answer.answers[OVERALL] == "a" for answer in judgements)
    return {
        "name": reviewer.name,
        "judged": len(judgements),
        "open": len(key["items"]) - len(judgements),
        "left": left_side / max(1, len(judgements)),
        "minutes": sum(seconds) / 60 if seconds else None,
        "comments": sum(bool(answer.comment) for answer in reviewer.items.values()),
        "flags": reviewer_flags,
        "dropped": is_dropped,
    }


def _disagreements(votes: Votes, reviewers: list[Reviewer], key: dict[str, Any]) -> list[dict[str, Any]]:
    """Items on which both models were called the better one, the most even ones first."""
    disagreements = []
    for item in key["items"]:
        vote_by_reviewer = {reviewer: vote for (reviewer, item_id), vote in votes.items() if item_id == item["id"]}
        wins = [vote for vote in vote_by_reviewer.values() if vote != TIE]
        if len({*wins}) < 2:
            continue
        imbalance = abs(2 * wins.count(TUNED_WINS) - len(wins))
        row = {
            "item": item["id"],
            "prompt": item["prompt"],
            "other": item["other"],
            "votes": vote_by_reviewer,
            "comments": _comments(item["id"], reviewers),
        }
        disagreements.append((imbalance, row))
    disagreements.sort(key=lambda imbalance_and_row: imbalance_and_row[0])
    return [row for _, row in disagreements[:MAX_LISTED]]


def _comments(item_id: str, reviewers: list[Reviewer]) -> dict[str, str]:
    comments = {}
    for reviewer in reviewers:
        answer = reviewer.items.get(item_id)
        if answer is not None and answer.comment:
            comments[reviewer.name] = answer.comment
    return comments
