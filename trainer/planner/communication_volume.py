"""Bytes of each collective that a rank is expected to exchange in a step, computed from what is sharded.

Flags, norms and counts are left out. `tests/planner/test_communication_volume.py` compares it with the simulated
step.
"""

from __future__ import annotations

from typing import Any

from strategies.base import ActivationCheckpointing, DdpConfig, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from strategies.expert_share import share_of
from strategies.mesh import replica_count
from strategies.parameters import BESIDE, named_parameters
from strategies.runtime import Runtime
from trainer.build.sequence import heads_of
from trainer.model.architecture import experts_per_token, text_settings, width_and_blocks
from trainer.step import Built


def expected_bytes(
    built: Built,
    strategy: StrategyConfig,
    precision: Precision,
    runtime: Runtime,
    micro_batches: int,
    tokens_of_row: float,
) -> dict[str, float] | None:
    """Bytes by collective: of the whole that is gathered or reduced, and of what ranks that share rows or experts exchange.

    `tokens_of_row`: tokens of a reader's micro-batch, on average. None if the bytes are not known. They are not for bases that
    are stored packed, and for ZeRO-3: how often that gathers follows from what it has seen on the way.
    """
    if built.quantised or (isinstance(strategy, ZeroConfig) and strategy.stage == 3):
        return None
    if runtime.world_size == 1:
        return {}
    bytes_by_collective = _parameter_bytes(built, strategy, precision, runtime, micro_batches)
    token_bytes = 0.0
    if runtime.sequence_size > 1:
        token_bytes += _row_bytes(built, strategy, precision, runtime.sequence_size, tokens_of_row)
    if built.step_module.plan.expert_ranks > 1:
        token_bytes += _expert_bytes(built, strategy, precision, tokens_of_row / runtime.sequence_size)
    if token_bytes:
        bytes_by_collective[ALL_TO_ALL] = token_bytes * micro_batches
    return bytes_by_collective


def _parameter_bytes(
    built: Built, strategy: StrategyConfig, precision: Precision, runtime: Runtime, micro_batches: int
) -> dict[str, float]:
    """Bytes by collective that a step exchanges for parameters and gradients, whatever its tokens are.

    What frozen and trained weights are gathered in is half precision unless the run is in fp32; most gradients are in fp32.
    """
    parameters = {id(parameter): parameter for _, parameter in named_parameters(built.step_module)}
    trained_elements = sum(p.numel() for p in parameters.values() if p.requires_grad)
    gathered_itemsize = 4 if precision is Precision.fp32 else 2
    if isinstance(strategy, ZeroConfig):
        gradient_itemsize = 2 if precision is Precision.fp16 else 4
        reductions = micro_batches if strategy.stage == 2 else 1
        return {
            ALL_REDUCE: trained_elements * gradient_itemsize * reductions,
            ALL_GATHER: gathered_itemsize * trained_elements,
        }
    if isinstance(strategy, Fsdp2Config):
        return _fsdp2_bytes(built, strategy, runtime, micro_batches, gathered_itemsize)
    if isinstance(strategy, DdpConfig):
        reductions = micro_batches if strategy.defer_sync is False else 1
        return {ALL_REDUCE: 4 * trained_elements * reductions}
    return {}


def _fsdp2_bytes(
    built: Built, strategy: Fsdp2Config, runtime: Runtime, micro_batches: int, gathered_itemsize: int
) -> dict[str, float]:
    """Bytes by collective of parameters and gradients under FSDP2, and under HSDP, which has several sharded replicas.

    `gathered_itemsize`: bytes of a weight in the type in which it is gathered.
    """
    module = built.step_module
    copies = replica_count(strategy, runtime.world_size, runtime.hosts)
    shards = runtime.world_size // copies
    elements = _exchanged_elements(module, shards)
    parameters = {id(parameter): parameter for _, parameter in named_parameters(module)}
    trained_elements = sum(elements[key] for key, parameter in parameters.items() if parameter.requires_grad)
    gathered_elements = sum(elements.values())
    if strategy.reshard_after_forward:  # blocks are gathered again in the backward pass
        for unit in module.shard_units():
            gathered_elements += sum(elements.get(id(p), 0) for p in unit.parameters())
    # Whether gradients wait unreduced for the step's last micro-batch: as the run has decided, else as it is set.
    defers = module.plan.defer_sync
    if defers is None:
        defers = strategy.defer_sync is not False
    reductions = 1 if defers else micro_batches
    bytes_by_collective: dict[str, float] = {
        ALL_GATHER: gathered_itemsize * gathered_elements * micro_batches,
        REDUCE_SCATTER: 4 * trained_elements * reductions,
    }
    if copies > 1:
        # Replicas add up the shards of a rank, whoever its experts are gathered by.
        all_elements = _whole_elements(module)
        trained = sum(all_elements[key] for key, parameter in parameters.items() if parameter.requires_grad)
        bytes_by_collective[ALL_REDUCE] = 4 * trained / shards
    return bytes_by_collective


