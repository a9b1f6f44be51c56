"""`trainer/verification` in ranks that stay up: sound runs, and runs with a planted fault. Part of the parity job."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from strategies import sequence
from strategies.base import ActivationCheckpointing, Precision, StrategyConfig
from strategies.errors import ConfigError
from strategies.runtime import barrier, broadcast_object
from tests.helpers.building import STRATEGIES, model_dir, run_config
from tests.helpers.objectives import OBJECTIVE_TESTS
from tests.helpers.seq2seq import seq2seq_dir
from tests.parity.base import Job
from trainer.config.parallel import ParallelConfig
from trainer.config.run import RunConfig
from trainer.objectives.base import TeacherConfig
from trainer.tuning.base import FullConfig, LoraConfig
from trainer.tuning.config import BottleneckConfig, VeraConfig
from trainer.verification import run, steps

TUNINGS = {
    "full": FullConfig(),
    "lora": LoraConfig(rank=4, dropout=0.1),
    "lora on all parts": LoraConfig(rank=4, experts=True, router=True),
    "vera": VeraConfig(),
    "bottleneck": BottleneckConfig(size=8),
}
ALTERED = ("plain", "bf16", "recomputed", "packing", "accumulating", "sequence", "sequence, recomputed, bf16")
OBJECTIVES = tuple(name for name in OBJECTIVE_TESTS if name != "grpo")
"""All but those whose data the model writes itself: the verification draws documents."""
SEQ2SEQ = "seq2seq"
FAULTS = {
    "readers instead of ranks": "sequence",
    "a rank left out": "plain",
    "a rank's own gradient": "plain",
    "the identity as adjoint": "sequence",
    "gradients of heads left with their rank": "sequence",
}
"""Faults, and the altered run in which each is planted."""


def config_of(job: Job, architecture: str, strategy: str, tuning: str, objective: str, altered: str) -> RunConfig:
    """The settings of a case, as a user would have them."""
    make = seq2seq_dir if objective == SEQ2SEQ else model_dir
    model = job.first_here(lambda: make(job.root, architecture))
    settings: StrategyConfig = STRATEGIES[strategy]
    if "recomputed" in altered:
        settings = replace(settings, activation_checkpointing=ActivationCheckpointing.full)
    config = run_config(model, settings, "full", micro=4 if altered == "accumulating" else 8)
    learned = OBJECTIVE_TESTS[objective].variants[objective]
    if objective == "distillation":
        learned = replace(learned, teacher=TeacherConfig(path=str(model)))  # type: ignore[call-arg]
    config = replace(config, tuning=TUNINGS[tuning], objective=learned)
    if "bf16" in altered:
        config = replace(config, precision=Precision.bf16)
    if "sequence" in altered:
        config = replace(config, parallel=ParallelConfig(sequence=4))
    if "experts" in altered:
        config = replace(config, parallel=replace(config.parallel, experts=2))
    if altered == "packing":
        config = replace(config, data=replace(config.data, packing=True))
    return config


def verdict(
    job: Job, architecture: str, strategy: str, tuning: str, objective: str, altered: str, fault: str = ""
) -> dict[str, Any]:
    """The verdict on a case, with `fault` planted in the run as configured."""
    config = config_of(job, architecture, strategy, tuning, objective, altered)
    directory = Path(broadcast_object(tempfile.mkdtemp(dir=job.root), job.runtime))
    user_ranks = job.runtime.world_size
    about: dict[str, Any] = {}
    if job.runtime.is_main:
        model, small = run.write_small_models_and_documents(config, directory, user_ranks=user_ranks)
        about = {"model": model.record(), "changes": small.changes, "ranks": small.ranks}
    barrier(job.runtime)
    with planted(fault):
        found = run.verify_step_against_single_process(
            config, directory, job.runtime, user_ranks=user_ranks, report_progress=lambda text: None
        )
    if job.runtime.is_main:
        shutil.rmtree(directory)
    return {**found, **about}


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A fault in every engine of several ranks."""
    real = steps.build_engine

    def faulty(*args: Any, **kwargs: Any) -> Any:
        engine, built, source = real(*args, **kwargs)
        if engine.world_size == 1:  # the process that the others are compared with
            return engine, built, source
        if fault == "readers instead of ranks":
            engine.world_size = engine.runtime.dp_size
        elif fault == "a rank left out":
            backward = engine.backward
            factor = float(engine.rank != 1)
            engine.backward = lambda loss, **how: backward(loss * factor, **how)
        elif fault == "a rank's own gradient":
            engine.wrapped = engine.step_module  # past DDP, which would reduce
        return engine, built, source

    with mock.patch.object(steps, "build_engine", faulty), ExitStack() as patches:
        if fault == "the identity as adjoint":
            own = staticmethod(lambda ctx, grad: (grad, None))
            patches.enter_context(mock.patch.object(sequence.SumOverGroup, "backward", own))
        elif fault == "gradients of heads left with their rank":
            patches.enter_context(mock.patch.object(sequence.AllToAll, "backward", staticmethod(_own_part)))
        yield


def _own_part(ctx: Any, grad: Any) -> tuple[Any, None, None, None]:
    """What `AllToAll` gives back if a rank keeps the gradients of what it sent to itself, and loses the others."""
    found = grad.new_zeros(sum(ctx.send_counts))
    rank = dist.get_rank(ctx.group)
    first_sent, first_received = sum(ctx.send_counts[:rank]), sum(ctx.receive_counts[:rank])
    size = ctx.send_counts[rank]
    found[first_sent : first_sent + size] = grad[first_received : first_received + size]
    return found, None, None, None


def refusal(job: Job, *case: str) -> str:
    """Why a case is refused, and nothing if it is not."""
    try:
        verdict(job, *case)
    except ConfigError as error:
        return str(error)
    return ""
