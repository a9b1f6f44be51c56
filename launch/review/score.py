"""Scores of a review: win rates with intervals, agreement, disputed items, careless reviewers; and their record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from launch.review.agreement import TIE, TUNED_WINS, Votes, krippendorff_alpha, pairwise_kappas, preferred_model
from launch.review.answers import Reviewer
from launch.review.careless_reviewers import RULES, carelessness_flags
from launch.review.sheet import BASE, TUNED, ReviewKey
from trainer.config.review import OVERALL

RESAMPLES = 10_000
MAX_LISTED = 50
"""Disputed items in the record."""
WIN_VALUE = {TUNED_WINS: 1.0, TIE: 0.5}
"""What a vote adds to the win rate; a loss adds 0."""
METHOD = (
    "share of prompts that the tuned model wins, ties and equal answers as halves, reviewers of a prompt as their mean; "
    f"bootstrap over prompts, {RESAMPLES} resamples, seed 0, 95 % percentile interval"
)


def score_review(review_id: str, key: ReviewKey, reviewers: list[Reviewer], dropped: list[str]) -> dict[str, Any]:
    """The record of a review as JSON values: win rates with intervals, agreement, disputed items, and the reviewers.

    The votes of reviewers named in `dropped` do not count.
    """
    counted_reviewers = [reviewer for reviewer in reviewers if reviewer.name not in dropped]
    votes_by_question = {question: _votes(counted_reviewers, key, question) for question in [OVERALL, *key["rubric"]]}
    arms = [arm for arm in key["arms"] if arm != TUNED]  # the models that the tuned one is compared with

    # Signs of careless answers, also of dropped reviewers: the record shows why they were dropped.
    flags_by_name = {}
    for reviewer in reviewers:
        flags_by_name[reviewer.name] = carelessness_flags(reviewer, key, _majority_of_others(reviewer, reviewers, key))
    unflagged = [reviewer for reviewer in counted_reviewers if not flags_by_name[reviewer.name]]
    without_flagged = None
    if 0 < len(unflagged) < len(counted_reviewers):
        without_flagged = _metrics({OVERALL: _votes(unflagged, key, OVERALL)}, key, arms)["win_rate"]
    summaries = []
    for reviewer in reviewers:
        is_dropped = reviewer.name in dropped
        summaries.append(_reviewer_summary(reviewer, key, flags_by_name[reviewer.name], is_dropped))
    return {
        "version": 1,
        "review": review_id,
        "time": time.time(),
        "model": key["model"],
        "arms": key["arms"],
        "method": METHOD,
        "num_prompts": key["num_prompts"],
        "num_same": dict(Counter(pair["other"] for pair in key["same"])),
        "rubric": key["rubric"],
        "reviewers": summaries,
        "rules": RULES,
        "metrics": _metrics(votes_by_question, key, arms),
        "without_flagged": without_flagged,
        "kappa": pairwise_kappas(votes_by_question[OVERALL]),
        "disagreements": _disagreements(votes_by_question[OVERALL], counted_reviewers, key),
    }


def _votes(reviewers: Iterable[Reviewer], key: ReviewKey, question: str) -> Votes:
    """The votes of the reviewers on one question, by (reviewer, item id).

    Repeated items are left out: they only show whether a reviewer is consistent.
    """
    items = {item["id"]: item for item in key["items"] if item["repeats"] is None}
    votes = {}
    for reviewer in reviewers:
        for item_id, answer in reviewer.items.items():
            if item_id in items and question in answer.answers:
                votes[reviewer.name, item_id] = preferred_model(answer.answers[question], items[item_id])
    return votes


def _metrics(votes_by_question: dict[str, Votes], key: ReviewKey, arms: list[str]) -> dict[str, dict[str, Any]]:
    """Win rates and agreement, by the metric names that gates use. `arms`: the models that the tuned one is compared with.

    The names are `win_rate/<arm>/<question>` and `alpha/<question>`, without the question for the overall one. `win_rate` without
    an arm is the win rate against the base or, if the base was not compared, against the arm with the lowest win rate.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for question, votes in votes_by_question.items():
            metrics[f"win_rate/{arm}{_metric_suffix(question)}"] = _win_rate(votes, key, arm)

    def order_by_win_rate(arm: str) -> tuple[bool, float]:
        win_rate = metrics[f"win_rate/{arm}"]["value"]
        return win_rate is None, win_rate or 0  # an arm that nobody judged comes last

    main_arm = BASE if BASE in arms else min(arms, key=order_by_win_rate)
    for question, votes in votes_by_question.items():
        suffix = _metric_suffix(question)
        metrics[f"win_rate{suffix}"] = metrics[f"win_rate/{main_arm}{suffix}"]
        metrics[f"alpha{suffix}"] = {"value": krippendorff_alpha(votes)}
    num_reviewers = len({reviewer for reviewer, _ in votes_by_question[OVERALL]})
    metrics["num_reviewers"] = {"value": float(num_reviewers)}
    # `win_rate` first, then the metrics without an arm, then those of an arm, then those of an arm and a question.
    sorted_names = sorted(metrics, key=lambda name: (name.count("/"), name != "win_rate", name))
    return {name: metrics[name] for name in sorted_names}


