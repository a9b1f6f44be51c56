"""A review by three rules in the place of people: what agreement and flags look like when nobody reads.

The pairs are the right and a wrong option of 30 exam questions. The rules do not know which is right. They go through the
files that `shardtune review` makes and reads.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS = 30
REPEATS = 0.2
"""Share of the pairs that are shown a second time: six."""
LONGER = "the longer answer"
ROUGE = "the higher ROUGE-L with the question"
RANDOM = "at random"
RULES = (LONGER, ROUGE, RANDOM)


def judge_by_rule(rule: str, seed: int, directory: Path) -> dict[str, Any]:
    """The row of one rule: how often the right option wins, its agreement with the other rules, and its flags."""
    from launch.review.answers import read_reviewers
    from launch.review.score import score_review

    sheet = make_review(seed)
    files = [write_votes(sheet, name, seed, directory) for name in RULES]
    score = score_review(sheet.review_id, sheet.key, read_reviewers(files, sheet.review_id, sheet.key), [])
    alone = score_review(
        sheet.review_id, sheet.key, read_reviewers([files[RULES.index(rule)]], sheet.review_id, sheet.key), []
    )
    (reviewer,) = [each for each in score["reviewers"] if each["name"] == rule]
    row: dict[str, Any] = {
        "win_rate": round(alone["metrics"]["win_rate"]["value"], 6),
        "flags": len(reviewer["flags"]),
        "flagged": [flag.partition(":")[0] for flag in reviewer["flags"]],
        "alpha": round(score["metrics"]["alpha"]["value"], 6),
    }
    for pair in score["kappa"]:
        if rule in pair["reviewers"] and pair["kappa"] is not None:
            (other,) = [name for name in pair["reviewers"] if name != rule]
            row[f"kappa/{other}"] = round(pair["kappa"], 6)
    return row


def make_review(seed: int) -> Any:
    """The sheet of 30 pairs, drawn by the seed. The right option has the place of the tuned model, a wrong one of the base."""
    from benchmarks.course.data import short_pairs
    from launch.review.prompts import ReviewPrompt
    from launch.review.sheet import BASE_ARM, TUNED_ARM, make_review_sheet
    from trainer.config.review import ReviewConfig

    pairs = random.Random(seed).sample(short_pairs(), PAIRS)
    prompts = [ReviewPrompt(f"pair {number}", pair["prompt"], None) for number, pair in enumerate(pairs)]
    answers = {TUNED_ARM: [pair["chosen"] for pair in pairs], BASE_ARM: [pair["rejected"] for pair in pairs]}
    config = ReviewConfig(n=PAIRS, seed=seed, repeats=REPEATS)
    return make_review_sheet(prompts, answers, {"run": "", "model": {}}, config, salt=f"review_rules {seed}")


def write_votes(sheet: Any, rule: str, seed: int, directory: Path) -> Path:
    """The file of answers that a rule sends back, as the page of a review saves it."""
    from trainer.config.review import OVERALL_QUESTION

    choose = chooser(rule, seed)
    items = {item.id: {"answers": {OVERALL_QUESTION: choose(item)}} for item in sheet.items}
    path = directory / f"{rule.replace(' ', '-')}-{seed}.json"
    path.write_text(
        json.dumps({"version": 1, "review": sheet.review_id, "reviewer": rule, "items": items}), encoding="utf-8"
    )
    return path


def chooser(rule: str, seed: int) -> Callable[[Any], str]:
    """The rule as a function of an item of the sheet: `a`, `b` or `tie`."""
    drawn = random.Random(seed)

    def score(item: Any, answer: str) -> float:
        return float(len(answer)) if rule == LONGER else rouge_l(item.prompt, answer)

    def choose(item: Any) -> str:
        if rule == RANDOM:
            return drawn.choice("ab")
        left = score(item, item.answer_a)
        right = score(item, item.answer_b)
        if left == right:
            return "tie"
        return "a" if left > right else "b"

    return choose


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L, by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)
