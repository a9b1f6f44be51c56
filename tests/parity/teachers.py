"""Objectives that look ahead or compare with a teacher, under every strategy: part of the job of `features.py`."""

from dataclasses import replace
from pathlib import Path

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyName, ZeroConfig
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    alone,
    data_set,
    model_dir,
    rated_set,
    replay_set,
    run_config,
    trainer_for,
)
from trainer.heads.divergence import Divergence
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
    }[name]()


CASES = [
    *(("kto", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *(("distil", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *(("replay", tuning, "llama", strategy) for tuning in ("lora", "full") for strategy in EVERYWHERE),
    *((name, "full", "llama", strategy) for name in ("reverse", "jensen", "held") for strategy in SHARDED),
    *(("held", tuning, "llama", strategy) for tuning in ("lora", "lora with head") for strategy in SHARDED),
    *((name, "full", "llama_tied", strategy) for name in ("distil", "replay") for strategy in SHARDED),
    *(("distil", "full", "llama", strategy) for strategy in SPECIAL),
    *(("held", "lora", "llama", strategy) for strategy in SPECIAL),
    ("kto", "lora", "llama", "checkpointed"),
    ("distil", "lora", "gemma2", "fsdp2"),
    ("kto", "lora", "gemma2", "zero3"),
]
NAMES = [" ".join(case) for case in CASES]


def compare(root: Path, runtime: processes.Runtime) -> dict:
    """Curves of all ranks beside those of `single`, which takes each step in one micro-batch."""
    found, oracles = {}, {}
    for name, (objective, tuning, architecture, strategy) in zip(NAMES, CASES, strict=True):
        config = run_config(
            model_dir(root, architecture),
            {**STRATEGIES, **SPECIAL}[strategy],
            tuning if tuning not in LOCAL_TUNINGS else "lora",
            micro=2,
            steps=STEPS,
            objective=objective_of(objective, root),
        )
        config.tuning = LOCAL_TUNINGS.get(tuning, config.tuning)
        oracle = objective, tuning, architecture
        if oracle not in oracles:
            batch = {"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH}
            whole = replace(config, strategy=STRATEGIES["single"], batch=batch)
            oracles[oracle] = curve(whole, objective, root, alone(runtime))
        found[name] = {"found": curve(config, objective, root, runtime), "expected": oracles[oracle]}
    return found


def curve(config, objective: str, root: Path, runtime: processes.Runtime) -> list[list[float]]:
    """Loss, gradient norm and the objective's metrics of each step. All ranks must call, or one that is alone."""
    sets = {"kto": rated_set, "replay": replay_set, "held": replay_set}
    data = sets[objective](root) if objective in sets else data_set(root, uneven=True)
    trainer = trainer_for(config, data, runtime)
    names = ("loss", *trainer.engine.step_module.objective.metrics)
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        sums = [record.local_sums[name].double() for name in names]
        if runtime.world_size > 1:
            sums = [processes.dist_sum(value) for value in sums]
        loss, *others = (float(value) / record.counts["loss"] for value in sums)
        rows.append([loss, float(record.result.grad_norm), *others])
    return rows
