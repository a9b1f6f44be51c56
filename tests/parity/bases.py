"""Bases that are not the checkpoint's own, and adapters that are not new: `python -m tests.parity.bases <dir>`.

Quantised bases, bases with folded adapters, and runs that go on from an adapter, under every strategy and in one process.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision
from strategies.parameters import named_parameters
from strategies.state import TENSORS
from tests.helpers.adapters import plain_adapter
from tests.helpers.building import GLOBAL_BATCH, alone, data_set, model_dir, pair_set, run_config, take_steps
from tests.helpers.building import trainer_for as build
from tests.parity.methods import STEPS, release_at_once
from tests.parity.plan import SHARDING
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.evaluation.loss import LossEvaluator
from trainer.model.quantisation import Quantisation
from trainer.objectives.preference import DpoConfig
from trainer.optim.config import AdamwConfig
from trainer.tuning.base import LoraConfig

LORA = LoraConfig(rank=4)
FIRST = LoraConfig(rank=4, from_="first")
QUANTISED = {"quantisation": Quantisation.nf4}
MODELS = {
    "nf4": QUANTISED,
    "nf4, scales whole": {**QUANTISED, "double_quantisation": False},
    "fp4": {"quantisation": Quantisation.fp4},
    "int8": {"quantisation": Quantisation.int8},
}
SELECTIVE = Fsdp2Config(activation_checkpointing=ActivationCheckpointing.selective)
STRATEGIES = {
    **SHARDING,
    "fsdp2, checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full),
    "fsdp2, selective": SELECTIVE,
    "fsdp2, offloaded": Fsdp2Config(cpu_offload=True),
}
EVERY = list(STRATEGIES)
CASES = {  # model settings, tuning, strategies
    "nf4": (QUANTISED, LORA, EVERY),
    "nf4, scales whole": (MODELS["nf4, scales whole"], LORA, ["fsdp2", "zero3"]),
    "fp4": (MODELS["fp4"], LORA, ["fsdp2", "zero3"]),
    "int8": (MODELS["int8"], LORA, ["ddp", "fsdp2", "zero2", "zero3"]),
    "from": ({}, FIRST, ["ddp", "fsdp2", "zero2", "zero3"]),
    "from, nf4": (QUANTISED, FIRST, ["fsdp2", "zero3"]),
    "folded": ({"adapters": ["first", "second"]}, LORA, ["fsdp2", "zero2", "zero3"]),
    "folded, nf4": ({"adapters": ["first"], **QUANTISED}, LORA, ["fsdp2", "zero3"]),
}


class Job:
    """Holds the process group, the model, the data and the adapters."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.model, self.data = model_dir(root), data_set(root, uneven=True)
        pair_set(root)
        plain_adapter(self.model, root / "first", r=4, lora_alpha=32, seed=1)
        plain_adapter(self.model, root / "second", r=2, lora_alpha=8, seed=2, target_modules=["q_proj", "down_proj"])

    def config(self, model: dict, tuning, strategy, micro: int = 4, **changes):
        config = run_config(self.model, strategy, "lora", micro=micro, steps=STEPS, **changes)
        if (start := getattr(tuning, "from_", None)) is not None:
            tuning = replace(tuning, from_=str(self.root / start))
        settings = dict(model)
        if "adapters" in settings:
            settings["adapters"] = [str(self.root / name) for name in settings["adapters"]]
        return replace(config, tuning=tuning, model=replace(config.model, **settings))

    def lone(self, model: dict, tuning, data=None, **changes):
        config = self.config(model, tuning, "single", GLOBAL_BATCH, **changes)
        trainer = build(config, data or self.data, alone(self.runtime))
        start = {name: p.detach().clone() for name, p in named_parameters(trainer.engine.step_module)}
        rows = []
        for batch in trainer.loader.steps(0, STEPS):
            record = trainer.train_step(batch)
            loss = float(record.local_sums["loss"]) / record.counts["loss"]
            rows.append((loss, float(record.result.grad_norm)))
        return start, rows

    def curves(self) -> dict:
        """Loss and grad norm of every step, and whether initial values are equal, by case and strategy."""
        found: dict[str, dict] = {}
        for case, (model, tuning, names) in CASES.items():
            start, expected = self.lone(model, tuning)
            found[case] = {"expected": expected}
            for name in names:
                trainer = build(self.config(model, tuning, STRATEGIES[name]), self.data, self.runtime)
                same = self.same(trainer, start)
                found[case][name] = {"found": take_steps(trainer, STEPS), "same": same}
        return found

    def same(self, trainer, expected: dict[str, torch.Tensor]) -> bool:
        seen, same = set(), True
        for name, value in trainer.engine.gather(trainable_only=False):
            if value is not None:
                same &= torch.equal(value, expected[name]) and value.dtype is expected[name].dtype
                seen.add(name)
        return bool(same) and (not self.runtime.is_main or seen == set(expected))

    def evaluated(self) -> dict:
        """A curve with and without evaluation between the steps, and what evaluation finds at a rate that moves nothing."""
        found = {}
        for kind in ("nf4", "int8"):
            for name in ("fsdp2", "zero3"):
                curves, losses = [], []
                for evaluate in (False, True):
                    trainer = build(self.config(MODELS[kind], LORA, STRATEGIES[name]), self.data, self.runtime)
                    rows = []
                    for _ in range(STEPS):
                        if evaluate:
                            self.evaluate(trainer)
                        rows += take_steps(trainer, 1)
                    curves.append(rows)
                still = AdamwConfig(lr=1e-30, weight_decay=0.0)
                trainer = build(self.config(MODELS[kind], LORA, STRATEGIES[name], optim=still), self.data, self.runtime)
                for _ in range(3):
                    losses.append(self.evaluate(trainer))
                    take_steps(trainer, 1)
                found[f"{kind} {name}"] = {"without": curves[0], "with": curves[1], "still": losses}
        return found

    def evaluate(self, trainer) -> float:
        engine = trainer.engine

        def batches():
            share = EvalShare(4, engine.dp_rank, engine.dp_size)
            return eval_batches(self.data.train, share, trainer.loader.collator, self.runtime.device)

        count = int(self.data.train.counts["loss"].sum())
        evaluator = LossEvaluator(batches, count=count, prefix="eval", perplexity=True)
        return dict(evaluator.run(engine))["eval/loss"]

    def resumed(self) -> dict:
        """Two steps after a saved state, by the run that saved it and by fresh ones, also under another strategy."""
        found = {}
        for case, model, tuning in (("nf4", QUANTISED, LORA), ("from, nf4", QUANTISED, FIRST)):
            for name, other in (("fsdp2", "zero3"), ("zero3", "ddp")):
                first = build(self.config(model, tuning, STRATEGIES[name]), self.data, self.runtime)
                take_steps(first, 3)
                path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
                first.engine.save(path, first.progress)
                processes.barrier(self.runtime)
                row = {"uninterrupted": take_steps(first, 2)}
                for key, strategy in (("resumed", name), ("elsewhere", other)):
                    fresh = build(self.config(model, tuning, STRATEGIES[strategy]), self.data, self.runtime)
                    fresh.progress = fresh.engine.load(path)
                    row[key] = take_steps(fresh, 2)
                row["saved"] = sorted(FileSystemReader(str(path / TENSORS)).read_metadata().state_dict_metadata)
                found[f"{case} {name}"] = row
        return found

    def preference(self) -> dict:
        """DPO from a first adapter: the first loss is log 2 where the reference is the first adapter's model."""
        found = {}
        for case, model in (("plain", {}), ("nf4", QUANTISED)):
            _, expected = self.lone(model, FIRST, pair_set(self.root), objective=DpoConfig(beta=0.5))
            found[case] = {"expected": expected}
            for name in ("ddp", "fsdp2", "zero3"):
                config = self.config(model, FIRST, STRATEGIES[name], objective=DpoConfig(beta=0.5))
                found[case][name] = take_steps(build(config, pair_set(self.root), self.runtime), STEPS)
        return found

    def halves(self) -> dict:
        """bf16 under the strategies that convert parameters, beside fp32."""
        found = {}
        for name in ("ddp", "fsdp2", "zero2", "zero3"):
            config = self.config(QUANTISED, LORA, STRATEGIES[name], precision=Precision.bf16)
            found[name] = take_steps(build(config, self.data, self.runtime), STEPS)
        return found


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    release_at_once()
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        Job(directory, here)
    processes.barrier(here)
    job = Job(directory, here)
    parts = ("curves", "evaluated", "resumed", "preference", "halves")
    result = {part: getattr(job, part)() for part in parts if part in (sys.argv[2:] or parts)}
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
