"""Which combinations the parity tests of the tuning methods run: a covering choice, or every legal one.

Each run is compared with `single` under the same optimizer and rows, so one run proves a strategy, a feature and an
optimizer for its method at once. The choice (`tests/helpers/covering.py`): every kind of strategy meets every feature, every
optimizer torch's engines and DeepSpeed's, and every method meets strategies that gather parameters and strategies that keep
them whole, and blocks that are computed a second time. With SHARDTUNE_TEST_ALL=1 every method meets every strategy with
every feature and with every optimizer.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyName, ZeroConfig
from tests.helpers.building import STRATEGIES
from tests.helpers.covering import EVERYTHING, SEED, cover, takes
from tests.helpers.methods import CASES as PARTIAL
from tests.parity.optimizers import INSTALLED
from trainer.config.combinations import (
    CombinationState,
    CombinationVerdict,
    combination_verdict,
    method_name_of,
    methods_by_name,
)
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.data.config import Layout
from trainer.model.config import Quantisation
from trainer.tuning.base import FullConfig, TuningConfig

CASES: dict[str, TuningConfig] = {"full": FullConfig(), **PARTIAL}
# ZeRO-3 gives every weight back as soon as it was used: a tiny model would stay gathered, and hide what reaches for it.
SHARDING = {
    **{name: strategy for name, strategy in STRATEGIES.items() if name != "single"},
    "hsdp": Fsdp2Config(name=StrategyName.hsdp, replicate=2),
    "zero3": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0),
}
EXACT = ("plain", "checkpointing", "selective", "packing", "padded", "sequence")
"""Features that change nothing, within 1e-5."""
APART = ("bf16", "quantised", "experts", "compile")
"""Features with runs of their own: one rounds, two have another base, and one takes long to trace."""
OTHERWISE = ("packing", "quantised", "experts")
"""Features that one process takes other steps with."""
MIXTURE_TARGETS = {"ia3": ["k_proj", "v_proj"], "ln": ["post_attention_layernorm"]}
"""What these cases adapt of a mixture, for which peft knows no modules."""
COMPILED_ALWAYS = ("full",)
"""Cases that the covering choice runs compiled: tracing takes most of a minute. All that may be are with SHARDTUNE_TEST_ALL."""
OPTIMIZERS = [name for name in INSTALLED if name != "sgd without momentum"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run on two ranks."""

    case: str
    strategy: str
    feature: str = "plain"
    optim: str = "adamw"

    @property
    def key(self) -> str:
        return f"{self.case}, {self.strategy}, {self.feature}, {self.optim}"

    @property
    def oracle(self) -> str:
        """What the lone run has in common with it."""
        return f"{self.case}, {self.feature if self.feature in OTHERWISE else 'documents'}, {self.optim}"

    @property
    def row(self) -> str:
        return method_name_of(CASES[self.case])

    @property
    def legal(self) -> bool:
        """Whether the table says tested, and two ranks can show it: under hsdp each of them is a replica that deals nothing."""
        deals_nothing = self.feature == "experts" and self.strategy == "hsdp"
        return self.verdict.state is CombinationState.tested and not deals_nothing

    @property
    def verdict(self) -> CombinationVerdict:
        return combination_verdict(self.row, StrategyName(self.strategy), self.feature, INSTALLED[self.optim].name)

    def config(self, base: RunConfig) -> RunConfig:
        """The settings of the run out of those of a plain one."""
        strategy = SHARDING.get(self.strategy, base.strategy)
        if self.feature in ("checkpointing", "selective"):
            kept = (
                ActivationCheckpointing.full if self.feature == "checkpointing" else ActivationCheckpointing.selective
            )
            strategy = replace(strategy, activation_checkpointing=kept)
        if self.feature == "compile":
            strategy = replace(strategy, compile=True)
        quantisation = Quantisation.nf4 if self.feature == "quantised" else Quantisation.none
        precision = Precision(self.feature) if self.feature in ("bf16", "fp16") else Precision.fp32
        layout = Layout(self.feature) if self.feature in ("padded", "padding_free") else Layout.auto
        tuning: Any = CASES[self.case]
        if self.feature == "experts" and self.case in MIXTURE_TARGETS:
            tuning = replace(tuning, targets=MIXTURE_TARGETS[self.case])
        data = replace(base.data, packing=self.feature == "packing", max_length=64, layout=layout)
        return replace(
            base,
            parallel=ParallelConfig(
                sequence=2 if self.feature == "sequence" else 1,
                experts=2 if self.feature == "experts" and self.strategy != "single" else 1,
            ),
            model=replace(base.model, quantisation=quantisation),
            tuning=tuning,
            strategy=strategy,
            precision=precision,
            data=data,
            optim=INSTALLED[self.optim],
        )


