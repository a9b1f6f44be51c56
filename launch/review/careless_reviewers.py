"""Flags reviewers who may have answered without reading, each with the rule that applies. Nobody is left out for it.

docs/review.md says how often the rules are right and wrong about simulated reviewers.
"""

from __future__ import annotations

from collections import Counter
from statistics import median

from launch.review.answers import Reviewer
from launch.review.sheet import KeyItem, ReviewKey
from trainer.config.review import OVERALL_QUESTION

MIN_REPEATS = 4
MIN_JUDGED = 20
"""With fewer repeated items, or fewer items, a rule says nothing: an honest reviewer might break it by chance."""
VOTE_WITH_SIDES_EXCHANGED = {"a": "b", "b": "a", "tie": "tie"}
"""What the same judgement is called once sides are exchanged."""
MAX_SAME_SIDE_SHARE = 0.9
MAX_WORDS_PER_SECOND = 15.0
"""900 words a minute: nearly four times as fast as people read."""
RULE_TEXT_BY_NAME = {
    "repeats": f"agrees with itself in half of the repeated items or fewer, of {MIN_REPEATS} at least",
    "side": f"says the same side, or tie, in more than {MAX_SAME_SIDE_SHARE:.0%} of {MIN_JUDGED} items or more",
    "time": f"reads more than {MAX_WORDS_PER_SECOND:g} words a second in the middle one of its items, of {MIN_JUDGED} at least",
    "others": (
        f"agrees with the majority of the others no better than by chance (kappa 0 or below), on {MIN_JUDGED} items or more"
    ),
}


def carelessness_flags(reviewer: Reviewer, review_key: ReviewKey, majority_vote_by_item: dict[str, str]) -> list[str]:
    """Look for signs that a reviewer answered without reading: a sentence for each rule of `RULE_TEXT_BY_NAME` that is broken.

    Empty for a careful reviewer. `review_key`: which model wrote which answer. `majority_vote_by_item`: the vote of most of
    the other reviewers (`tuned`, `other` or `tie`), by item id.
    """
    item_by_id = {item["id"]: item for item in review_key["items"]}
    choices = {}  # `a`, `b` or `tie`, by item id
    for item_id, judgement in reviewer.judgement_by_item.items():
        if OVERALL_QUESTION in judgement.choice_by_question:
            choices[item_id] = judgement.choice_by_question[OVERALL_QUESTION]
    flags = (
        _inconsistency_flag(choices, item_by_id),
        _same_side_flag(choices),
        _speed_flag(reviewer, item_by_id),
        _chance_agreement_flag(choices, item_by_id, majority_vote_by_item),
    )
    return [flag for flag in flags if flag is not None]


def _inconsistency_flag(choices: dict[str, str], item_by_id: dict[str, KeyItem]) -> str | None:
    """The flag of a reviewer who judges repeated items differently the second time; None if the rule is kept.

    Some items come twice, the second time with the sides exchanged. `choices`: `a`, `b` or `tie` by item id.
    """
    num_repeated = 0
    num_agreed = 0
    for item_id, choice in choices.items():
        first_id = item_by_id[item_id]["repeats"]  # None for an item that repeats no other
        if first_id in choices:
            same_judgement = VOTE_WITH_SIDES_EXCHANGED[choices[first_id]]
            num_repeated += 1
            num_agreed += choice == same_judgement
    if num_repeated < MIN_REPEATS or num_agreed > num_repeated / 2:
        return None
    return f"repeats: agrees with itself in {num_agreed} of {num_repeated} repeated items"


def _same_side_flag(choices: dict[str, str]) -> str | None:
    """The flag of a reviewer who nearly always chooses the same side, or a tie; None if the rule is kept.

    Sides are drawn at random, so a careful reviewer has no reason to prefer one. `choices`: `a`, `b` or `tie` by item id.
    """
    if len(choices) < MIN_JUDGED:
        return None
    # The most frequent choice, and how often it was made.
    choice, count = Counter(choices.values()).most_common(1)[0]
    if count <= MAX_SAME_SIDE_SHARE * len(choices):
        return None
    return f"side: says {choice} in {count} of {len(choices)} items"


def _speed_flag(reviewer: Reviewer, item_by_id: dict[str, KeyItem]) -> str | None:
    """The flag of a reviewer who chooses faster than anybody can read; None if the rule is kept.

    The speed is the words of prompt and answers over the seconds until the choice. Only the page measures these, so a
    reviewer who filled in the table gets no flag.
    """
    words_per_s = []
    for item_id, judgement in reviewer.judgement_by_item.items():
        if judgement.seconds is not None and OVERALL_QUESTION in judgement.choice_by_question:
            words_per_s.append(item_by_id[item_id]["words"] / max(judgement.seconds, 1e-3))  # a click may take 0 s
    if len(words_per_s) < MIN_JUDGED:
        return None
    median_words_per_s = median(words_per_s)
    if median_words_per_s <= MAX_WORDS_PER_SECOND:
        return None
    return f"time: {median_words_per_s:.0f} words a second in the middle one of {len(words_per_s)} items"


def _chance_agreement_flag(
    choices: dict[str, str], item_by_id: dict[str, KeyItem], majority_vote_by_item: dict[str, str]
) -> str | None:
    """The flag of a reviewer who agrees with the majority of the others no better than by chance; None if the rule is kept.

    Cohen's kappa is about 0 for somebody who answers without reading. `choices`: `a`, `b` or `tie` by item id.
    `majority_vote_by_item`: `tuned`, `other` or `tie`, for items that other reviewers judged too.
    """
    shared_item_ids = [item_id for item_id in choices if item_id in majority_vote_by_item]
    if len(shared_item_ids) < MIN_JUDGED:
        return None
    from launch.review.agreement import cohen_kappa, preferred_model

    own_votes = [preferred_model(choices[item_id], item_by_id[item_id]) for item_id in shared_item_ids]
    majority_votes = [majority_vote_by_item[item_id] for item_id in shared_item_ids]
    kappa = cohen_kappa(own_votes, majority_votes)
    if kappa is None or kappa > 0:
        return None
    return f"others: kappa {kappa:.2f} with the majority of the others on {len(shared_item_ids)} items"
