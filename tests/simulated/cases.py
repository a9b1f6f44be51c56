"""A step of a tiny model, simulated or real, and what of it can be compared."""

from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.runtime import SIMULATED, Runtime
from strategies.simulation import simulated_rank
from tests.helpers import building
from tests.helpers.building import run_config
from tests.helpers.covering import chosen, values
from trainer.config.run import RunConfig
from trainer.planning.simulate import ShapesOnly, Simulated, simulate, watch
from trainer.simulation import parts_of

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
NATIVE = STRATEGIES[:4]
CHECKPOINTING = ("none", "selective", "full")
LENGTHS = [40, 24]
"""Tokens of the documents of a micro-batch."""


@dataclass(frozen=True)
class Case:
    strategy: str
    tuning: str = "full"
    precision: str = "fp32"
    checkpointing: str = "none"
    offload: bool = False
    accumulation: int = 1

    def strategy_config(self) -> StrategyConfig:
        config = replace(
            building.STRATEGIES[self.strategy], activation_checkpointing=ActivationCheckpointing(self.checkpointing)
        )
        if self.offload and isinstance(config, Fsdp2Config):
            config = replace(config, cpu_offload=True)
        if self.offload and isinstance(config, ZeroConfig):
            config = replace(config, offload_optimizer="cpu")
        return config

    def config(self, model: Path, world: int) -> RunConfig:
        batch = {"global": 2 * self.accumulation * world, "micro": 2}
        return run_config(
            model, self.strategy_config(), self.tuning, micro=2, precision=Precision(self.precision), batch=batch
        )


def simulated(
    case: Case, model: Path, world: int, rank: int = 0, device: torch.device = SIMULATED, local: int = 8
) -> Simulated:
    """The case as rank `rank` of `world` on `device`: the simulated GPU, or a CPU as it is."""
    with simulated_rank(rank, world, local_world_size=local, device=device) as runtime:
        return simulate(parts_of(case.config(model, world), LENGTHS, runtime), runtime)


def real_alone(case: Case, model: Path, world: int, rank: int = 0) -> Simulated:
    """The case on real tensors of this CPU, as rank `rank` of `world`; only the exchange is made up."""
    with simulated_rank(rank, world, device=torch.device("cpu")) as runtime:
        return watch(parts_of(case.config(model, world), LENGTHS, runtime), runtime)


class Zeros(ShapesOnly):
    """Values with which every step is finite."""

    def run(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, dtype=torch.bfloat16)


def real(case: Case, model: Path, runtime: Runtime) -> Simulated:
    """The case on this rank's CPU. All ranks must call."""
    parts = parts_of(case.config(model, runtime.world_size), LENGTHS, runtime, source=Zeros())
    return watch(parts, runtime, warm=2, repeat=4)


def comparable(found: Simulated) -> dict:
    """Everything that a simulation of a CPU and the CPU itself have in common, as JSON values."""
    return {
        "moments": {
            str(moment): [h.total, {str(k): v for k, v in h.kinds.items()}] for moment, h in found.moments.items()
        },
        "resting": {str(kind): size for kind, size in found.resting.items()},
        "collectives": [[c.name, list(c.ranks), c.dtype, c.bytes, str(c.moment)] for c in found.collectives],
        "host_reads": sum(found.host_reads.values()),
        "flops": found.flops,
    }


def matrix() -> list[tuple[Case, int]]:
    """Every (case, number of ranks) that is simulated as on GPUs."""
    return [
        (Case(strategy, tuning, precision, checkpointing, offload, accumulation), world)
        for strategy in STRATEGIES
        for tuning in ("full", "lora")
        for precision in ("bf16", "fp16", "fp32")
        for checkpointing in CHECKPOINTING
        for offload in (False, True)
        if not offload or strategy not in ("single", "ddp")
        for accumulation in (1, 4)
        for world in ((1,) if strategy == "single" else (8, 64, 512))
    ]


def chosen_cases() -> list[tuple[Case, int]]:
    """Those of them that `make test` takes: every value, and every strategy with and without adapters."""
    return chosen(matrix(), lambda one: {*values((*astuple(one[0]), one[1])), (one[0].strategy, one[0].tuning)})
