"""Scores of a review: win rates with intervals, agreement, disputed items, careless reviewers; and their record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from launch.review.agreement import (
    TIE,
    TUNED_WINS,
    VotesOnQuestion,
    krippendorff_alpha,
    pairwise_kappas,
    preferred_model,
)
from launch.review.answers import Reviewer
from launch.review.careless_reviewers import RULE_TEXT_BY_NAME, carelessness_flags
from launch.review.sheet import BASE_ARM, TUNED_ARM, ReviewKey
from trainer.config.review import OVERALL_QUESTION

NUM_RESAMPLES = 10_000
MAX_RECORDED_DISAGREEMENTS = 50
"""Disputed items in the record."""
WIN_SHARE_BY_VOTE = {TUNED_WINS: 1.0, TIE: 0.5}
"""What a vote adds to the win rate; a loss adds 0."""
WIN_RATE_METHOD_TEXT = (
    "share of prompts that the tuned model wins, ties and equal answers as halves, reviewers of a prompt as their mean; "
    f"bootstrap over prompts, {NUM_RESAMPLES} resamples, seed 0, 95 % percentile interval"
)


def score_review(review_id: str, key: ReviewKey, reviewers: list[Reviewer], dropped_names: list[str]) -> dict[str, Any]:
    """The record of a review as JSON values: win rates with intervals, agreement, disputed items, and the reviewers.

    `key`: which model wrote which answer. The votes of the reviewers in `dropped_names` do not count.
    """
    counted_reviewers = [reviewer for reviewer in reviewers if reviewer.name not in dropped_names]
    votes_by_question = {
        question: _votes_on_question(counted_reviewers, key, question)
        for question in [OVERALL_QUESTION, *key["rubric"]]
    }
    arms = [arm for arm in key["arms"] if arm != TUNED_ARM]  # the models that the tuned one is compared with

    # Signs of careless answers, also of dropped reviewers: the record shows why they were dropped.
    flags_by_name = {}
    for reviewer in reviewers:
        flags_by_name[reviewer.name] = carelessness_flags(
            reviewer, key, _majority_votes_of_others(reviewer, reviewers, key)
        )
    unflagged = [reviewer for reviewer in counted_reviewers if not flags_by_name[reviewer.name]]
    without_flagged = None
    if 0 < len(unflagged) < len(counted_reviewers):
        without_flagged = _review_metrics(
            {OVERALL_QUESTION: _votes_on_question(unflagged, key, OVERALL_QUESTION)}, key, arms
        )["win_rate"]
    summaries = []
    for reviewer in reviewers:
        is_dropped = reviewer.name in dropped_names
        summaries.append(_reviewer_summary(reviewer, key, flags_by_name[reviewer.name], is_dropped))
    return {
        "version": 1,
        "review": review_id,
        "time": time.time(),
        "model": key["model"],
        "arms": key["arms"],
        "method": WIN_RATE_METHOD_TEXT,
        "num_prompts": key["num_prompts"],
        "num_same": dict(Counter(pair["other"] for pair in key["same"])),
        "rubric": key["rubric"],
        "reviewers": summaries,
        "rules": RULE_TEXT_BY_NAME,
        "metrics": _review_metrics(votes_by_question, key, arms),
        "without_flagged": without_flagged,
        "kappa": pairwise_kappas(votes_by_question[OVERALL_QUESTION]),
        "disagreements": _disputed_items(votes_by_question[OVERALL_QUESTION], counted_reviewers, key),
    }


def _votes_on_question(reviewers: Iterable[Reviewer], key: ReviewKey, question: str) -> VotesOnQuestion:
    """The votes of the reviewers on one question, by (reviewer, item id).

    Repeated items are left out: they only show whether a reviewer is consistent.
    """
    items = {item["id"]: item for item in key["items"] if item["repeats"] is None}
    votes = {}
    for reviewer in reviewers:
        for item_id, judgement in reviewer.judgement_by_item.items():
            choice = judgement.choice_by_question.get(question)
            if item_id in items and choice is not None:
                votes[reviewer.name, item_id] = preferred_model(choice, items[item_id])
    return votes


def _review_metrics(
    votes_by_question: dict[str, VotesOnQuestion], key: ReviewKey, arms: list[str]
) -> dict[str, dict[str, Any]]:
    """Win rates and agreement, by the metric names that gates use. `arms`: the models that the tuned one is compared with.

    The names are `win_rate/<arm>/<question>` and `alpha/<question>`, without the question for the overall one. `win_rate` without
    an arm is the win rate against the base or, if the base was not compared, against the arm with the lowest win rate.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for arm in arms:
        for question, votes in votes_by_question.items():
            metrics[f"win_rate/{arm}{_metric_suffix(question)}"] = _win_rate_metric(votes, key, arm)

    def order_by_win_rate(arm: str) -> tuple[bool, float]:
        win_rate = metrics[f"win_rate/{arm}"]["value"]
        return win_rate is None, win_rate or 0  # an arm that nobody judged comes last

    main_arm = BASE_ARM if BASE_ARM in arms else min(arms, key=order_by_win_rate)
    for question, votes in votes_by_question.items():
        suffix = _metric_suffix(question)
        metrics[f"win_rate{suffix}"] = metrics[f"win_rate/{main_arm}{suffix}"]
        metrics[f"alpha{suffix}"] = {"value": krippendorff_alpha(votes)}
    num_reviewers = len({reviewer for reviewer, _ in votes_by_question[OVERALL_QUESTION]})
    metrics["num_reviewers"] = {"value": float(num_reviewers)}
    # `win_rate` first, then the metrics without an arm, then those of an arm, then those of an arm and a question.
    sorted_names = sorted(metrics, key=lambda name: (name.count("/"), name != "win_rate", name))
    return {name: metrics[name] for name in sorted_names}


