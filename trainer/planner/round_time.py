"""Seconds of a round of online learning on a GPU, from sizes and the card's rates.

In a round, the model generates answers to some prompts (a rollout), rewards score them, and the model trains on them. Every
answer is taken to be as long as it may be, so the seconds are upper bounds for the kernels that are assumed. A decode step
reads all weights and the KV cache of its rows, multiplies every weight with each row, and launches kernels block by block.
It takes as long as the slowest of the three. What rewards take is not known before they have run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from strategies.base import Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from trainer.build.rounds import MAX_GENERATION_ROWS, num_documents_per_step, num_prompts_per_round
from trainer.config.parallel import dp_size_of
from trainer.config.run import RunConfig
from trainer.evaluation.full_weights import USABLE_MEMORY_SHARE, kv_cache_bytes_upper_bound
from trainer.objectives.registry import max_generated_tokens, objective_family
from trainer.planner.hardware import Card
from trainer.planner.speed import MEMORY_EFFICIENCY, PRODUCT_EFFICIENCY, ring_bytes_per_s

BLOCK_LAUNCH_S = 0.5e-3
"""Seconds in which a host launches the kernels of one block for one token, uncompiled. An assumption."""
KV_CACHE_PASSES = 3
"""Times that the KV cache of all rows is read or written to generate a token: read and written to copy it with a column more
(it is one tensor), and read by attention."""
LOGIT_PASSES = 6
"""Times that the logits of all rows, in float32, are read or written to draw a token from them."""
FORWARD_SHARE = 1 / 3
"""Share of a training step that a pass without gradients over the same answers takes."""


@dataclass(frozen=True, slots=True)
class RoundSizes:
    """The sizes of a round of online learning (generate answers, score them, train on them), known without a simulated step."""

    num_prompts: int
    """Prompts of a round."""
    group_size: int
    """Answers to a prompt."""
    max_generation_rows: int
    """Most answers that a rank generates at a time."""
    may_lower_generation_rows: bool
    """Whether the run halves `max_generation_rows` until their KV cache fits; not if `objective.rollout.rows` is set."""
    mean_prompt_tokens: float
    """Mean length of a prompt."""
    longest_prompt_tokens: int
    """Tokens of the longest one."""
    max_new_tokens: int
    """Longest answer in tokens."""
    kv_cache_bytes_per_token: float
    """Bytes of the keys and values of one token in all layers."""
    steps_per_iteration: int
    """Optimizer steps that go through all answers of a round once."""
    iterations: int
    """How often a round goes through its answers."""
    extra_forward_passes: int
    """Passes without gradients over all answers of a round, for log-probabilities of the policy and of the reference model."""

    @property
    def num_answers(self) -> int:
        """Answers of a round."""
        return self.num_prompts * self.group_size

    @property
    def num_steps(self) -> int:
        """Optimizer steps of a round, repeated ones included."""
        return self.steps_per_iteration * self.iterations


@dataclass(frozen=True, slots=True)
class GeneratorSizes:
    """The sizes of a model that decide how long it takes to generate an answer."""

    num_parameters: int
    """Of the whole model; of experts, all of them: the rows of a batch choose most."""
    num_blocks: int
    num_vocabulary_rows: int
    weight_itemsize: int
    """Bytes of a weight in the type that computes."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.num_parameters * self.weight_itemsize


@dataclass(frozen=True, slots=True)
class RoundTime:
    """Seconds of one round, and where its weights lie meanwhile."""

    generation_s: float
    scoring_s: float | None
    """None if no run has measured the rewards."""
    training_s: float
    """All optimizer steps of the round, and the passes without gradients before them."""
    gathers_weights_once: bool
    """Whether every rank has all weights while it generates; else each token gathers them block by block."""
    generation_bytes: int
    """Bytes that weights and KV cache take on a rank while it generates."""
    num_steps: int

    @property
    def total_s(self) -> float:
        """Seconds of the round, without the rewards if these are not known."""
        return self.generation_s + (self.scoring_s or 0.0) + self.training_s

    @property
    def seconds_per_step(self) -> float:
        """Seconds of the round for each of its optimizer steps."""
        return self.total_s / self.num_steps


