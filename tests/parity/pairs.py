"""Objectives over pairs of answers, under every strategy and in one process: part of the job of `features.py`."""

from dataclasses import replace
from pathlib import Path

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, alone, model_dir, pair_set, run_config, trainer_for
from trainer.objectives.preference import DpoConfig, OrpoConfig, PairLoss, SimpoConfig
from trainer.objectives.reward import RewardConfig

STEPS = 5
OBJECTIVES = {
    "dpo": DpoConfig(beta=0.5),
    "ipo": DpoConfig(loss_type=PairLoss.ipo, sft_weight=0.2),
    "orpo": OrpoConfig(),
    "simpo": SimpoConfig(label_smoothing=0.1),
    "reward": RewardConfig(centre=0.01),
}
CHECKPOINTED = Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full)
CASES = {
    **{
        f"dpo {tuning} {strategy}": ("dpo", tuning, "llama", STRATEGIES[strategy])
        for tuning in ("lora", "full")
        for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    },
    **{
        f"dpo {tuning} {strategy} tied": ("dpo", tuning, "llama_tied", STRATEGIES[strategy])
        for tuning in ("lora", "full")
        for strategy in ("fsdp2", "zero3")
    },
    "dpo lora fsdp2 checkpointed": ("dpo", "lora", "llama", CHECKPOINTED),
    "dpo lora fsdp2 padded": ("dpo", "lora", "gemma2", STRATEGIES["fsdp2"]),
    **{
        f"{objective} full {strategy}": (objective, "full", "llama", STRATEGIES[strategy])
        for objective in ("ipo", "orpo", "simpo", "reward")
        for strategy in ("fsdp2", "zero3")
    },
    "reward lora ddp": ("reward", "lora", "llama", STRATEGIES["ddp"]),
}


def compare(root: Path, runtime: processes.Runtime) -> dict:
    """Curves of all ranks beside those of `single`, which takes each step's pairs in one micro-batch."""
    found, oracles = {}, {}
    for name, (objective, tuning, architecture, strategy) in CASES.items():
        config = run_config(model_dir(root, architecture), strategy, tuning, micro=2, steps=STEPS)
        config = replace(config, objective=OBJECTIVES[objective])
        oracle = objective, tuning, architecture
        if oracle not in oracles:
            whole = replace(
                config, strategy=STRATEGIES["single"], batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH}
            )
            oracles[oracle] = alone_curve(whole, root, runtime)
        found[name] = {"found": curve(config, root, runtime), "expected": oracles[oracle]}
    return found


def curve(config, root: Path, runtime: processes.Runtime) -> list[list[float]]:
    """Loss, gradient norm and margin of each step. All ranks must call."""
    trainer = trainer_for(config, pair_set(root), runtime)
    for batch in trainer.loader.steps(0, STEPS):
        trainer.meter.add(trainer.train_step(batch))
    return [[row["loss"], row["grad_norm"], row["margin"]] for row in trainer.meter.flush()]


def alone_curve(config, root: Path, runtime: processes.Runtime) -> list[list[float]]:
    """The same in this process alone, without any communication."""
    trainer = trainer_for(config, pair_set(root), alone(runtime))
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        sums, count = record.local_sums, record.counts["loss"]
        rows.append([float(sums["loss"]) / count, float(record.result.grad_norm), float(sums["margin"]) / count])
    return rows