TRAPS = [
    Run("bottleneck", "zero3", "selective"),
    Run("prefix", "zero3", "selective"),
    Run("prefix", "zero3", "checkpointing"),
]
"""Always run: biases, and keys from outside, where blocks are computed a second time."""


@cache
def main_cases() -> dict[str, str]:
    """The first case of each row, by row."""
    found: dict[str, str] = {}
    for case, config in CASES.items():
        found.setdefault(method_name_of(config), case)
    return found


GATHERING = ("fsdp2", "hsdp", "zero3")
"""Strategies under which a parameter is whole only in the forward pass of its own module."""


def engine_of(run: Run) -> str:
    """Whose optimizer step it takes."""
    return "deepspeed" if run.strategy.startswith("zero") else "torch"


def kind_of(run: Run) -> str:
    """What a feature can meet: parameters kept whole, or gathered by block, of torch or of DeepSpeed."""
    return f"{engine_of(run)}, {'gathered' if run.strategy in GATHERING else 'whole'}"


def marks(run: Run) -> set[Hashable]:
    """What one run proves, for the covering choice."""
    if run.feature == "compile":
        return {("compile", run.case)}
    if run.feature == "experts":  # its model has few layers that a method adapts
        return {("feature", kind_of(run), run.feature)}
    found: set[Hashable] = {("strategy", run.strategy), ("feature", kind_of(run), run.feature), ("case", run.case)}
    found |= {("optim", engine_of(run), run.optim)}
    if run.strategy in ("fsdp2", "zero3"):
        found |= {("sharded", run.case)}
    if run.case in main_cases().values():
        found |= {("gathered" if run.strategy in GATHERING else "whole", run.case)}
        found |= {("computed again", run.case)} if run.feature in ("checkpointing", "selective") else set()
    return found


def cost(run: Run) -> float:
    """What it takes on two ranks, and a lone run that no other is compared with; blocks are computed again, or traced."""
    alone = 0.4 * (run.feature in OTHERWISE or run.optim != "adamw")
    again = {"checkpointing": 1.2, "selective": 1.4, "compile": 12.0}.get(run.feature, 1.0)
    return takes([run.strategy]) * again + alone


@cache
def covering() -> list[Run]:
    """The choice of `make test`, and the traps."""
    tried = [case for case in CASES if case in main_cases().values()]
    runs = [
        Run(case, strategy, feature, optim)
        for case in CASES
        for strategy in SHARDING
        for feature in ((*EXACT, *APART) if case in tried else ("plain",))
        for optim in (OPTIMIZERS if feature in EXACT and case in tried else ["adamw"])
    ]
    able = [run for run in runs if run.legal and (run.feature != "compile" or run.case in COMPILED_ALWAYS)]
    return [*cover(able, marks, seed=SEED, cost=cost, given=TRAPS), *TRAPS]


def everything() -> list[Run]:
    """Every legal pair: method and strategy with each feature, and with each optimizer; other settings plainly."""
    runs, mains = [], main_cases()
    for case in CASES:
        for strategy in SHARDING:
            runs.append(Run(case, strategy))
            if case in mains.values():
                runs += [Run(case, strategy, feature) for feature in (*EXACT[1:], *APART)]
                runs += [Run(case, strategy, "plain", optim) for optim in OPTIMIZERS if optim != "adamw"]
    return [run for run in runs if run.legal]


def plan() -> list[Run]:
    """What this session of tests runs."""
    return everything() if EVERYTHING else covering()


def missing(runs: list[Run], *, axes: tuple[str, ...]) -> list[str]:
    """Rows without a case, and what a method could have met along an axis (a field of `Run`) and has not."""
    gaps = [f"{row}: no case in tests/helpers/methods.py" for row in methods_by_name() if row not in main_cases()]
    for row, case in main_cases().items():
        met = [run for run in runs if run.case == case]
        for axis in axes:
            for name in {"strategy": SHARDING, "feature": (*EXACT, *APART), "optim": OPTIMIZERS}[axis]:
                legal = any(
                    Run(case, **{"strategy": strategy, axis: name}).legal
                    for strategy in ([name] if axis == "strategy" else SHARDING)
                )
                if legal and not any(getattr(run, axis) == name for run in met):
                    gaps.append(f"{row}: never meets {axis} {name}")
    return gaps
