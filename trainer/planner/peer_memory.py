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


def peer_setting_problems(settings: Sequence[PeerSetting], *, full_tuning: bool) -> list[str]:
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


def estimate_peer_memory(
    cost_model: CostModel,
    units: float,
    logit_count: float,
    settings: Sequence[PeerSetting],
    shard_counts: ShardCounts,
) -> PeerMemory:
    """Peak memory of one rank of another trainer, for the step that `cost_model` describes.

    `units`: the size of the micro-batch, in the unit of the cost model (rows or tokens). `logit_count`: its tokens times the size
    of the vocabulary. `settings`: what that trainer does differently; all else is assumed to be as in our own step. The peak is
    the larger of two phases: the loss, with all logits, and the update or our own step's peak.
    """
    loss_bytes = round(sum(LOSS_BYTES_PER_LOGIT.get(setting, 0.0) for setting in settings) * logit_count)
    resting, activations = _memory_at_the_loss(cost_model, units)
    if PeerSetting.pure_bf16 in settings:
        bf16_bytes = (
            2 * cost_model.num_parameters
        )  # of the weights; gradients take as many, the two moments twice as many
        sharded_state = {
            "weights": bf16_bytes // shard_counts.weights,
            "moments": 2 * bf16_bytes // shard_counts.moments,
        }
        other_phase = "update"
        other_parts = {
            **sharded_state,
            "gradients": bf16_bytes // shard_counts.gradients,
            "foreach copies": bf16_bytes // shard_counts.moments,
        }
        other_total = sum(other_parts.values())
        loss_parts = {**sharded_state, "activations": activations, "logits": loss_bytes}
    else:
        other_phase = "as ours"
        other_parts = {}
        other_total = cost_model.memory_peak_at(units).total_bytes
        loss_parts = {"what stays": resting, "activations": activations, "logits": loss_bytes}
    loss_total = sum(loss_parts.values())
    if loss_total > other_total:
        return PeerMemory(loss_total, "loss", loss_parts)
    return PeerMemory(other_total, other_phase, other_parts)


def _memory_at_the_loss(cost_model: CostModel, units: float) -> tuple[int, int]:
    """(bytes of weights and optimizer state, bytes of activations) of our own step after a forward pass, without logits."""
    phases = cost_model.phase_peaks_at_sizes[1]
    loss_phase = next(phase for phase in phases if phase.name == "forward" and phase.place in ("head", "after"))
    kinds = phases[loss_phase].bytes_by_kind
    resting = 0
    for kind, size in kinds.items():
        if kind not in (MemoryKind.activations, MemoryKind.logits):
            resting += size
    # Bytes by kind are those of the larger simulated size. Beyond it, only activations grow.
    growth = (
        cost_model.memory_peak_at(units).total_bytes
        - cost_model.memory_peak_at(cost_model.simulated_sizes[1].num_units).total_bytes
    )
    return resting, kinds.get(MemoryKind.activations, 0) + max(growth, 0)
