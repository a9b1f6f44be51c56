"""Which combinations the parity tests of the tuning methods run: a covering choice, or every legal one.

Each run is compared with `single` under the same optimizer and rows, so one run proves a strategy, a feature and an
optimizer for its method at once. The choice: each method meets each strategy, and on the way each feature and each optimizer
that it can, in turns, so that each feature and each optimizer meets each strategy too. With SHARDTUNE_TEST_ALL=1 every method
meets every strategy with every feature and with every optimizer.
"""

import os
from dataclasses import dataclass, replace

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyName, ZeroConfig
from tests.helpers.building import STRATEGIES
from tests.helpers.methods import CASES as PARTIAL
from tests.parity.optimizers import INSTALLED
from trainer.config.combinations import Cell, State, cell, row_of, rows
from trainer.config.run import RunConfig
from trainer.data.config import Layout
from trainer.model.quantisation import Quantisation
from trainer.tuning.base import FullConfig, TuningConfig

ALL = "SHARDTUNE_TEST_ALL"
CASES: dict[str, TuningConfig] = {"full": FullConfig(), **PARTIAL}
# ZeRO-3 gives every weight back as soon as it was used: a tiny model would stay gathered, and hide what reaches for it.
SHARDING = {
    **{name: strategy for name, strategy in STRATEGIES.items() if name != "single"},
    "hsdp": Fsdp2Config(name=StrategyName.hsdp, replicate=2),
    "zero3": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0),
}
EXACT = ("plain", "checkpointing", "selective", "packing", "padded")
"""Features that change nothing, within 1e-5."""
APART = ("bf16", "quantised", "compile")
"""Features with runs of their own: one rounds, one has another base, and one takes long to trace."""
OTHERWISE = ("packing", "quantised")
"""Features that one process takes other steps with."""
COMPILED_ALWAYS = ("full", "lora")
"""Cases that the covering choice runs compiled; all others that may be compiled are run with SHARDTUNE_TEST_ALL only."""
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
    def still(self) -> str:
        """What it has in common with a lone run that learns nothing."""
        return self.oracle.rpartition(", ")[0]

    @property
    def row(self) -> str:
        return row_of(CASES[self.case])

    @property
    def legal(self) -> bool:
        """Whether the table says tested."""
        return self.verdict.state is State.tested

    @property
    def verdict(self) -> Cell:
        return cell(self.row, StrategyName(self.strategy), self.feature, INSTALLED[self.optim].name)

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
        data = replace(base.data, packing=self.feature == "packing", max_length=64, layout=layout)
        return replace(
            base,
            model=replace(base.model, quantisation=quantisation),
            tuning=CASES[self.case],
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


def main_cases() -> dict[str, str]:
    """The first case of each row, by row."""
    found: dict[str, str] = {}
    for case, config in CASES.items():
        found.setdefault(row_of(config), case)
    return found


def covering() -> list[Run]:
    """Each method under each strategy, features and optimizers in turns; other settings of a method under two strategies."""
    runs, names, mains = [], list(SHARDING), main_cases()
    for number, case in enumerate(mains.values()):
        able = [s for s in names if Run(case, s).legal]
        for turn in range(len(names)):  # a method that few strategies run meets these again, with other features
            strategy = able[turn % len(able)]
            features = [f for f in EXACT if Run(case, strategy, f).legal]
            optims = [o for o in OPTIMIZERS if Run(case, strategy, "plain", o).legal]
            feature = features[(number + turn) % len(features)]
            # One optimizer more than there are features, so that pairs do not repeat from method to method.
            runs.append(Run(case, strategy, feature, optims[(number + 2 * turn) % len(optims)]))
        for turn, feature in enumerate(APART):
            able = [s for s in names if Run(case, s, feature).legal]
            able = [] if feature == "compile" and case not in COMPILED_ALWAYS else able
            runs += [Run(case, able[(number + turn) % len(able)], feature)] if able else []
    others = [case for case in CASES if case not in mains.values()]
    for number, case in enumerate(others):
        for strategy in dict.fromkeys([names[number % len(names)], ("fsdp2", "zero3")[number % 2]]):
            runs.append(Run(case, strategy))
    return list(dict.fromkeys([*runs, *TRAPS]))


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
    return everything() if os.environ.get(ALL) else covering()


def missing(runs: list[Run], *, axes: tuple[str, ...]) -> list[str]:
    """Rows without a case, and what a method could have met along an axis (a field of `Run`) and has not."""
    gaps = [f"{row}: no case in tests/helpers/methods.py" for row in rows() if row not in main_cases()]
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
