"""Words with several values: the axes, their points, and the conditions that leave points out."""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.config.choices import WHOLE_RUN_GROUPS, groups
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from trainer.reporting.config import LoggingConfig

FUNCTION = re.compile(r"[a-z]+\(.*\)", re.DOTALL)
"""Hydra's own way to write several values, such as range(0,3)."""
BETWEEN_WORDS = re.compile(r"\s*\+\s*(?=[\w.]+=)|\s+(?=[\w.]+=)")
"""Between the words of one condition."""
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Axes:
    """What was typed: one value for each of some words, several for the axes."""

    words: tuple[tuple[str, ...], ...]
    """The words as typed, in their order, each as the words that it stands for."""

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The values of each key that has several."""
        return {
            words[0].partition("=")[0]: tuple(word.partition("=")[2] for word in words)
            for words in self.words
            if len(words) > 1
        }

    def points(self) -> list[list[str]]:
        """The cartesian product, last word fastest; a setting of some choices of an axis goes to their points alone."""
        settings_of_some_choices, points, shortened = self._settings_of_some_choices(), [], set()
        for full_point in itertools.product(*self.words):
            values = {key: value for key, _, value in (word.partition("=") for word in full_point)}
            point = tuple(
                word
                for word in full_point
                if _exists_under(settings_of_some_choices.get(word.partition("=")[0]), values)
            )
            if point == full_point or point not in shortened:
                points.append(list(point))
            if point != full_point:
                shortened.add(point)
        return points

    def values_on_axes(self, point: list[str]) -> dict[str, str]:
        """The values of a point on each axis that it has."""
        axes = self.axes
        pairs = [word.partition("=") for word in point]
        return {key: value for key, _, value in pairs if key in axes}

    def describe_point(self, point: list[str]) -> str:
        """What a point has that others have not, in words."""
        return " ".join(f"{key}={value}" for key, value in self.values_on_axes(point).items()) or "only point"

    def settings_of_some_points(self) -> list[str]:
        """A line for each setting that some points do not have, since the choice of theirs has no such setting."""
        axes = self.axes
        return [
            f"{key}: only where {group} is {' or '.join(choice for choice in axes[group] if choice in choices)}"
            for key, (group, choices) in self._settings_of_some_choices().items()
        ]

    def _settings_of_some_choices(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The typed settings that some values of an axis have and others have not: {key: (the axis, choices that have it)}."""
        from launch.config.overrides import setting_of, settings

        axes, partial = self.axes, {}
        for key in (words[0].partition("=")[0] for words in self.words):
            group = key.partition(".")[0]
            if key != group and group in axes:
                setting = setting_of(settings(), key)
                if setting is not None and any(choice in setting.under for choice in axes[group]):
                    partial[key] = (group, setting.under)
        return {key: limits for key, limits in partial.items() if not {*axes[limits[0]]} <= {*limits[1]}}


def _exists_under(limit: tuple[str, tuple[str, ...]] | None, values: dict[str, str]) -> bool:
    return limit is None or values[limit[0]] in limit[1]


