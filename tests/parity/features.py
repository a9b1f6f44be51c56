"""What the matrix leaves out: settings, architectures, precision, evaluation, resuming, gathering. Part of `job.py`."""

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from strategies import matmul
from strategies import runtime as processes
from strategies.base import ActivationCheckpointing, DdpConfig, Fsdp2Config, Precision, StrategyName, ZeroConfig
from strategies.parameters import named_parameters
from strategies.zero_config import deepspeed_config
from tests.helpers.building import STRATEGIES, alone, data_set, model_dir, run_config, samples, take_steps, trainer_for
from tests.helpers.stores import write
from tests.parity.base import Job, lone_steps, values_of
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import LABEL, Sample, TokenDataset
from trainer.evaluation.loss import LossEvaluator
from trainer.loop import Trainer
from trainer.model.config import ModelConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.optim.config import AdamwConfig
from trainer.tuning.base import LoraConfig

STEPS = 3
ZERO3_CPU = ZeroConfig(name=StrategyName.zero3, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
VARIANTS = {
    "ddp, each micro-batch synchronised": DdpConfig(defer_sync=False),
    "fsdp2, each micro-batch synchronised": Fsdp2Config(defer_sync=False),
    "fsdp2, each by memory": Fsdp2Config(memory_gib=1e-6),
    "fsdp2, deferred": Fsdp2Config(defer_sync=True),
    "fsdp2, kept gathered": Fsdp2Config(reshard_after_forward=False),
    "fsdp2, full checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.full),
    "fsdp2, selective checkpointing": Fsdp2Config(activation_checkpointing=ActivationCheckpointing.selective),
    "fsdp2, offloaded": Fsdp2Config(cpu_offload=True),
    "zero2, full checkpointing": ZeroConfig(activation_checkpointing=ActivationCheckpointing.full),
    "zero2, optimizer offloaded": ZeroConfig(offload_optimizer="cpu"),
    "zero3, everything offloaded": ZERO3_CPU,
    "zero3, nothing kept gathered": ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0),
}


ZERO3_APART = ZeroConfig(name=StrategyName.zero3, stage=3, persistence_threshold=0)
LONG_ROWS: dict[str, dict[str, Any]] = {
    "tiles": {"mlp_tokens": 16},
    "tiles, recomputed": {"mlp_tokens": 16, "activation_checkpointing": ActivationCheckpointing.full},
    "on the host": {"offload_activations": True, "activation_checkpointing": ActivationCheckpointing.full},
    "on the host, selective": {
        "offload_activations": True,
        "activation_checkpointing": ActivationCheckpointing.selective,
    },
    "both": {"mlp_tokens": 7, "offload_activations": True, "activation_checkpointing": ActivationCheckpointing.full},
}


