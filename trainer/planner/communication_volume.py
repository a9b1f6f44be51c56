"""Bytes of each collective that a rank is expected to exchange in a step, computed from what is sharded.

Flags, norms and counts are left out. `tests/planner/test_communication_volume.py` compares it with the simulated
step.
"""

from __future__ import annotations

from typing import Any

from strategies.base import ActivationCheckpointing, DdpConfig, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from strategies.expert_share import expert_share_of_parameter
from strategies.mesh import replica_count
from strategies.parameters import FROZEN_MODEL_PREFIXES, named_parameters
from strategies.runtime import Runtime
from trainer.build.sequence import attention_heads_of
from trainer.model.architecture import experts_per_token, text_model_config, width_and_num_blocks
from trainer.step import BuiltModel, TrainStep

REDUCED_GRADIENT_ITEMSIZE = 4
"""Bytes of an element of a gradient that is reduced: float32, whatever type the step computes in (ZeRO in fp16 apart)."""


def _compute_itemsize(precision: Precision) -> int:
    """Bytes of an element in the type in which the step computes."""
    return 4 if precision is Precision.fp32 else 2


def expected_bytes_by_collective(
    built: BuiltModel,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: Runtime,
    num_micro_batches: int,
    row_tokens: float,
) -> dict[str, float] | None:
    """Compute from what is sharded how many bytes a step should exchange, by collective, to compare with what is measured.

    {"all_gather": 3.2e9, "reduce_scatter": 1.6e9}, each by the size of the full tensor; {} for a single rank.
    `num_micro_batches`: of a rank in a step. `row_tokens`: mean tokens of a micro-batch, all ranks that share a row together.

    None if the bytes cannot be computed: for quantised bases, and for ZeRO-3, which decides while it runs how often it gathers.
    """
    is_zero3 = isinstance(strategy, ZeroConfig) and strategy.stage == 3
    if built.quantised_shapes or is_zero3:  # shapes of packed weights; empty without quantisation
        return None
    if runtime.world_size == 1:
        return {}
    bytes_by_collective = _parameter_bytes_by_collective(built, strategy, precision, runtime, num_micro_batches)
    # All-to-alls in each micro-batch, between ranks that share rows or experts.
    token_bytes = 0.0
    if runtime.sequence_size > 1:
        token_bytes += _sequence_parallel_bytes(built, strategy, precision, runtime.sequence_size, row_tokens)
    if built.step_module.plan.expert_ranks > 1:  # a layer's experts are distributed over so many ranks
        token_bytes += _expert_parallel_bytes(built, strategy, precision, row_tokens / runtime.sequence_size)
    if token_bytes:
        bytes_by_collective[ALL_TO_ALL] = token_bytes * num_micro_batches
    return bytes_by_collective


def _parameter_bytes_by_collective(
    built: BuiltModel, strategy: StrategyConfig, precision: Precision, runtime: Runtime, num_micro_batches: int
) -> dict[str, float]:
    """Bytes that a step exchanges for parameters and gradients, by collective; they do not depend on its tokens.

    Weights are gathered in half precision unless the run is in fp32. Gradients are reduced in fp32, except under ZeRO in fp16.
    `num_micro_batches`: of a rank in a step. {} for the strategy `single`.
    """
    trained_elements = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    gathered_itemsize = _compute_itemsize(precision)
    if isinstance(strategy, ZeroConfig):
        gradient_itemsize = 2 if precision is Precision.fp16 else REDUCED_GRADIENT_ITEMSIZE
        # Stage 2 shards gradients, and so reduces them in each micro-batch. Stage 1 adds them up first.
        reductions = num_micro_batches if strategy.stage == 2 else 1
        return {
            ALL_REDUCE: trained_elements * gradient_itemsize * reductions,
            ALL_GATHER: gathered_itemsize * trained_elements,
        }
    if isinstance(strategy, Fsdp2Config):
        return _fsdp2_bytes_by_collective(built, strategy, runtime, num_micro_batches, gathered_itemsize)
    if isinstance(strategy, DdpConfig):
        reductions = num_micro_batches if strategy.defer_sync is False else 1
        return {ALL_REDUCE: REDUCED_GRADIENT_ITEMSIZE * trained_elements * reductions}
    return {}


