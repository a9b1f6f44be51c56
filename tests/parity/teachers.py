"""Objectives that look ahead or compare with a teacher, under every strategy: part of the parity job (`job.py`)."""

from functools import partial
from pathlib import Path

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyName, ZeroConfig
from tests.helpers.building import (
    STRATEGIES,
    data_set,
    model_dir,
    rated_set,
    replay_set,
    run_config,
)
from tests.parity.base import Curve, Job
from tests.parity.methods import FEWER
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.loop import Trainer
from trainer.losses.divergence import Divergence
from trainer.objectives.base import TeacherConfig
from trainer.objectives.distillation import DistillationConfig
from trainer.objectives.kto import KtoConfig
from trainer.objectives.sft import ForgettingConfig, SftConfig
from trainer.tuning.base import LoraConfig

STEPS = 5
EVERYWHERE = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")
SPECIAL = {
    "checkpointed": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full),
    "nothing kept": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0),
}
LOCAL_TUNINGS = {"lora with head": LoraConfig(rank=4, modules_to_save=["lm_head"])}


def distillation(root: Path, **settings) -> DistillationConfig:
    """From a model of another architecture and the same vocabulary."""
    return DistillationConfig(teacher=TeacherConfig(path=str(model_dir(root, "qwen3"))), **settings)


def objective_of(name: str, root: Path):
    """The settings behind the first word of a case."""
    return {
        "kto": lambda: KtoConfig(beta=0.5, desirable_weight=0.7, undesirable_weight=1.3),
        "distil": lambda: distillation(root, temperature=2.0, sft_weight=0.3),
        "reverse": lambda: distillation(root, divergence=Divergence.reverse_kl),
        "jensen": lambda: distillation(root, divergence=Divergence.jensen_shannon, interpolation=0.3),
        "replay": lambda: SftConfig(forgetting=ForgettingConfig(kl_weight=0.7)),
        "held": lambda: SftConfig(forgetting=ForgettingConfig(kl_weight=2.0, replay_loss=False)),
    }[name.removeprefix("weighed_")]()


CASES = [
    *(("kto", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *(("distil", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *(("replay", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *((name, "full", "llama", strategy) for name in ("reverse", "jensen", "held") for strategy in SHARDED),
    *((f"weighed_{name}", "full", "llama", strategy) for name in ("distil", "replay", "held") for strategy in SHARDED),
    *(("held", tuning, "llama", strategy) for tuning in ("lora", "lora with head") for strategy in SHARDED),
    *((name, "full", "llama_tied", strategy) for name in ("distil", "replay") for strategy in SHARDED),
    *(("distil", "full", "llama", strategy) for strategy in SPECIAL),
    *(("held", "lora", "llama", strategy) for strategy in SPECIAL),
    ("kto", "lora", "llama", "checkpointed"),
    ("distil", "lora", "gemma2", "fsdp2"),
    ("kto", "lora", "gemma2", "zero3"),
]
NAMES = [" ".join(case) for case in CASES]


def compare(job: Job, name: str) -> dict[str, Curve]:
    """The curve of all ranks, and that of `single`, which takes each step in one micro-batch."""
    config, data = _asked(job, name)
    found = curve(job.trainer(config, data), job.runtime.world_size, FEWER)
    return {"found": found, "expected": lone(job, name)[:FEWER]}


def lone(job: Job, name: str) -> Curve:
    """The curve of `single` alone."""
    config, data = _asked(job, name)
    key = "teachers", *CASES[NAMES.index(name)][:3]
    return job.oracle(key, lambda: curve(job.lone_trainer(config, data), 1, STEPS), elsewhere=[])


def _asked(job: Job, name: str) -> tuple[RunConfig, PreparedData]:
    objective, tuning, architecture, strategy = CASES[NAMES.index(name)]

    def made():
        model_dir(job.root, "qwen3")
        name, weighted = objective.removeprefix("weighed_"), {"weighted": True} if "weighed" in objective else {}
        sets = {"kto": rated_set, "replay": replay_set, "held": replay_set}
        make = sets.get(name, partial(data_set, uneven=True))
        data = make(job.root, **weighted)
        return model_dir(job.root, architecture), data

    model, data = job.first_here(made)
    config = run_config(
        model,
        {**STRATEGIES, **SPECIAL}[strategy],
        tuning if tuning not in LOCAL_TUNINGS else "lora",
        micro=2,
        steps=STEPS,
        objective=objective_of(objective, job.root),
    )
    config.tuning = LOCAL_TUNINGS.get(tuning, config.tuning)
    return config, data


def curve(trainer: Trainer, world: int, steps: int) -> Curve:
    """Loss, gradient norm and the objective's metrics of these first steps. All `world` ranks must call, or one that is alone."""
    names = ("loss", *trainer.engine.step_module.objective.metrics)
    rows = []
    for batch in trainer.loader.steps(0, steps):
        record = trainer.train_step(batch)
        sums = [record.local_sums[name].double() for name in names]
        if world > 1:
            sums = [processes.sum_over_ranks(value) for value in sums]
        loss, *others = (float(value) / record.counts["loss"] for value in sums)
        rows.append([loss, float(record.result.grad_norm), *others])
    return rows
