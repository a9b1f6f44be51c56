"""Judges the compared steps: distances by kind of gradient, their bounds, and what lies beyond."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strategies.base import Precision
from trainer.verification.gradients import KINDS, distances, relative
from trainer.verification.steps import Compared, TakenStep

BOUND = 1e-5
"""Largest difference in float32, as a share of the largest element of a kind."""
TIMES_ROUNDING = 3.0
"""Bound in another precision: as many times what one process in that precision is away from itself in float32."""
LEAST_BOUND = {Precision.bf16: 2.0**-10, Precision.fp16: 2.0**-13}
"""Bound of gradients in another precision at least: an eighth of the type's own precision."""
LEAST_BOUND_OF_LOSS = {Precision.bf16: 2.0**-8, Precision.fp16: 2.0**-11}
"""Bound of the loss likewise: half of it. The loss is one number, which one process may come to by chance in any precision; that
of a classifier is the mean of a few scores, each rounded to the type. Smaller faults show in float32."""
LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Difference:
    """One quantity in one precision."""

    precision: str
    quantity: str
    """`loss`, or a kind of gradient."""
    distance: float | None
    """Relative; None if there is no gradient on either side."""
    bound: float

    @property
    def exceeded(self) -> bool:
        """Whether it lies beyond its bound."""
        return self.distance is not None and not self.distance <= self.bound


@dataclass(slots=True)
class VerificationResult:
    """What a verification found. Only rank 0 makes one."""

    differences: list[Difference] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    """What each pass computed with, by the name of the pass."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The verdict as JSON values. A distance that is no finite number is written as a text."""
        rows = []
        for each in self.differences:
            rows.append(
                {
                    "precision": each.precision,
                    "quantity": each.quantity,
                    "distance": _as_json(each.distance),
                    "bound": _as_json(each.bound),
                    "exceeded": each.exceeded,
                }
            )
        return {
            "agrees": not self.problems,
            "differences": rows,
            "kernels": self.kernels,
            "problems": self.problems,
            "notes": self.notes,
        }


def _as_json(number: float | None) -> float | str | None:
    """The number, or a word where JSON has none."""
    return "infinite" if number == float("inf") else number


def judge(compared: list[Compared]) -> VerificationResult:
    """The verdict on the steps of each precision, of which float32 is the first. For rank 0."""
    verdict = VerificationResult()
    exact = compared[0].single
    assert exact is not None
    for steps in compared:
        single = steps.single
        assert single is not None
        verdict.kernels[f"one process, {steps.precision}"] = single.kernels
        verdict.kernels[f"as configured, {steps.precision}"] = steps.configured.kernels
        for name, step in (("one process", single), ("as configured", steps.configured)):
            if not step.finite:
                verdict.problems.append(f"{steps.precision}: {name}, a gradient is no finite number")
        rounding = None
        if steps.precision is not Precision.fp32:
            rounding = _distances(single, exact)
        _compare(verdict, steps.precision, steps.configured, exact, rounding)
        _note_experts(verdict, str(steps.precision), steps.configured, single)
    gradients = [each for each in verdict.differences if each.quantity != LOSS]
    if all(each.distance is None for each in gradients):
        verdict.problems.append("no parameter has a gradient, so that nothing was compared")
    return verdict


def _distances(step: TakenStep, exact: TakenStep) -> dict[str, float | None]:
    """Relative distances of loss and gradients from those of `exact`, by quantity, in the order in which they are shown."""
    by_kind = distances(step.gradients, exact.gradients, exact.kinds)
    result: dict[str, float | None] = {LOSS: relative((abs(step.loss - exact.loss), abs(exact.loss)))}
    if result[LOSS] is not None and result[LOSS] != result[LOSS]:  # NaN
        result[LOSS] = float("inf")
    for kind in KINDS:
        if kind in by_kind:
            result[kind] = relative(by_kind[kind])
    return result


def _compare(
    verdict: VerificationResult,
    precision: Precision,
    step: TakenStep,
    exact: TakenStep,
    rounding: dict[str, float | None] | None,
) -> None:
    """Add the differences of a step. `rounding`: distances of one process in this precision; None in float32."""
    bounds = None if rounding is None else _bounds(precision, rounding)
    for quantity, distance in _distances(step, exact).items():
        bound = BOUND if bounds is None else bounds[quantity]
        difference = Difference(str(precision), quantity, distance, bound)
        verdict.differences.append(difference)
        if difference.exceeded:
            what = "loss differs" if quantity == LOSS else f"{quantity}: gradients differ"
            verdict.problems.append(
                f"{precision}: {what} by {distance:.1e} from one process, at most {bound:.1e} is rounding"
            )
    lacking = sorted(set(exact.gradients) ^ set(step.gradients))
    if lacking:
        verdict.problems.append(
            f"{precision}: {lacking[0]} trains in one of both alone (of {len(lacking)} such parameters)"
        )


def _bounds(precision: Precision, rounding: dict[str, float | None]) -> dict[str, float]:
    """The bound of each quantity in a precision, from the distances of one process in it.

    A kind of gradient counts as at least as far away as the kinds are on average: its largest difference is that of one
    element, and may be small by chance.
    """
    of_gradients = [distance for quantity, distance in rounding.items() if quantity != LOSS and distance is not None]
    average = sum(of_gradients) / max(1, len(of_gradients))
    bounds = {}
    for quantity, distance in rounding.items():
        if quantity == LOSS:
            bounds[quantity] = max(LEAST_BOUND_OF_LOSS[precision], TIMES_ROUNDING * (distance or 0.0))
        else:
            bounds[quantity] = max(LEAST_BOUND[precision], TIMES_ROUNDING * max(distance or 0.0, average))
    return bounds


def _note_experts(verdict: VerificationResult, precision: str, step: TakenStep, single: TakenStep) -> None:
    """Note tokens that went to other experts than in one process of the same precision: not every distance is then a fault."""
    if step.expert_tokens is None or single.expert_tokens is None:
        return
    moved = 0
    for layer, single_layer in zip(step.expert_tokens, single.expert_tokens, strict=True):
        for tokens, single_tokens in zip(layer, single_layer, strict=True):
            moved += abs(tokens - single_tokens)
    if moved:
        verdict.notes.append(f"{precision}: {moved // 2} choices of routers are others than in one process")