def round_sizes_of_run(
    config: RunConfig, model_config: Any, mean_prompt_tokens: float, longest_prompt_tokens: int
) -> RoundSizes | None:
    """Collect the sizes of a round, in which the model generates answers and then learns from them, to estimate its time.

    None for objectives without rounds. `model_config`: the model's configuration of transformers. `mean_prompt_tokens`,
    `longest_prompt_tokens`: of the prompts in the data.
    """
    if objective_family(config.objective).rollout is None:
        return None
    objective: Any = config.objective
    rollout = objective.rollout
    bytes_per_value = 4 if config.precision is Precision.fp32 else 2
    # From the second step on, the policy is not the one that generated the answers, so its own log-probabilities are kept.
    needs_old_logprobs = rollout.steps * rollout.iterations > 1
    needs_reference_logprobs = objective.kl.weight > 0
    return RoundSizes(
        num_prompts=num_prompts_per_round(config),
        group_size=int(objective.group_size),
        max_generation_rows=rollout.rows or MAX_GENERATION_ROWS["cuda"],  # a plan is for GPUs
        may_lower_generation_rows=not rollout.rows,
        mean_prompt_tokens=mean_prompt_tokens,
        longest_prompt_tokens=longest_prompt_tokens,
        max_new_tokens=max_generated_tokens(config.objective),
        kv_cache_bytes_per_token=float(
            kv_cache_bytes_upper_bound(model_config, rows=1, tokens=1, bytes_per_number=bytes_per_value)
        ),
        steps_per_iteration=int(rollout.steps),
        iterations=int(rollout.iterations),
        extra_forward_passes=int(needs_old_logprobs) + int(needs_reference_logprobs),
    )


class _GenerationBatches(NamedTuple):
    """The batches of answers that a rank generates one after the other in a round."""

    rows: int
    """Answers that are generated at the same time."""
    num_batches: int


