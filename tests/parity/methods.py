"""Tuning methods against `single`: part of the parity job (`job.py`). Which runs is said by `plan.py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import strategies.zero
from strategies import runtime as processes
from strategies.parameters import named_parameters
from tests.helpers.building import GLOBAL_BATCH, model_dir, run_config, take_steps
from tests.helpers.covering import EVERYTHING
from tests.helpers.learning import LEAST_LEARNED
from tests.parity.base import Curve, Job, lone_steps, values_of
from tests.parity.plan import CASES, OTHERWISE, SHARDING, Run
from trainer.config.run import RunConfig
from trainer.tuning.base import LoraConfig, TuningConfig
from trainer.tuning.config import OftConfig

FEWER, STEPS = 3, 5
"""Steps that are compared: of most cases fewer, the last of which shows two updates, one of them at the full rate.

All five of those that learn too little in fewer, and of AdaLoRA, which drops ranks later; `test_matrix.py` takes five of all.
"""
EXPERTS = 8
"""Of a layer of the mixture that the feature `experts` deals over two ranks."""
RESUMED = {
    "lora pissa": LoraConfig(rank=4, init="pissa", lr_ratio=4.0),
    "oft": OftConfig(block_size=8),
    "prefix projection": CASES["prefix projection"],
    "bottleneck": CASES["bottleneck"],
}
ELSEWHERE = {"fsdp2": "zero2", "zero3": "ddp"}


@contextmanager
def released_at_once() -> Iterator[None]:
    """Make stage 3 keep nothing gathered."""
    derive = strategies.zero.deepspeed_config

    def derived(*args: Any, **kwargs: Any) -> dict[str, Any]:
        settings = derive(*args, **kwargs)
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
        return settings

    with mock.patch.object(strategies.zero, "deepspeed_config", derived):
        yield


@contextmanager
def only_traced() -> Iterator[None]:
    """Make `torch.compile` trace as ever, but run the graphs as they are: no C++ is compiled.

    The backward pass is traced too in `make test-all`, in twice the time.
    """
    compiled = torch.nn.Module.compile

    def traced(module: torch.nn.Module, **options: Any) -> Any:
        return compiled(module, backend="aot_eager" if EVERYTHING else "eager", **options)

    with mock.patch.object(torch.nn.Module, "compile", traced):
        yield


def config(job: Job, tuning: TuningConfig, strategy: str, feature: str = "plain") -> RunConfig:
    def made() -> Path:
        if feature == "experts":
            return model_dir(job.root / "mixture", "qwen3_moe", num_experts=EXPERTS)
        return model_dir(job.root)

    model = job.first_here(made)
    micro = min(4, GLOBAL_BATCH // job.runtime.world_size)
    plain = run_config(model, "single", "lora", micro=micro, steps=STEPS)
    return replace(plain, tuning=tuning, strategy=SHARDING.get(strategy, plain.strategy))


def curves(job: Job, case: str, strategy: str, feature: str, optim: str) -> dict[str, Any]:
    """Loss and grad norm of every step, the largest difference of initial values, and what the lone process found."""
    run = Run(case, strategy, feature, optim)
    with released_at_once(), only_traced():
        lone, start, far = _lone(job, run)
        trainer = job.trainer(run.config(config(job, CASES[case], strategy, feature)))
        trained = {name for name, p in named_parameters(trainer.engine.step_module) if p.requires_grad}
        # In bf16 a frozen base is kept rounded.
        worst = job.gathered_apart(trainer, start, of=trained if feature == "bf16" else set(start))
        found = take_steps(trainer, processes.broadcast_object(len(lone), job.runtime))
        torch.compiler.reset()
    return {"found": found, "start": worst, "expected": lone, "learned": far}


def _lone(job: Job, run: Run) -> tuple[Curve, dict[str, torch.Tensor], float]:
    """The curve of rank 0 alone, the values at its start, and how far it is from one that learns nothing."""
    feature = run.feature if run.feature in OTHERWISE else "plain"
    settings = Run(run.case, "single", feature, run.optim).config(config(job, CASES[run.case], "single", run.feature))

    def computed() -> tuple[Curve, dict[str, torch.Tensor], float]:
        trainer = job.lone_trainer(settings)
        start = values_of(trainer)
        if run.case != "adalora":
            curve = lone_steps(trainer, FEWER)
            if (far := job.again(trainer, curve)) > LEAST_LEARNED:
                return curve, start, far
        curve, far = job.lone_and_far(settings, STEPS)
        return curve, start, far

    return job.oracle(("lone", run.oracle), computed, elsewhere=([], {}, 0.0))


def resume(job: Job, case: str, strategy: str) -> dict[str, Any]:
    """Two steps after a saved state, by the run that saved it and by a fresh one, also under another strategy."""
    with released_at_once():
        if case == "adalora":  # replicated strategies only: the other one is a single process
            return _resume_adalora(job)
        other = SHARDING[ELSEWHERE[strategy]]
        return job.resumed(config(job, RESUMED[case], strategy), other, before=2, steps=2)


def _resume_adalora(job: Job) -> dict[str, Any]:
    settings = config(job, CASES["adalora"], "ddp")
    first = job.trainer(settings)
    take_steps(first, 3)
    path = job.saved(first)
    alone = job.lone_trainer(settings)
    alone.progress = alone.engine.load(path)
    return {
        "uninterrupted": take_steps(first, 2),
        "resumed": job.go_on(settings, path, 2),
        "elsewhere": lone_steps(alone, 2),
    }


def files(job: Job) -> list[float]:
    """The same loss before and after rank 0 alone makes the files of an adapter and of a module trained in full."""
    from peft.utils.save_and_load import get_peft_model_state_dict

    trainer = job.trainer(config(job, LoraConfig(rank=4, modules_to_save=["lm_head"]), "fsdp2"))
    take_steps(trainer, 1)
    batch = trainer.loader.collator([job.data.train.sample(number) for number in range(4)])
    found = []
    for _ in range(2):
        with trainer.engine.inference() as module:
            found.append(float(module(batch)["loss"]))
        state = dict(trainer.engine.gather_full_parameters(trainable_only=True))
        if job.runtime.is_main:
            get_peft_model_state_dict(trainer.engine.step_module.model, state_dict=state, save_embedding_layers=False)
    return found
