"""Agreement against a published example and scikit-learn; reviewers that stand out against simulated ones."""

import random
from pathlib import Path

import pytest

from launch.review.agreement import cohen_kappa, krippendorff_alpha
from launch.review.answers import ItemJudgement, Reviewer
from launch.review.careless_reviewers import carelessness_flags


def test_alpha_is_that_of_the_published_example():
    rows = {  # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), C: four observers, twelve units, . not seen
        "A": "1 2 3 3 2 1 4 1 2 . . .",
        "B": "1 2 3 3 2 2 4 1 2 5 . 3",
        "C": ". 3 3 3 2 3 4 2 2 5 1 .",
        "D": "1 2 3 3 2 4 4 1 2 5 1 .",
    }
    votes = {
        (who, str(unit)): said for who, row in rows.items() for unit, said in enumerate(row.split()) if said != "."
    }
    assert krippendorff_alpha(votes) == pytest.approx(0.743, abs=5e-4)


def test_agreement_is_undefined_where_nobody_could_have_disagreed():
    assert krippendorff_alpha({("a", "1"): "tie", ("b", "1"): "tie"}) is None
    assert krippendorff_alpha({("a", "1"): "tuned", ("b", "2"): "other"}) is None
    assert cohen_kappa(["tie"] * 3, ["tie"] * 3) is None and cohen_kappa([], []) is None


def test_kappa_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    drawn = random.Random(0)
    one = drawn.choices(["tuned", "other", "tie"], k=40)
    other = [vote if drawn.random() < 0.6 else drawn.choice(["tuned", "other", "tie"]) for vote in one]
    assert cohen_kappa(one, other) == pytest.approx(metrics.cohen_kappa_score(one, other))


def sheet(drawn, number, repeats):
    items = [{"id": str(n), "tuned": drawn.choice("ab"), "repeats": None, "words": 100} for n in range(number)]
    for first in drawn.sample(items, repeats):
        items.append(
            {
                **first,
                "id": f"again {first['id']}",
                "tuned": "b" if first["tuned"] == "a" else "a",
                "repeats": first["id"],
            }
        )
    return {"items": items}


def judged(drawn, key, truth, right, seconds):
    """A reviewer who says the truth this often, and anything else the rest of the time."""
    items = {}
    for item in key["items"]:
        winner = (
            truth[item["repeats"] or item["id"]] if drawn.random() < right else drawn.choice(["tuned", "other", "tie"])
        )
        side = (
            winner if winner == "tie" else item["tuned"] if winner == "tuned" else {"a": "b", "b": "a"}[item["tuned"]]
        )
        items[item["id"]] = ItemJudgement({"overall": side}, seconds=drawn.expovariate(1 / seconds))
    return Reviewer("one", Path("one.json"), items)


def test_agreement_finds_a_reviewer_who_ticks_at_random_and_no_careful_one():
    """50 items, 10 of them again: the rates that docs/review.md gives."""
    drawn, found = random.Random(0), {"careful": 0, "random": 0, "hasty": 0}
    for _ in range(400):
        key = sheet(drawn, 50, 10)
        truth = {item["id"]: drawn.choice(["tuned", "other", "tie"]) for item in key["items"]}
        others = {name: said for name, said in truth.items() if drawn.random() < 0.9}
        found["careful"] += bool(carelessness_flags(judged(drawn, key, truth, 0.85, 40), key, others))
        found["random"] += bool(carelessness_flags(judged(drawn, key, truth, 0.0, 40), key, others))
        found["hasty"] += bool(carelessness_flags(judged(drawn, key, truth, 0.85, 3), key, others))
    rates = {name: count / 400 for name, count in found.items()}
    assert rates["careful"] <= 0.05 and rates["random"] >= 0.9 and rates["hasty"] >= 0.9, rates