def _metric_suffix(question: str) -> str:
    """What a question adds to the name of a metric: nothing for the overall question."""
    return "" if question == OVERALL_QUESTION else f"/{question}"


def _win_rate_metric(votes: VotesOnQuestion, key: ReviewKey, arm: str) -> dict[str, Any]:
    """The win rate of the tuned model against one arm, with its 95 % interval and counts, as a metric of the record.

    `WIN_RATE_METHOD_TEXT` says how it is computed. The rate is None if nobody judged an item of this arm.
    """
    items = {item["id"]: item for item in key["items"] if item["other"] == arm}
    values_by_prompt: dict[int, list[float]] = {}
    counts = Counter[str]()
    for (_, item_id), vote in votes.items():
        if item_id in items:
            values_by_prompt.setdefault(items[item_id]["prompt"], []).append(WIN_SHARE_BY_VOTE.get(vote, 0.0))
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
    means = np.array(prompt_means + [WIN_SHARE_BY_VOTE[TIE]] * num_equal)  # one for each prompt
    # Prompts are resampled, not votes: several votes on one prompt are not independent. Seed 0, as WIN_RATE_METHOD_TEXT says.
    resampled_indices = np.random.default_rng([0, len(means)]).integers(0, len(means), (NUM_RESAMPLES, len(means)))
    low, high = np.percentile(means[resampled_indices].mean(axis=1), [2.5, 97.5])
    rate = {"value": float(means.mean()), "low": float(low), "high": float(high), "greater_is_better": True}
    return {**rate, "num_prompts": len(means), "num_equal": num_equal, **outcomes}


def _majority_votes_of_others(reviewer: Reviewer, reviewers: list[Reviewer], key: ReviewKey) -> dict[str, str]:
    """The vote of most reviewers other than `reviewer`, by item id; only items that at least two of them judged."""
    other_reviewers = [any_reviewer for any_reviewer in reviewers if any_reviewer is not reviewer]
    counts_by_item: dict[str, Counter[str]] = {}
    for (_, item_id), vote in _votes_on_question(other_reviewers, key, OVERALL_QUESTION).items():
        counts_by_item.setdefault(item_id, Counter())[vote] += 1
    majority_by_item = {}
    for item_id, counts in counts_by_item.items():
        if counts.total() > 1:
            most_common_vote, _ = counts.most_common(1)[0]
            majority_by_item[item_id] = most_common_vote
    return majority_by_item


def _reviewer_summary(reviewer: Reviewer, key: ReviewKey, flags: list[str], is_dropped: bool) -> dict[str, Any]:
    """One reviewer in the record: name, numbers of judged and open items, share of wins of the left answer, minutes, flags."""
    all_judgements = reviewer.judgement_by_item.values()
    judgements = [judgement for judgement in all_judgements if OVERALL_QUESTION in judgement.choice_by_question]
    seconds = [judgement.seconds for judgement in judgements if judgement.seconds is not None]
    num_left_wins = sum(judgement.choice_by_question[OVERALL_QUESTION] == "a" for judgement in judgements)
    return {
        "name": reviewer.name,
        "judged": len(judgements),
        "open": len(key["items"]) - len(judgements),
        "left": num_left_wins / max(1, len(judgements)),
        "minutes": sum(seconds) / 60 if seconds else None,
        "comments": sum(bool(judgement.comment) for judgement in all_judgements),
        "flags": flags,
        "dropped": is_dropped,
    }


def _disputed_items(votes: VotesOnQuestion, reviewers: list[Reviewer], key: ReviewKey) -> list[dict[str, Any]]:
    """Items on which reviewers prefer opposite answers, with votes and comments; those with the most even votes first.

    At most `MAX_RECORDED_DISAGREEMENTS` items.
    """
    entries_with_imbalance = []  # (by how many votes one side is ahead, entry of the record)
    for item in key["items"]:
        vote_by_reviewer = {reviewer: vote for (reviewer, item_id), vote in votes.items() if item_id == item["id"]}
        votes_without_ties = [vote for vote in vote_by_reviewer.values() if vote != TIE]
        is_disputed = len(set(votes_without_ties)) > 1
        if not is_disputed:
            continue
        num_wins = votes_without_ties.count(TUNED_WINS)
        num_losses = len(votes_without_ties) - num_wins
        entry = {
            "item": item["id"],
            "prompt": item["prompt"],
            "other": item["other"],
            "votes": vote_by_reviewer,
            "comments": _comments_on_item(item["id"], reviewers),
        }
        entries_with_imbalance.append((abs(num_wins - num_losses), entry))
    entries_with_imbalance.sort(key=lambda imbalance_and_entry: imbalance_and_entry[0])
    return [entry for _, entry in entries_with_imbalance[:MAX_RECORDED_DISAGREEMENTS]]


def _comments_on_item(item_id: str, reviewers: list[Reviewer]) -> dict[str, str]:
    """The comments on one item by reviewer; reviewers without a comment are left out."""
    comments = {}
    for reviewer in reviewers:
        judgement = reviewer.judgement_by_item.get(item_id)
        if judgement is not None and judgement.comment:
            comments[reviewer.name] = judgement.comment
    return comments