def _metric_suffix(question: str) -> str:
    """What a question adds to the name of a metric: nothing for the overall question."""
    return "" if question == OVERALL else f"/{question}"


def _win_rate(votes: Votes, key: ReviewKey, arm: str) -> dict[str, Any]:
    """The win rate of the tuned model against one arm, with its 95 % interval and counts, as a metric of the record.

    `METHOD` says how it is computed. The rate is None if nobody judged an item of this arm.
    """
    items = {item["id"]: item for item in key["items"] if item["other"] == arm}
    values_by_prompt: dict[int, list[float]] = {}
    counts = Counter[str]()
    for (_, item_id), vote in votes.items():
        if item_id in items:
            values_by_prompt.setdefault(items[item_id]["prompt"], []).append(WIN_VALUE.get(vote, 0.0))
            counts[vote] += 1
    outcomes = {
        "wins": counts[TUNED_WINS],
        "ties": counts[TIE],
        "losses": counts.total() - counts[TUNED_WINS] - counts[TIE],
    }
    if not values_by_prompt:
        return {"value": None, "low": None, "high": None, "num_prompts": 0, **outcomes}

    # Equal answers were not shown to reviewers: each is a tie.
    num_equal = sum(pair["other"] == arm for pair in key["same"])
    prompt_means = [np.mean(values) for values in values_by_prompt.values()]
    means = np.array(prompt_means + [WIN_VALUE[TIE]] * num_equal)
    # Prompts are resampled, not votes: several votes on one prompt are not independent. Seed 0, as METHOD says.
    resampled = np.random.default_rng([0, len(means)]).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.percentile(means[resampled].mean(axis=1), [2.5, 97.5])
    rate = {"value": float(means.mean()), "low": float(low), "high": float(high), "greater_is_better": True}
    return {**rate, "num_prompts": len(means), "num_equal": num_equal, **outcomes}


def _majority_of_others(reviewer: Reviewer, reviewers: list[Reviewer], key: ReviewKey) -> dict[str, str]:
    """The vote of most reviewers other than `reviewer`, by item id; only items that at least two of them judged."""
    other_reviewers = [any_reviewer for any_reviewer in reviewers if any_reviewer is not reviewer]
    counts_by_item: dict[str, Counter[str]] = {}
    for (_, item_id), vote in _votes(other_reviewers, key, OVERALL).items():
        counts_by_item.setdefault(item_id, Counter())[vote] += 1
    majority_by_item = {}
    for item_id, counts in counts_by_item.items():
        if counts.total() > 1:
            most_common_vote, _ = counts.most_common(1)[0]
            majority_by_item[item_id] = most_common_vote
    return majority_by_item


def _reviewer_summary(reviewer: Reviewer, key: ReviewKey, flags: list[str], is_dropped: bool) -> dict[str, Any]:
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
        "flags": flags,
        "dropped": is_dropped,
    }


def _disagreements(votes: Votes, reviewers: list[Reviewer], key: ReviewKey) -> list[dict[str, Any]]:
    """Items on which reviewers prefer opposite answers, with votes and comments; those with the most even votes first.

    At most `MAX_LISTED` items.
    """
    rows_with_imbalance = []
    for item in key["items"]:
        vote_by_reviewer = {reviewer: vote for (reviewer, item_id), vote in votes.items() if item_id == item["id"]}
        votes_without_ties = [vote for vote in vote_by_reviewer.values() if vote != TIE]
        is_disputed = len(set(votes_without_ties)) > 1
        if not is_disputed:
            continue
        num_wins = votes_without_ties.count(TUNED_WINS)
        num_losses = len(votes_without_ties) - num_wins
        row = {
            "item": item["id"],
            "prompt": item["prompt"],
            "other": item["other"],
            "votes": vote_by_reviewer,
            "comments": _comments_on_item(item["id"], reviewers),
        }
        rows_with_imbalance.append((abs(num_wins - num_losses), row))
    rows_with_imbalance.sort(key=lambda entry: entry[0])
    return [row for _, row in rows_with_imbalance[:MAX_LISTED]]


def _comments_on_item(item_id: str, reviewers: list[Reviewer]) -> dict[str, str]:
    """The comments on one item by reviewer; reviewers without a comment are left out."""
    comments = {}
    for reviewer in reviewers:
        answer = reviewer.items.get(item_id)
        if answer is not None and answer.comment:
            comments[reviewer.name] = answer.comment
    return comments
