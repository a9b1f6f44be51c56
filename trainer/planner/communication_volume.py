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
    """Bytes by collective: of the whole that is gathered or reduced; None where it is not known.

    It is not for bases that are stored packed, and for ZeRO-3: how often that gathers follows from what it has seen on the way.
    """
    if built.quantised or (isinstance(strategy, ZeroConfig) and strategy.stage == 3):
        return None
    if runtime.world_size == 1:
        return {}
    module = built.step_module
    sizes = {id(p): (p.numel(), p.requires_grad) for _, p in named_parameters(module)}
    whole, trained = sum(n for n, _ in sizes.values()), sum(n for n, trains in sizes.values() if trains)
    short = 4 if precision is Precision.fp32 else 2
    if isinstance(strategy, ZeroConfig):
        reduced = trained * (2 if precision is Precision.fp16 else 4)
        return {ALL_REDUCE: reduced * (micro_batches if strategy.stage == 2 else 1), ALL_GATHER: short * trained}
    if isinstance(strategy, Fsdp2Config):
        blocks = sum(p.numel() for unit in module.shard_units() for p in unit.parameters() if id(p) in sizes)
        gathered = whole + (blocks if strategy.reshard_after_forward else 0)
        planned = module.plan.defer_sync
        deferred = strategy.defer_sync is not False if planned is None else planned
        found = {
            ALL_GATHER: short * gathered * micro_batches,
            REDUCE_SCATTER: 4 * trained * (1 if deferred else micro_batches),
        }
        copies = replica_count(strategy, runtime.world_size, runtime.hosts)
        return found | ({ALL_REDUCE: 4 * trained * copies / runtime.world_size} if copies > 1 else {})
    if isinstance(strategy, DdpConfig):
        return {ALL_REDUCE: 4 * trained * (micro_batches if strategy.defer_sync is False else 1)}
    return {}