def _owners(*args: Any, **kwargs: Any) -> dict[str, Any]:
    settings = deepspeed_config(*args, **kwargs)
    settings["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
    return settings


def _kept(*args: Any, **kwargs: Any) -> dict[str, Any]:
    settings = deepspeed_config(*args, **kwargs)
    settings["bf16"]["immediate_grad_update"] = False
    return settings


TUNINGS = ("dora", "rslora", "new tokens, lora", "new tokens, full")
ELSEWHERE = {"ddp": "zero3", "fsdp2": "zero1", "hsdp": "zero2", "zero1": "ddp", "zero2": "fsdp2", "zero3": "zero2"}
EVALUATED = [(1, 2), (3, 2), (48, 2), (1, 1), (7, 1)]
"""Batch and ranks."""
CLASSIFIED = [(1, 2), (5, 2), (48, 2), (7, 1)]


def plain(job: Job, strategy: Any, tuning: str, architecture: str = "llama", **changes: Any) -> RunConfig:
    model = job.first_here(lambda: model_dir(job.root, architecture))
    return run_config(model, strategy, tuning, **{"micro": 4, "steps": STEPS} | changes)


def against_lone(
    job: Job, config: RunConfig, oracle: Any, data: PreparedData | None = None, steps: int = STEPS
) -> dict:
    """The curve of all ranks and that of the lone process, which is computed once for `oracle`."""
    expected = job.oracle(("features", oracle), lambda: job.lone(config, steps, data), elsewhere=[])
    return {"found": job.curve(config, steps, data), "expected": expected}


def variant(job: Job, name: str) -> dict:
    """A setting that must not change the result."""
    return against_lone(job, plain(job, VARIANTS[name], "full"), "full")


def long_rows(job: Job, strategy: str, tuning: str, settings: str) -> dict:
    """Tiles of the MLP, and inputs of blocks that are copied away and back, as from a GPU to the host."""
    base = ZERO3_APART if strategy == "zero3" else STRATEGIES[strategy]
    config = plain(job, replace(base, **LONG_ROWS[settings]), tuning)
    with mock.patch("strategies.host_inputs.is_on_host", lambda _: False):
        return against_lone(job, config, tuning)


def reduced_to_owners(job: Job) -> dict:
    """ZeRO-2 as on GPUs, where each part of a bucket goes to the rank that keeps it."""
    with mock.patch("strategies.zero.deepspeed_config", _owners):
        return against_lone(job, plain(job, "zero2", "full"), "full")


class HostReads(TorchDispatchMode):
    """Counts the values that are read on the host, for each of which a GPU would be waited for."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def zero2_on_device(job: Job) -> dict:
    """Host reads of a step in bf16, a step with a gradient that is not finite, and DeepSpeed's own way of both."""
    config = plain(job, "zero2", "full", precision=Precision.bf16)
    with mock.patch("strategies.zero.steps_on_device", lambda *_: False):
        theirs = job.curve(config, STEPS)
    trainer = job.trainer(config)
    engine, real = trainer.engine, trainer.engine.step
    reads = []

    def counted(*given: Any) -> Any:
        with HostReads() as mode:
            result = real(*given)
        reads.append(mode.number)
        return result

    engine.step = counted  # type: ignore[method-assign]
    ours = [list(row) for row in take_steps(trainer, STEPS)]
    before, updates = values_of(trainer), int(engine._num_updates)  # type: ignore[attr-defined]
    batch = next(trainer.loader.steps(0, 1)).micro_batches[0]
    engine.backward(engine.forward({**batch, "step_means": {}}, last=True)["loss"] * float("inf"), last=True)
    skipped = engine.step(1.0)
    after = values_of(trainer)
    same = all(torch.equal(before[name], after[name]) for name in before)
    told = [float(skipped.skipped), same, int(engine._num_updates) - updates]  # type: ignore[attr-defined]
    path = job.saved(trainer)
    going_on, resumed = take_steps(trainer, 2), job.go_on(config, path, 2)
    return {
        "reads": reads,
        "ours": ours,
        "theirs": theirs,
        "skipped": told,
        "going on": going_on,
        "resumed": resumed,
    }


def zero1_gradients(job: Job) -> dict:
    """ZeRO-1 in bf16: what is left of gradients in bf16 after a backward pass, and the curve with them kept."""
    config = plain(job, "zero1", "full", precision=Precision.bf16)
    with mock.patch("strategies.zero.deepspeed_config", _kept):
        kept = job.curve(config, STEPS)
    trainer = job.trainer(config)
    found = [list(row) for row in take_steps(trainer, STEPS)]
    batch = next(trainer.loader.steps(0, 1)).micro_batches[0]
    trainer.engine.backward(trainer.engine.forward({**batch, "step_means": {}}, last=False)["loss"], last=False)
    left = sum(p.grad is not None for p in trainer.engine.step_module.parameters())
    return {"found": found, "kept": kept, "left": left}


def sources(job: Job, strategy: str) -> dict:
    """The training loss of each of two sources, with weights, in every step."""
    config = plain(job, strategy, "full")

    def made() -> PreparedData:
        data = data_set(job.root, uneven=True, weighted=True)
        data.train.sources = np.arange(len(data.train)) // 2 % 2
        data.train.manifest["sources"] = ["a", "b"]
        return data

    def curve(trainer: Trainer, world: int) -> list[list[float]]:
        rows = []
        for batch in trainer.loader.steps(0, STEPS):
            record = trainer.train_step(batch)
            parts = [record.local_sums[f"loss/{name}"].double() for name in record.source_counts]
            parts = [processes.sum_over_ranks(part) if world > 1 else part for part in parts]
            rows.append([float(p) / count for p, count in zip(parts, record.source_counts.values(), strict=True)])
        return rows

    data = job.first_here(made)
    expected = job.oracle(("features", "sources"), lambda: curve(job.lone_trainer(config, data), 1), elsewhere=[])
    return {"found": curve(job.trainer(config, data), job.runtime.world_size), "expected": expected}


def architecture(job: Job, name: str, strategy: str) -> dict:
    """A class of model, in the layout that falls to it."""
    if name == "distilbert":
        config = replace(plain(job, strategy, "full", name), objective=ClassificationConfig())
        return against_lone(job, config, name, labelled(job, several=False))
    return against_lone(job, plain(job, strategy, "lora", name), name)


def labelled(job: Job, *, several: bool) -> PreparedData:
    """Documents with one of three labels, or with any number of them."""
    directory = job.root / f"labelled-{several}"

    def made() -> PreparedData:
        if not (directory / "manifest.json").exists():
            rows = [
                Sample(s.input_ids, s.supervised, {LABEL: i % 7 if several else i * i % 7 % 3})
                for i, s in enumerate(samples(48, uneven=False))
            ]
            write(directory, rows, lambda s: {"loss": 1}, {"fingerprint": "labelled"})
        opened = TokenDataset.open(directory)
        return PreparedData(
            train=opened, evaluation=opened, directory=directory, report={}, label_names=["a", "b", "c"]
        )

    return job.first_here(made)


def tuning(job: Job, architecture: str, strategy: str, name: str) -> dict:
    """LoRA's relatives and a grown vocabulary."""
    config = plain(job, strategy, "full" if name.endswith("full") else "lora", architecture)
    if name.startswith("new tokens"):
        config = replace(config, model=ModelConfig(path=config.model.path, add_tokens=["<a>", "<b>"]))
    elif name == "dora":
        config = replace(config, tuning=LoraConfig(rank=4, dora=True))
    else:
        config = replace(config, tuning=LoraConfig(rank=4, rslora=True, targets=["q_proj", "v_proj"]))
    return against_lone(job, config, (architecture, name))


def _labels(job: Job, strategy: str, labels: str) -> tuple[RunConfig, PreparedData]:
    several = labels == "several"
    objective = ClassificationConfig(multi_label=several, class_weights="balanced")
    return replace(plain(job, strategy, "full", "distilbert"), objective=objective), labelled(job, several=several)


def weighted_labels(job: Job, labels: str, strategy: str) -> dict:
    """Weighted labels, one or several, in training."""
    config, data = _labels(job, strategy, labels)
    return against_lone(job, config, labels, data)


def f1(job: Job, labels: str) -> list[dict]:
    """The F1 of evaluation for several batch sizes and ranks."""
    config, data = _labels(job, "fsdp2", labels)
    trainers = {2: job.trainer(config, data), 1: job.lone_trainer(config, data)}
    return [_evaluated(job, trainers, data, batch, ranks) for batch, ranks in CLASSIFIED]


def evaluation(job: Job) -> list[dict]:
    """Held-out loss and accuracy for several batch sizes, on two ranks and on one."""
    config = plain(job, "fsdp2", "full", steps=12, optim=AdamwConfig(lr=0.03))
    many = job.trainer(config)
    take_steps(many, 12)  # so that some predictions are right
    one = trainer_for(replace(config, strategy=STRATEGIES["single"]), job.data, alone(job.runtime))
    one.engine.load(job.saved(many))
    trainers = {2: many, 1: one}
    return [_evaluated(job, trainers, job.data, batch, ranks) for batch, ranks in EVALUATED]


def _evaluated(job: Job, trainers: dict, data: PreparedData, batch: int, ranks: int) -> dict:
    """The held-out values, by this process alone where `ranks` is 1."""
    held_out = data.evaluation
    assert held_out is not None

    def batches():
        share = EvalShare(batch, job.runtime.rank if ranks == 2 else 0, ranks)
        return eval_batches(held_out, share, trainers[ranks].loader.collator, "cpu")

    # One process evaluating alone still sums over both ranks: count it twice, too.
    count = int(held_out.counts["loss"].sum()) * (2 if ranks == 1 else 1)
    return dict(LossEvaluator(batches, loss_denominator=count).run(trainers[ranks].engine))


def half(job: Job, strategy: str, tuning: str, precision: str) -> dict:
    """A bf16 or fp16 curve beside the fp32 one."""
    config = plain(job, strategy, tuning, steps=6)
    expected = job.oracle(("six steps", tuning), lambda: job.lone(config, 6), elsewhere=[])
    return {"found": job.curve(replace(config, precision=Precision(precision)), 6), "expected": expected}


def resume(job: Job, strategy: str, tuning: str) -> dict:
    """Two steps after a saved state, by the run that saved it and by a fresh one; also across strategies."""
    config = plain(job, strategy, tuning.removeprefix("rank-1 "), steps=4)
    if tuning == "rank-1 lora":  # matrices of one row: a shard of them is all or nothing
        config = replace(config, tuning=LoraConfig(rank=1))
    return job.resumed(config, STRATEGIES[ELSEWHERE[strategy]], before=2, steps=2, look=True)


def gathered(job: Job, strategy: str, tuning: str) -> dict[str, float]:
    """Largest difference between gathered parameters and the lone process's, before and after two steps."""
    config = plain(job, strategy, tuning)

    def lone_values():
        trainer = job.lone_trainer(config)
        start = values_of(trainer)
        lone_steps(trainer, 2)
        return start, values_of(trainer)

    start, end = job.oracle(("gathered", tuning), lone_values, elsewhere=({}, {}))
    trainer = job.trainer(config)
    trained = {name for name, p in named_parameters(trainer.engine.step_module) if p.requires_grad}
    before = job.gathered_apart(trainer, start, of=set(start))
    take_steps(trainer, 2)
    return {"before": before, "after": job.gathered_apart(trainer, end, of=trained)}


def library(job: Job) -> list[list[str]]:
    """The library of products that each rank records and takes, where oneDNN is faster on one host and unknown on the other."""
    zen5, other = matmul.MEASURED_RATIOS[0].processor, matmul.Processor("GenuineIntel", 6, "AVX2", "mkl")
    with (
        mock.patch.object(matmul, "this_processor", lambda: [zen5, other][job.runtime.rank]),
        mock.patch.object(matmul, "_onednn_keeps_float32", lambda: True),
    ):
        runtime = processes.join_job("cpu", timeout_s=600, threads=1)
    found = processes.gather_objects([str(runtime.matmul), torch.get_float32_matmul_precision()], runtime)
    matmul.choose_matmul_library(matmul.Matmul.blas)
    return found
