"""Memory that other trainers would need for the same step, to compare plans with published figures.

It is arithmetic on the sizes of model and batch alone. The bytes of the losses follow from the code of the libraries:
logits in bf16 and a copy in fp32, shifted, with softmax and gradient. Nothing is fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import Form


class Theirs(StrEnum):
    """What another trainer does otherwise."""

    stock_loss = "stock_loss"
    """transformers' own loss: logits of all tokens in bf16 and fp32, and their gradient."""
    fused_loss = "fused_loss"
    """A fused cross-entropy over logits of all tokens, or a compiled one."""
    fp32_head = "fp32_head"
    """An output head in fp32, as peft's preparation of a quantised model leaves it, under transformers' own loss."""
    pure_bf16 = "pure_bf16"
    """Full tuning with weights, gradients and moments in bf16, and an update of all at once (foreach)."""


LOGITS = {Theirs.stock_loss: 12.0, Theirs.fused_loss: 8.0, Theirs.fp32_head: 16.0}
"""Bytes that a loss holds for each token and word."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Among how many ranks a strategy shards weights, gradients and moments; 1 where each has all."""

    weights: int = 1
    gradients: int = 1
    moments: int = 1


@dataclass(frozen=True, slots=True)
class TheirBytes:
    """Bytes of tensors of one rank, were the step another trainer's."""

    total: int
    at: str
    """`loss` (the end of the forward pass), `update`, or `as ours`: the peak of this trainer's own step."""
    parts: dict[str, int]
    """Of these; empty where the peak is that of this trainer's own step."""


def problems_of(theirs: Sequence[Theirs], *, full: bool) -> list[str]:
    """What is wrong with `plan.theirs`; `full`: whether all of the model trains."""
    losses = [each for each in dict.fromkeys(theirs) if each in LOGITS]
    found = []
    if len(losses) > 1:
        found.append(f"plan.theirs=[{','.join(theirs)}]: a step has one loss; name one of {', '.join(losses)}")
    if Theirs.pure_bf16 in theirs and not full:
        found.append(
            "plan.theirs=[pure_bf16]: is of full tuning; set tuning=full, or leave it out (a frozen base is in bf16)"
        )
    return found


def held(form: Form, units: float, logits: float, theirs: Sequence[Theirs], cut: Cut) -> TheirBytes:
    """The step of `units` as `theirs` would hold it; `logits` are tokens times words of a micro-batch."""
    ours = form.at(units)
    loss = round(sum(LOGITS.get(each, 0.0) for each in theirs) * logits)
    stays, activations = _at_the_loss(form, units)
    moments: dict[str, dict[str, int]] = {}
    if Theirs.pure_bf16 in theirs:
        size = 2 * form.parameters
        state = {"weights": size // cut.weights, "moments": 2 * size // cut.moments}
        moments["update"] = state | {"gradients": size // cut.gradients, "foreach copies": size // cut.moments}
        moments["loss"] = state | {"activations": activations, "logits": loss}
    else:
        moments["as ours"] = {}
        moments["loss"] = {"what stays": stays, "activations": activations, "logits": loss}
    totals = {at: sum(parts.values()) if parts else ours.total for at, parts in moments.items()}
    at = max(totals, key=lambda one: totals[one])
    return TheirBytes(totals[at], at, moments[at])


def _at_the_loss(form: Form, units: float) -> tuple[int, int]:
    """(what stays, activations without logits) at the end of a forward pass."""
    large = form.moments[1]
    place = next(moment for moment in large if moment.phase == "forward" and moment.place in ("head", "after"))
    kinds = large[place].kinds
    more = form.at(units).total - form.at(form.sizes[1].units).total
    stays = sum(size for kind, size in kinds.items() if kind not in (MemoryKind.activations, MemoryKind.logits))
    return stays, kinds.get(MemoryKind.activations, 0) + max(more, 0)
