"""Optimizers and parameter groups under every strategy: part of the parity job (`job.py`)."""

from importlib.util import find_spec
from typing import Any

import torch

from strategies.base import Fsdp2Config
from tests.helpers.building import STRATEGIES, alone, model_dir, run_config, trainer_for
from tests.parity.base import Curve, Job
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
from trainer.optim.support import OPTIMIZER_SUPPORT

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
INSTALLED = {
    n: o
    for n, o in OPTIMIZERS.items()
    if not OPTIMIZER_SUPPORT[o.name].package or find_spec(OPTIMIZER_SUPPORT[o.name].package)
}
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
    return [name for name in NAMES if name not in OPTIMIZER_SUPPORT[optim.name].refusal_by_strategy]


def _config(job: Job, strategy: Any, tuning: str, name: str, *, micro: int = 4, steps: int = STEPS):
    model = job.first_here(lambda: model_dir(job.root))
    optim = (INSTALLED | GROUPED)[name]
    return run_config(model, strategy, tuning, micro=micro, steps=steps, optim=optim)


def lone(job: Job, name: str, tuning: str) -> Curve:
    """Five clipped steps of one process."""
    config = _config(job, "single", tuning, name)
    return job.oracle(("optimizers", name, tuning), lambda: job.lone(config, STEPS), elsewhere=[])


def curve(job: Job, name: str, strategy: str, tuning: str) -> Curve:
    """The same under a strategy."""
    return job.curve(_config(job, strategy, tuning, name), STEPS)


def resuming(job: Job, name: str, strategy: str) -> dict:
    """Two steps after a saved state: by the run that saved it, by a fresh one, and under another strategy."""
    config = _config(job, strategy, "full", name, steps=4)
    other = "ddp" if strategy != "ddp" else runs(config.optim)[-1]
    return job.resumed(config, STRATEGIES[other], before=2, steps=2, look=True)


def averaging(job: Job, strategy: str) -> dict[str, list[float]]:
    """Schedule-free: evaluating and exporting between steps leaves no trace, and sees the average.

    `averaged` is the loss of rank 0's documents at the exported weights, `trained` at those of the next step.
    """
    runtime = alone(job.runtime) if strategy == "single" else job.runtime
    chosen = KEPT if strategy.endswith("kept gathered") else strategy
    config = _config(job, chosen, "full", "schedule_free", steps=4)
    looked_at = trainer_for(config, job.data, runtime)
    batch = looked_at.loader.collator([job.data.train.sample(n) for n in range(4)])  # the same on every rank
    rows: dict[str, list[float]] = {"looked at": [], "averaged": [], "trained": []}
    for number in range(4):
        for step in looked_at.loader.steps(16 * number, 1):
            record = looked_at.train_step(step)
            rows["looked at"].append(float(record.result.grad_norm))
        with looked_at.engine.inference() as module:
            rows["averaged"].append(float(module(batch)["loss"]))
        list(looked_at.engine.gather_full_parameters(trainable_only=True))
        if strategy != "single":
            with torch.no_grad():
                rows["trained"].append(float(looked_at.engine.forward(batch, last=True)["loss"]))
    plain = trainer_for(config, job.data, runtime)
    rows["plain"] = [float(plain.train_step(s).result.grad_norm) for s in plain.loader.steps(0, 4)]
    return rows
