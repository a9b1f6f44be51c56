"""Reads the search space of a hyperparameter search: arguments with ranges or lists of values, as Optuna distributions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from launch.config.axes import SWEEP_FUNCTION_REGEX, read_axes
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SEARCHED_VALUE_EXAMPLES = "interval(1e-5,1e-3), tag(log,interval(1e-5,1e-3)), range(1,9,2), choice(a,b), or a,b"
SIGNIFICANT_DIGITS = 6
"""Significant digits to which a drawn value is rounded, so that the run has the very value that is shown and can be pasted."""
RANGE_TOLERANCE = 1e-9
"""Share of a step by which rounding may miss a whole number of steps: (0.3 - 0) / 0.1 is 2.9999999999999996."""


@dataclass(frozen=True, slots=True)
class SearchedSetting:
    """A setting whose values a search tries: one of `choices`, or a number from `low` to `high`, both included."""

    key: str
    values_text: str
    """What is behind the equals sign of the argument, such as `interval(1e-5,1e-3)`."""
    choices: tuple[str, ...] = ()
    """Values as in an argument; empty for a setting of numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Distance between the numbers of a range; None for an interval, of which any number may be drawn."""
    is_integer: bool = False
    is_logarithmic: bool = False
    """Whether values are drawn evenly on a logarithmic scale."""

    def distribution(self) -> BaseDistribution:
        """What Optuna draws the setting's values from: a list of choices, whole numbers, or numbers between two ends."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.is_integer:
            return IntDistribution(int(self.low), int(self.high), log=self.is_logarithmic, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.is_logarithmic, step=self.step)

    def value_text(self, value: Any) -> str:
        """Write a drawn value as one would type it: a choice as it is, a number with `SIGNIFICANT_DIGITS`, such as `0.0002`."""
        if self.choices:
            return str(value)
        if self.is_integer:
            return str(int(value))
        # Rounding errors, for example of a logarithm, must not lead out of the interval.
        in_interval = min(max(value, self.low), self.high)
        return f"{in_interval:.{SIGNIFICANT_DIGITS}g}"

    def argument(self, value: Any) -> str:
        """The argument that gives the setting a drawn value, such as `optim.lr=0.0002`."""
        return f"{self.key}={self.value_text(value)}"

    def arguments_at_ends(self) -> list[str]:
        """The arguments by which a search is checked before it starts: one for each choice, or for both ends of the numbers.

        If these are legal, so is every value between them.
        """
        values = self.choices or dict.fromkeys((self.low, self.high))
        return [self.argument(value) for value in values]


def split_searched_settings(arguments: list[str]) -> tuple[list[SearchedSetting], list[str]]:
    """Find out which settings a search varies: returns (the searched settings, the other arguments, which all trials share).

    A searched setting has several values, such as `optim.lr=interval(1e-5,1e-3)` or `tuning=lora,full`. Raises ConfigError
    with every problem at once.
    """
    problems: list[str] = []
    searched_settings: list[SearchedSetting] = []
    shared_arguments: list[str] = []
    for argument in arguments:
        try:
            setting = _read_setting(argument)
        except ConfigError as error:
            problems += error.problems
            continue
        if setting is None:
            shared_arguments.append(argument)
        else:
            searched_settings.append(setting)

    keys = [setting.key for setting in searched_settings]
    keys += [argument.partition("=")[0] for argument in shared_arguments]
    for setting in searched_settings:
        if keys.count(setting.key) > 1:
            problems.append(f"{setting.key}={setting.values_text}: {setting.key} is given twice")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return searched_settings, shared_arguments


def _read_setting(argument: str) -> SearchedSetting | None:
    """Read one argument of a search: the searched setting if it has several values, None if it has one. Raises ConfigError.

    Several values are written as `a,b`, as a pattern of names (`glob(*)`), or by a sweep function: `interval(1e-5,1e-3)`.
    """
    key, equals_sign, values_text = argument.partition("=")
    # A glob is a list of choices, which `read_axes` knows; Hydra's parser does not read it as values.
    is_glob = values_text.startswith("glob(")
    if equals_sign and SWEEP_FUNCTION_REGEX.fullmatch(values_text.strip()) and not is_glob:
        return _read_sweep_function(argument, key, values_text.strip())
    value_arguments = _value_arguments(argument)
    if len(value_arguments) == 1:
        return None
    return SearchedSetting(key, values_text, _unique_values(value_arguments))


def _value_arguments(argument: str) -> tuple[str, ...]:
    """The arguments that one with several values stands for: `tuning=lora,full` -> ("tuning=lora", "tuning=full")."""
    return read_axes([argument]).alternative_arguments[0]


