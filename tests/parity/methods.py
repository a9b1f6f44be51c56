"""Tuning methods against `single`, in one two-rank process group: `python -m tests.parity.methods <dir> [case ...]`.

Which runs is said by `tests/parity/plan.py`; the assertions stand in test_methods.py.
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
from strategies.parameters import named_parameters
from tests.helpers.building import GLOBAL_BATCH, alone, data_set, model_dir, run_config, trainer_for
from tests.helpers.building import take_steps as take
from tests.parity.plan import CASES, OTHERWISE, SHARDING, Run, plan
from trainer.config.run import RunConfig
from trainer.loop import Trainer
from trainer.tuning.base import LoraConfig, TuningConfig
from trainer.tuning.config import OftConfig

STEPS = 5
RESUMED = {
    "lora pissa": LoraConfig(rank=4, init="pissa", lr_ratio=4.0),
    "oft": OftConfig(block_size=8),
    "prefix projection": CASES["prefix projection"],
    "bottleneck": CASES["bottleneck"],
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


def trace_only() -> None:
    """Make `torch.compile` trace forward and backward as ever, but run the graphs as they are: no C++ is compiled."""
    compiled = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module, **options: compiled(module, backend="aot_eager", **options)


class Job:
    """Holds the process group, the model and the data."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.model, self.data = model_dir(root), data_set(root, uneven=True)

    def config(self, tuning: TuningConfig, strategy: str, micro: int) -> RunConfig:
        plain = run_config(self.model, "single", "lora", micro=micro, steps=STEPS)
        return replace(plain, tuning=tuning, strategy=SHARDING.get(strategy, plain.strategy))

    def curves(self, runs: list[Run]) -> dict:
        """Loss and grad norm of every step, and the largest difference of initial values, by run; the lone runs too."""
        found: dict[str, dict] = {"lone": {}, "still": {}, "shared": {}}
        starts: dict[str, dict[str, torch.Tensor]] = {}
        for run in runs:
            if run.oracle not in found["lone"]:
                starts[run.still] = self._lone(run, found)
            trainer = trainer_for(run.config(self.config(CASES[run.case], run.strategy, 4)), self.data, self.runtime)
            worst = self._difference(trainer, starts[run.still], rounded=run.feature == "bf16")
            found["shared"][run.key] = {"found": take(trainer, STEPS), "start": worst}
            torch.compiler.reset()
        return found

    def _lone(self, run: Run, found: dict[str, dict]) -> dict[str, torch.Tensor]:
        """The curve of this process alone, and that of a rate of zero; returns the values at the start."""
        feature = run.feature if run.feature in OTHERWISE else "plain"
        base = self.config(CASES[run.case], "single", GLOBAL_BATCH)
        config = Run(run.case, "single", feature, run.optim).config(base)
        start, found["lone"][run.oracle] = self._curve(config)
        if run.still not in found["still"]:
            _, found["still"][run.still] = self._curve(replace(config, optim=replace(config.optim, lr=0.0)))
        return start

    def _curve(self, config: RunConfig) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
        trainer = trainer_for(config, self.data, alone(self.runtime))
        start = {name: p.detach().clone() for name, p in named_parameters(trainer.engine.step_module)}
        return start, self._rows(trainer, STEPS)

    def _rows(self, trainer: Trainer, num: int) -> list[list[float]]:
        """Loss and grad norm of `num` further steps of this process alone."""
        rows = []
        for batch in trainer.loader.steps(trainer.progress.samples, num):
            record = trainer.train_step(batch)
            rows.append([float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)])
        return rows

    def _difference(self, trainer: Trainer, expected: dict[str, torch.Tensor], *, rounded: bool) -> float:
        """The largest difference of a gathered value; of trained ones only where a frozen base is kept rounded."""
        worst, seen = 0.0, set()
        trained = {name for name, p in named_parameters(trainer.engine.step_module) if p.requires_grad}
        for name, value in trainer.engine.gather(trainable_only=False):
            if value is not None:
                if name in trained or not rounded:
                    worst = max(worst, float((value.float() - expected[name]).abs().max()))
                seen.add(name)
        assert not self.runtime.is_main or seen == set(expected)
        return worst

    def resume(self) -> dict:
        """Two steps after a saved state, by the run that saved it and by a fresh one, also under another strategy."""
        found = {}
        for case, tuning in RESUMED.items():
            for name, other in (("fsdp2", "zero2"), ("zero3", "ddp")):
                config = self.config(tuning, name, 4)
                first = trainer_for(config, self.data, self.runtime)
                take(first, 3)
                path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
                first.engine.save(path, first.progress)
                processes.barrier(self.runtime)
                found[f"{case} {name}"] = {
                    "uninterrupted": take(first, 2),
                    "resumed": self._go_on(config, path),
                    "elsewhere": self._go_on(replace(config, strategy=SHARDING[other]), path),
                }
        config = self.config(
            CASES["adalora"], "ddp", 4
        )  # replicated strategies only: the other one is a single process
        first = trainer_for(config, self.data, self.runtime)
        take(first, 3)
        path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
        first.engine.save(path, first.progress)
        processes.barrier(self.runtime)
        found["adalora ddp"] = {
            "uninterrupted": take(first, 2),
            "resumed": self._go_on(config, path),
            "elsewhere": self._alone_from(self.config(CASES["adalora"], "single", GLOBAL_BATCH), path),
        }
        return found

    def _alone_from(self, config: RunConfig, path: Path) -> list[list[float]]:
        trainer = trainer_for(config, self.data, alone(self.runtime))
        trainer.progress = trainer.engine.load(path)
        return self._rows(trainer, 2)

    def _go_on(self, config: RunConfig, path: Path) -> list[tuple[float, float]]:
        fresh = trainer_for(config, self.data, self.runtime)
        fresh.progress = fresh.engine.load(path)
        return take(fresh, 2)

    def files(self) -> list[float]:
        """The same loss before and after rank 0 alone makes the files of an adapter and of a module trained in full."""
        from peft.utils.save_and_load import get_peft_model_state_dict

        config = self.config(LoraConfig(rank=4, modules_to_save=["lm_head"]), "fsdp2", 4)
        trainer = trainer_for(config, self.data, self.runtime)
        take(trainer, 1)
        batch = trainer.loader.collator([self.data.train.sample(number) for number in range(4)])
        found = []
        for _ in range(2):
            with trainer.engine.inference() as module:
                found.append(float(module(batch)["loss"]))
            state = dict(trainer.engine.gather(trainable_only=True))
            if self.runtime.is_main:
                get_peft_model_state_dict(
                    trainer.engine.step_module.model, state_dict=state, save_embedding_layers=False
                )
        return found


if __name__ == "__main__":
    directory, cases = Path(sys.argv[1]), sys.argv[2:]
    release_at_once()
    trace_only()
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        model_dir(directory)
        data_set(directory, uneven=True)
    processes.barrier(here)
    job = Job(directory, here)
    result = {"curves": job.curves([run for run in plan() if not cases or run.case in cases])}
    if not cases or "resume" in cases:
        result["resume"] = job.resume()
    if not cases or "files" in cases:
        result["files"] = job.files()
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
