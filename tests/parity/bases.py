"""Bases that are not the checkpoint's own, and adapters that are not new: part of the parity job (`job.py`).

Quantised bases, bases with folded adapters, and runs that go on from an adapter, under every strategy and in one process.
"""

from dataclasses import replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision
from strategies.state import read_index
from tests.helpers.adapters import plain_adapter
from tests.helpers.building import model_dir, pair_set, run_config, take_steps
from tests.parity.base import Curve, Job, lone_steps, values_of
from tests.parity.methods import FEWER, STEPS, released_at_once
from tests.parity.plan import SHARDING
from trainer.config.run import RunConfig
from trainer.data.batches.loader import EvalShare, eval_batches
from trainer.evaluation.loss import LossEvaluator
from trainer.model.config import Quantisation
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


RESUMED = {"nf4": (QUANTISED, LORA), "from, nf4": (QUANTISED, FIRST)}
ELSEWHERE = {"fsdp2": "zero3", "zero3": "ddp"}
PREFERENCE = {"plain": {}, "nf4": QUANTISED}


EVALUATED = 16
"""Documents of an evaluation between steps."""


def _config(job: Job, model: dict, tuning: LoraConfig, strategy: Any, **changes: Any) -> RunConfig:
    def made():
        path = model_dir(job.root)
        if not (job.root / "second").exists():
            plain_adapter(path, job.root / "first", r=4, lora_alpha=32, seed=1)
            plain_adapter(path, job.root / "second", r=2, lora_alpha=8, seed=2, target_modules=["q_proj", "down_proj"])
        return path

    config = run_config(job.first_here(made), strategy, "lora", micro=4, steps=STEPS, **changes)
    if tuning.from_ is not None:
        tuning = replace(tuning, from_=str(job.root / tuning.from_))
    settings = dict(model)
    if "adapters" in settings:
        settings["adapters"] = [str(job.root / name) for name in settings["adapters"]]
    return replace(config, tuning=tuning, model=replace(config.model, **settings))


def _lone(job: Job, case: str) -> tuple[dict[str, torch.Tensor], Curve, float]:
    model, tuning, _ = CASES[case]
    config = _config(job, model, tuning, "single")

    def computed():
        trainer = job.lone_trainer(config)
        start = values_of(trainer)
        curve = lone_steps(trainer, FEWER)
        return start, curve, job.far(trainer, curve, config)

    return job.oracle(("base", case), computed, elsewhere=({}, [], 0.0))


def lone(job: Job, case: str) -> dict[str, Any]:
    """The curve of one process, and how far it is from one that learns nothing."""
    _, curve, far = _lone(job, case)
    return {"curve": curve, "learned": far}


def curve(job: Job, case: str, name: str) -> dict[str, Any]:
    """Loss and grad norm of every step, and whether all initial values are those of the lone process."""
    model, tuning, _ = CASES[case]
    with released_at_once():
        trainer = job.trainer(_config(job, model, tuning, STRATEGIES[name]))
        same = _same(job, trainer, _lone(job, case)[0])
        return {"found": take_steps(trainer, FEWER), "same": same}


def _same(job: Job, trainer: Any, expected: dict[str, torch.Tensor]) -> bool:
    seen, same = set(), True
    for name, value in trainer.engine.gather_full_parameters(trainable_only=False):
        if value is not None:
            same &= torch.equal(value, expected[name]) and value.dtype is expected[name].dtype
            seen.add(name)
    return bool(same) and (not job.runtime.is_main or seen == set(expected))


def evaluated(job: Job, kind: str, name: str) -> dict[str, Any]:
    """A curve with and without evaluation between the steps, and what evaluation finds at a rate that moves nothing."""
    with released_at_once():
        curves, losses = [], []
        for evaluate in (False, True):
            trainer = job.trainer(_config(job, MODELS[kind], LORA, STRATEGIES[name]))
            rows = []
            for _ in range(FEWER):
                if evaluate:
                    _evaluation(job, trainer)
                rows += take_steps(trainer, 1)
            curves.append(rows)
        still = AdamwConfig(lr=1e-30, weight_decay=0.0)
        trainer = job.trainer(_config(job, MODELS[kind], LORA, STRATEGIES[name], optim=still))
        for _ in range(2):
            losses.append(_evaluation(job, trainer))
            take_steps(trainer, 1)
        return {"without": curves[0], "with": curves[1], "still": losses}


def _evaluation(job: Job, trainer: Any) -> float:
    engine = trainer.engine

    def batches():
        share = EvalShare(4, engine.rank, engine.world_size, EVALUATED)
        return eval_batches(job.data.train, share, trainer.loader.collator, job.runtime.device)

    count = int(job.data.train.counts["loss"][:EVALUATED].sum())
    evaluator = LossEvaluator(batches, loss_denominator=count, perplexity=True)
    return dict(evaluator.run(engine))["eval/loss"]


def resumed(job: Job, case: str, name: str) -> dict[str, Any]:
    """Two steps after a saved state, by the run that saved it and by fresh ones, also under another strategy."""
    model, tuning = RESUMED[case]
    with released_at_once():
        first = job.trainer(_config(job, model, tuning, STRATEGIES[name]))
        take_steps(first, 2)
        path = job.saved(first)
        row: dict[str, Any] = {"uninterrupted": take_steps(first, 2)}
        for key, strategy in (("resumed", name), ("elsewhere", ELSEWHERE[name])):
            row[key] = job.go_on(_config(job, model, tuning, STRATEGIES[strategy]), path, 2)
        row["saved"] = sorted(read_index(path))
        return row


def preference(job: Job, case: str, name: str) -> dict[str, Any]:
    """DPO from a first adapter: the first loss is log 2 where the reference is the first adapter's model."""
    data = job.first_here(lambda: pair_set(job.root))
    with released_at_once():
        config = _config(job, PREFERENCE[case], FIRST, STRATEGIES[name], objective=DpoConfig(beta=0.5))
        expected, far = job.oracle(
            ("preference", case), lambda: job.lone_and_far(config, FEWER, data), elsewhere=([], 0.0)
        )
        return {"found": job.curve(config, FEWER, data), "expected": expected, "learned": far}


def half(job: Job, name: str) -> Curve:
    """bf16 under the strategies that convert parameters."""
    with released_at_once():
        return job.curve(_config(job, QUANTISED, LORA, STRATEGIES[name], precision=Precision.bf16), FEWER)
