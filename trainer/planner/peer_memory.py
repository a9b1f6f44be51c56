"""Memory that other trainers would need for the same step, to compare plans with published figures.

It is arithmetic on the sizes of model and batch alone. The bytes of the losses follow from the code of the libraries:
logits in bf16 and a copy in fp32, shifted, with softmax and gradient. Nothing is fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from strategies.tensor_inventory import MemoryKind
from trainer.planner.cost_model import CostModel


class PeerSetting(StrEnum):
    """What another trainer does differently (`plan.theirs`)."""

    stock_loss = "stock_loss"
    """transformers' own loss: logits of all tokens in bf16 and fp32, and their gradient."""
    fused_loss = "fused_loss"
    """A fused cross-entropy over logits of all tokens, or a compiled one."""
    fp32_head = "fp32_head"
    """An output head in fp32, as peft's preparation of a quantised model leaves it, under transformers' own loss."""
    pure_bf16 = "pure_bf16"
    """Full tuning with weights, gradients and moments in bf16, and an update of all at once (foreach)."""


LOSS_BYTES_PER_LOGIT = {PeerSetting.stock_loss: 12.0, PeerSetting.fused_loss: 8.0, PeerSetting.fp32_head: 16.0}
"""Bytes that a loss holds for each token and word."""


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """Among how many ranks a strategy shards weights, gradients and moments; 1 if each rank has all."""

    weights: int = 1
    gradients: int = 1
    moments: int = 1


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """Bytes of tensors of one rank if another trainer took the step."""

    total: int
    phase: str
    """`loss` (the end of the forward pass), `update`, or `as ours`: the peak of this trainer's own step."""
    parts: dict[str, int]
    """Bytes by part; empty if the peak is that of this trainer's own step."""


def problems_of(settings: Sequence[PeerSetting], *, full_tuning: bool) -> list[str]:
    """Sentences that say what is wrong with `plan.theirs`, the other trainer to compare with; empty if nothing is.

    `full_tuning`: whether all weights of the model train.
    """
    losses = [setting for setting in dict.fromkeys(settings) if setting in LOSS_BYTES_PER_LOGIT]
    problems = []
    if len(losses) > 1:
        problems.append(f"plan.theirs=[{','.join(settings)}]: a step has one loss; name one of {', '.join(losses)}")
    if PeerSetting.pure_bf16 in settings and not full_tuning:
        problems.append(
            "plan.theirs=[pure_bf16]: is of full tuning; set tuning=full, or leave it out (a frozen base is in bf16)"
        )
    return problems


def peer_memory(
    cost_model: CostModel,
    units: float,
    logit_count: float,
    settings: Sequence[PeerSetting],
    shard_counts: ShardCounts,
) -> PeerMemory:
    """What one rank of another trainer would hold for the step that `cost_model` describes, and in which phase most.

    `units`: the size of the micro-batch, in the unit of the cost model (rows or tokens). `logit_count`: its tokens times the
    words of the vocabulary. `settings`: what that trainer does differently. All else is taken to be as in our own step.
    """
    loss_bytes = round(sum(LOSS_BYTES_PER_LOGIT.get(setting, 0.0) for setting in settings) * logit_count)
    resting, activations = _memory_at_the_loss(cost_model, units)
    parts_by_phase: dict[str, dict[str, int]] = {}
    if PeerSetting.pure_bf16 in settings:
        weights = 2 * cost_model.parameters  # bytes in bf16; gradients take as many, the two moments twice that
        # Most is held at one of two moments: at the loss, with the logits, or in the update, with copies of the weights.
        sharded_state = {
            "weights": weights // shard_counts.weights,
            "moments": 2 * weights // shard_counts.moments,
        }
        parts_by_phase["update"] = {
            **sharded_state,
            "gradients": weights // shard_counts.gradients,
            "foreach copies": weights // shard_counts.moments,
        }
        parts_by_phase["loss"] = {**sharded_state, "activations": activations, "logits": loss_bytes}
    else:
        parts_by_phase["as ours"] = {}
        parts_by_phase["loss"] = {"what stays": resting, "activations": activations, "logits": loss_bytes}
    totals = {phase: sum(parts.values()) for phase, parts in parts_by_phase.items()}
    if "as ours" in totals:
        totals["as ours"] = cost_model.peak_at(units).total
    peak_phase = max(totals, key=lambda phase: totals[phase])
    return PeerMemory(totals[peak_phase], peak_phase, parts_by_phase[peak_phase])


def _memory_at_the_loss(cost_model: CostModel, units: float) -> tuple[int, int]:
    """What our own step holds at the end of a forward pass, without logits: (bytes of weights and state, of activations)."""
    phases = cost_model.phases[1]
    loss_phase = next(phase for phase in phases if phase.name == "forward" and phase.place in ("head", "after"))
    kinds = phases[loss_phase].kinds
    resting = 0
    for kind, size in kinds.items():
        if kind not in (MemoryKind.activations, MemoryKind.logits):
            resting += size
    # Kinds are of the larger simulated size: what the peak grows by from there on are activations.
    growth = cost_model.peak_at(units).total - cost_model.peak_at(cost_model.sizes[1].units).total
    return resting, kinds.get(MemoryKind.activations, 0) + max(growth, 0)