def _unique_values(value_arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The values of arguments in their order, each once: ("tuning=lora", "tuning=full") -> ("lora", "full")."""
    return tuple(dict.fromkeys(argument.partition("=")[2] for argument in value_arguments))


def _read_sweep_function(argument: str, key: str, values_text: str) -> SearchedSetting | None:
    """Read an argument in Hydra's sweep syntax as a searched setting: `choice(...)`, `interval(...)` or `range(...)`.

    None if the argument has one value, as in `int(3)`, or is a text that only looks like a function. Raises ConfigError.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
        sweep: Any = override.value() if override.is_sweep_override() else None
    except (HydraException, NotImplementedError) as error:
        if _takes_text(key):
            return None  # a path or a text that looks like a function
        # Hydra's message names its grammar rule first and the functions that it has last: keep what is between.
        reason = re.sub(r"^\w+ while evaluating .*?': ", "", str(error).splitlines()[0]).split(" Available")[0]
        raise ConfigError(f"{argument}: is no distribution ({reason}); write {SEARCHED_VALUE_EXAMPLES}") from error
    if sweep is None:
        return None
    tags = sweep.tags
    if unknown_tags := tags - {"log"}:
        raise ConfigError(
            f"{argument}: there is no tag {', '.join(sorted(unknown_tags))}; tag(log,interval(1e-5,1e-3)) is the one there is"
        )
    if getattr(sweep, "shuffle", False):
        raise ConfigError(f"{argument}: a search draws in an order of its own; leave shuffle out")

    if isinstance(sweep, ChoiceSweep):
        if tags:
            raise ConfigError(f"{argument}: log is of numbers between two ends; write tag(log,interval(1e-5,1e-3))")
        return SearchedSetting(key, values_text, _unique_values(_value_arguments(argument)))
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None  # the grammar wants both
        return _with_interval(
            argument, SearchedSetting(key, values_text, is_logarithmic="log" in tags), sweep.start, sweep.end
        )
    assert isinstance(sweep, RangeSweep)
    if tags:
        raise ConfigError(
            f"{argument}: a range has steps, which a logarithm has not; write tag(log,interval(...)), or choice(...)"
        )
    assert sweep.start is not None and sweep.stop is not None
    return _with_range(argument, SearchedSetting(key, values_text), sweep.start, sweep.stop, sweep.step)


def _with_interval(argument: str, setting: SearchedSetting, low: float, high: float) -> SearchedSetting:
    """Give a searched setting the ends of its interval, between which any number may be drawn.

    Raises ConfigError if `low` and `high` are not ends of an interval. Only whole numbers are drawn if the setting takes no
    others, or if both ends are ints, as Hydra makes them of int(interval(1,8)). `argument` is for messages.
    """
    takes_only_integers = _setting_types(setting.key) == {int}  # such as `tuning.rank`
    is_integer = takes_only_integers or (isinstance(low, int) and isinstance(high, int))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            f"{argument}: goes from {low:g} to {high:g}; write the smaller end first, both of them numbers"
        )
    if setting.is_logarithmic and low <= 0:
        raise ConfigError(f"{argument}: a logarithm needs ends above 0; raise {low:g}, or leave tag(log,...) out")
    if is_integer and (low != int(low) or high != int(high)):
        raise ConfigError(f"{argument}: {setting.key} is a whole number; give whole ends")
    return replace(setting, low=low, high=high, is_integer=is_integer)


def _with_range(argument: str, setting: SearchedSetting, start: float, stop: float, step: float) -> SearchedSetting:
    """Give a searched setting the numbers of a range, as in Python without `stop`: range(1,9,2) is 1, 3, 5, 7.

    Raises ConfigError if there are none. Only whole numbers are drawn if all three are ints. `argument` is for messages.
    """
    if not (step > 0 and start < stop):
        raise ConfigError(
            f"{argument}: goes from {start:g} up to {stop:g} by {step:g}, which has no number; write range(1,9,2)"
        )
    is_integer = all(isinstance(number, int) for number in (start, stop, step))
    count = math.ceil((stop - start) / step - RANGE_TOLERANCE)
    last_number = start + (count - 1) * step
    return replace(setting, low=start, high=last_number, step=step, is_integer=is_integer)


def _setting_types(key: str) -> set[Any]:
    """The types that a setting of the configuration takes, None left out; empty if there is no such setting."""
    from launch.config.known_settings import find_setting

    setting = find_setting(key)
    if setting is None:
        return set()
    union_members = get_args(setting.type) or (setting.type,)
    return set(union_members) - {type(None)}


def _takes_text(key: str) -> bool:
    """Whether a setting of the configuration may be a text, such as `data.path`."""
    return bool(_setting_types(key) & {str, Any})
