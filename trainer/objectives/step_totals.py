"""The passes of a whole step over its micro-batches, and its totals.

Some totals are needed before the first backward pass, because no sum of micro-batches gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from strategies.base import InferenceWeights
from strategies.runtime import sum_over_ranks
from trainer.model.routing import ADDED_LOSS, EXPERT_TOKENS
from trainer.reporting.metrics import StepRecord

if TYPE_CHECKING:
    from strategies.base import Engine, Progress, StepResult
    from trainer.data.batches.loader import StepBatch
    from trainer.objectives.routed import AddedLosses


def mean_terms_without_gradients(
    engine: Engine,
    batches: Iterable[dict[str, Any]],
    count: float,
    *,
    averaged: bool,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Average the terms of an objective over a whole step or evaluation, before the losses that need these means.

    Returns each term by name, summed over the micro-batches of all ranks and divided by `count`: 0-d float32. Computed without
    gradients and dropout. All ranks must call, with equally many micro-batches.

    `batches`: this rank's micro-batches.
    `count`: 0 leaves the sums as they are.
    `averaged`: whether the average of the weights over steps computes them.
    `check_stop`: called after each micro-batch.
    """
    sums: dict[str, torch.Tensor] = {}
    with engine.inference(InferenceWeights.averaged if averaged else InferenceWeights.trained) as module:
        for batch in batches:
            for term, term_sum in module(batch).items():
                if term in sums:
                    sums[term] = sums[term] + term_sum.double()
                else:
                    sums[term] = term_sum.double()
            check_stop()
    if not sums:
        return {}
    # One exchange for all terms, in an order that is the same on every rank.
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names])
    if engine.world_size > 1:
        totals = sum_over_ranks(totals)
    return {name: (total / (count or 1)).float() for name, total in zip(names, totals, strict=True)}


def routing_context(engine: Engine, batch: StepBatch) -> dict[str, Any]:
    """Compute what each micro-batch of a step is told of the whole step, for the losses of routers and logits.

    All ranks must call. Empty if the model adds no such loss. `step_tokens` and `ranks` turn a micro-batch's sum into its part of
    the step's mean. `tokens_by_expert` (int64 [experts]): how many tokens of the whole step chose each expert. With one
    micro-batch the forward pass itself counts them. With several they are counted here, in a pass of its own without gradients
    and dropout.
    """
    added_losses: AddedLosses | None = getattr(engine.step_module, "added_losses", None)
    if added_losses is None or not added_losses.changes_loss:
        return {}
    context: dict[str, Any] = {"step_tokens": batch.tokens, "ranks": engine.world_size}
    # The balancing loss is a product of two means over the step, which no sum of micro-batches gives.
    has_balancing_loss = bool(added_losses.router_losses.balance_weight)
    if has_balancing_loss and len(batch.micro_batches) > 1:
        context["tokens_by_expert"] = _count_tokens_by_expert(engine, batch.micro_batches)
    return context


def _count_tokens_by_expert(engine: Engine, micro_batches: Sequence[dict[str, Any]]) -> torch.Tensor:
    """How many tokens of the whole step chose each expert, int64 [experts]; `micro_batches`: this rank's. All ranks must call."""
    counts = []
    with engine.inference(InferenceWeights.trained) as module:
        for micro_batch in micro_batches:
            outputs = module({**micro_batch, "only_count_tokens_by_expert": True})
            counts.append(outputs["tokens_by_expert"])
    total = torch.stack(counts).sum(0)
    return sum_over_ranks(total) if engine.world_size > 1 else total


def pop_loss(terms: dict[str, torch.Tensor], scale: float, world_size: int) -> torch.Tensor:
    """Scale the loss of a micro-batch for its backward pass (0-d), and take the loss that the model adds out of `terms`.

    `scale`: turns the sum `terms["loss"]` into its part of the step's mean, times `world_size`, because engines average gradients
    over ranks. The added loss is a part of that mean already, so it is multiplied by `world_size` alone.
    """
    loss = terms["loss"] * scale
    added_loss = terms.pop(ADDED_LOSS, None)
    if added_loss is None:
        return loss
    return loss + added_loss * world_size


def accumulate_gradients(engine: Engine, batch: StepBatch, seed_and_step: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Let the engine add up the gradients of a step over its micro-batches. All ranks must call. Reads nothing from the device.

    Returns the sum of each loss term over this rank's micro-batches, by name. `seed_and_step`: (the run's seed, the step), by
    which noise on embeddings is drawn.

    The loss contract (strategies/base.py): sums over the micro-batch, divided by the count of the whole step, times the number of
    ranks, because every strategy averages over them.
    """
    # A step without any target has a count of 0 and a loss of 0.
    loss_count = batch.totals["loss"]
    scale = engine.world_size / (loss_count or 1)
    sums: dict[str, torch.Tensor] = {}

    # Some losses (KTO's) need a mean over the whole step before its first backward pass. Most steps have no batches for it.
    step_means: dict[str, torch.Tensor] = {}
    if batch.look_ahead_batches:
        step_means = mean_terms_without_gradients(engine, batch.look_ahead_batches, loss_count, averaged=False)
    # What every micro-batch is given of the whole step.
    step_context = {
        "step_means": step_means,
        "seed_and_step": seed_and_step,
        **routing_context(engine, batch),
    }
    for index, micro_batch in enumerate(batch.micro_batches):
        # Most engines exchange gradients on the last micro-batch alone; before it they add up locally.
        is_last = index == len(batch.micro_batches) - 1
        terms = engine.forward({**micro_batch, **step_context}, last=is_last)
        engine.backward(pop_loss(terms, scale, engine.world_size), last=is_last)
        # Sums for the log stay on the device, where the meter reads them once an interval.
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    return sums


def step_record(
    batch: StepBatch,
    local_sums: dict[str, torch.Tensor],
    step_result: StepResult,
    progress: Progress,
    *,
    lr: float,
    epoch: float,
) -> StepRecord:
    """Collect the numbers of a step on `batch`, for the meter. It keeps none of the batch's micro-batches alive.

    `local_sums`: what `accumulate_gradients` returned; the tokens by expert are taken out of it.
    `step_result`: what the engine returned of the update, such as the gradient norm.
    `progress`: counts the step already.
    `lr`: of the step.
    `epoch`: passes over the training data so far.
    """
    return StepRecord(
        step=progress.step,
        lr=lr,
        tokens=batch.tokens,
        supervised_tokens=batch.supervised_tokens,
        total_tokens=progress.tokens,
        total_supervised_tokens=progress.supervised_tokens,
        counts=batch.totals,
        expert_tokens=local_sums.pop(EXPERT_TOKENS, None),
        local_sums=local_sums,
        result=step_result,
        local_tokens=batch.local_tokens,
        wait_s=batch.wait_s,
        source_tokens=batch.source_tokens,
        source_counts=batch.source_counts,
        balance=batch.parallel_efficiency,
        epoch=epoch,
        facts=batch.facts,
        round_s=batch.round_s,
    )
