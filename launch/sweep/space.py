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

WAYS = "interval(1e-5,1e-3), tag(log,interval(1e-5,1e-3)), range(1,9,2), choice(a,b), or a,b"
DIGITS = 6
"""Significant digits of a value that is drawn: the run has what is shown, and what can be pasted."""


@dataclass(frozen=True, slots=True)
class Searched:
    """A setting of which values are tried: choices, or numbers from `low` to `high` with both."""

    key: str
    text: str
    """As typed, behind the equals sign."""
    choices: tuple[str, ...] = ()
    """Values as they would be typed; empty for numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Between numbers of a range; None: all between `low` and `high`."""
    whole: bool = False
    log: bool = False
    """Drawn evenly of the logarithm."""

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def word(self, value: Any) -> str:
        """A value that was drawn, as a word."""
        if self.choices:
            return f"{self.key}={value}"
        return f"{self.key}={int(value) if self.whole else _shown(min(max(value, self.low), self.high))}"

    def corners(self) -> list[str]:
        """Words that must all be legal: the choices, or both ends."""
        return [self.word(value) for value in (self.choices or dict.fromkeys((self.low, self.high)))]


def read_space(words: list[str]) -> tuple[list[Searched], list[str]]:
    """(the settings that are searched, the words that are the same for all). Raises ConfigError with every problem."""
    problems: list[str] = []
    space: list[Searched] = []
    fixed: list[str] = []
    for word in words:
        try:
            found = _read(word)
        except ConfigError as error:
            problems += error.problems
            continue
        if found is None:
            fixed.append(word)
        else:
            space.append(found)
    keys = [one.key for one in space] + [word.partition("=")[0] for word in fixed]
    problems += [f"{one.key}={one.text}: {one.key} is given twice" for one in space if keys.count(one.key) > 1]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return space, fixed


def _read(word: str) -> Searched | None:
    """None where the word has one value."""
    key, assigned, text = word.partition("=")
    if assigned and FUNCTION.fullmatch(text.strip()) and not text.startswith("glob("):
        return _of_function(word, key, text.strip())
    values = read_axes([word]).words[0]
    if len(values) == 1:
        return None
    return Searched(key, text, tuple(dict.fromkeys(value.partition("=")[2] for value in values)))


def _of_function(word: str, key: str, text: str) -> Searched | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
        swept: Any = override.value() if override.is_sweep_override() else None
    except (HydraException, NotImplementedError) as error:
        if _is_text(key):
            return None  # a path or a text that looks like one
        said = re.sub(r"^\w+ while evaluating .*?': ", "", str(error).splitlines()[0]).split(" Available")[0]
        raise ConfigError(f"{word}: is no distribution ({said}); write {WAYS}") from error
    if swept is None:
        return None  # such as int(3), one value
    tags = swept.tags
    if odd := tags - {"log"}:
        raise ConfigError(
            f"{word}: there is no tag {', '.join(sorted(odd))}; tag(log,interval(1e-5,1e-3)) is the one there is"
        )
    if getattr(swept, "shuffle", False):
        raise ConfigError(f"{word}: a search draws in an order of its own; leave shuffle out")
    if isinstance(swept, ChoiceSweep):
        if tags:
            raise ConfigError(f"{word}: log is of numbers between two ends; write tag(log,interval(1e-5,1e-3))")
        values = [value.partition("=")[2] for value in read_axes([word]).words[0]]
        return Searched(key, text, tuple(dict.fromkeys(values)))
    if isinstance(swept, IntervalSweep):
        return _interval(word, Searched(key, text, log="log" in tags), swept.start, swept.end)
    assert isinstance(swept, RangeSweep)
    if tags:
        raise ConfigError(
            f"{word}: a range has steps, which a logarithm has not; write tag(log,interval(...)), or choice(...)"
        )
    return _range(word, Searched(key, text), swept.start, swept.stop, swept.step)


def _interval(word: str, asked: Searched, low: Any, high: Any) -> Searched:
    whole = _is_whole(asked.key) or (isinstance(low, int) and isinstance(high, int))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{word}: goes from {low:g} to {high:g}; write the smaller end first, both of them numbers")
    if asked.log and low <= 0:
        raise ConfigError(f"{word}: a logarithm needs ends above 0; raise {low:g}, or leave tag(log,...) out")
    if whole and (low != int(low) or high != int(high)):
        raise ConfigError(f"{word}: {asked.key} is a whole number; give whole ends")
    return Searched(asked.key, asked.text, low=low, high=high, whole=whole, log=asked.log)


def _range(word: str, asked: Searched, start: Any, stop: Any, step: Any) -> Searched:
    if not (step > 0 and start < stop):
        raise ConfigError(
            f"{word}: goes from {start:g} up to {stop:g} by {step:g}, which has no number; write range(1,9,2)"
        )
    whole = all(isinstance(each, int) for each in (start, stop, step))
    # The end is not of the range, as in Hydra.
    high = start + (math.ceil((stop - start) / step - 1e-9) - 1) * step
    return Searched(asked.key, asked.text, low=start, high=high, step=step, whole=whole)


def _shown(value: float) -> str:
    return f"{value:.{DIGITS}g}"


def _types(key: str) -> set[Any]:
    from launch.config.overrides import setting_of, settings

    setting = setting_of(settings(), key)
    return set() if setting is None else set(get_args(setting.type) or (setting.type,)) - {type(None)}


def _is_whole(key: str) -> bool:
    return _types(key) == {int}


def _is_text(key: str) -> bool:
    return bool(_types(key) & {str, Any})
