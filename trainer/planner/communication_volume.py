"""Bytes of each collective that a rank is expected to exchange in a step, computed from what is sharded.

Flags, norms and counts are left out. `tests/planner/test_communication_volume.py` compares it with the simulated
step.
"""

from __future__ import annotations

from strategies.base import DdpConfig, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.communication_counters import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from strategies.mesh import replica_count
from strategies.parameters import named_parameters
from strategies.runtime import Runtime
from trainer.step import Built


def expected_bytes(
    built: Built, strategy: StrategyConfig, precision: Precision, runtime: Runtime, micro_batches: int
) -> dict[str, float] | None:
    """Bytes by collective: of the whole that is gathered or reduced; None if they are not known.

    They are not known for bases that are stored packed, and for ZeRO-3: how often that gathers follows from what it has
    seen on the way.
    """
    if built.quantised or (isinstance(strategy, ZeroConfig) and strategy.stage == 3):
        return None
    if runtime.world_size == 1:
        return {}
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
    """`expected_bytes` under FSDP2 and HSDP."""
    module = built.step_module
    parameters = {id(parameter): parameter for _, parameter in named_parameters(module)}
    trained_elements = sum(p.numel() for p in parameters.values() if p.requires_grad)
    gathered_elements = sum(p.numel() for p in parameters.values())
    if strategy.reshard_after_forward:  # blocks are gathered again in the backward pass
        for unit in module.shard_units():
            gathered_elements += sum(p.numel() for p in unit.parameters() if id(p) in parameters)
    defers = module.plan.defer_sync
    if defers is None:
        defers = strategy.defer_sync is not False
    reductions = 1 if defers else micro_batches
    bytes_by_collective: dict[str, float] = {
        ALL_GATHER: gathered_itemsize * gathered_elements * micro_batches,
        REDUCE_SCATTER: 4 * trained_elements * reductions,
    }
    copies = replica_count(strategy, runtime.world_size, runtime.hosts)
    if copies > 1:
        bytes_by_collective[ALL_REDUCE] = 4 * trained_elements * copies / runtime.world_size
    return bytes_by_collective