def _fsdp2_bytes_by_collective(
    built: BuiltModel, strategy: Fsdp2Config, runtime: Runtime, num_micro_batches: int, gathered_itemsize: int
) -> dict[str, float]:
    """Bytes that a rank exchanges in a step for parameters and gradients under FSDP2 and HSDP, by collective.

    HSDP has several replicas, each of which is sharded. `gathered_itemsize`: bytes of a weight in the type in which it is
    gathered. `num_micro_batches`: of a rank in a step. Parameters are told apart by their `id()`, since modules
    may share one.
    """
    module = built.step_module
    num_replicas = replica_count(strategy, runtime.world_size, runtime.num_hosts)
    ranks_per_replica = runtime.world_size // num_replicas
    # All-gathers of weights, and reduce-scatters of gradients, within a replica.
    gathered_by_id = _num_gathered_elements_by_id(module, ranks_per_replica)
    trained_ids = [id(parameter) for _, parameter in named_parameters(module) if parameter.requires_grad]
    trained_elements = sum(gathered_by_id[parameter_id] for parameter_id in trained_ids)
    gathered_elements = sum(gathered_by_id.values())
    if strategy.reshard_after_forward:  # blocks are gathered again in the backward pass
        for block in module.shard_units():
            gathered_elements += sum(gathered_by_id.get(id(p), 0) for p in block.parameters())
    # Gradients are reduced in the last micro-batch only, or in each: as the run has decided, else as it is set.
    defers_reduction = module.plan.defer_sync
    if defers_reduction is None:  # nobody decided: deferred unless the user set `strategy.defer_sync=false`
        defers_reduction = strategy.defer_sync is not False
    reductions = 1 if defers_reduction else num_micro_batches
    bytes_by_collective: dict[str, float] = {
        ALL_GATHER: gathered_itemsize * gathered_elements * num_micro_batches,
        REDUCE_SCATTER: REDUCED_GRADIENT_ITEMSIZE * trained_elements * reductions,
    }
    if num_replicas > 1:
        # All-reduces between replicas: each rank reduces its shard of all gradients, those of experts too.
        full_by_id = _num_full_elements_by_id(module)
        full_trained = sum(full_by_id[parameter_id] for parameter_id in trained_ids)
        bytes_by_collective[ALL_REDUCE] = REDUCED_GRADIENT_ITEMSIZE * full_trained / ranks_per_replica
    return bytes_by_collective


def _num_gathered_elements_by_id(module: TrainStep, ranks_per_replica: int) -> dict[int, int]:
    """Count the elements that a rank gathers of each parameter under FSDP2, by its `id()` (blocks know theirs by other names).

    With `parallel.experts`, each rank of an expert group holds some experts of a layer. It gathers these from the ranks that
    shard the same experts; there are no such ranks, and nothing is gathered, if a replica is a single group.
    `ranks_per_replica`: ranks that together hold one copy of the model.
    """
    elements = _num_full_elements_by_id(module)
    expert_ranks = module.plan.expert_ranks
    for name in module.plan.expert_parallel_modules:
        for parameter in module.get_submodule(name).parameters(recurse=False):
            if id(parameter) in elements:  # those of a teacher are not: `named_parameters` leaves out frozen models
                own_elements = elements[id(parameter)] // expert_ranks
                elements[id(parameter)] = own_elements if ranks_per_replica > expert_ranks else 0
    return elements


def _num_full_elements_by_id(module: TrainStep) -> dict[int, int]:
    """Elements of each full parameter by its id, whether it is sharded or not. All experts of a layer count, on every rank."""
    elements = {}
    for name, parameter in named_parameters(module):
        share = expert_share_of_parameter(module, name)
        elements[id(parameter)] = parameter.numel() if share is None else share.full_shape(parameter.shape).numel()
    return elements