def _generation_batches(round_sizes: RoundSizes, max_rows: int, dp_size: int) -> _GenerationBatches:
    """Divide the answers that a rank generates in a round into batches of at most `max_rows` answers, as a run does it.

    The answers to one prompt stay together if a batch holds them; else they are several parts, each a batch. `dp_size`: ranks
    that generate answers to different prompts.
    """
    rows_per_part = min(max_rows, round_sizes.group_size)
    max_parts_per_batch = max(1, max_rows // rows_per_part)
    num_parts = round_sizes.num_prompts * math.ceil(round_sizes.group_size / rows_per_part)
    parts_per_batch = min(max_parts_per_batch, math.ceil(num_parts / dp_size))
    return _GenerationBatches(
        rows=parts_per_batch * rows_per_part,
        # If there is more than one batch, a batch has the most parts that it may have.
        num_batches=math.ceil(num_parts / (max_parts_per_batch * dp_size)),
    )


def _max_rows_beside_weights(round_sizes: RoundSizes, available_bytes: float, answer_bytes: float) -> int:
    """Most answers that a rank generates at a time, so that their KV cache fits in `available_bytes`, as a run chooses it.

    `round_sizes.max_generation_rows` is halved until it fits; not if the user has set that number. `answer_bytes`: of the KV
    cache of one answer with its prompt, at their longest.
    """
    max_rows = round_sizes.max_generation_rows
    while round_sizes.may_lower_generation_rows and max_rows > 1 and max_rows * answer_bytes > available_bytes:
        max_rows //= 2
    return max_rows


def estimate_round_time(
    round_sizes: RoundSizes,
    generator: GeneratorSizes,
    config: RunConfig,
    card: Card,
    *,
    num_ranks: int,
    num_hosts: int,
    step_s: float,
    resting_bytes: float,
) -> RoundTime:
    """Estimate the seconds of a round on `num_ranks` cards: generating answers, scoring them, learning from them.

    `round_sizes`: of the round. `generator`: sizes of the model. `config`: of it, strategy, precision and `parallel` count.
    `step_s`: seconds of an optimizer step. `resting_bytes`: what a rank holds between two steps, whole weights not counted.
    """
    # The batches of answers that a rank generates one after the other.
    usable_bytes = USABLE_MEMORY_SHARE * (card.memory_gib * 2**30 - resting_bytes)
    answer_bytes = round_sizes.kv_cache_bytes_per_token * (
        round_sizes.longest_prompt_tokens + round_sizes.max_new_tokens
    )
    max_rows = _max_rows_beside_weights(round_sizes, usable_bytes - generator.weight_bytes, answer_bytes)
    dp_size = dp_size_of(config, num_ranks)
    batches = _generation_batches(round_sizes, max_rows, dp_size)

    # Sharded weights are gathered once a round if memory allows it, else again for each generated token.
    generation_bytes = generator.weight_bytes + round(batches.rows * answer_bytes)
    is_sharded = are_weights_sharded(config.strategy) and num_ranks > 1
    gathers_weights_once = not is_sharded or generation_bytes <= usable_bytes
    gather_s = 0.0
    if is_sharded:
        gather_s = generator.weight_bytes * (num_ranks - 1) / num_ranks / ring_bytes_per_s(card, num_ranks, num_hosts)

    # The prompts (prefill). A prompt is computed once for its group if the rank has all weights, else for each of its answers.
    prompts_per_rank = round_sizes.num_prompts / dp_size * (1 if gathers_weights_once else round_sizes.group_size)
    prefill_flops = 2 * generator.num_parameters * prompts_per_rank * round_sizes.mean_prompt_tokens
    prefill_s = prefill_flops / (card.tflops(config.precision) * 1e12 * PRODUCT_EFFICIENCY)

    # The new tokens: for each the slower of decoding and gathering. The mean KV cache is that of half an answer.
    mean_cached_tokens = round_sizes.mean_prompt_tokens + round_sizes.max_new_tokens / 2
    kv_cache_bytes = batches.rows * round_sizes.kv_cache_bytes_per_token * mean_cached_tokens
    token_s = decode_step_s(generator, card, config.precision, rows=batches.rows, kv_cache_bytes=kv_cache_bytes)
    if gathers_weights_once:
        generation_s = batches.num_batches * round_sizes.max_new_tokens * token_s + prefill_s + gather_s
    else:
        generation_s = batches.num_batches * round_sizes.max_new_tokens * max(token_s, gather_s) + prefill_s
    return RoundTime(
        generation_s=card.writing_pace * generation_s,
        scoring_s=None if card.scoring_s is None else round_sizes.num_answers * card.scoring_s,
        training_s=step_s
        * (round_sizes.num_steps + round_sizes.extra_forward_passes * FORWARD_SHARE * round_sizes.steps_per_iteration),
        gathers_weights_once=gathers_weights_once,
        generation_bytes=generation_bytes,
        num_steps=round_sizes.num_steps,
    )


def decode_step_s(
    generator: GeneratorSizes, card: Card, precision: Precision, *, rows: int, kv_cache_bytes: float
) -> float:
    """Estimate the seconds of a decode step, in which a rank generates one token of each of `rows` answers at once.

    It takes as long as the slowest of three, since they overlap: memory traffic, matrix products (of few rows, so that weights
    are read while they are multiplied), and the launches of kernels. `kv_cache_bytes`: bytes of the KV cache of all rows.
    """
    logit_bytes = 4 * rows * generator.num_vocabulary_rows  # fp32
    moved_bytes = generator.weight_bytes + KV_CACHE_PASSES * kv_cache_bytes + LOGIT_PASSES * logit_bytes
    memory_s = moved_bytes / (card.memory_gb_s * 1e9 * MEMORY_EFFICIENCY)
    flops = 2 * generator.num_parameters * rows  # a multiplication and an addition for each weight and row
    products_s = flops / (card.tflops(precision) * 1e12 * PRODUCT_EFFICIENCY)
    launches_s = generator.num_blocks * BLOCK_LAUNCH_S
    return max(memory_s, products_s, launches_s)


def are_weights_sharded(strategy: StrategyConfig) -> bool:
    """Whether a rank holds a part of the weights between two steps."""
    return isinstance(strategy, Fsdp2Config) or (isinstance(strategy, ZeroConfig) and strategy.stage == 3)


def estimate_run_hours(
    config: RunConfig, samples_per_epoch: int | None, step_s: float, tokens_per_step: float
) -> float | None:
    """Estimate how many hours the whole run takes, its budget in steps, tokens or epochs, with steps of `step_s` seconds.

    `samples_per_epoch`: documents, pairs or packs, which a step counts in its batch; None if no data was given.
    `tokens_per_step`: of all ranks. Returns None without a budget, or for one in epochs without data.
    """
    budget = config.budget
    if budget.steps is not None:
        steps = float(budget.steps)
    elif budget.tokens is not None:
        steps = budget.tokens / tokens_per_step
    elif budget.epochs is not None and samples_per_epoch is not None:
        steps = budget.epochs * samples_per_epoch / num_documents_per_step(config)
    else:
        return None
    return steps * step_s / 3600
