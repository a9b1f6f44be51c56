"""Agreement of reviewers: Krippendorff's alpha over all of them, Cohen's kappa for each pair, by nltk."""

from __future__ import annotations

from typing import Any

TUNED_WINS, OTHER_WINS, TIE = "tuned", "other", "tie"
Votes = dict[tuple[str, str], str]
"""Who won, by (reviewer, item)."""


def winner(choice: str, item: dict[str, Any]) -> str:
    """A side as who stood on it."""
    if choice == TIE:
        return TIE
    return TUNED_WINS if choice == item["tuned"] else OTHER_WINS


def alpha(votes: Votes) -> float | None:
    """Krippendorff's alpha of nominal votes, items that one alone judged left out; None where nobody could have disagreed."""
    by_item: dict[str, list[tuple[str, str]]] = {}
    for (reviewer, item), vote in votes.items():
        by_item.setdefault(item, []).append((reviewer, vote))
    rows = [(reviewer, item, vote) for item, said in by_item.items() if len(said) > 1 for reviewer, vote in said]
    if len({vote for *_, vote in rows}) < 2:
        return None
    from nltk.metrics.agreement import AnnotationTask

    return float(AnnotationTask(data=rows).alpha())


def kappa(one: list[str], other: list[str]) -> float | None:
    """Cohen's kappa of two judges' votes on the same items; None where both always said one and the same."""
    if not one or len({*one, *other}) < 2:
        return None
    from nltk.metrics.agreement import AnnotationTask

    rows = [(who, str(place), vote) for who, votes in (("1", one), ("2", other)) for place, vote in enumerate(votes)]
    return float(AnnotationTask(data=rows).kappa_pairwise("1", "2"))


def pairwise_kappas(votes: Votes) -> list[dict[str, Any]]:
    """Cohen's kappa of each two reviewers on the items that both judged."""
    names = sorted({reviewer for reviewer, _ in votes})
    found = []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            shared = [item for reviewer, item in votes if reviewer == one and (other, item) in votes]
            value = kappa([votes[one, item] for item in shared], [votes[other, item] for item in shared])
            found.append({"reviewers": [one, other], "items": len(shared), "kappa": value})
    return found