def _sequence_parallel_bytes(
    built: BuiltModel, strategy: StrategyConfig, precision: Precision, ranks_per_row: int, row_tokens: float
) -> float:
    """Bytes that rank 0 exchanges in a micro-batch with the ranks that share its row of tokens (`parallel.sequence`).

    Outside attention, each rank has a slice of the row with all heads; in attention, the full row with some heads. So there is an
    all-to-all before and after attention. `row_tokens`: of the whole row. 0 if the model's heads are not known. Left out:
    replayed documents, which a reference model reads by themselves.
    """
    step = built.step_module
    _, num_blocks = width_and_num_blocks(built.base_on_meta)  # the model without what the tuning method adds
    # A backward pass exchanges the gradients of what a forward pass exchanges.
    num_passes = _num_forward_passes(built, strategy) + 1
    elements = _all_to_all_elements_per_layer(built.config, ranks_per_row, row_tokens) * num_passes * num_blocks
    if step.teacher is not None:  # one forward pass
        _, num_teacher_blocks = width_and_num_blocks(step.teacher)
        elements += _all_to_all_elements_per_layer(step.teacher.config, ranks_per_row, row_tokens) * num_teacher_blocks
    return elements * _compute_itemsize(precision)


def _expert_parallel_bytes(built: BuiltModel, strategy: StrategyConfig, precision: Precision, tokens: float) -> float:
    """Bytes that a rank exchanges in a micro-batch of `tokens` tokens with the ranks that hold the other experts of a layer.

    For each expert that the router chooses for a token, the token's hidden state (a row) is sent to the rank of the expert and
    back, and so are the gradients. Before that, the ranks exchange how many rows they send to each expert. Routing is assumed to
    be even.
    """
    step = built.step_module
    text_config = text_model_config(built.config)
    rows = tokens * experts_per_token(built.config)
    forward_passes = _num_forward_passes(built, strategy)
    exchanged_bytes = 0.0
    for name in step.plan.expert_parallel_modules:
        # A teacher's sizes are its own, and reward models run between steps: not counted.
        if name.startswith(FROZEN_MODEL_PREFIXES):
            continue
        row_bytes = 2 * rows * text_config.hidden_size * _compute_itemsize(precision)  # to the experts and back
        experts: Any = step.get_submodule(name)
        count_bytes = 8 * experts.num_experts  # an int64 for each expert
        # A backward pass exchanges the gradients of the rows, by the counts that its forward pass exchanged.
        exchanged_bytes += row_bytes * (forward_passes + 1) + count_bytes * forward_passes
    return exchanged_bytes


def _num_forward_passes(built: BuiltModel, strategy: StrategyConfig) -> float:
    """How often a block of the model runs forward in a micro-batch, on average over the blocks: 2.0 if all are recomputed, say.

    Each of these passes exchanges tokens, where ranks share rows or experts.
    """
    step = built.step_module
    _, num_blocks = width_and_num_blocks(built.base_on_meta)
    # The modes of the blocks if the run chose them by memory (`activation_checkpointing=auto`), else the one of the settings.
    mode_by_block = step.plan.recomputation or [strategy.activation_checkpointing] * num_blocks
    recomputed_blocks = sum(mode is not ActivationCheckpointing.none for mode in mode_by_block)
    # Passes without gradients: of the reference model (if it is the base without its adapters), and of a look ahead (a mean that
    # the loss needs before the step), which the reference model takes as well.
    gradient_free_passes = 1 if step.objective.uses_reference and built.tuning.keeps_base else 0
    if step.objective.look_ahead_terms:
        gradient_free_passes += 1 + gradient_free_passes
    return 1 + gradient_free_passes + recomputed_blocks / num_blocks


def _all_to_all_elements_per_layer(model_config: Any, ranks_per_row: int, row_tokens: float) -> float:
    """Elements that a forward pass of one layer exchanges; 0 if the configuration tells of no heads."""
    heads = attention_heads_of(model_config)
    return 0.0 if heads is None else heads.all_to_all_elements_counted_on_rank_0(row_tokens, ranks_per_row)
