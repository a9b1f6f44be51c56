"""Parses `gates={eval/loss: "<2.1", memorised: 0}` into bounds. Reads no files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERRIDE = "override"
"""The name among gates that is none: why an export goes on although they say no."""
NAME = re.compile(r"\w[\w.@-]*(/[\w.@-]+)*")
BOUND = re.compile(r"(?P<sign><=|>=|==|<|>|=)?\s*(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*(?P<percent>%)?")
SIGNS = {"<": "below", "<=": "at most", ">": "above", ">=": "at least", "=": "equal to"}
FORM = 'a number (it must be that), or a text such as "<2.1", ">=0.5" or "<3%"'


@dataclass(frozen=True, slots=True)
class Bound:
    """One gate."""

    metric: str
    sign: str
    """One of `SIGNS`."""
    limit: float
    text: str
    """As the user wrote it."""

    def holds(self, value: float) -> bool:
        """Whether a value passes; NaN does not."""
        if math.isnan(value):
            return False
        return {
            "<": value < self.limit,
            "<=": value <= self.limit,
            ">": value > self.limit,
            ">=": value >= self.limit,
            "=": value == self.limit,
        }[self.sign]

    def worse(self, value: float) -> float:
        """How far a value is on the wrong side: of several measurements the largest one counts."""
        if math.isnan(value):
            return math.inf
        return {"<": value, ">": -value}.get(self.sign[0], abs(value - self.limit))

    def __str__(self) -> str:
        return f"must be {SIGNS[self.sign]} {self.text.lstrip('<>= ')}"


def bounds_of(gates: Mapping[str, Any]) -> list[Bound]:
    """The gates of a configuration without problems, in its order."""
    return [bound for metric, value in gates.items() if metric != OVERRIDE and (bound := parse(metric, value))]


def parse(metric: str, value: Any) -> Bound | None:
    """One gate; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    found = BOUND.fullmatch(str(value).strip())
    if found is None or not math.isfinite(limit := float(found["number"])):
        return None
    sign = {"==": "=", None: "="}.get(found["sign"], found["sign"])
    return Bound(metric, sign, limit / 100 if found["percent"] else limit, str(value).strip())


def problems(gates: Mapping[str, Any]) -> list[str]:
    """What is wrong with gates as they are written, one line each."""
    found = []
    for metric, value in gates.items():
        if metric == OVERRIDE:
            if not isinstance(value, str) or not value.strip():
                found.append(f'gates.{OVERRIDE}={value}: must say why, as in gates.{OVERRIDE}="agreed with the clinic"')
        elif not NAME.fullmatch(metric):
            found.append(f"gates: {metric}: must be the name of a metric, such as eval/loss, bias/gap or memorised")
        elif isinstance(value, Mapping):
            found.append(
                f"gates: {metric}: has entries below it; write the whole name, as in {metric}/{next(iter(value), 'x')}"
            )
        elif parse(metric, value) is None:
            found.append(f"gates: {metric}: {value}: must be {FORM}")
    return found


def read_word(word: str) -> tuple[dict[str, Any] | None, str]:
    """(gates, problem) of a word `gates={...}` or `gates.NAME=...`, as YAML has values; quotes are as in a shell or without."""
    import yaml

    key, _, text = word.partition("=")
    name = key.partition(".")[2]
    if name:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        plain = text[1:-1] if quoted else text
        return ({name: plain}, "") if plain else (None, f"{word}: {key} needs a value")
    found = None
    for written in (
        text,
        re.sub(r":(?=\S)", ": ", text),
    ):  # {memorised:0} is no pair in YAML, and is one on a command line
        try:
            found = yaml.safe_load(written)
        except yaml.YAMLError:
            continue
        if isinstance(found, dict) and None not in found.values():
            break
    if not isinstance(found, dict) or None in found.values():
        return None, f'{word}: must be pairs of a metric and its bound, such as {{eval/loss: "<2.1", memorised: 0}}'
    return {str(metric): value for metric, value in found.items()}, ""
