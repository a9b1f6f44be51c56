"""Judges the compared steps: differences by kind of gradient, their bounds, and the problems that exceed them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from strategies.base import Precision
from trainer.verification.gradients import PARAMETER_KINDS, gradient_distances_by_kind, relative_difference
from trainer.verification.steps import ComparedSteps, TakenStep

FLOAT32_BOUND = 1e-5
"""Largest difference in float32, as a share of the largest element of a kind."""
ROUNDING_FACTOR = 3.0
"""Bound in another precision, as a multiple of the rounding error: the difference of one process in it to itself in float32."""
MIN_GRADIENT_BOUND = {Precision.bf16: 2.0**-10, Precision.fp16: 2.0**-13}
"""Bound of gradients in another precision at least: an eighth of the type's own precision."""
MIN_LOSS_BOUND = {Precision.bf16: 2.0**-8, Precision.fp16: 2.0**-11}
"""Bound of the loss in another precision at least: half of the type's precision. The loss is one number, whose rounding error in
one process may be small by chance; that of a classifier is the mean of a few rounded scores. Smaller faults show in float32."""
LOSS = "loss"


@dataclass(frozen=True, slots=True)
class StepDifference:
    """The difference of the configured step from that of one process, in one quantity and one precision."""

    precision: str
    quantity: str
    """`loss`, or a kind of gradient."""
    distance: float | None
    """Relative; None if there is no gradient on either side."""
    bound: float

    @property
    def exceeds_bound(self) -> bool:
        """Whether the difference is larger than its bound; NaN counts as larger."""
        return self.distance is not None and not self.distance <= self.bound


