"""Parses `gates={eval/loss: "<2.1", memorised: 0}` into bounds. Reads no files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from strategies.errors import ConfigError

OVERRIDE_KEY = "override"
"""The key among `gates` that is no gate: its value is the reason to export although gates failed."""
METRIC_NAME_REGEX = re.compile(r"\w[\w.@-]*(/[\w.@-]+)*")
"""Such as `eval/loss` or `memorised@10`."""
# Such as `<2.1`, `>= 90%` or `0`.
BOUND_REGEX = re.compile(
    r"(?P<sign><=|>=|==|<|>|=)?\s*(?P<number>[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*(?P<percent>%)?"
)
WORDS_BY_SIGN = {"<": "below", "<=": "at most", ">": "above", ">=": "at least", "=": "equal to"}
BOUND_FORM = 'a number (it must be that), or a text such as "<2.1", ">=0.5" or "<3%"'
"""How a bound is written, for errors."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One gate: a metric with the bound that it must keep."""

    metric: str
    sign: str
    """One of `WORDS_BY_SIGN`."""
    limit: float
    """A percentage is stored as a share: 0.03 for `<3%`."""
    text: str
    """As the user wrote it."""

    def holds(self, measured: float) -> bool:
        """Whether a value passes; NaN does not."""
        if math.isnan(measured):
            return False
        return {
            "<": measured < self.limit,
            "<=": measured <= self.limit,
            ">": measured > self.limit,
            ">=": measured >= self.limit,
            "=": measured == self.limit,
        }[self.sign]

    def badness(self, measured: float) -> float:
        """A number that is larger the worse a value is for this bound, to find the worst of several measurements.

        An upper bound (`<`, `<=`): the value; a lower bound (`>`, `>=`): its negative; an equation: the distance. NaN is the
        worst.
        """
        if math.isnan(measured):
            return math.inf
        if self.sign.startswith("<"):
            return measured
        if self.sign.startswith(">"):
            return -measured
        return abs(measured - self.limit)

    def __str__(self) -> str:
        return f"must be {WORDS_BY_SIGN[self.sign]} {self.text.lstrip('<>= ')}"


def parse_gate_bounds(gates: Mapping[str, Any]) -> list[Bound]:
    """Read the gates of a configuration, in its order: {"eval/loss": "<2.1"} -> one bound below 2.1.

    The entry `override` is no gate, and left out; so is a value that is no bound, which `gate_problems` names.
    """
    bounds = []
    for metric, value in gates.items():
        if metric == OVERRIDE_KEY:
            continue
        bound = parse_bound(metric, value)
        if bound is not None:
            bounds.append(bound)
    return bounds


def parse_bound(metric: str, value: Any) -> Bound | None:
    """Read one gate from its value in the configuration: `"<2.1"` is the sign `<` and the limit 2.1; None if it is no bound.

    `">= 90%"` has the limit 0.9, and a bare number, or `==`, the sign `=`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value).strip()
    match = BOUND_REGEX.fullmatch(text)
    if match is None:
        return None
    limit = float(match["number"])
    if not math.isfinite(limit):  # 1e999 is read as infinity
        return None
    if match["percent"]:
        limit /= 100
    sign = match["sign"]
    if sign in (None, "=="):
        sign = "="
    return Bound(metric=metric, sign=sign, limit=limit, text=text)


def gate_problems(gates: Mapping[str, Any]) -> list[str]:
    """Check gates, which are limits of metrics that a model must keep to be exported, such as {"eval/loss": "<2.1"}.

    Returns an error message for each that cannot be read. The entry `override` is no gate: it must say why the model is
    exported although gates fail.
    """
    problems = []
    for metric, value in gates.items():
        if metric == OVERRIDE_KEY:
            if not isinstance(value, str) or not value.strip():
                problems.append(
                    f'gates.{OVERRIDE_KEY}={value}: must say why, as in gates.{OVERRIDE_KEY}="agreed with the clinic"'
                )
        elif not METRIC_NAME_REGEX.fullmatch(metric):
            problems.append(f"gates: {metric}: must be the name of a metric, such as eval/loss, bias/gap or memorised")
        # Nested as YAML often is: `eval: {loss: 2}` in place of `eval/loss: 2`.
        elif isinstance(value, Mapping):
            problems.append(
                f"gates: {metric}: has entries below it; write the whole name, as in {metric}/{next(iter(value), 'x')}"
            )
        elif parse_bound(metric, value) is None:
            problems.append(f"gates: {metric}: {value}: must be {BOUND_FORM}")
    return problems


def parse_gate_argument(argument: str) -> dict[str, Any]:
    """Read the gates, by name of the metric, that one argument of the command line sets; ConfigError if it cannot be read.

    - one gate, `gates.eval/loss="<2.1"`: `{"eval/loss": "<2.1"}`, quotes removed.
    - several as YAML, `gates={eval/loss: "<2.1", memorised: 0}`: `{"eval/loss": "<2.1", "memorised": 0}`.
    """
    import yaml

    key, _, text = argument.partition("=")
    name = key.partition(".")[2]
    if name:
        is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if is_quoted:
            text = text[1:-1]
        if not text:
            raise ConfigError(f"{argument}: {key} needs a value")
        return {name: text}
    gates = None
    # {memorised:0} is no pair in YAML, but users write it on a command line: the second attempt adds the space.
    for yaml_text in (text, re.sub(r":(?=\S)", ": ", text)):
        try:
            gates = yaml.safe_load(yaml_text)
        except yaml.YAMLError:
            continue
        if isinstance(gates, dict) and None not in gates.values():
            break
    # YAML reads a key without a value, as `{memorised}`, as None.
    if not isinstance(gates, dict) or None in gates.values():
        raise ConfigError(
            f'{argument}: must be pairs of a metric and its bound, such as {{eval/loss: "<2.1", memorised: 0}}'
        )
    return {str(metric): value for metric, value in gates.items()}
