"""The settings along which the points of a comparison differ, in the order in which they were typed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.compare.names import ABSENT, FIRST_IN_NAME, NOT_NAMED, SettingDifference, is_below
from trainer.reporting.numbers import short

WORLD_SIZE = "run.json world_size"
POINT_KEY = "point"
"""Key of the axis of points that no setting tells apart."""


@dataclass(frozen=True, slots=True)
class ComparedAxis:
    """One setting, with its value at each point."""

    key: str
    labels: tuple[str, ...]
    """The value at each point, as text; `-` at a point that has no such setting."""

    @property
    def title(self) -> str:
        """What people call the setting: `strategy`, `optim.lr`, `ranks`."""
        if self.key == WORLD_SIZE:
            return "ranks"
        return self.key.removesuffix(".name")

    @property
    def values(self) -> list[str]:
        """Each label once: numbers from small to large, words in the order of the points."""
        labels = list(dict.fromkeys(self.labels))
        try:
            return sorted(labels, key=float)
        except ValueError:
            return labels


def compared_axes(
    names: Sequence[str], differences: Sequence[SettingDifference], typed_keys: Sequence[str] = ()
) -> list[ComparedAxis]:
    """The axes of a comparison: settings in which its points differ, with a label for each point, such as rank 8, 16, 16.

    Plots give each axis a colour or a dash. An axis that tells no further points apart is left out: with
    `compare.where=[tuning=full+optim.lr=2e-5,...]` the learning rate follows from the method, and is no axis of its own. Points
    that no setting tells apart get a last axis with their `names`. `typed_keys`: keys in the order of the command that started
    the points, such as `strategy`; empty for runs that existed.
    """
    settings = [difference for difference in differences if _is_axis(difference.key)]
    settings.sort(key=lambda difference: _order(difference.key, typed_keys))
    axes: list[ComparedAxis] = []
    combinations = [""] * len(names)  # by point: its labels on the axes so far
    for difference in settings:
        labels = tuple(_label(value) for value in difference.values)
        longer = [f"{before}\n{label}" for before, label in zip(combinations, labels, strict=True)]
        if len(set(longer)) > len(set(combinations)):
            axes.append(ComparedAxis(difference.key, labels))
            combinations = longer
    if len(set(combinations)) < len(names):
        axes.append(ComparedAxis(POINT_KEY, tuple(names)))
    return axes


def _is_axis(key: str) -> bool:
    """Whether a difference is a choice of the user's that changes the run, and no fact that follows from others."""
    if key.startswith("run.json "):
        return key == WORLD_SIZE
    return not is_below(key, NOT_NAMED)


def _order(key: str, typed_keys: Sequence[str]) -> tuple[int, int]:
    """Sort key: settings that were typed, in their order, then those that names begin with, then others."""
    typed_key = key.removesuffix(".name")
    if key == WORLD_SIZE:
        typed_key = "launcher.processes"
    for candidate in (typed_key, key):
        if candidate in typed_keys:
            return 0, typed_keys.index(candidate)
    if key in FIRST_IN_NAME:
        return 1, FIRST_IN_NAME.index(key)
    return 2, 0


def _label(value: object) -> str:
    return ABSENT if value == ABSENT else short(value)
