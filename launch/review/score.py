"""Scores of a review: win rates with intervals, agreement, disputed items, careless reviewers; and their record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from launch.review.agreement import (
    OTHER_WINS,
    TIE,
    TUNED_WINS,
    VotesOnQuestion,
    krippendorff_alpha,
    pairwise_kappas,
    preferred_model,
)
from launch.review.answers import Reviewer
from launch.review.careless_reviewers import RULE_TEXT_BY_NAME, carelessness_flags
from launch.review.sheet import BASE_ARM, LEFT_SIDE, TUNED_ARM, KeyItem, ReviewKey
from trainer.config.review import OVERALL_QUESTION

NUM_RESAMPLES = 10_000
MAX_RECORDED_DISAGREEMENTS = 50
"""Disputed items in the record."""
WIN_SHARE_BY_VOTE = {TUNED_WINS: 1.0, TIE: 0.5, OTHER_WINS: 0.0}
"""What a vote adds to the win rate."""
WIN_RATE_METHOD_TEXT = (
    "share of prompts that the tuned model wins, ties and equal answers as halves, reviewers of a prompt as their mean; "
    f"bootstrap over prompts, {NUM_RESAMPLES} resamples, seed 0, 95 % percentile interval"
)


def score_review(
    review_id: str, review_key: ReviewKey, reviewers: list[Reviewer], dropped_names: list[str]
) -> dict[str, Any]:
    """Evaluate a review: how often reviewers preferred the tuned model, how far they agree, and who may have answered carelessly.

    Returns the record of the review, as JSON values. `review_key`: which model wrote which answer. The models that answered
    are called arms: `tuned`, and those that it is compared with. The votes of the reviewers in `dropped_names` do not count.
    """
    counted_reviewers = [reviewer for reviewer in reviewers if reviewer.name not in dropped_names]
    votes_by_question = {
        question: _votes_on_question(counted_reviewers, review_key["items"], question)
        for question in [OVERALL_QUESTION, *review_key["rubric"]]
    }
    other_models = [arm for arm in review_key["arms"] if arm != TUNED_ARM]

    # Of all reviewers, also of dropped ones: the record shows why they were dropped.
    flags_by_name = {}
    for reviewer in reviewers:
        majority_vote_by_item = _majority_votes_of_others(reviewer, reviewers, review_key["items"])
        flags_by_name[reviewer.name] = carelessness_flags(reviewer, review_key, majority_vote_by_item)
    careful_reviewers = [reviewer for reviewer in counted_reviewers if not flags_by_name[reviewer.name]]
    win_rate_without_flagged = None  # also if nobody is flagged, or everybody
    if 0 < len(careful_reviewers) < len(counted_reviewers):
        votes = _votes_on_question(careful_reviewers, review_key["items"], OVERALL_QUESTION)
        win_rate_without_flagged = _review_metrics({OVERALL_QUESTION: votes}, review_key, other_models)["win_rate"]
    summaries = []
    for reviewer in reviewers:
        is_dropped = reviewer.name in dropped_names
        summaries.append(
            _reviewer_summary(reviewer, len(review_key["items"]), flags_by_name[reviewer.name], is_dropped)
        )
    return {
        "version": 1,
        "review": review_id,
        "time": time.time(),
        "model": review_key["model"],
        "arms": review_key["arms"],
        "method": WIN_RATE_METHOD_TEXT,
        "num_prompts": review_key["num_prompts"],
        "num_same": dict(Counter(pair["other"] for pair in review_key["same"])),
        "rubric": review_key["rubric"],
        "reviewers": summaries,
        "rules": RULE_TEXT_BY_NAME,
        "metrics": _review_metrics(votes_by_question, review_key, other_models),
        "without_flagged": win_rate_without_flagged,
        "kappa": pairwise_kappas(votes_by_question[OVERALL_QUESTION]),
        "disagreements": _disputed_items(votes_by_question[OVERALL_QUESTION], counted_reviewers, review_key["items"]),
    }


def _votes_on_question(reviewers: Iterable[Reviewer], items: Iterable[KeyItem], question: str) -> VotesOnQuestion:
    """Collect the reviewers' votes on one question, by (reviewer, item id): `tuned`, `other` or `tie`.

    Repeated items are left out: they only show whether a reviewer is consistent.
    """
    item_by_id = {item["id"]: item for item in items if item["repeats"] is None}
    votes = {}
    for reviewer in reviewers:
        for item_id, judgement in reviewer.judgement_by_item.items():
            choice = judgement.choice_by_question.get(question)
            if item_id in item_by_id and choice is not None:
                votes[reviewer.name, item_id] = preferred_model(choice, item_by_id[item_id])
    return votes


def _review_metrics(
    votes_by_question: dict[str, VotesOnQuestion], review_key: ReviewKey, other_models: list[str]
) -> dict[str, dict[str, Any]]:
    """Compute win rates and agreement, by the metric names that gates use: {"win_rate": {"value": 0.6, ...}, "alpha": ...}.

    The names are `win_rate/<model>/<question>` and `alpha/<question>`, without the question for the overall one. `win_rate`
    without a model is the one against the base or, if that was not compared, against the model with the lowest win rate.

    `other_models`: those that the tuned one is compared with.
    """
    metrics: dict[str, dict[str, Any]] = {}
    for model in other_models:
        prompt_by_item = {item["id"]: item["prompt"] for item in review_key["items"] if item["other"] == model}
        num_equal = sum(pair["other"] == model for pair in review_key["same"])
        for question, votes in votes_by_question.items():
            name = f"win_rate/{model}{_metric_suffix(question)}"
            metrics[name] = _win_rate_metric(votes, prompt_by_item, num_equal)

    def win_rate_order(model: str) -> tuple[bool, float]:
        win_rate = metrics[f"win_rate/{model}"]["value"]
        return win_rate is None, win_rate or 0  # a model that nobody judged comes last

    main_model = BASE_ARM if BASE_ARM in other_models else min(other_models, key=win_rate_order)
    for question, votes in votes_by_question.items():
        suffix = _metric_suffix(question)
        metrics[f"win_rate{suffix}"] = metrics[f"win_rate/{main_model}{suffix}"]
        metrics[f"alpha{suffix}"] = {"value": krippendorff_alpha(votes)}
    num_reviewers = len({reviewer for reviewer, _ in votes_by_question[OVERALL_QUESTION]})
    metrics["num_reviewers"] = {"value": float(num_reviewers)}
    # `win_rate` first, then the metrics without a model, then those of a model, then those of a model and a question.
    sorted_names = sorted(metrics, key=lambda name: (name.count("/"), name != "win_rate", name))
    return {name: metrics[name] for name in sorted_names}


def _metric_suffix(question: str) -> str:
    """What a question adds to the name of a metric: nothing for the overall question."""
    return "" if question == OVERALL_QUESTION else f"/{question}"


def _win_rate_metric(votes: VotesOnQuestion, prompt_by_item: dict[str, int], num_equal: int) -> dict[str, Any]:
    """How often reviewers preferred the tuned model to another one: the win rate with its 95 % interval and counts.

    `WIN_RATE_METHOD_TEXT` says how it is computed. The rate is None if nobody judged an item of the two, however many of
    their answers were equal.

    `votes`: "tuned", "tie" or "other", by (reviewer, item id), on items with any model.
    `prompt_by_item`: for each item with this other model, by id, the index of its prompt.
    `num_equal`: prompts to which both models gave the same answer.
    """
    shares_by_prompt: dict[int, list[float]] = {}  # what each vote adds to the win rate: 1, 0.5 or 0
    counts = Counter[str]()
    for (_, item_id), vote in votes.items():
        if item_id in prompt_by_item:
            shares_by_prompt.setdefault(prompt_by_item[item_id], []).append(WIN_SHARE_BY_VOTE[vote])
            counts[vote] += 1
    outcomes = {
        "wins": counts[TUNED_WINS],
        "ties": counts[TIE],
        "losses": counts[OTHER_WINS],
    }
    if not shares_by_prompt:
        return {"value": None, "low": None, "high": None, "num_prompts": 0, **outcomes}

    # Equal answers were not shown to reviewers: each is a tie.
    prompt_means = [np.mean(shares) for shares in shares_by_prompt.values()]
    means = np.array(prompt_means + [WIN_SHARE_BY_VOTE[TIE]] * num_equal)  # one for each prompt
    low, high = _bootstrap_interval(means)
    rate = {"value": float(means.mean()), "low": low, "high": high, "greater_is_better": True}
    return {**rate, "num_prompts": len(means), "num_equal": num_equal, **outcomes}


def _bootstrap_interval(prompt_means: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval (low, high) of the mean over prompts, by bootstrap as `WIN_RATE_METHOD_TEXT` says.

    Prompts are resampled, not votes: several votes on one prompt are not independent.
    """
    num_prompts = len(prompt_means)
    resampled_indices = np.random.default_rng([0, num_prompts]).integers(0, num_prompts, (NUM_RESAMPLES, num_prompts))
    low, high = np.percentile(prompt_means[resampled_indices].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _majority_votes_of_others(
    reviewer: Reviewer, reviewers: list[Reviewer], items: Iterable[KeyItem]
) -> dict[str, str]:
    """How most of the other reviewers voted, by item id, to compare `reviewer` with; only items that at least two of them judged.

    Of votes that are equally frequent, the one that comes first in the order of `reviewers` is taken.
    """
    other_reviewers = [any_reviewer for any_reviewer in reviewers if any_reviewer is not reviewer]
    counts_by_item: dict[str, Counter[str]] = {}
    for (_, item_id), vote in _votes_on_question(other_reviewers, items, OVERALL_QUESTION).items():
        counts_by_item.setdefault(item_id, Counter())[vote] += 1
    majority_by_item = {}
    for item_id, counts in counts_by_item.items():
        if counts.total() > 1:
            most_common_vote, _ = counts.most_common(1)[0]
            majority_by_item[item_id] = most_common_vote
    return majority_by_item


def _reviewer_summary(reviewer: Reviewer, num_items: int, flags: list[str], is_dropped: bool) -> dict[str, Any]:
    """One reviewer in the record: name, numbers of judged and open items, share of wins of the left answer, minutes, flags.

    An item is open until the overall question is answered. `num_items`: of the review. `flags`: signs of careless answers.
    `is_dropped`: whether the votes do not count.
    """
    all_judgements = reviewer.judgement_by_item.values()
    judgements = [judgement for judgement in all_judgements if OVERALL_QUESTION in judgement.choice_by_question]
    seconds = [judgement.seconds for judgement in judgements if judgement.seconds is not None]
    num_left_wins = sum(judgement.choice_by_question[OVERALL_QUESTION] == LEFT_SIDE for judgement in judgements)
    return {
        "name": reviewer.name,
        "judged": len(judgements),
        "open": num_items - len(judgements),
        "left": num_left_wins / max(1, len(judgements)),
        "minutes": sum(seconds) / 60 if seconds else None,
        "comments": sum(bool(judgement.comment) for judgement in all_judgements),
        "flags": flags,
        "dropped": is_dropped,
    }


def _disputed_items(
    votes: VotesOnQuestion, reviewers: list[Reviewer], items: Iterable[KeyItem]
) -> list[dict[str, Any]]:
    """Find the items on which reviewers prefer opposite answers, with votes and comments; those with the most even votes first.

    At most `MAX_RECORDED_DISAGREEMENTS` items. In the record, `other` is the model beside the tuned one, and `prompt` an
    index.
    """
    disputed_items: list[dict[str, Any]] = []
    for item in items:
        vote_by_reviewer = {reviewer: vote for (reviewer, item_id), vote in votes.items() if item_id == item["id"]}
        preferred_models = {vote for vote in vote_by_reviewer.values() if vote != TIE}
        if len(preferred_models) < 2:
            continue
        disputed_items.append(
            {
                "item": item["id"],
                "prompt": item["prompt"],
                "other": item["other"],
                "votes": vote_by_reviewer,
                "comments": _comments_on_item(item["id"], reviewers),
            }
        )
    disputed_items.sort(key=lambda disputed_item: _vote_imbalance(disputed_item["votes"]))
    return disputed_items[:MAX_RECORDED_DISAGREEMENTS]


def _vote_imbalance(vote_by_reviewer: dict[str, str]) -> int:
    """By how many votes one of the two models is ahead; ties do not count."""
    counts = Counter(vote_by_reviewer.values())
    return abs(counts[TUNED_WINS] - counts[OTHER_WINS])


def _comments_on_item(item_id: str, reviewers: list[Reviewer]) -> dict[str, str]:
    """The comments on one item by reviewer; reviewers without a comment are left out."""
    comments = {}
    for reviewer in reviewers:
        judgement = reviewer.judgement_by_item.get(item_id)
        if judgement is not None and judgement.comment:
            comments[reviewer.name] = judgement.comment
    return comments
