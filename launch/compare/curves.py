"""Compares loss curves with the first run's: how far they differ, where, and whether they may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launch.compare.run_files import Point

SAME = 1e-5
"""Losses count as the same up to this relative difference over the first steps: every strategy promises that."""
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
"""Settings that decide where and how fast a step is computed. They change no step, so the loss must stay the same."""


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
    """How far the losses of `other` are from those of `first`; None if no step has a finite loss in both."""
    difference_by_step: dict[int, float] = {}
    for step in sorted(first.steps.keys() & other.steps.keys()):
        loss = first.steps[step]["loss"]
        other_loss = other.steps[step]["loss"]
        if loss is not None and other_loss is not None:
            difference_by_step[step] = _relative_difference(loss, other_loss)
    if not difference_by_step:
        return None
    # Rounding grows with the steps, so only the first ones can show that strategies compute the same.
    first_steps = list(difference_by_step)[:FIRST_STEPS]
    early_step = max(first_steps, key=difference_by_step.__getitem__)
    drift_step = max(difference_by_step, key=difference_by_step.__getitem__)
    return LossDifference(
        early=difference_by_step[early_step],
        early_step=early_step,
        drift=difference_by_step[drift_step],
        drift_step=drift_step,
        steps=len(difference_by_step),
    )


def _relative_difference(a: float, b: float) -> float:
    """|a - b| relative to `a`, or to `b` if `a` is 0."""
    scale = abs(a) or abs(b) or 1.0
    return abs(a - b) / scale


def baseline_index(points: list[Point], number: int, first: int) -> int | None:
    """Which point the loss of point `number` is compared with: the earliest that takes the same steps, else `first`.

    None for a point before the first that has steps.
    """
    if number < first:
        return None
    # A strategy is compared with the first one of the same method and rate, a method with the first run of all.
    settings = _step_settings(points[number])
    for earlier in range(number):
        if points[earlier].steps and _step_settings(points[earlier]) == settings:
            return earlier
    return first


def _step_settings(point: Point) -> dict[str, Any]:
    """The settings that decide what the steps are."""
    return {key: value for key, value in point.config.items() if _decides_steps(key)}


def _decides_steps(key: str) -> bool:
    if key.startswith("run."):
        return key == "run.seed"
    return not any(key == prefix or key.startswith(f"{prefix}.") for prefix in SPEED_SETTINGS)


def first_step_not_finite(point: Point) -> int | None:
    """The first step whose loss was NaN or infinite."""
    return next((step for step, row in point.steps.items() if row["loss"] is None), None)


def why_not_comparable(first: Point, other: Point) -> list[str]:
    """Why the curves are not of the same documents in the same order: `key: value and value`; empty where they are."""
    if not first.identity or not other.identity:
        return _difference_lines(_identity_from_config(first), _identity_from_config(other))
    lines = []
    for kind in IDENTITY_KINDS:
        identity = first.identity.get(kind, {})
        other_identity = other.identity.get(kind, {})
        if kind == "data":
            if identity.get("fingerprint") == other_identity.get("fingerprint"):
                continue  # settings that changed nothing of what was prepared
            identity = {**_data_settings(first), **identity}
            other_identity = {**_data_settings(other), **other_identity}
        lines += _difference_lines(identity, other_identity)
    return lines


def _data_settings(point: Point) -> dict[str, Any]:
    """Where the data came from. The identity itself has only a fingerprint of the data's content."""
    keys = ("data.path", "data.eval_path", "data.test_path", "model.path", "model.tokenizer", "model.chat_template")
    return {key: point.config.get(key) for key in keys}


def _identity_from_config(point: Point) -> dict[str, Any]:
    """The identity of a run that ended before it was recorded: the settings that an identity is made of."""
    from trainer.config.tree import kind_of  # loads torch, which a comparison needs for such runs alone

    identity = {key: value for key, value in point.config.items() if key == "data.path"}
    for key, value in point.config.items():
        try:
            if kind_of(key) in IDENTITY_KINDS:
                identity[key] = value
        except KeyError:  # a setting of another version
            continue
    return identity


def _difference_lines(identity: dict[str, Any], other_identity: dict[str, Any]) -> list[str]:
    """A line for each key with different values: `key: value and value`."""
    lines = []
    for key in sorted(identity.keys() | other_identity.keys()):
        value = identity.get(key, "-")
        other_value = other_identity.get(key, "-")
        if value != other_value:
            name = "prepared data" if key == "fingerprint" else key
            lines.append(f"{name}: {_shortened(value)} and {_shortened(other_value)}")
    return lines


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
