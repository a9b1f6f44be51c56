"""A training state that one strategy and number of ranks saved, gone on with by every other: part of the parity job."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from strategies.base import Precision, StrategyName
from tests.helpers.building import model_dir, run_config, take_steps
from tests.parity import experts
from tests.parity.base import Curve, Job, lone_steps
from tests.parity.methods import released_at_once
from tests.parity.optimizers import OPTIMIZERS
from trainer.config.run import RunConfig
from trainer.loop import Trainer
from trainer.optim.support import OPTIMIZER_SUPPORT

SIDES = {
    "single": ("single", 1),
    "ddp of 2": ("ddp", 2),
    "fsdp2 of 2": ("fsdp2", 2),
    "zero1 of 2": ("zero1", 2),
    "zero2 of 2": ("zero2", 2),
    "zero3 of 2": ("zero3", 2),
    "fsdp2 of 4": ("fsdp2", 4),
    "hsdp of 4": ("hsdp", 4),
}
"""Strategy and number of ranks of each side; hsdp has two replicas of two shards."""
OTHERS = ("lora", "moe", "moe lora", "lion", "adafactor", "schedule_free", "adamw_8bit", "muon", "bf16")
"""What is trained otherwise than in full, by AdamW, in fp32."""
BEFORE, STEPS = 3, 3
"""Steps before the state is saved, and those that are compared after it."""


def legal(what: str, side: str) -> bool:
    """Whether a strategy runs an optimizer."""
    return (
        what not in OPTIMIZERS
        or StrategyName(SIDES[side][0]) not in OPTIMIZER_SUPPORT[OPTIMIZERS[what].name].refusal_by_strategy
    )


def seed(job: Job) -> int:
    """Of a mixture of experts whose routers never waver."""
    return experts.decided(job, "mixtral", "full", "none")[0]


def save(job: Job, what: str, side: str, seed: int) -> dict[str, Any]:
    """Where a state lies that was saved after some steps, and the next steps of the trainer that saved it."""
    config = _config(job, what, side, seed)
    if _elsewhere(job, side):
        return {}
    with released_at_once():
        trainer = _trainer(job, config, side)
        _steps(trainer, side, BEFORE)
        path = job.saved(trainer) if SIDES[side][1] > 1 else Path(tempfile.mkdtemp(dir=job.root))
        if SIDES[side][1] == 1:
            trainer.engine.state(trainer.progress).save(path)
        return {"path": str(path), "curve": _steps(trainer, side, STEPS)}


def go_on(job: Job, what: str, side: str, seed: int, path: str) -> Curve:
    """The same steps of a fresh trainer that loaded it."""
    config = _config(job, what, side, seed)
    if _elsewhere(job, side):
        return []
    with released_at_once():
        trainer = _trainer(job, config, side)
        trainer.progress = trainer.engine.load(Path(path))
        return _steps(trainer, side, STEPS)


def _elsewhere(job: Job, side: str) -> bool:
    """Whether this rank has no part in it: `single` is rank 0 alone."""
    return SIDES[side][1] == 1 and not job.runtime.is_main


def _config(job: Job, what: str, side: str, seed: int) -> RunConfig:
    world = SIDES[side][1]
    if what.startswith("moe"):
        model = experts.made_of(job, "mixtral", seed)
    else:
        model = job.first_here(lambda: model_dir(job.root))
    tuning = "lora" if "lora" in what else "full"
    config = run_config(model, SIDES[side][0], tuning, micro=8 // max(world, 2), steps=BEFORE + STEPS)
    if what in OPTIMIZERS:
        config = replace(config, optim=OPTIMIZERS[what])
    return replace(config, precision=Precision.bf16) if what == "bf16" else config


def _trainer(job: Job, config: RunConfig, side: str) -> Trainer:
    return job.trainer(config) if SIDES[side][1] > 1 else job.lone_trainer(config)


def _steps(trainer: Trainer, side: str, num: int) -> Curve:
    """Loss and grad norm of some steps."""
    return [list(row) for row in (take_steps if SIDES[side][1] > 1 else lone_steps)(trainer, num)]
