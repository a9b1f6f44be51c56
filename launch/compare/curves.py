"""Compares loss curves with the first run's: how far apart they are, where, and whether they may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.compare.run_files import Point

SAME = 1e-5
"""Strategies are promised to agree so far, relatively, over the first steps."""
FIRST_STEPS = 5
IDENTITY_KINDS = ("data", "order", "objective")
"""What must be the same for losses of the same step to be of the same documents and of the same kind."""


SPEED_SETTINGS = (
    *(
        "strategy",
        "launcher",
        "logging",
        "profile",
        "checkpoint",
        "export",
        "evaluation",
        "batch.micro",
        "substitutions",
    ),
    *("model.attention", "model.keep_packed", "data.layout", "data.cache_dir", "data.workers", "data.verify"),
)
"""Settings that decide where and how fast a step is computed, never which: the loss is promised to be the same."""


@dataclass(frozen=True, slots=True)
class LossDifference:
    """Relative differences of two curves over the steps that both have."""

    early: float
    """The largest over the first five steps."""
    early_step: int
    drift: float
    """The largest over all."""
    drift_step: int
    steps: int
    """How many steps both have."""

    @property
    def same(self) -> bool:
        """Whether the first steps agree as strategies are promised to."""
        return self.early <= SAME


def compare_losses(first: Point, other: Point) -> LossDifference | None:
    """How far `other` is from `first`; None where no step has a finite loss in both."""
    pairs = {
        step: (first.steps[step]["loss"], other.steps[step]["loss"])
        for step in sorted(first.steps.keys() & other.steps.keys())
    }
    found = {step: _relative(a, b) for step, (a, b) in pairs.items() if a is not None and b is not None}
    if not found:
        return None
    begun = list(found)[:FIRST_STEPS]
    early, drift = max(begun, key=found.__getitem__), max(found, key=found.__getitem__)
    return LossDifference(found[early], early, found[drift], drift, len(found))


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(a) if a else abs(b - a) / (abs(b) or 1.0)


def baseline_index(points: list[Point], number: int, first: int) -> int | None:
    """Which curve that of a point is set beside: the earliest whose loss is promised to be the same, else the first.

    None for a point before the first that has steps.
    """
    if number < first:
        return None
    job = _step_settings(points[number])
    return next((n for n in range(number) if points[n].steps and _step_settings(points[n]) == job), first)


def _step_settings(point: Point) -> dict[str, Any]:
    """The settings that decide what the steps are."""
    return {
        key: value
        for key, value in point.config.items()
        if not any(key == prefix or key.startswith(f"{prefix}.") for prefix in SPEED_SETTINGS)
        and (key == "run.seed" or not key.startswith("run."))
    }


def first_step_not_finite(point: Point) -> int | None:
    """The first step whose loss was NaN or infinite."""
    return next((step for step, row in point.steps.items() if row["loss"] is None), None)


def why_not_comparable(first: Point, other: Point) -> list[str]:
    """Why the curves are not of the same documents in the same order: `key: value and value`; empty where they are."""
    if not first.identity or not other.identity:
        ours, theirs = _identity_from_config(first), _identity_from_config(other)
        return _difference_lines(ours, theirs)
    lines = []
    for kind in IDENTITY_KINDS:
        ours, theirs = first.identity.get(kind, {}), other.identity.get(kind, {})
        if kind == "data" and ours.get("fingerprint") == theirs.get("fingerprint"):
            continue  # settings that changed nothing of what was prepared
        if kind == "data":
            ours, theirs = {**_data_words(first), **ours}, {**_data_words(other), **theirs}
        lines += _difference_lines(ours, theirs)
    return lines


def _data_words(point: Point) -> dict[str, Any]:
    """Where the data came from, which the identity has by its content alone."""
    words = ("data.path", "data.eval_path", "data.test_path", "model.path", "model.tokenizer", "model.chat_template")
    return {key: point.config.get(key) for key in words}


def _identity_from_config(point: Point) -> dict[str, Any]:
    """For runs that ended before their identity was known."""
    from trainer.config.tree import kind_of  # loads torch, which a comparison needs for such runs alone

    found = {key: value for key, value in point.config.items() if key == "data.path"}
    for key, value in point.config.items():
        try:
            if kind_of(key) in IDENTITY_KINDS:
                found[key] = value
        except KeyError:  # a setting of another version
            continue
    return found


def _difference_lines(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"{'prepared data' if key == 'fingerprint' else key}: {_short(ours.get(key, '-'))} and "
        f"{_short(theirs.get(key, '-'))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "-") != theirs.get(key, "-")
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
