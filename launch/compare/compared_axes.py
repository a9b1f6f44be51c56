"""The settings along which the points of a comparison differ, in the order of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.compare.names import (
    ABSENT_VALUE,
    KEYS_FIRST_IN_NAME,
    KEYS_LEFT_OUT_OF_NAMES,
    RECORD_KEY_PREFIX,
    WORLD_SIZE_KEY,
    SettingDifference,
    is_below,
)
from trainer.reporting.numbers import format_setting

AXIS_OF_POINT_NAMES = "point"
"""Key of the axis of points that no setting tells apart."""


@dataclass(frozen=True, slots=True)
class ComparedAxis:
    """A setting along which the points of a comparison differ, with its value at each point."""

    key: str
    labels: tuple[str, ...]
    """The value at each point, as text; `-` at a point that has no such setting."""

    @property
    def title(self) -> str:
        """The setting's name for a reader: `strategy`, `optim.lr`, `ranks`."""
        if self.key == WORLD_SIZE_KEY:
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
    names: Sequence[str], differences: Sequence[SettingDifference], command_keys: Sequence[str] = ()
) -> list[ComparedAxis]:
    """Find the axes of a comparison, to which plots give a colour or a dash: the settings by which its points are told apart.

    A setting that tells no further points apart is left out: if the learning rate follows from the method at each point, it
    is no axis of its own. If some points are not told apart by any setting, a last axis has the `names` of all points.

    `names`: of the points.
    `differences`: settings that differ, with a value for each point.
    `command_keys`: keys such as `strategy` in the order of the command that started the points; empty if the runs existed
        already.
    """
    settings = [difference for difference in differences if _can_be_axis(difference.key)]
    # Of two settings that tell the same points apart, the first in this order becomes the axis.
    settings.sort(key=lambda difference: _axis_order(difference.key, command_keys))
    axes: list[ComparedAxis] = []
    labels_so_far = [""] * len(names)  # for each point: its labels on the axes so far, joined by what no label has
    for difference in settings:
        labels = tuple(_axis_label(value) for value in difference.values)
        longer_labels = [f"{so_far}\n{label}" for so_far, label in zip(labels_so_far, labels, strict=True)]
        tells_more_points_apart = len(set(longer_labels)) > len(set(labels_so_far))
        if tells_more_points_apart:
            axes.append(ComparedAxis(difference.key, labels))
            labels_so_far = longer_labels
    if len(set(labels_so_far)) < len(names):
        axes.append(ComparedAxis(AXIS_OF_POINT_NAMES, tuple(names)))
    return axes


def _can_be_axis(key: str) -> bool:
    """Whether a difference can be an axis of plots: a setting that changes the run (`optim.lr`), or the number of ranks.

    Other entries of `run.json`, and settings that only say how a run was started or what it reports (`logging.*`), cannot.
    """
    if key.startswith(RECORD_KEY_PREFIX):
        return key == WORLD_SIZE_KEY
    return not is_below(key, KEYS_LEFT_OUT_OF_NAMES)


def _axis_order(key: str, command_keys: Sequence[str]) -> tuple[int, int]:
    """Sort key of axes, (group, position in it): settings of the command in its order, `KEYS_FIRST_IN_NAME`, all others."""
    command_key = key.removesuffix(".name")  # `strategy.name` is given as `strategy=ddp`
    if key == WORLD_SIZE_KEY:
        # The number of ranks follows from this setting.
        command_key = "launcher.processes"
    for candidate in (command_key, key):
        if candidate in command_keys:
            return 0, command_keys.index(candidate)
    if key in KEYS_FIRST_IN_NAME:
        return 1, KEYS_FIRST_IN_NAME.index(key)
    return 2, 0


def _axis_label(value: object) -> str:
    return ABSENT_VALUE if value == ABSENT_VALUE else format_setting(value)
