"""How one argument of a verb is declared, and how its text becomes a value: numbers in bounds, choices, lists, booleans."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from launch.config.axes import split_at_commas

BOOLEAN_BY_SPELLING = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


@dataclass(frozen=True, kw_only=True)
class ArgumentSpec:
    """How one argument is typed, which values it takes, and what `--help` says about it."""

    kind: Literal["option", "flag", "positional", "settings"]
    """`option`: key=value. `positional`: without `=`. `settings`: the list of what the verb hands on to another command."""
    text: str
    """Its sentence in `--help`. For a positional argument: what to say if there are more, or none."""
    key: str = ""
    """As it is typed; empty: the field's name, with `--` and dashes for a flag. An option may have dashes too: `--cfg job`."""
    aliases: tuple[str, ...] = ()
    """Other spellings of the key."""
    example: str = ""
    """The example value in `--help` and messages; empty: the default."""
    needs: str = ""
    """The key of another argument that must be typed too, or its beginning, as in `to=hub:`."""
    advice_if_missing: str = ""
    """What to do if it is not typed; empty: it may be left out."""
    required_prefix: str = ""
    """For settings: only the arguments that begin with this are taken, such as `serve.`; empty: all."""
    forwards_unknown_flags: bool = False
    """For settings: whether flags that the verb does not know are handed on too."""
    choices: tuple[str, ...] = ()
    """All values that it takes. For an argument with dashes, the first one is meant if it stands alone, as in `--cfg`."""
    least: float = -math.inf
    """For a number: the smallest value that it takes."""
    most: float = math.inf
    """For a number: the largest value that it takes."""
    above: float | None = None
    """For a number: the bound that it must exceed, as 0 for a price; None if there is none."""


def parse_value(text: str, annotation: Any, spec: ArgumentSpec | None = None) -> Any:
    """Read the text of a typed argument as a value of its annotated type: "[1,2]" as list[int] is [1, 2].

    `annotation`: bool, int, float, str, Path, an enum (typed by the name of a member), a list of one of these, or `X | None` of
        one.
    `spec`: the bounds of a number and the choices of a text; None if there are none.
    Raises ValueError with what it must be, such as "must be true or false".
    """
    spec = spec or ArgumentSpec(kind="option", text="")
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (member for member in get_args(annotation) if member is not type(None))
        if text == "null" and annotation is not str:  # as a text, `null` may be a name
            return None
    if get_origin(annotation) is list:
        (entry_type,) = get_args(annotation)
        return [parse_value(entry, entry_type, spec) for entry in unquoted_list_entries(text)]
    if annotation is bool:
        if text.lower() not in BOOLEAN_BY_SPELLING:
            raise ValueError("must be true or false")
        return BOOLEAN_BY_SPELLING[text.lower()]
    if annotation in (int, float):
        return _parse_number_in_bounds(text, annotation, spec)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        # By its name: that is how the settings of a run are typed.
        _check_choice(text, tuple(member.name for member in annotation))
        return annotation[text]
    if spec.choices:
        _check_choice(text, spec.choices)
    return Path(text).expanduser() if annotation is Path else text


def unquoted_list_entries(text: str) -> list[str]:
    """Split a list as typed into its entries, without quotes around them: `["a",b]` is ["a", "b"], and `a` alone is ["a"]."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    entries = []
    for entry in split_at_commas(inner):
        is_quoted = len(entry) > 1 and entry[0] == entry[-1] and entry[0] in "'\""
        if entry:
            entries.append(entry[1:-1] if is_quoted else entry)
    return entries


def suggestion_of_similar_name(typed: str, known: Iterable[str], *, end: str = "") -> str:
    """`; did you mean ...?` with the known word that is most like the typed one; empty if none is. `end` is put behind it."""
    similar = difflib.get_close_matches(typed, list(known), n=1)
    return f"; did you mean {similar[0]}{end}?" if similar else ""


def _parse_number_in_bounds(text: str, annotation: type, spec: ArgumentSpec) -> float:
    """Read the text of an argument as a number within its bounds, of the type `annotation` (`int` or `float`).

    `spec`: the bounds, of which the message speaks.
    Raises ValueError if it is no number or outside of them: "must be a whole number, at least 1".
    """
    number = _parse_number(text, annotation)
    if number is not None:
        is_above = spec.above is None or number > spec.above
        if is_above and spec.least <= number <= spec.most:
            return annotation(number)
    number_kind = "a whole number" if annotation is int else "a number"
    bounds = "" if spec.above is None else f" above {spec.above:g}"
    if spec.least > -math.inf and spec.most < math.inf:
        bounds = f" from {spec.least:g} to {spec.most:g}"
    elif spec.least > -math.inf:
        bounds = f", at least {spec.least:g}"
    raise ValueError(f"must be {number_kind}{bounds}")


def _parse_number(text: str, annotation: type) -> float | None:
    """The number that a typed text spells, such as 600 or 1e-4; None if it spells none, or a fraction where an int is needed."""
    # `int()` and `float()` would also take `1_000`, `inf` and blanks. 18 digits fit into 64 bits.
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if annotation is float and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text, re.IGNORECASE):
        try:
            return float(text)
        except ValueError:  # several points, or none but points
            return None
    return None


def _check_choice(text: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError with the choices unless the typed text is one of them."""
    if text not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}{suggestion_of_similar_name(text, choices)}")
