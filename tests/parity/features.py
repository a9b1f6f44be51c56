"""What the matrix leaves out, in one two-rank process group: `python -m tests.parity.features <dir>`.

Each check returns numbers; the assertions stand in test_features.py.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, DdpConfig, Fsdp2Config, Precision, StrategyName, ZeroConfig
from strategies.parameters import named_parameters
from tests.helpers.building import (
    GLOBAL_BATCH,
    STRATEGIES,
    alone,
    data_set,
    model_dir,
    pair_set,
    rated_set,
    replay_set,
    run_config,
    samples,
    take_steps,
    trainer_for,
    two_sided_set,
)
from tests.helpers.seq2seq import seq2seq_dir
from tests.parity import pairs, teachers, two_sides
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.config import Layout
from trainer.data.prepare import Prepared
from trainer.data.store.sequences import Sample, TokenDataset, write
from trainer.evaluation.loss import LossEvaluator
from trainer.model.config import ModelConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.optim.config import AdamwConfig
from trainer.tuning.base import LoraConfig

ZERO3_CPU = ZeroConfig(name=StrategyName.zero3, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
VARIANTS = {
    "ddp, each micro-batch synchronised": DdpConfig(defer_sync=False),
    "fsdp2, each micro-batch synchronised": Fsdp2Config(defer_sync=False),
    "fsdp2, kept gathered": Fsdp2Config(reshard_after_forward=False),
    "fsdp2, full checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full),
    "fsdp2, selective checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.selective),
    "fsdp2, offloaded": Fsdp2Config(cpu_offload=True),
    "zero2, full checkpointing": ZeroConfig(activation_checkpointing=ActivationCheckpointing.full),
    "zero2, optimizer offloaded": ZeroConfig(offload_optimizer="cpu"),
    "zero3, everything offloaded": ZERO3_CPU,
    "zero3, nothing kept gathered": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0),
}


class Job:
    """Holds the process group and compares things with the lone process."""

    def __init__(self, root: Path, runtime: processes.Runtime) -> None:
        self.root, self.runtime = root, runtime
        self.data = data_set(root, uneven=True)

    def curve(self, config, data: Prepared | None = None, steps: int = 3) -> list[list[float]]:
        """Loss and grad norm of a few steps on all ranks."""
        return [list(pair) for pair in take_steps(trainer_for(config, data or self.data, self.runtime), steps)]

    def oracle(self, config, data: Prepared | None = None, steps: int = 3) -> list[list[float]]:
        """The same under `single`, in this process alone."""
        config = replace(config, strategy=STRATEGIES["single"], batch={"global": GLOBAL_BATCH, "micro": GLOBAL_BATCH})
        trainer = trainer_for(config, data or self.data, alone(self.runtime))
        rows = []
        for batch in trainer.loader.steps(0, steps):
            record = trainer.train_step(batch)
            rows.append([float(record.local_sums["loss"]) / record.counts["loss"], float(record.result.grad_norm)])
        return rows

    def against_oracle(self, config, data: Prepared | None = None) -> dict:
        return {"found": self.curve(config, data), "expected": self.oracle(config, data)}

    def variants(self) -> dict:
        """Settings that must not change the result."""
        model = model_dir(self.root)
        return {
            name: self.against_oracle(run_config(model, strategy, "full", micro=4, steps=3))
            for name, strategy in VARIANTS.items()
        }

    def architectures(self) -> dict:
        """Every class of model, two strategies, both layouts as they fall."""
        found = {}
        for architecture in ("llama_tied", "qwen2", "qwen3", "gemma2", "gpt2", "falcon"):
            for strategy in ("fsdp2", "zero3"):
                config = run_config(model_dir(self.root, architecture), strategy, "lora", micro=4, steps=3)
                found[f"{architecture} {strategy}"] = self.against_oracle(config)
        config = run_config(model_dir(self.root, "distilbert"), "fsdp2", "full", micro=4, steps=3)
        labelled = self.labelled()
        for strategy in ("fsdp2", "zero3"):
            classify = replace(config, objective=ClassificationConfig(), strategy=STRATEGIES[strategy])
            found[f"distilbert {strategy}"] = self.against_oracle(classify, labelled)
        return found

    def labelled(self, *, several: bool = False) -> Prepared:
        """Documents with one of three labels, or with any number of them."""
        directory = self.root / f"labelled-{several}"
        made = [
            Sample(s.input_ids, s.supervised, i % 7 if several else i * i % 7 % 3)
            for i, s in enumerate(samples(48, uneven=False))
        ]
        if self.runtime.is_main and not directory.exists():
            write(directory, made, lambda s: {"loss": 1}, {"fingerprint": "labelled"})
        processes.barrier(self.runtime)
        opened = TokenDataset.open(directory)
        return Prepared(train=opened, evaluation=opened, directory=directory, report={}, label_names=["a", "b", "c"])

    def tunings(self) -> dict:
        """LoRA's relatives and a grown vocabulary."""
        found = {}
        for architecture in ("llama", "llama_tied"):
            base = run_config(model_dir(self.root, architecture), "fsdp2", "lora", micro=4, steps=3)
            for strategy in ("fsdp2", "zero3"):
                config = replace(base, strategy=STRATEGIES[strategy])
                grown = replace(config, model=ModelConfig(path=config.model.path, add_tokens=["<a>", "<b>"]))
                whole = run_config(model_dir(self.root, architecture), strategy, "full", micro=4, steps=3)
                cases = {
                    "dora": replace(config, tuning=LoraConfig(rank=4, dora=True)),
                    "rslora": replace(config, tuning=LoraConfig(rank=4, rslora=True, targets=["q_proj", "v_proj"])),
                    "new tokens, lora": grown,
                    "new tokens, full": replace(whole, model=grown.model),
                }
                for name, case in cases.items():
                    found[f"{architecture} {strategy} {name}"] = self.against_oracle(case)
        return found

    def classification(self) -> dict:
        """Weighted labels, one and several, in training; and the F1 of evaluation for several batch sizes and ranks."""
        found = {}
        base = run_config(model_dir(self.root, "distilbert"), "fsdp2", "full", micro=4, steps=3)
        for name, several in (("one", False), ("several", True)):
            objective = ClassificationConfig(multi_label=several, class_weights="balanced")
            data = self.labelled(several=several)
            for strategy in ("ddp", "fsdp2", "zero3"):
                config = replace(base, objective=objective, strategy=STRATEGIES[strategy])
                found[f"{name} {strategy}"] = self.against_oracle(config, data)
            config = replace(base, objective=objective)
            trainers = {2: trainer_for(config, data, self.runtime)}
            trainers[1] = trainer_for(replace(config, strategy=STRATEGIES["single"]), data, alone(self.runtime))
            found[f"{name} evaluation"] = [
                self.evaluate(trainers[ranks], data, batch=batch, ranks=ranks, layout=Layout.padded)
                for batch, ranks in [(1, 2), (5, 2), (48, 2), (7, 1)]
            ]
        return found

    def evaluate(self, trainer, data: Prepared, *, batch: int, ranks: int, layout: Layout) -> dict:
        """The held-out values, by this process alone where `ranks` is 1."""
        held_out = data.evaluation
        assert held_out is not None

        def batches():
            share = EvalShare(batch, self.runtime.rank if ranks == 2 else 0, ranks)
            return eval_batches(held_out, share, trainer.loader.collator, "cpu")

        # One process evaluating alone still sums over both ranks: count it twice, too.
        count = int(held_out.counts["loss"].sum()) * (2 if ranks == 1 else 1)
        return dict(LossEvaluator(batches, count=count, prefix="eval").run(trainer.engine))

    def preferences(self) -> dict:
        """Objectives over pairs of answers."""
        return pairs.compare(self.root, self.runtime)

    def two_sides(self) -> dict:
        """Encoder-decoder models."""
        return two_sides.compare(self.root, self.runtime)

    def generation(self) -> dict:
        """Answers written while training."""
        return two_sides.generate(self.root, self.runtime)

    def teachers(self) -> dict:
        """Objectives that look ahead, or compare with a teacher."""
        return teachers.compare(self.root, self.runtime)

    def precision(self) -> dict:
        """bf16 curves beside the fp32 one."""
        model = model_dir(self.root)
        found = {}
        for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
            for tuning in ("full", "lora"):
                config = run_config(model, strategy, tuning, micro=4, steps=6, precision=Precision.bf16)
                exact = replace(config, precision=Precision.fp32)
                found[f"{strategy} {tuning}"] = {
                    "found": self.curve(config, steps=6),
                    "expected": self.oracle(exact, steps=6),
                }
        for strategy in ("ddp", "fsdp2"):
            config = run_config(model, strategy, "full", micro=4, steps=6, precision=Precision.fp16)
            found[f"{strategy} fp16"] = {
                "found": self.curve(config, steps=6),
                "expected": self.oracle(replace(config, precision=Precision.fp32), steps=6),
            }
        return found

    def evaluation(self) -> dict:
        """Held-out loss and accuracy for several batch sizes, on two ranks and on one."""
        config = run_config(model_dir(self.root), "fsdp2", "full", micro=4, steps=12, optim=AdamwConfig(lr=0.03))
        many = trainer_for(config, self.data, self.runtime)
        take_steps(many, 12)  # so that some predictions are right
        path = self._saved(many)
        one = trainer_for(replace(config, strategy=STRATEGIES["single"]), self.data, alone(self.runtime))
        one.engine.load(path)
        return {
            f"batch {batch}, ranks {ranks}": self.evaluate(
                many if ranks == 2 else one, self.data, batch=batch, ranks=ranks, layout=Layout.padding_free
            )
            for batch, ranks in [(1, 2), (3, 2), (48, 2), (1, 1), (7, 1)]
        }

    def resume(self) -> dict:
        """Three steps after a saved state, by the run that saved it and by a fresh one; also across strategies."""
        found = {}
        for strategy in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"):
            for tuning in ("full", "lora", "rank-1 lora"):
                config = run_config(model_dir(self.root), strategy, tuning.removeprefix("rank-1 "), micro=2, steps=6)
                if tuning == "rank-1 lora":  # matrices of one row: a shard of them is all or nothing
                    config = replace(config, tuning=LoraConfig(rank=1))
                first = trainer_for(config, self.data, self.runtime)
                take_steps(first, 3)
                path = self._saved(first)
                found[f"{strategy} {tuning}"] = {
                    "uninterrupted": take_steps(first, 3),
                    "resumed": self._continue(config, path),
                    "elsewhere": self._continue(replace(config, strategy=STRATEGIES[_OTHER[strategy]]), path),
                }
        return found

    def _saved(self, trainer) -> Path:
        path = Path(processes.broadcast_object(tempfile.mkdtemp(dir=self.root), self.runtime))
        trainer.engine.save(path, trainer.progress)
        processes.barrier(self.runtime)
        return path

    def _continue(self, config, path: Path) -> list[tuple[float, float]]:
        fresh = trainer_for(config, self.data, self.runtime)
        with fresh.engine.inference() as module:  # as to record a reference: what it gathers must not outlive the load
            module(fresh.loader.collator([self.data.train.sample(0)]))
        fresh.progress = fresh.engine.load(path)
        return take_steps(fresh, 3)

    def gathered(self) -> dict:
        """Largest difference between gathered parameters and the lone process's, before and after two steps."""
        found = {}
        for tuning in ("full", "lora"):
            config = run_config(model_dir(self.root), "single", tuning, micro=GLOBAL_BATCH, steps=3)
            lone = trainer_for(config, self.data, alone(self.runtime))
            start = {name: p.detach().clone() for name, p in named_parameters(lone.engine.step_module)}
            for batch in lone.loader.steps(0, 2):
                lone.train_step(batch)
            end = {name: p.detach().clone() for name, p in named_parameters(lone.engine.step_module)}
            for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
                trainer = trainer_for(
                    replace(config, strategy=STRATEGIES[strategy], batch={"global": 16, "micro": 4}),
                    self.data,
                    self.runtime,
                )
                before = self._difference(trainer, start, trainable_only=False)
                take_steps(trainer, 2)
                after = self._difference(trainer, end, trainable_only=True)
                found[f"{strategy} {tuning}"] = {"before": before, "after": after}
        return found

    def _difference(self, trainer, expected: dict[str, torch.Tensor], *, trainable_only: bool) -> float | None:
        worst, seen = 0.0, set()
        for name, value in trainer.engine.gather(trainable_only=trainable_only):
            if value is not None:
                assert value.shape == expected[name].shape, name
                worst = max(worst, float((value.float() - expected[name].float()).abs().max()))
                seen.add(name)
        if self.runtime.is_main and not trainable_only:
            assert seen == set(expected)
        return worst if self.runtime.is_main else None


_OTHER = {"ddp": "zero3", "fsdp2": "zero1", "hsdp": "zero2", "zero1": "ddp", "zero2": "fsdp2", "zero3": "zero2"}

CHECKS = (
    "variants",
    "architectures",
    "tunings",
    "classification",
    "preferences",
    "two_sides",
    "generation",
    "teachers",
    "precision",
    "evaluation",
    "resume",
    "gathered",
)

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    wanted = sys.argv[2:] or CHECKS
    here = processes.start("cpu", timeout_s=120, threads=1)
    if here.is_main:
        for name in ("llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gpt2", "falcon", "distilbert"):
            model_dir(directory, name)
        data_set(directory, uneven=True)
        pair_set(directory)
        for name in ("t5", "t5_untied", "bart", "pegasus"):
            seq2seq_dir(directory, name)
        two_sided_set(directory)
        rated_set(directory)
        replay_set(directory)
    processes.barrier(here)
    job = Job(directory, here)
    result = {check: getattr(job, check)() for check in wanted}
    if here.is_main:
        (directory / "report.json").write_text(json.dumps(result))
    processes.barrier(here)
    processes.stop()
