"""Agreement of reviewers: Krippendorff's alpha over all of them, Cohen's kappa for each pair, by nltk."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.review.sheet import KeyItem

TUNED_WINS = "tuned"
OTHER_WINS = "other"
TIE = "tie"
VotesOnQuestion = dict[tuple[str, str], str]
"""Votes on one question, by (reviewer, item id): `TUNED_WINS`, `OTHER_WINS` or `TIE`."""


def preferred_model(choice: str, item: KeyItem) -> str:
    """Turn a reviewer's choice of a side into a vote for a model: `TUNED_WINS`, `OTHER_WINS` or `TIE`.

    `choice`: `a`, `b` or `tie`, as the reviewer saw the answers. `item["tuned"]` says on which side that of the tuned model
    was.
    """
    if choice == TIE:
        return TIE
    return TUNED_WINS if choice == item["tuned"] else OTHER_WINS


def krippendorff_alpha(votes: VotesOnQuestion) -> float | None:
    """How far all reviewers agree on one question: Krippendorff's nominal alpha, 1 for full agreement and 0 for chance.

    Over the items that several reviewers judged; None if all of their votes are the same.
    """
    votes_by_item: dict[str, list[tuple[str, str]]] = {}  # (reviewer, vote) of each item
    for (reviewer, item_id), vote in votes.items():
        votes_by_item.setdefault(item_id, []).append((reviewer, vote))
    rows = []  # (reviewer, item id, vote), the form that nltk reads
    for item_id, votes_on_item in votes_by_item.items():
        if len(votes_on_item) > 1:
            rows += [(reviewer, item_id, vote) for reviewer, vote in votes_on_item]
    different_votes = {vote for _, _, vote in rows}
    if len(different_votes) < 2:
        return None  # alpha divides by the disagreement expected by chance, which is 0 here
    from nltk.metrics.agreement import AnnotationTask

    return float(AnnotationTask(data=rows).alpha())


def cohen_kappa(first_votes: list[str], second_votes: list[str]) -> float | None:
    """How far two reviewers agree beyond chance: Cohen's kappa, 1 for full agreement and 0 for chance.

    `first_votes[i]` and `second_votes[i]` are on the same item. None without votes, or if all votes of both are the same:
    two reviewers who answer at random would agree as well.
    """
    if not first_votes or len({*first_votes, *second_votes}) < 2:
        return None
    from nltk.metrics.agreement import AnnotationTask

    # (reviewer, item, vote), the form that nltk reads.
    rows = [("1", str(item_number), vote) for item_number, vote in enumerate(first_votes)]
    rows += [("2", str(item_number), vote) for item_number, vote in enumerate(second_votes)]
    return float(AnnotationTask(data=rows).kappa_pairwise("1", "2"))


def pairwise_kappas(votes: VotesOnQuestion) -> list[dict[str, Any]]:
    """How far every two reviewers agree on items that both judged: {"reviewers": ["ada", "bert"], "items": 12, "kappa": 0.4}."""
    kappas = []
    reviewers = sorted({reviewer for reviewer, _ in votes})
    for first, second in combinations(reviewers, 2):
        shared_item_ids = [item_id for reviewer, item_id in votes if reviewer == first and (second, item_id) in votes]
        first_votes = [votes[first, item_id] for item_id in shared_item_ids]
        second_votes = [votes[second, item_id] for item_id in shared_item_ids]
        kappa = cohen_kappa(first_votes, second_votes)
        kappas.append({"reviewers": [first, second], "items": len(shared_item_ids), "kappa": kappa})
    return kappas
