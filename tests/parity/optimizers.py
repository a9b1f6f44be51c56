"""Optimizers and parameter groups under every strategy, in one two-rank process group.

`python -m tests.parity.optimizers <dir> [check ...]`; the assertions stand in test_optimizers.py.
"""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from strategies import runtime as processes
from strategies.base import Fsdp2Config
from tests.helpers.building import STRATEGIES, alone, data_set, model_dir, run_config, take_steps, trainer_for
from tests.parity.features import Job
from trainer.optim.config import (
    AdafactorConfig,
    Adamw8bitConfig,
    AdamwConfig,
    GroupRule,
    LionConfig,
    MuonConfig,
    OptimConfig,
    ScheduleFreeConfig,
    SgdConfig,
)
from trainer.optim.support import SUPPORT

KEPT = Fsdp2Config(reshard_after_forward=False)
COMMON = {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5}
OPTIMIZERS: dict[str, OptimConfig] = {
    "adamw": AdamwConfig(**COMMON),
    "lion": LionConfig(**COMMON),
    "sgd": SgdConfig(**COMMON | {"lr": 0.05}),
    "sgd without momentum": SgdConfig(**COMMON | {"lr": 0.05}, momentum=0.0),
    "muon": MuonConfig(**COMMON),
    "adafactor": AdafactorConfig(**COMMON | {"lr": 0.05}),  # relative to the weights
    "schedule_free": ScheduleFreeConfig(**COMMON),
    "adamw_8bit": Adamw8bitConfig(**COMMON, min_8bit_elements=1024),
}
INSTALLED = {n: o for n, o in OPTIMIZERS.items() if not SUPPORT[o.name].package or find_spec(SUPPORT[o.name].package)}
STEPS = 5
NAMES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
GROUPED = {
    "layer_decay": AdamwConfig(**COMMON, layer_decay=0.7),
    "groups": AdamwConfig(
        **COMMON,
        groups={
            "head": GroupRule(match="lm_head", lr_factor=10, weight_decay=0.0),
            "norms": GroupRule(match="norm", weight_decay=0.2),
        },
    ),
    "both, lion": LionConfig(
        **COMMON, layer_decay=0.9, groups={"first": GroupRule(match=r"layers\.0\.", lr_factor=0.5)}
    ),
    "both, muon": MuonConfig(**COMMON, layer_decay=0.9, groups={"q": GroupRule(match="q_proj", lr_factor=0.5)}),
}


def runs(optim: OptimConfig) -> list[str]:
    """The strategies that run it."""
    return [name for name in NAMES if name not in SUPPORT[optim.name].refused]


class OptimizerJob(Job):
    """The lone process as the oracle of every optimizer."""

    def _parity(self, cases: dict[str, OptimConfig], tunings: tuple[str, ...]) -> dict:
        found = {}
        for name, optim in cases.items():
            for tuning in tunings:
                base = run_config(model_dir(self.root), "single", tuning, micro=4, steps=STEPS, optim=optim)
                expected = self.oracle(base, steps=STEPS)
                for strategy in runs(optim):
                    config = replace(base, strategy=STRATEGIES[strategy])
                    found[f"{name} {strategy} {tuning}"] = {
                        "found": self.curve(config, steps=STEPS),
                        "expected": expected,
                    }
        return found

    def optimizers(self) -> dict:
        """Five clipped steps each."""
        return self._parity(INSTALLED, ("full", "lora"))

    def groups(self) -> dict:
        """The same with groups of their own rates."""
        return self._parity(GROUPED, ("full",))

    def resuming(self) -> dict:
        """Three steps after a saved state: by the run that saved it, by a fresh one, and under another strategy."""
        found = {}
        for name, optim in INSTALLED.items():
            for strategy in runs(optim):
                config = run_config(model_dir(self.root), strategy, "full", micro=2, steps=6, optim=optim)
                first = trainer_for(config, self.data, self.runtime)
                take_steps(first, 3)
                path = self._saved(first)
                other = "ddp" if strategy != "ddp" else runs(optim)[-1]
                found[f"{name} {strategy}"] = {
                    "uninterrupted": take_steps(first, 3),
                    "resumed": self._continue(config, path),
                    "elsewhere": self._continue(replace(config, strategy=STRATEGIES[other]), path),
                }
        return found

    def averaging(self) -> dict:
        """Schedule-free: evaluating and exporting between steps leaves no trace, and sees the average.

        `averaged` is the loss of rank 0's documents at the exported weights, `trained` at those of the next step.
        """
        found = {}
        if "schedule_free" not in INSTALLED:
            return found
        for strategy in ("single", "ddp", "fsdp2", "fsdp2, kept gathered"):
            runtime = alone(self.runtime) if strategy == "single" else self.runtime
            optim = INSTALLED["schedule_free"]
            chosen = KEPT if strategy.endswith("kept gathered") else strategy
            config = run_config(model_dir(self.root), chosen, "full", micro=4, steps=4, optim=optim)
            looked_at = trainer_for(config, self.data, runtime)
            batch = self._some_documents(looked_at)
            rows = {"looked at": [], "averaged": [], "trained": []}
            for number in range(4):
                for step in looked_at.loader.steps(16 * number, 1):
                    record = looked_at.train_step(step)
                    rows["looked at"].append(float(record.result.grad_norm))
                with looked_at.engine.inference() as module:
                    rows["averaged"].append(float(module(batch)["loss"]))
                list(looked_at.engine.gather(trainable_only=True))
                if strategy != "single":
                    with torch.no_grad():
                        rows["trained"].append(float(looked_at.engine.forward(batch, last=True)["loss"]))
            plain = trainer_for(config, self.data, runtime)
            rows["plain"] = [float(plain.train_step(s).result.grad_norm) for s in plain.loader.steps(0, 4)]
            found[strategy] = rows
        return found

    def _some_documents(self, trainer) -> dict:
        """The same documents on every rank and under every strategy."""
        return trainer.loader.collator([self.data.train.sample(n) for n in range(4)])


CHECKS = ("optimizers", "groups", "resuming", "averaging")

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    wanted = sys.argv[2:] or CHECKS
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        model_dir(directory)
        data_set(directory, uneven=True)
    processes.barrier(here)
    job = OptimizerJob(directory, here)
    result = {check: getattr(job, check)() for check in wanted}
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
