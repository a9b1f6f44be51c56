"""Every strategy against `single`: part of the parity job (`job.py`), on two ranks and on four."""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from tests.helpers.building import GLOBAL_BATCH, data_set, model_dir, run_config, take_steps, trainer_for
from tests.parity.base import Curve, Job
from trainer.data.prepare import PreparedData
from trainer.model.config import Quantisation

STEPS = 5


def names_for(world: int) -> list[str]:
    """The strategies that make sense at this world size."""
    return ["ddp", "fsdp2", "zero1", "zero2", "zero3"] + (["hsdp"] if world >= 4 else [])


def config(job: Job, strategy: str, tuning: str, accumulation: int):
    model = job.first_here(lambda: model_dir(job.root))
    micro = GLOBAL_BATCH // (job.runtime.world_size * accumulation)
    return run_config(model, strategy, tuning, micro=micro, steps=STEPS)


def masked(job: Job, masks: str) -> PreparedData:
    """Documents with even or uneven masks, or with uneven ones and weights."""
    return job.first_here(lambda: data_set(job.root, uneven=masks != "even", weighted=masks == "weighted"))


def curve(job: Job, strategy: str, tuning: str, masks: str, accumulation: int) -> Curve:
    """Loss and grad norm of each step."""
    data = masked(job, masks)
    trainer = job.trainer(config(job, strategy, tuning, accumulation), data)
    assert trainer.loader.accumulation == accumulation
    return [list(row) for row in take_steps(trainer, STEPS)]


def lone(job: Job, tuning: str, masks: str) -> dict[str, Any]:
    """The same under `single`, and how far that is from a run that learns nothing."""
    data = masked(job, masks)
    plain = config(job, "single", tuning, 1)
    curve, far = job.oracle(
        ("matrix", tuning, masks), lambda: job.lone_and_far(plain, STEPS, data), elsewhere=([], 0.0)
    )
    return {"curve": curve, "learned": far}


def sockets(job: Job, strategy: str) -> Curve:
    """As ranks on several hosts would exchange: all others did through the memory of theirs."""
    settings = config(job, strategy, "full", 1)
    assert job.trainer(settings).engine.host_memory is not None
    trainer = trainer_for(settings, job.data, replace(job.runtime, shared_memory=False))
    assert trainer.engine.host_memory is None
    return [list(row) for row in take_steps(trainer, STEPS)]


def reduced_each(job: Job) -> dict[str, Any]:
    """Replicas of two shards that have no room for whole gradients, four micro-batches a step."""
    settings = config(job, "hsdp", "full", 4)
    settings = replace(settings, strategy=replace(settings.strategy, memory_gib=1e-6))
    calls: list[int] = []
    real = torch.distributed.all_reduce

    def counted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    trainer = job.trainer(settings)
    with mock.patch.object(_fsdp_collectives.dist, "all_reduce", counted):
        steps = [list(row) for row in take_steps(trainer, STEPS)]
    groups = sum(isinstance(module, FSDPModule) for module in trainer.engine.step_module.modules())
    large = sum(numel > 1000 for numel in calls)  # norms and counts are small
    return {"found": steps, "deferred": trainer.engine.defer_sync, "reductions": large / STEPS, "groups": groups}


def timeouts(job: Job) -> dict[str, list[float]]:
    """Seconds after which each group of this process gives up, with those that strategies and DeepSpeed have made."""
    found = {}
    for strategy in ("hsdp", "zero2"):
        trainer = job.trainer(config(job, strategy, "full", 1))
        groups = [group for group in distributed_c10d._world.pg_map if torch.distributed.get_rank(group) >= 0]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        found[strategy] = [backend.options._timeout.total_seconds() for backend in backends]
        del trainer
    return {**found, "asked": [job.runtime.timeout_s]}


def quantised_hsdp(job: Job) -> dict[str, Curve]:
    """The one strategy that the two ranks of `bases.py` cannot have."""
    settings = config(job, "hsdp", "lora", 1)
    settings = replace(settings, model=replace(settings.model, quantisation=Quantisation.nf4))
    expected = job.oracle("quantised", lambda: job.lone(settings, STEPS), elsewhere=[])
    return {"found": job.curve(settings, STEPS), "expected": expected}
