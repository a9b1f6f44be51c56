"""Encoder-decoder models under every strategy and in one process: part of the job of `features.py`."""

from dataclasses import replace
from pathlib import Path

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyConfig, StrategyName, ZeroConfig
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    alone,
    run_config,
    take_steps,
    trainer_for,
    two_sided_set,
)
from tests.helpers.seq2seq import seq2seq_dir
from trainer.config import RunConfig
from trainer.objectives.base import Seq2seqConfig

STEPS = 5
FULL, SELECTIVE = ActivationCheckpointing.full, ActivationCheckpointing.selective
CASES: dict[str, tuple[str, str, StrategyConfig]] = {
    **{
        f"{architecture} {tuning} {strategy}": (architecture, tuning, STRATEGIES[strategy])
        for architecture in ("t5", "bart")
        for tuning in ("full", "lora")
        for strategy in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
    },
    **{
        f"{architecture} full {strategy}": (architecture, "full", STRATEGIES[strategy])
        for architecture in ("t5_untied", "pegasus")
        for strategy in ("ddp", "fsdp2", "zero3")
    },
    "t5 full fsdp2 checkpointed": ("t5", "full", Fsdp2Config(activation_checkpointing=FULL)),
    "t5 lora fsdp2 checkpointed": ("t5", "lora", Fsdp2Config(activation_checkpointing=FULL)),
    "bart full fsdp2 checkpointed by choice": ("bart", "full", Fsdp2Config(activation_checkpointing=SELECTIVE)),
    "bart full zero3 checkpointed by choice": (
        "bart",
        "full",
        ZeroConfig(name=StrategyName.zero3, stage=3, activation_checkpointing=SELECTIVE),
    ),
    "t5 full zero2 checkpointed": ("t5", "full", ZeroConfig(activation_checkpointing=FULL)),
}


def compare(root: Path, runtime: processes.Runtime) -> dict:
    """Curves of all ranks beside those of `single`, which takes each step's documents in one micro-batch."""
    found, oracles = {}, {}
    for name, (architecture, tuning, strategy) in CASES.items():
        config = config_of(root, architecture, tuning, strategy)
        if (architecture, tuning) not in oracles:
            oracles[architecture, tuning] = alone_curve(config, root, runtime)
        curve = take_steps(trainer_for(config, two_sided_set(root), runtime), STEPS)
        found[name] = {"found": curve, "expected": oracles[architecture, tuning]}
    return found


def config_of(root: Path, architecture: str, tuning: str, strategy: StrategyConfig) -> RunConfig:
    """A run in which each rank takes two micro-batches a step."""
    config = run_config(seq2seq_dir(root, architecture), strategy, tuning, micro=4, steps=STEPS)
    return replace(config, objective=Seq2seqConfig(), optim=replace(config.optim, max_grad_norm=0.2))


def alone_curve(config: RunConfig, root: Path, runtime: processes.Runtime) -> list[list[float]]:
    """Loss and gradient norm of each step in this process alone, without any communication."""
    whole = replace(config, strategy=STRATEGIES["single"], batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH})
    trainer = trainer_for(whole, two_sided_set(root), alone(runtime))
    rows = []
    for batch in trainer.loader.steps(0, STEPS):
        record = trainer.train_step(batch)
        rows.append([float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)])
    return rows
