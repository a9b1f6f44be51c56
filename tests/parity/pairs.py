"""Objectives over pairs of answers, under every strategy and in one process: part of the parity job (`job.py`)."""

from dataclasses import replace

from strategies.base import ActivationCheckpointing, Fsdp2Config
from tests.helpers.building import STRATEGIES, model_dir, pair_set, run_config
from tests.helpers.objectives import variants_of
from tests.parity.base import Curve, Job
from tests.parity.methods import FEWER

STEPS = 5
OBJECTIVES = variants_of("dpo", "orpo", "simpo", "reward")
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
        for objective in OBJECTIVES
        if objective != "dpo"
        for strategy in ("fsdp2", "zero3")
    },
    "reward lora ddp": ("reward", "lora", "llama", STRATEGIES["ddp"]),
}


def compare(job: Job, name: str) -> dict[str, Curve]:
    """The curve of all ranks and that of `single`, which takes each step's pairs in one micro-batch."""
    objective, tuning, architecture, strategy = CASES[name]
    model = job.first_here(lambda: model_dir(job.root, architecture))
    data = job.first_here(lambda: pair_set(job.root))
    config = run_config(model, strategy, tuning, micro=2, steps=STEPS)
    config = replace(config, objective=OBJECTIVES[objective])
    key = objective, tuning, architecture
    expected = job.oracle(("pairs", *key), lambda: alone_curve(job, config, data), elsewhere=[])
    return {"found": curve(job, config, data), "expected": expected}


def curve(job: Job, config, data) -> Curve:
    """Loss, gradient norm and margin of each step. All ranks must call."""
    trainer = job.trainer(config, data)
    for batch in trainer.loader.steps(0, FEWER):
        trainer.meter.add(trainer.train_step(batch))
    return [[row["loss"], row["grad_norm"], row["margin"]] for row in trainer.meter.flush()]


def alone_curve(job: Job, config, data) -> Curve:
    """The same in this process alone, without any communication."""
    trainer = job.lone_trainer(config, data)
    rows = []
    for batch in trainer.loader.steps(0, FEWER):
        record = trainer.train_step(batch)
        sums, count = record.local_sums, record.counts["loss"]
        rows.append([float(sums["loss"]) / count, float(record.result.grad_norm), float(sums["margin"]) / count])
    return rows