def _exchanged_elements(module: Any, shards: int) -> dict[int, int]:
    """Elements of each parameter that a rank gathers at a time, by the parameter's id; `shards`: ranks of a replica.

    With `parallel.experts` the experts of a layer are dealt: each rank of a group holds some of them. A rank gathers its own
    experts from the ranks that hold the same ones, and nothing if there are no such ranks.
    """
    elements = _whole_elements(module)
    expert_ranks = module.plan.expert_ranks
    for name in module.plan.dealt_experts:
        for parameter in module.get_submodule(name).parameters(recurse=False):
            if id(parameter) in elements:  # a teacher's are not counted
                own_elements = elements[id(parameter)] // expert_ranks
                elements[id(parameter)] = own_elements if shards > expert_ranks else 0
    return elements


def _whole_elements(module: Any) -> dict[int, int]:
    """Elements of each parameter by its id, before and after it is sharded. Dealt experts count on all ranks of a group."""
    elements = {}
    for name, parameter in named_parameters(module):
        share = share_of(module, name)
        elements[id(parameter)] = parameter.numel() if share is None else share.whole_shape(parameter.shape).numel()
    return elements


def _row_bytes(built: Built, strategy: StrategyConfig, precision: Precision, degree: int, tokens: float) -> float:
    """Bytes that rank 0 exchanges in a micro-batch with the ranks that share its row (`parallel.sequence`).

    Before attention each rank has a slice of the row with all heads, in attention the whole row with some heads: that takes
    an exchange each way. `degree`: ranks that share a row. `tokens`: of the row. 0 if the model's heads are not known. Left
    out: replayed documents, which a reference model reads by themselves.
    """
    step = built.step_module
    _, blocks = width_and_blocks(built.plain)
    # Gradients go back the way of the forward pass.
    block_passes = (_forward_passes(built, strategy) + 1) * blocks
    elements = _elements_of_layer(built.config, degree, tokens) * block_passes
    if step.teacher is not None:
        _, teacher_blocks = width_and_blocks(step.teacher)
        elements += _elements_of_layer(step.teacher.config, degree, tokens) * teacher_blocks
    return elements * (4 if precision is Precision.fp32 else 2)


def _expert_bytes(built: Built, strategy: StrategyConfig, precision: Precision, tokens: float) -> float:
    """Bytes that a rank exchanges in a micro-batch of `tokens` tokens with the ranks that hold its layer's other experts.

    Each expert that the router chooses for a token is a row of the token's hidden state, which goes to the expert's rank and
    back; so do the gradients. Before, the ranks tell each other how many rows come for each expert. Routing is taken to be
    even.
    """
    step = built.step_module
    text = text_settings(built.config)
    rows = tokens * experts_per_token(built.config)
    itemsize = 4 if precision is Precision.fp32 else 2
    forward_passes = _forward_passes(built, strategy)
    size = 0.0
    for name in step.plan.dealt_experts:
        if name.startswith(BESIDE):  # a teacher's sizes are its own, and reward models run between steps: not counted
            continue
        row_bytes = 2 * rows * text.hidden_size * itemsize
        experts: Any = step.get_submodule(name)
        count_bytes = 8 * experts.num_experts
        size += row_bytes * (forward_passes + 1) + count_bytes * forward_passes
    return size


def _forward_passes(built: Built, strategy: StrategyConfig) -> float:
    """How often blocks run forward in a micro-batch, recomputed ones included; on average over the blocks."""
    step = built.step_module
    _, blocks = width_and_blocks(built.plain)
    modes = step.plan.recomputation or [strategy.activation_checkpointing] * blocks
    recomputed_blocks = sum(mode is not ActivationCheckpointing.none for mode in modes)
    # What only reads, the pass of a reference or one that looks ahead, is a forward pass.
    reading_passes = 1 if step.objective.uses_reference and built.tuning.keeps_base else 0
    if step.objective.look_ahead_terms:
        reading_passes += 1 + reading_passes
    return 1 + reading_passes + recomputed_blocks / blocks


def _elements_of_layer(model_config: Any, degree: int, tokens: float) -> float:
    """Elements that a forward pass of one layer exchanges; 0 if the configuration tells of no heads."""
    heads = heads_of(model_config)
    return 0.0 if heads is None else heads.counted_elements(tokens, degree)
