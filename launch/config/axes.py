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
TOGETHER = re.compile(r"\s*\+\s*(?=[\w.]+=)|\s+(?=[\w.]+=)")
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
            values[0].partition("=")[0]: tuple(word.partition("=")[2] for word in values)
            for values in self.words
            if len(values) > 1
        }

    def points(self) -> list[list[str]]:
        """The cartesian product, last word fastest; a setting of some choices of an axis goes to their points alone."""
        own, found, shorter = self._own(), [], set()
        for whole in itertools.product(*self.words):
            there = {key: value for key, _, value in (word.partition("=") for word in whole)}
            point = tuple(word for word in whole if _meant(own.get(word.partition("=")[0]), there))
            if point == whole or point not in shorter:
                found.append(list(point))
            if point != whole:
                shorter.add(point)
        return found

    def chosen(self, point: list[str]) -> dict[str, str]:
        """The values of a point on each axis that it has."""
        axes = self.axes
        typed = [word.partition("=") for word in point]
        return {key: value for key, _, value in typed if key in axes}

    def changed(self, point: list[str]) -> str:
        """What a point has that others have not, in words."""
        return " ".join(f"{key}={value}" for key, value in self.chosen(point).items()) or "only point"

    def partly(self) -> list[str]:
        """A line for each setting that some points do not have, since the choice of theirs has no such setting."""
        axes = self.axes
        return [
            f"{key}: only where {group} is {' or '.join(choice for choice in axes[group] if choice in choices)}"
            for key, (group, choices) in self._own().items()
        ]

    def _own(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The typed settings that some values of an axis have and others have not: {key: (the axis, choices that have it)}."""
        from launch.config.overrides import setting_of, settings

        axes, found = self.axes, {}
        for key in (values[0].partition("=")[0] for values in self.words):
            group = key.partition(".")[0]
            if key != group and group in axes:
                setting = setting_of(settings(), key)
                if setting is not None and any(choice in setting.under for choice in axes[group]):
                    found[key] = (group, setting.under)
        return {key: each for key, each in found.items() if not {*axes[each[0]]} <= {*each[1]}}


def _meant(own: tuple[str, tuple[str, ...]] | None, there: dict[str, str]) -> bool:
    return own is None or there[own[0]] in own[1]


def read_axes(words: list[str]) -> Axes:
    """Sort the words out. Raises ConfigError where nothing stands between two commas."""
    problems, found = [], []
    for word in words:
        try:
            found.append(tuple(_values(word)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Axes(tuple(found))


def split(text: str) -> list[str]:
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


def _values(word: str) -> list[str]:
    """The words that a word stands for: itself, or one for each of its values."""
    key, _, text = word.partition("=")
    parts = split(text)
    if len(parts) > 1:
        if not all(parts):
            raise ConfigError(f"{word}: nothing stands between two commas; leave one out, or quote the whole value")
        return [f"{key}={part}" for part in parts]
    if text.startswith("glob(") and text.endswith(")"):
        return [f"{key}={found}" for found in _matching(word, key, text)]
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


def _matching(word: str, key: str, text: str) -> list[str]:
    """The choices of a group, or the files, that `glob(<pattern>)` or `glob([a,b],exclude=c)` means. Errors: ConfigError."""
    from glob import glob

    parts = split(text.removeprefix("glob(").removesuffix(")"))
    given: dict[str, list[str]] = {"include": [], "exclude": []}
    for part in parts:
        name, assigned, patterns = part.partition("=")
        name, patterns = (name.strip(), patterns) if assigned and name.strip() in given else ("include", part)
        given[name] += [each.strip("'\" ") for each in split(patterns.strip().strip("[]"))]
    if key in groups():
        there = {pattern: fnmatch.filter(groups()[key], pattern) for pattern in (*given["include"], *given["exclude"])}
    else:
        asked = (*given["include"], *given["exclude"])
        there = {pattern: glob(pattern, recursive=True) for pattern in asked}  # noqa: PTH207 - absolute patterns too
    out = {each for pattern in given["exclude"] for each in there[pattern]}
    found = sorted({each for pattern in given["include"] for each in there[pattern]} - out)
    if not found:
        raise ConfigError(
            f"{word}: matches nothing" + (f"; {key}= has {', '.join(groups()[key])}" if key in groups() else "")
        )
    return found


def left_out(axes: Axes, skip: list[str], where: list[str]) -> list[bool]:
    """Whether each point is left out by a condition.

    `skip`: a point that has all words of a condition is left out; `where`: one that has its first word and not all others is.
    Raises ConfigError for conditions about what is no axis or no value of it: they would never hold.
    """
    problems: list[str] = []
    skipping = [_condition("compare.skip", said, axes, problems) for said in skip]
    keeping = [_condition("compare.where", said, axes, problems) for said in where]
    for said, condition in zip(where, keeping, strict=True):
        if len(condition) == 1:
            problems.append(
                f"compare.where: {said}: says nothing more of such points; add the words that must stand beside it, as in "
                "compare.where=[tuning=lora+optim.lr=2e-4]"
            )
    if problems:
        raise ConfigError(problems)
    found = []
    for point in axes.points():
        chosen = axes.chosen(point)

        def has(words: list[tuple[str, str]], chosen: dict[str, str] = chosen) -> bool:
            return all(chosen.get(key) == value for key, value in words)

        out = any(has(condition) for condition in skipping)
        found.append(out or any(has(condition[:1]) and not has(condition) for condition in keeping))
    return found


def _condition(name: str, said: str, axes: Axes, problems: list[str]) -> list[tuple[str, str]]:
    found = []
    for word in TOGETHER.split(said.strip().strip("'\"")):
        key, _, value = word.partition("=")
        values = axes.axes.get(key)
        if values is None:
            several = ", ".join(axes.axes) or "none"
            problems.append(f"{name}: {word}: no axis of this comparison; those with several values: {several}")
        elif value not in values:
            problems.append(f"{name}: {word}: {key} takes {', '.join(values)} here")
        else:
            found.append((key, value))
    return found


def label(chosen: dict[str, str]) -> str:
    """A point's name for people and directories, such as `fsdp2-lora-lr2e-4`; `point` where there is no axis."""
    return "-".join(filter(None, (_part(key, value) for key, value in chosen.items())))[:80].strip("-.") or "point"


def name_in_trackers(logging: LoggingConfig, base: Path, name: str, words: Iterable[str]) -> None:
    """Let trackers show a point as one of several: the group is theirs, the name its own, each axis is a column.

    `words` are the point's values on the axes; what the user has set stays, and so does the group that WANDB_RUN_GROUP names.
    """
    logging.group = logging.group or os.environ.get("WANDB_RUN_GROUP") or base.resolve().name
    logging.name = f"{logging.name}-{name}" if logging.name else name
    # What is no setting (experiment=) is a column by its word.
    added = [word if (key := word.partition("=")[0]) in WHOLE_RUN_GROUPS else key for word in words]
    logging.columns = list(dict.fromkeys([*logging.columns, *added]))


def _part(key: str, value: str) -> str:
    text = value.strip("'\"[]").rstrip("/")
    leaf = key.rsplit(".", 1)[-1]
    if key in groups():
        shown = text
    elif leaf in ("path", "eval_path", "tokenizer"):
        shown = text.rsplit("/", 1)[-1]
    else:
        shown = f"{leaf}{text}" if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", text) else f"{leaf}_{text}"
    return re.sub(r"[^\w.-]+", "_", shown).strip("_.-")
