"""Rules for objectives whose batches are rounds of answers that the model generates: what a run must not combine them with."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.run import RunConfig
from trainer.objectives.registry import objective_family
from trainer.objectives.rollouts import IdleGroups, RoundsConfig

MAX_ADVISED_GROUP_SIZE = 64
"""Answers to one prompt: no larger group is advised in an error."""


def round_problems(config: RunConfig) -> Iterator[str]:
    """Check what does not go with learning from generated answers, as objective=grpo does; other runs yield no messages."""
    settings = config.objective
    if objective_family(settings).rollout is None:
        return
    assert isinstance(settings, RoundsConfig)
    yield from _budget_problems(config, settings)
    yield from _data_problems(config)
    yield from _noise_problems(config)


def answer_batch_problems(config: RunConfig) -> Iterator[str]:
    """Check that a step takes whole groups of answers (all answers to one prompt); yields at most one error message.

    `batch.global` counts answers here, and must be a multiple of `objective.group_size`. With batch.global=30 and
    objective.group_size=8 it names batch.global=24 or 32, and sizes of groups that divide 30.
    """
    settings = config.objective
    assert isinstance(settings, RoundsConfig)
    num_answers = config.batch["global"]
    group_size = settings.group_size
    if group_size < 1 or num_answers % group_size == 0:
        return
    next_smaller = num_answers // group_size * group_size
    legal_batches = [next_smaller, next_smaller + group_size] if next_smaller else [group_size]
    advice = " or ".join(f"batch.global={batch}" for batch in legal_batches)
    largest_group = min(num_answers, MAX_ADVISED_GROUP_SIZE)
    divisors = [str(number) for number in range(2, largest_group + 1) if num_answers % number == 0]
    if divisors:
        advice += f", or objective.group_size={' or '.join(divisors[-4:])}"
    yield (
        f"batch.global={num_answers}: counts answers, and must be a multiple of objective.group_size={group_size}, the answers "
        f"to one prompt; set {advice}"
    )


def _budget_problems(config: RunConfig, objective: RoundsConfig) -> Iterator[str]:
    """Check that the budget of a run with generated answers can be turned into a number of steps; yields messages for these:

    - Tokens: nobody knows before how long the answers will be.
    - Passes over the prompts, if idle groups (whose answers all have the same reward) are replaced by answers to more prompts.
    """
    if config.budget.tokens is not None:
        yield (
            f"budget.tokens={config.budget.tokens}: nobody knows how long answers will be; set budget.steps, or budget.epochs "
            "for passes over the prompts"
        )
    if config.budget.epochs is not None and objective.idle_groups is IdleGroups.replace:
        yield (
            f"budget.epochs={config.budget.epochs:g} with objective.idle_groups=replace: a step takes any number of prompts; "
            "set budget.steps, or objective.idle_groups=drop"
        )


def _data_problems(config: RunConfig) -> Iterator[str]:
    """An error message for packing, which does not go with prompts."""
    data = config.data
    if data.packing:
        yield "data.packing=true: the rows of a step are answers that the model writes; set data.packing=false"


def _noise_problems(config: RunConfig) -> Iterator[str]:
    """Check that a run that learns from its own answers trains without noise (dropout, noise on embeddings); yields messages.

    The answers are generated without it, and would be those of another model than the trained one.
    """
    reason = "answers are written without it, so the model would learn about answers that it did not write; set it to 0"
    if config.model.neftune_alpha:
        yield f"model.neftune_alpha={config.model.neftune_alpha:g}: {reason}"
    if config.model.dropout:
        yield f"model.dropout={config.model.dropout:g}: {reason}"
    dropout = getattr(config.tuning, "dropout", 0.0)
    if dropout:
        yield f"tuning.dropout={dropout:g}: {reason}"
