"""Every tuning method against `single`, in one two-rank process group: `python -m tests.parity.methods <dir>`.

Strategies take turns, so that every method and every strategy is met. Stage 3 of ZeRO gives every weight back as soon as
it was used: a tiny model would otherwise stay gathered, and hide a method that reaches for weights it does not own.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import strategies.zero
from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyName, ZeroConfig
from strategies.parameters import named_parameters
from tests.helpers.building import GLOBAL_BATCH, STRATEGIES, alone, data_set, model_dir, run_config, trainer_for
from tests.helpers.building import take_steps as take
from tests.helpers.methods import CASES
from trainer.tuning.base import LoraConfig
from trainer.tuning.settings import OftConfig

STEPS = 5
ZERO3 = ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0)
TURNS = {
    "fsdp2": STRATEGIES["fsdp2"],
    "zero3": ZERO3,
    "zero2": STRATEGIES["zero2"],
    "ddp": STRATEGIES["ddp"],
    "zero1": STRATEGIES["zero1"],
    "fsdp2, checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full),
}
ALSO = {
    "zero3, selective checkpointing": replace(ZERO3, activation_checkpointing=ActivationCheckpointing.selective),
    "zero3, checkpointing": replace(ZERO3, activation_checkpointing=ActivationCheckpointing.full),
}
"""Met by some cases beside their turn: biases, and keys from outside, where blocks are computed a second time."""
MORE = {"bottleneck": ["zero3, selective checkpointing"], "prefix": list(ALSO)}
RESUMED = {
    "lora pissa": LoraConfig(rank=4, init="pissa", lr_ratio=4.0),
    "oft": OftConfig(block_size=8),
    "prefix projection": CASES["prefix projection"],
    "bottleneck": CASES["bottleneck"],
}


def turns() -> dict[str, list[str]]:
    """The strategies that each case meets: one of a plain turn, and always the one that shards most or ZeRO-3."""
    names = list(TURNS)
    return {
        case: list(dict.fromkeys([names[number % len(names)], ("fsdp2", "zero3")[number % 2], *MORE.get(case, [])]))
        for number, case in enumerate(CASES)
    }


def release_at_once() -> None:
    """Make stage 3 keep nothing gathered."""
    derive = strategies.zero.deepspeed_config

    def derived(*args: Any, **kwargs: Any) -> dict[str, Any]:
        settings = derive(*args, **kwargs)
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        return settings

    strategies.zero.deepspeed_config = derived


class Job:
    """Holds the process group, the model and the data."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.model, self.data = model_dir(root), data_set(root, uneven=True)

    def config(self, tuning, strategy, micro: int):
        return replace(run_config(self.model, strategy, "lora", micro=micro, steps=STEPS), tuning=tuning)

    def lone(self, tuning, *, lr: float = 1e-3):
        config = self.config(tuning, "single", GLOBAL_BATCH)
        return trainer_for(replace(config, optim=replace(config.optim, lr=lr)), self.data, alone(self.runtime))

    def alone(self, trainer) -> list[tuple[float, float]]:
        """Loss and grad norm of every step of the oracle, in this process alone."""
        found = []
        for batch in trainer.loader.steps(0, STEPS):
            record = trainer.train_step(batch)
            loss = float(record.local_sums["loss"]) / record.counts["loss"]
            found.append((loss, float(record.result.grad_norm)))
        return found

    def curves(self) -> dict:
        """Loss and grad norm of every step, and the largest difference of initial values, by case and strategy.

        `expected` is the oracle's curve, `standing` the same without updates.
        """
        found: dict[str, dict] = {}
        for case, names in turns().items():
            trainer = self.lone(CASES[case])
            start = {name: p.detach().clone() for name, p in named_parameters(trainer.engine.step_module)}
            found[case] = {"expected": self.alone(trainer), "standing": self.alone(self.lone(CASES[case], lr=1e-12))}
            for name in names:
                trainer = trainer_for(self.config(CASES[case], {**TURNS, **ALSO}[name], 4), self.data, self.runtime)
                worst = self.difference(trainer, start)
                found[case][name] = {"found": take(trainer, STEPS), "start": worst}
        return found

    def difference(self, trainer, expected: dict[str, torch.Tensor]) -> float:
        worst, seen = 0.0, set()
        for name, value in trainer.engine.gather(trainable_only=False):
            if value is not None:
                worst = max(worst, float((value.float() - expected[name]).abs().max()))
                seen.add(name)
        assert not self.runtime.is_main or seen == set(expected)
        return worst

    def resume(self) -> dict:
        """Two steps after a saved state, by the run that saved it and by a fresh one, also under another strategy."""
        found = {}
        for case, tuning in RESUMED.items():
            for name, other in (("fsdp2", "zero2"), ("zero3", "ddp")):
                config = self.config(tuning, TURNS[name], 4)
                first = trainer_for(config, self.data, self.runtime)
                take(first, 3)
                path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
                first.engine.save(path, first.progress)
                processes.barrier(self.runtime)
                found[f"{case} {name}"] = {
                    "uninterrupted": take(first, 2),
                    "resumed": self.go_on(config, path),
                    "elsewhere": self.go_on(replace(config, strategy=TURNS[other]), path),
                }
        return found

    def go_on(self, config, path: Path) -> list[tuple[float, float]]:
        fresh = trainer_for(config, self.data, self.runtime)
        fresh.progress = fresh.engine.load(path)
        return take(fresh, 2)


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    release_at_once()
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        model_dir(directory)
        data_set(directory, uneven=True)
    processes.barrier(here)
    job = Job(directory, here)
    result = {"curves": job.curves(), "resume": job.resume()}
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
