"""A step of a tiny model, simulated or real, and what of it can be compared."""

from collections.abc import Hashable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig, ZeroConfig
from strategies.runtime import SIMULATED, Runtime
from strategies.simulation import simulated_rank
from tests.helpers import building
from tests.helpers.building import model_dir, run_config
from tests.helpers.covering import chosen, values
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.model.config import Quantisation
from trainer.planner.simulate import ShapesOnly, SimulatedStep, record_steps, simulate
from trainer.planner.simulation import build_step_parts

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
NATIVE = STRATEGIES[:4]
CHECKPOINTING = ("none", "selective", "full")
LENGTHS = [40, 24]
"""Tokens of the documents of a micro-batch."""
EXPERTS = 8
"""Of the mixture: fewer than most numbers of ranks here."""
TUNINGS = {
    "full": "full",
    "lora": "lora",
    "nf4": "lora",
    "int8": "lora",
    "experts": "full",
    "experts_lora": "lora",
}
"""What is simulated, and whether all of it trains or adapters do; the last two are a mixture of experts."""
WHOLE = ("single", "ddp", "zero1", "zero2")
"""Strategies that keep parameters whole."""


@dataclass(frozen=True)
class Case:
    strategy: str
    tuning: str = "full"
    precision: str = "fp32"
    checkpointing: str = "none"
    offload: bool = False
    accumulation: int = 1

    @property
    def mixture(self) -> bool:
        return self.tuning.startswith("experts")

    def model_in(self, place: Path) -> Path:
        """The tiny model that the case trains, under `place`; made once."""
        return model_dir(place, "qwen3_moe", num_experts=EXPERTS) if self.mixture else model_dir(place)

    def strategy_config(self, world: int) -> StrategyConfig:
        config = replace(
            building.STRATEGIES[self.strategy], activation_checkpointing=ActivationCheckpointing(self.checkpointing)
        )
        if self.mixture and self.strategy == "hsdp":  # no more shards than experts
            config = replace(config, replicate=max(2, world // EXPERTS))
        if self.offload and isinstance(config, Fsdp2Config):
            config = replace(config, cpu_offload=True)
        if self.offload and isinstance(config, ZeroConfig):
            config = replace(config, offload_optimizer="cpu")
        return config

    def config(self, model: Path, world: int) -> RunConfig:
        batch = {"global": 2 * self.accumulation * world, "micro": 2}
        tuning, precision = TUNINGS[self.tuning], Precision(self.precision)
        config = run_config(model, self.strategy_config(world), tuning, micro=2, precision=precision, batch=batch)
        if self.tuning in ("nf4", "int8"):
            config = replace(config, model=replace(config.model, quantisation=Quantisation(self.tuning)))
        if self.tuning == "experts_lora":
            config = replace(config, tuning=replace(config.tuning, experts=True, router=True))
        return config


@dataclass(frozen=True)
class LongRows(Case):
    """A case with what very long rows need."""

    mlp_tokens: int | None = 16
    on_host: bool = False

    def strategy_config(self, world: int) -> StrategyConfig:
        config = replace(
            Case.strategy_config(self, world), mlp_tokens=self.mlp_tokens, offload_activations=self.on_host
        )
        if isinstance(config, ZeroConfig) and config.stage == 3:
            config = replace(config, persistence_threshold=0)  # a tiny model would stay gathered
        return config


@dataclass(frozen=True)
class DealtExperts(Case):
    """A mixture whose experts are distributed over ranks."""

    experts: int = 2

    def config(self, model: Path, world: int) -> RunConfig:
        return replace(Case.config(self, model, world), parallel=ParallelConfig(experts=self.experts))


def simulated(
    case: Case,
    model: Path,
    world: int,
    rank: int = 0,
    device: torch.device = SIMULATED,
    repeat: int = 1,
    imbalance: float = 1.0,
) -> SimulatedStep:
    """The case as rank `rank` of `world` on `device`: the simulated GPU, or a CPU as it is."""
    with simulated_rank(rank, world, device=device, expert_imbalance=imbalance) as runtime:
        return simulate(build_step_parts(case.config(model, world), LENGTHS, runtime), runtime, num_repeats=repeat)


def real_alone(case: Case, model: Path, world: int, rank: int = 0) -> SimulatedStep:
    """The case on real tensors of this CPU, as rank `rank` of `world`; only the exchange is made up."""
    with simulated_rank(rank, world, device=torch.device("cpu")) as runtime:
        return record_steps(build_step_parts(case.config(model, world), LENGTHS, runtime), runtime)


class Zeros(ShapesOnly):
    """Values with which every step is finite."""

    def read_slice(self, name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start, dtype=torch.bfloat16)


def real(case: Case, model: Path, runtime: Runtime) -> SimulatedStep:
    """The case on this rank's CPU. All ranks must call."""
    parts = build_step_parts(case.config(model, runtime.world_size), LENGTHS, runtime, source=Zeros())
    return record_steps(parts, runtime, warmup_steps=2)  # DDP makes its buckets anew in the second step


def comparable(found: SimulatedStep) -> dict:
    """Everything that a simulation of a CPU and the CPU itself have in common, as JSON values."""
    return {
        "moments": {
            str(moment): [h.total_bytes, {str(k): v for k, v in h.bytes_by_kind.items()}]
            for moment, h in found.peak_by_phase.items()
        },
        "resting": {str(kind): size for kind, size in found.resting_bytes_by_kind.items()},
        "collectives": [[c.name, list(c.ranks), c.dtype, c.num_bytes, str(c.phase)] for c in found.collectives],
        "host_reads": sum(found.host_reads.values()),
        "flops": found.flops,
    }


def matrix() -> list[tuple[Case, int]]:
    """Every (case, number of ranks) that is simulated as on GPUs, with all experts of a layer on each rank.

    A mixture of experts computes in bf16: torch's grouped products of other types read on the host how long the groups are,
    unseen in a simulation. FSDP2 refuses to deal experts to more ranks than there are of them.
    """
    return [
        (Case(strategy, tuning, precision, checkpointing, offload, accumulation), world)
        for strategy in STRATEGIES
        for tuning in TUNINGS
        for precision in (("bf16",) if tuning.startswith("experts") else ("bf16", "fp16", "fp32"))
        for checkpointing in CHECKPOINTING
        for offload in (False, True)
        if not offload or strategy not in ("single", "ddp")
        for accumulation in (1, 3)
        for world in ((1,) if strategy == "single" else (8, 64, 512))
        if not (strategy == "fsdp2" and tuning.startswith("experts") and world > EXPERTS)
    ]


def marks(one: tuple[Case, int]) -> set[Hashable]:
    """What a case proves: its values; its strategy with all training and with adapters, with offload and without; its tuning
    and accumulation where parameters are kept whole or cut in one way or the other, and more ranks than experts there."""
    case, world = one
    kept = "whole" if case.strategy in WHOLE else "blocks" if case.strategy in NATIVE else "zero3"
    met = {(case.strategy, TUNINGS[case.tuning]), (case.strategy, case.offload), (kept, case.tuning)}
    met |= {(kept, case.accumulation), (kept, "more ranks than experts", case.mixture and world > EXPERTS)}
    return {*values((*astuple(case), world)), *met}


def cost(one: tuple[Case, int]) -> float:
    """What a case takes, roughly: ZeRO-3 cuts every gradient into a piece for each rank, one after the other."""
    case, world = one
    return case.accumulation * (world * 16 if case.strategy == "zero3" else world)


DEALT = [(DealtExperts("fsdp2", "experts", "bf16", "full", experts=degree), 8) for degree in (1, 8)]
"""Cases whose experts are distributed over ranks, of which the table of goldens has a row beside those of `chosen_cases`."""


def chosen_cases() -> list[tuple[Case, int]]:
    """Those of them that `make test` takes."""
    return chosen(matrix(), marks, cost)
