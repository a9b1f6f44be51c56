"""The search space: words with ranges or lists, as Optuna distributions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from launch.config.axes import FUNCTION, read_axes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

EXAMPLES = "interval(1e-5,1e-3), tag(log,interval(1e-5,1e-3)), range(1,9,2), choice(a,b), or a,b"
DIGITS = 6
"""Significant digits of a value that is drawn: the run has what is shown, and what can be pasted."""


@dataclass(frozen=True, slots=True)
class SearchedSetting:
    """A setting of which values are tried: choices, or numbers from `low` to `high` with both."""

    key: str
    text: str
    """What was typed behind the equals sign."""
    choices: tuple[str, ...] = ()
    """Values as they would be typed; empty for numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Between numbers of a range; None: all between `low` and `high`."""
    is_integer: bool = False
    log: bool = False
    """Whether the logarithm is drawn evenly."""

    def distribution(self) -> BaseDistribution:
        """The setting as an Optuna distribution."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def word(self, value: Any) -> str:
        """A value that was drawn, as a word."""
        if self.choices:
            text = value
        elif self.is_integer:
            text = int(value)
        else:  # rounding to the digits shown must not leave the interval
            text = _with_digits(min(max(value, self.low), self.high))
        return f"{self.key}={text}"

    def extreme_words(self) -> list[str]:
        """Words that must all be legal: the choices, or both ends."""
        values = self.choices or dict.fromkeys((self.low, self.high))
        return [self.word(value) for value in values]


def read_space(words: list[str]) -> tuple[list[SearchedSetting], list[str]]:
    """(the settings that are searched, the words that are the same for all). Raises ConfigError with every problem."""
    problems: list[str] = []
    space: list[SearchedSetting] = []
    fixed: list[str] = []
    for word in words:
        try:
            setting = _read(word)
        except ConfigError as error:
            problems += error.problems
            continue
        if setting is None:
            fixed.append(word)
        else:
            space.append(setting)
    keys = [searched.key for searched in space]
    keys += [word.partition("=")[0] for word in fixed]
    for searched in space:
        if keys.count(searched.key) > 1:
            problems.append(f"{searched.key}={searched.text}: {searched.key} is given twice")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return space, fixed


def _read(word: str) -> SearchedSetting | None:
    """None where the word has one value."""
    key, assigned, text = word.partition("=")
    if assigned and FUNCTION.fullmatch(text.strip()) and not text.startswith("glob("):
        return _read_function(word, key, text.strip())
    points = read_axes([word]).words[0]  # `a,b` is a list of choices
    if len(points) == 1:
        return None
    return SearchedSetting(key, text, tuple(dict.fromkeys(point.partition("=")[2] for point in points)))


def _read_function(word: str, key: str, text: str) -> SearchedSetting | None:
    """The setting of a word in Hydra's sweep syntax; None if it has one value, or is a text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        distribution: Any = override.value() if override.is_sweep_override() else None
    except (HydraException, NotImplementedError) as error:
        if _is_text(key):
            return None  # a path or a text that looks like one
        reason = re.sub(r"^\w+ while evaluating .*?': ", "", str(error).splitlines()[0]).split(" Available")[0]
        raise ConfigError(f"{word}: is no distribution ({reason}); write {EXAMPLES}") from error
    if distribution is None:
        return None  # such as int(3), one value
    tags = distribution.tags
    if unknown_tags := tags - {"log"}:
        raise ConfigError(
            f"{word}: there is no tag {', '.join(sorted(unknown_tags))}; tag(log,interval(1e-5,1e-3)) is the one there is"
        )
    if getattr(distribution, "shuffle", False):
        raise ConfigError(f"{word}: a search draws in an order of its own; leave shuffle out")
    if isinstance(distribution, ChoiceSweep):
        if tags:
            raise ConfigError(f"{word}: log is of numbers between two ends; write tag(log,interval(1e-5,1e-3))")
        choices = [choice.partition("=")[2] for choice in read_axes([word]).words[0]]
        return SearchedSetting(key, text, tuple(dict.fromkeys(choices)))
    if isinstance(distribution, IntervalSweep):
        return _interval(word, SearchedSetting(key, text, log="log" in tags), distribution.start, distribution.end_run)
    assert isinstance(distribution, RangeSweep)
    if tags:
        raise ConfigError(
            f"{word}: a range has steps, which a logarithm has not; write tag(log,interval(...)), or choice(...)"
        )
    return _range(word, SearchedSetting(key, text), distribution.start, distribution.stop, distribution.step)


def _interval(word: str, setting: SearchedSetting, low: Any, high: Any) -> SearchedSetting:
    """The setting with both ends of an interval. Raises ConfigError for ends that are no interval."""
    is_integer = _is_whole(setting.key) or (isinstance(low, int) and isinstance(high, int))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{word}: goes from {low:g} to {high:g}; write the smaller end first, both of them numbers")
    if setting.log and low <= 0:
        raise ConfigError(f"{word}: a logarithm needs ends above 0; raise {low:g}, or leave tag(log,...) out")
    if is_integer and (low != int(low) or high != int(high)):
        raise ConfigError(f"{word}: {setting.key} is a whole number; give whole ends")
    return SearchedSetting(setting.key, setting.text, low=low, high=high, is_integer=is_integer, log=setting.log)


def _range(word: str, setting: SearchedSetting, start: Any, stop: Any, step: Any) -> SearchedSetting:
    """The setting with the numbers of a range, its end left out. Raises ConfigError for a range without one."""
    if not (step > 0 and start < stop):
        raise ConfigError(
            f"{word}: goes from {start:g} up to {stop:g} by {step:g}, which has no number; write range(1,9,2)"
        )
    is_integer = all(isinstance(number, int) for number in (start, stop, step))
    # The end is not of the range, as in Hydra.
    high = start + (math.ceil((stop - start) / step - 1e-9) - 1) * step
    return SearchedSetting(setting.key, setting.text, low=start, high=high, step=step, is_integer=is_integer)


def _with_digits(value: float) -> str:
    return f"{value:.{DIGITS}g}"


def _types(key: str) -> set[Any]:
    from launch.config.overrides import setting_of, settings

    setting = setting_of(settings(), key)
    return set() if setting is None else set(get_args(setting.type) or (setting.type,)) - {type(None)}


def _is_whole(key: str) -> bool:
    return _types(key) == {int}


def _is_text(key: str) -> bool:
    return bool(_types(key) & {str, Any})
