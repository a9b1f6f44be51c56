"""What the field of a settings class says about its setting, beside the type and the default.

A setting has one home, its field. The sentence under the field says what the setting means. `number` and `setting` say the
rest: the range and what to do about a number outside it, what the setting reaches, and what it decides in a run that is
resumed. Validation, the pages and `conf/` read it from here. Settings of every layer use this module, so it imports nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, replace
from enum import StrEnum
from typing import Any

METADATA_KEY = "shardtune"
"""The entry of a field's metadata that holds its `SettingMetadata`."""
FREE = "free"
"""`resume` of a setting that may change when a run is resumed."""


class Reach(StrEnum):
    """What a setting reaches.

    Somebody else's run directory is data for its reader. A setting that describes (model, method, data, sizes) is taken from
    it. A setting that reaches out counts only if the reader typed its value: see `launch/config/read_run.py`.
    """

    describes = "describes"
    address = "address"
    """A server, and the environment variable that is sent to it: one value with two settings."""
    code = "code"
    """Python code is run."""
    network = "network"
    """Something is fetched from the network."""
    tracker = "tracker"
    """A tracker is told, or who is told."""
    command = "command"
    """A command is run, or the machine it runs on is chosen."""
    place = "place"
    """A directory is written."""
    file = "file"
    """A file is read, and its texts stand in what is written."""


DESCRIBES = Reach.describes


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of one number; `above` and `below` exclude the bound itself."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def contains(self, number: float) -> bool:
        """Whether a finite `number` lies inside."""
        return math.isfinite(number) and self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = [("at least", self.least), ("above", self.above), ("at most", self.most), ("below", self.below)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)) or "finite"


@dataclass(frozen=True, slots=True)
class SettingMetadata:
    """What a field says about its setting."""

    reach: Reach | None = None
    """None for a group of settings, whose fields say it."""
    resume: str | None = None
    """The kind of change that another value is when a run is resumed (`trainer/config/resuming.py`), or `FREE`. None: that of
    the group it stands in."""
    bounds: Range | None = None
    """Of a number."""
    advice: str = ""
    """What to do about a number outside its range: usual values, or what a special one means."""
    words: tuple[str, ...] = ()
    """Values of a number's setting that are no numbers, such as `auto`."""
    advice_below: Mapping[str, str] | None = None
    """For a group: advice on some of its numbers that is better here than what the class says, by name."""
    entries: type | None = None
    """For a table with fixed names: the class whose fields stand for its entries."""


def number(
    default: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    advice: str,
    resume: str | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """Declare a setting that is a number: a dataclass field whose metadata has the range that validation checks.

    `default`: also None (null in YAML), or one of `words`, such as "auto", where these are values too. `least` and `most` may be
    taken, `above` and `below` not. `advice`: what the error says to do about a number outside. `resume`: `FREE` if it may change
    when a run is resumed, else the kind of change, such as `data`; None: that of the group it stands in.
    """
    # A number neither sends nor runs, fetches or writes anything: its reach is to describe the run.
    bounds = Range(least=least, most=most, above=above, below=below)
    return field(default=default, metadata={METADATA_KEY: SettingMetadata(DESCRIBES, resume, bounds, advice, words)})


def setting(
    default: Any = MISSING,
    *,
    default_factory: Any = MISSING,
    reach: Reach,
    resume: str | None = None,
    entries: type | None = None,
) -> Any:
    """Declare a setting that is no number: a dataclass field, whose metadata says what its values reach.

    `reach`: whether a value sends, runs, fetches or writes something, or reads a file whose texts are shown; `DESCRIBES` if not.
    A value that reaches out counts only if this user typed it, not if somebody else's run has it. `resume`: `FREE` if it may
    change when a run is resumed, else the kind of change, such as `data`; None: that of the group it stands in. `entries`: for
    a table with fixed names, the class that has them as fields.
    """
    metadata = SettingMetadata(reach, resume, entries=entries)
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata={METADATA_KEY: metadata})
    return field(default=default, metadata={METADATA_KEY: metadata})


def group(make: Callable[[], Any], *, resume: str | None = None, advice: Mapping[str, str] | None = None) -> Any:
    """A field that holds settings of a class of their own."""
    return field(default_factory=make, metadata={METADATA_KEY: SettingMetadata(resume=resume, advice_below=advice)})


def setting_metadata(settings: type, name: str, advice_of_group: Mapping[str, str] | None = None) -> SettingMetadata:
    """Look up what a setting says of itself (range, advice, reach): the setting in the field `name` of the class `settings`.

    A subclass that only gives a field another default keeps what its parent says. `advice_of_group`: advice by field, from the
    group that holds the settings, which takes precedence over the class's own. Empty metadata if the field declares nothing.
    """
    for parent in settings.__mro__:
        own_field = getattr(parent, "__dataclass_fields__", {}).get(name)
        if own_field is not None and METADATA_KEY in own_field.metadata:
            metadata: SettingMetadata = own_field.metadata[METADATA_KEY]
            return replace(metadata, advice=(advice_of_group or {}).get(name, metadata.advice))
    return SettingMetadata()
