"""Memory that other trainers would need for the same step, to compare plans with published figures.

It is arithmetic on the sizes of model and batch alone. The bytes of the losses follow from the code of the libraries:
logits in bf16 and a copy in fp32, shifted, with softmax and gradient. Nothing is fitted to measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

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
    """Say what is wrong with the setting `plan.theirs`, which describes another trainer to compare with; empty if nothing is.

    `settings`: what that trainer does differently. `full_tuning`: whether all weights of the model train.
    """
    loss_settings = [setting for setting in dict.fromkeys(settings) if setting in LOSS_BYTES_PER_LOGIT]
    problems = []
    if len(loss_settings) > 1:
        problems.append(
            f"plan.theirs=[{','.join(settings)}]: a step has one loss; name one of {', '.join(loss_settings)}"
        )
    if PeerSetting.pure_bf16 in settings and not full_tuning:
        problems.append(
            "plan.theirs=[pure_bf16]: is of full tuning; set tuning=full, or leave it out (a frozen base is in bf16)"
        )
    return problems


def estimate_peer_memory(
    cost_model: CostModel,
    num_rows_or_tokens: float,
    num_logits: float,
    settings: Sequence[PeerSetting],
    shard_counts: ShardCounts,
) -> PeerMemory:
    """Estimate the peak memory of one rank of another trainer (the peer) that takes the same step, to show it beside ours.

    `cost_model`: of our own step. `num_rows_or_tokens`: the size of the micro-batch, as the cost model counts it.
    `num_logits`: its tokens times the size of the vocabulary. `settings`: what the peer does differently; all else is assumed
    to be as in our step.

    The peak is the larger of two phases: the loss, with all logits, and the update of a `pure_bf16` peer. Other peers are as our
    own step in all but the loss, so our own step's peak stands for their second phase.
    """
    # Of a peer without a loss of its own among `settings`, 0: our loss never holds all logits.
    loss_bytes = round(sum(LOSS_BYTES_PER_LOGIT.get(setting, 0.0) for setting in settings) * num_logits)
    # What our own step holds there, without logits: the peer is taken to hold the same.
    at_the_loss = _own_memory_at_the_loss(cost_model, num_rows_or_tokens)
    if PeerSetting.pure_bf16 in settings:
        update_parts = _bf16_bytes_of_update(cost_model.num_parameters, shard_counts)
        other = _peer_memory_of_parts("update", update_parts)
        state_parts = {part: update_parts[part] for part in ("weights", "moments")}
    else:
        own_peak = cost_model.memory_peak_at(num_rows_or_tokens)
        other = PeerMemory(own_peak.total_bytes, "as ours", parts={})
        state_parts = {"what stays": at_the_loss.resting_bytes}
    loss = _peer_memory_of_parts(
        "loss", {**state_parts, "activations": at_the_loss.activation_bytes, "logits": loss_bytes}
    )
    return loss if loss.total > other.total else other


def _peer_memory_of_parts(phase: str, parts: dict[str, int]) -> PeerMemory:
    """What a peer holds in a phase, from the bytes of its parts."""
    return PeerMemory(sum(parts.values()), phase, parts)


def _bf16_bytes_of_update(num_parameters: int, shard_counts: ShardCounts) -> dict[str, int]:
    """Bytes of one rank by part during the optimizer's update, of another trainer that has weights, gradients, moments in bf16.

    `shard_counts`: among how many ranks it shards each of them.
    """
    weight_bytes = 2 * num_parameters
    return {
        "weights": weight_bytes // shard_counts.weights,
        "moments": 2 * weight_bytes // shard_counts.moments,  # two for each weight
        "gradients": weight_bytes // shard_counts.gradients,
        # An update of all parameters at once (torch's foreach kernels) makes copies as large as the weights it updates.
        "foreach copies": weight_bytes // shard_counts.moments,
    }


class _MemoryAtTheLoss(NamedTuple):
    """Bytes of one rank when its forward pass has reached the loss, without logits."""

    resting_bytes: int
    """Weights, optimizer state, gradients and buffers."""
    activation_bytes: int
    """What blocks keep for the backward pass."""


def _own_memory_at_the_loss(cost_model: CostModel, num_rows_or_tokens: float) -> _MemoryAtTheLoss:
    """What our own step holds when it has reached the loss, without logits, in a micro-batch of so many rows or tokens.

    Another trainer with another loss is taken to hold the same there. It is read at the peak of the phase in which the output
    head, or what follows it, computes.
    """
    larger_size = 1  # the larger of the two simulated sizes, for which alone bytes are known by kind
    phases = cost_model.phase_peaks_at_sizes[larger_size]
    loss_phase = next(phase for phase in phases if phase.name == "forward" and phase.model_part in ("head", "after"))
    bytes_by_kind = phases[loss_phase].bytes_by_kind
    resting_bytes = 0
    for kind, size_bytes in bytes_by_kind.items():
        if kind not in (MemoryKind.activations, MemoryKind.logits):
            resting_bytes += size_bytes
    # Beyond the larger size, only activations grow.
    peak_bytes = cost_model.memory_peak_at(num_rows_or_tokens).total_bytes
    larger_peak_bytes = cost_model.memory_peak_at(
        cost_model.simulated_sizes[larger_size].num_rows_or_tokens
    ).total_bytes
    growth = max(peak_bytes - larger_peak_bytes, 0)
    return _MemoryAtTheLoss(resting_bytes, bytes_by_kind.get(MemoryKind.activations, 0) + growth)
