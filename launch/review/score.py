"""Scores of a review: win rates with intervals, agreement, disputed items, careless reviewers; and their record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from launch.review.agreement import TIE, TUNED_WINS, Votes, alpha, pairwise_kappas, winner
from launch.review.answers import Reviewer
from launch.review.careless_reviewers import RULES, flags
from launch.review.sheet import BASE, TUNED
from trainer.config.review import OVERALL

RESAMPLES = 10_000
MAX_LISTED = 50
WORTH = {TUNED_WINS: 1.0, TIE: 0.5}
METHOD = (
    "share of prompts that the tuned model wins, ties and equal answers as halves, reviewers of a prompt as their mean; "
    f"bootstrap over prompts, {RESAMPLES} resamples, seed 0, 95 % percentile interval"
)


def score_review(review: str, key: dict[str, Any], reviewers: list[Reviewer], dropped: list[str]) -> dict[str, Any]:
    """The record of a review, JSON values; `dropped` are reviewers of these whose votes do not count."""
    counted = [each for each in reviewers if each.name not in dropped]
    questions = [OVERALL, *key["rubric"]]
    votes = {question: _votes(counted, key, question) for question in questions}
    suspects = {each.name: flags(each, key, _majority(each, reviewers, key)) for each in reviewers}
    others = [arm for arm in key["arms"] if arm != TUNED]
    metrics = _metrics(votes, key, others)
    plain = [each for each in counted if not suspects[each.name]]
    without = None
    if 0 < len(plain) < len(counted):
        without = _metrics({OVERALL: _votes(plain, key, OVERALL)}, key, others)["win_rate"]
    return {
        "version": 1,
        "review": review,
        "time": time.time(),
        "model": key["model"],
        "arms": key["arms"],
        "method": METHOD,
        "num_prompts": key["num_prompts"],
        "num_same": dict(Counter(each["other"] for each in key["same"])),
        "rubric": key["rubric"],
        "reviewers": [_reviewer_summary(each, key, suspects[each.name], each.name in dropped) for each in reviewers],
        "rules": RULES,
        "metrics": metrics,
        "without_flagged": without,
        "kappa": pairwise_kappas(votes[OVERALL]),
        "disagreements": _disagreements(votes[OVERALL], counted, key),
    }


def _votes(reviewers: Iterable[Reviewer], key: dict[str, Any], question: str) -> Votes:
    """Who won, by (reviewer, item); repeated items are for the reviewer's own consistency alone."""
    items = {item["id"]: item for item in key["items"] if item["repeats"] is None}
    return {
        (reviewer.name, name): winner(given.answers[question], items[name])
        for reviewer in reviewers
        for name, given in reviewer.items.items()
        if name in items and question in given.answers
    }


def _metrics(votes: dict[str, Votes], key: dict[str, Any], others: list[str]) -> dict[str, dict[str, Any]]:
    """Win rates and agreement by the names that gates use."""
    found: dict[str, dict[str, Any]] = {}
    for other in others:
        for question, said in votes.items():
            rate = _win_rate(said, key, other)
            found[f"win_rate/{other}" + ("" if question == OVERALL else f"/{question}")] = rate
    values = {other: found[f"win_rate/{other}"]["value"] for other in others}
    main = BASE if BASE in others else min(others, key=lambda other: (values[other] is None, values[other] or 0))
    for question in votes:
        tail = "" if question == OVERALL else f"/{question}"
        found[f"win_rate{tail}"] = found[f"win_rate/{main}{tail}"]
        found[f"alpha{tail}"] = {"value": alpha(votes[question])}
    found["num_reviewers"] = {"value": float(len({reviewer for reviewer, _ in votes[OVERALL]}))}
    return {name: found[name] for name in sorted(found, key=lambda name: (name.count("/"), name != "win_rate", name))}


def _win_rate(votes: Votes, key: dict[str, Any], other: str) -> dict[str, Any]:
    """The win rate against one arm, with its interval; None for both where nobody judged."""
    items = {item["id"]: item for item in key["items"] if item["other"] == other}
    by_prompt: dict[int, list[float]] = {}
    for (_, name), vote in votes.items():
        if name in items:
            by_prompt.setdefault(items[name]["prompt"], []).append(WORTH.get(vote, 0.0))
    counts = Counter(vote for (_, name), vote in votes.items() if name in items)
    said = {
        "wins": counts[TUNED_WINS],
        "ties": counts[TIE],
        "losses": counts.total() - counts[TUNED_WINS] - counts[TIE],
    }
    if not by_prompt:
        return {"value": None, "low": None, "high": None, "num_prompts": 0, **said}
    same = [each["prompt"] for each in key["same"] if each["other"] == other]
    means = np.array([np.mean(each) for each in by_prompt.values()] + [0.5] * len(same))
    drawn = np.random.default_rng([0, len(means)]).integers(0, len(means), (RESAMPLES, len(means)))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    rate = {"value": float(means.mean()), "low": float(low), "high": float(high), "greater_is_better": True}
    return {**rate, "num_prompts": len(means), "num_equal": len(same), **said}


def _majority(mine: Reviewer, reviewers: list[Reviewer], key: dict[str, Any]) -> dict[str, str]:
    """What most of the others say of each item that two of them judged at least."""
    votes = _votes([each for each in reviewers if each is not mine], key, OVERALL)
    by_item: dict[str, Counter[str]] = {}
    for (_, item), vote in votes.items():
        by_item.setdefault(item, Counter())[vote] += 1
    return {item: said.most_common(1)[0][0] for item, said in by_item.items() if said.total() > 1}


def _reviewer_summary(reviewer: Reviewer, key: dict[str, Any], suspicious: list[str], dropped: bool) -> dict[str, Any]:
    judged = [given for given in reviewer.items.values() if OVERALL in given.answers]
    timed = [given.seconds for given in judged if given.seconds is not None]
    return {
        "name": reviewer.name,
        "judged": len(judged),
        "open": len(key["items"]) - len(judged),
        "left": sum(given.answers[OVERALL] == "a" for given in judged) / max(1, len(judged)),
        "minutes": sum(timed) / 60 if timed else None,
        "comments": sum(bool(given.comment) for given in reviewer.items.values()),
        "flags": suspicious,
        "dropped": dropped,
    }


def _disagreements(votes: Votes, reviewers: list[Reviewer], key: dict[str, Any]) -> list[dict[str, Any]]:
    """Items on which both models were called the better one, the most even ones first."""
    found = []
    for item in key["items"]:
        said = {reviewer: vote for (reviewer, name), vote in votes.items() if name == item["id"]}
        wins = [vote for vote in said.values() if vote != TIE]
        if len({*wins}) > 1:
            comments = {
                each.name: each.items[item["id"]].comment
                for each in reviewers
                if item["id"] in each.items and each.items[item["id"]].comment
            }
            even = abs(2 * wins.count(TUNED_WINS) - len(wins))
            found.append(
                {"item": item["id"], "prompt": item["prompt"], "other": item["other"], "votes": said, "even": even}
                | {"comments": comments}
            )
    found.sort(key=lambda each: each["even"])
    return [{name: value for name, value in each.items() if name != "even"} for each in found[:MAX_LISTED]]