def read_axes(words: list[str]) -> Axes:
    """Sort the words out. Raises ConfigError where nothing stands between two commas."""
    problems, expanded = [], []
    for word in words:
        try:
            expanded.append(tuple(_expand_word(word)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Axes(tuple(expanded))


def split_at_commas(text: str) -> list[str]:
    """What stands between commas, those within quotes, brackets, braces and parentheses left alone."""
    parts, depth, quote = [""], 0, ""
    for before, character in zip(" " + text, text, strict=False):
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "'\"" and before in " ,=[({":  # a value's own apostrophe quotes nothing
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth = max(0, depth - 1)
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def _expand_word(word: str) -> list[str]:
    """The words that a word stands for: itself, or one for each of its values."""
    key, _, text = word.partition("=")
    parts = split_at_commas(text)
    if len(parts) > 1:
        if not all(parts):
            raise ConfigError(f"{word}: nothing stands between two commas; leave one out, or quote the whole value")
        return [f"{key}={part}" for part in parts]
    if text.startswith("glob(") and text.endswith(")"):
        return [f"{key}={match}" for match in _glob_matches(word, key, text)]
    if FUNCTION.fullmatch(text):
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        try:
            override = OverridesParser.create().parse_override(word)
            if override.is_sweep_override():
                return [f"{override.get_key_element()}={point}" for point in override.sweep_string_iterator()]
        except (HydraException, NotImplementedError):
            pass  # text that looks like one, or reported when the point is composed
    return [word]


def _glob_matches(word: str, key: str, text: str) -> list[str]:
    """The choices of a group, or the files, that `glob(<pattern>)` or `glob([a,b],exclude=c)` means. Errors: ConfigError."""
    from glob import glob

    parts = split_at_commas(text.removeprefix("glob(").removesuffix(")"))
    patterns_by_use: dict[str, list[str]] = {"include": [], "exclude": []}
    for part in parts:
        use, assigned, patterns = part.partition("=")
        use, patterns = (use.strip(), patterns) if assigned and use.strip() in patterns_by_use else ("include", part)
        patterns_by_use[use] += [entry.strip("'\" ") for entry in split_at_commas(patterns.strip().strip("[]"))]
    if key in groups():
        matches_by_pattern = {
            pattern: fnmatch.filter(groups()[key], pattern)
            for pattern in (*patterns_by_use["include"], *patterns_by_use["exclude"])
        }
    else:
        all_patterns = (*patterns_by_use["include"], *patterns_by_use["exclude"])
        matches_by_pattern = {pattern: glob(pattern, recursive=True) for pattern in all_patterns}  # noqa: PTH207 - absolute patterns too
    excluded = {entry for pattern in patterns_by_use["exclude"] for entry in matches_by_pattern[pattern]}
    matches = sorted(
        {entry for pattern in patterns_by_use["include"] for entry in matches_by_pattern[pattern]} - excluded
    )
    if not matches:
        raise ConfigError(
            f"{word}: matches nothing" + (f"; {key}= has {', '.join(groups()[key])}" if key in groups() else "")
        )
    return matches


def excluded_points(axes: Axes, skip: list[str], where: list[str]) -> list[bool]:
    """Whether each point is left out by a condition.

    `skip`: a point that has all words of a condition is left out; `where`: one that has its first word and not all others is.
    Raises ConfigError for conditions about what is no axis or no value of it: they would never hold.
    """
    problems: list[str] = []
    skipping = [_condition("compare.skip", condition_text, axes, problems) for condition_text in skip]
    keeping = [_condition("compare.where", condition_text, axes, problems) for condition_text in where]
    for condition_text, condition in zip(where, keeping, strict=True):
        if len(condition) == 1:
            problems.append(
                f"compare.where: {condition_text}: says nothing more of such points; add the words that must stand beside it, as in "
                "compare.where=[tuning=lora+optim.lr=2e-4]"
            )
    if problems:
        raise ConfigError(problems)
    excluded = []
    for point in axes.points():
        values = axes.values_on_axes(point)

        def holds(words: list[tuple[str, str]], values: dict[str, str] = values) -> bool:
            return all(values.get(key) == value for key, value in words)

        is_skipped = any(holds(condition) for condition in skipping)
        excluded.append(is_skipped or any(holds(condition[:1]) and not holds(condition) for condition in keeping))
    return excluded


def _condition(name: str, text: str, axes: Axes, problems: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for word in BETWEEN_WORDS.split(text.strip().strip("'\"")):
        key, _, value = word.partition("=")
        values = axes.axes.get(key)
        if values is None:
            axis_names = ", ".join(axes.axes) or "none"
            problems.append(f"{name}: {word}: no axis of this comparison; those with several values: {axis_names}")
        elif value not in values:
            problems.append(f"{name}: {word}: {key} takes {', '.join(values)} here")
        else:
            pairs.append((key, value))
    return pairs


def label(values: dict[str, str]) -> str:
    """A point's name for people and directories, such as `fsdp2-lora-lr2e-4`; `point` where there is no axis."""
    return (
        "-".join(filter(None, (_label_part(key, value) for key, value in values.items())))[:80].strip("-.") or "point"
    )


def name_in_trackers(logging: LoggingConfig, base: Path, name: str, words: Iterable[str]) -> None:
    """Let trackers show a point as one of several: the group is theirs, the name its own, each axis is a column.

    `words` are the point's values on the axes; what the user has set stays, and so does the group that WANDB_RUN_GROUP names.
    """
    logging.group = logging.group or os.environ.get("WANDB_RUN_GROUP") or base.resolve().name
    logging.name = f"{logging.name}-{name}" if logging.name else name
    # What is no setting (experiment=) is a column by its word.
    added = [word if (key := word.partition("=")[0]) in WHOLE_RUN_GROUPS else key for word in words]
    logging.columns = list(dict.fromkeys([*logging.columns, *added]))


def _label_part(key: str, value: str) -> str:
    text = value.strip("'\"[]").rstrip("/")
    leaf = key.rsplit(".", 1)[-1]
    if key in groups():
        part = text
    elif leaf in ("path", "eval_path", "tokenizer"):
        part = text.rsplit("/", 1)[-1]
    else:
        part = f"{leaf}{text}" if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text) else f"{leaf}_{text}"
    return re.sub(r"[^\w.-]+", "_", part).strip("_.-")