@dataclass(slots=True)
class VerificationResult:
    """The result of a verification, on rank 0 only."""

    differences: list[StepDifference] = field(default_factory=list)
    kernels_by_step: dict[str, str] = field(default_factory=dict)
    """What each step computed with, by the name of the step, such as `one process, bf16`."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json_values(self) -> dict[str, Any]:
        """The verdict as JSON values, for the record of a verification. An infinite distance becomes the text `infinite`."""
        rows = []
        for difference in self.differences:
            rows.append(
                {
                    "precision": difference.precision,
                    "quantity": difference.quantity,
                    "distance": _as_json(difference.distance),
                    "bound": _as_json(difference.bound),
                    "exceeded": difference.exceeds_bound,
                }
            )
        return {
            "agrees": not self.problems,
            "differences": rows,
            "kernels": self.kernels_by_step,
            "problems": self.problems,
            "notes": self.notes,
        }


def _as_json(number: float | None) -> float | str | None:
    """The number; `infinite` for infinity, which JSON does not have."""
    return "infinite" if number == float("inf") else number


def verdict_on_steps(compared: list[ComparedSteps]) -> VerificationResult:
    """Judge whether a run computes what one process computes, from its compared steps in each precision, float32 first.

    Every configured step is compared with the step of one process in float32 (`reference`). In another precision it may differ
    by some multiple of what one process differs from it. Rank 0 alone has both steps, so it alone calls.
    """
    verdict = VerificationResult()
    reference = compared[0].single_process_step
    assert reference is not None
    for steps in compared:
        single_step = steps.single_process_step
        configured_step = steps.configured_step
        assert single_step is not None
        for name, step in (("one process", single_step), ("as configured", configured_step)):
            verdict.kernels_by_step[f"{name}, {steps.precision}"] = step.kernels
            if not step.finite:
                verdict.problems.append(f"{steps.precision}: {name}, a gradient is no finite number")
        rounding_errors = None
        if steps.precision is not Precision.fp32:
            rounding_errors = _relative_differences(single_step, reference)
        _add_differences(verdict, steps.precision, configured_step, reference, rounding_errors)
        _note_rerouted_tokens(verdict, str(steps.precision), configured_step, single_step)
    gradient_differences = [difference for difference in verdict.differences if difference.quantity != LOSS]
    if all(difference.distance is None for difference in gradient_differences):
        verdict.problems.append("no parameter has a gradient, so that nothing was compared")
    return verdict


def _relative_differences(step: TakenStep, reference: TakenStep) -> dict[str, float | None]:
    """Relative differences of loss and gradients to those of `reference`, in the order of display: {"loss": 1e-6, ...}.

    Gradients are compared by kind of parameter, such as `attention`; None for a kind without a gradient on either side. NaN
    counts as infinite.
    """
    loss_difference = relative_difference(abs(step.loss - reference.loss), abs(reference.loss))
    if loss_difference is not None and math.isnan(loss_difference):
        loss_difference = float("inf")
    difference_by_quantity: dict[str, float | None] = {LOSS: loss_difference}
    distance_by_kind = gradient_distances_by_kind(step.gradients, reference.gradients, reference.kinds)
    for kind in PARAMETER_KINDS:
        if kind in distance_by_kind:
            distance = distance_by_kind[kind]
            difference_by_quantity[kind] = relative_difference(distance.max_difference, distance.max_expected)
    return difference_by_quantity


def _add_differences(
    verdict: VerificationResult,
    precision: Precision,
    step: TakenStep,
    reference: TakenStep,
    rounding_errors: dict[str, float | None] | None,
) -> None:
    """Add the differences between `step` and `reference` to `verdict`, and a problem for each that exceeds its bound.

    Also adds a problem if the two steps do not train the same parameters. `rounding_errors`: the differences of one process in
    this precision to itself in float32, by quantity, from which bounds are made; None in float32, whose bound is fixed.
    """
    bounds = None if rounding_errors is None else _bounds_by_quantity(precision, rounding_errors)
    for quantity, relative in _relative_differences(step, reference).items():
        bound = FLOAT32_BOUND if bounds is None else bounds[quantity]
        difference = StepDifference(str(precision), quantity, relative, bound)
        verdict.differences.append(difference)
        if difference.exceeds_bound:
            finding = "loss differs" if quantity == LOSS else f"{quantity}: gradients differ"
            verdict.problems.append(
                f"{precision}: {finding} by {relative:.1e} from one process, at most {bound:.1e} is rounding"
            )
    names_in_one_only = sorted(set(reference.gradients) ^ set(step.gradients))
    if names_in_one_only:
        verdict.problems.append(
            f"{precision}: {names_in_one_only[0]} trains in one of both alone (of {len(names_in_one_only)} such parameters)"
        )


def _bounds_by_quantity(precision: Precision, rounding_errors: dict[str, float | None]) -> dict[str, float]:
    """How much loss and gradients may differ in a precision, by the rounding errors of one process: {"loss": 4e-3, ...}.

    `rounding_errors`: by quantity; None for one without a gradient, which counts as 0.

    The rounding error of a kind of gradient counts as no smaller than the average over kinds: it is the largest difference of
    one element, which may be small by chance.
    """
    gradient_errors = []
    for quantity, error in rounding_errors.items():
        if quantity != LOSS and error is not None:
            gradient_errors.append(error)
    mean_gradient_error = sum(gradient_errors) / max(1, len(gradient_errors))
    bounds = {}
    for quantity, error in rounding_errors.items():
        if quantity == LOSS:
            bounds[quantity] = max(MIN_LOSS_BOUND[precision], ROUNDING_FACTOR * (error or 0.0))
        else:
            larger_error = max(error or 0.0, mean_gradient_error)
            bounds[quantity] = max(MIN_GRADIENT_BOUND[precision], ROUNDING_FACTOR * larger_error)
    return bounds


def _note_rerouted_tokens(
    verdict: VerificationResult, precision: str, step: TakenStep, single_process_step: TakenStep
) -> None:
    """Note in the verdict how many tokens went to other experts than in one process of the same precision.

    Such tokens explain larger differences of gradients: rounding moved them, which is no fault. Nothing is noted of a model
    without experts. `expert_tokens` of a step: tokens by layer and expert.
    """
    if step.expert_tokens is None or single_process_step.expert_tokens is None:
        return
    num_changed_counts = 0  # over the experts of all layers
    for layer, single_layer in zip(step.expert_tokens, single_process_step.expert_tokens, strict=True):
        for tokens, single_tokens in zip(layer, single_layer, strict=True):
            num_changed_counts += abs(tokens - single_tokens)
    num_moved = num_changed_counts // 2  # each moved token is missing at one expert and surplus at another
    if num_changed_counts:
        verdict.notes.append(f"{precision}: {num_moved} choices of routers are others than in one process")
