"""Every strategy against `single`: part of the parity job (`job.py`), on two ranks and on four."""

from dataclasses import replace

from tests.helpers.building import GLOBAL_BATCH, data_set, model_dir, run_config, take_steps, trainer_for
from tests.parity.base import Curve, Job
from trainer.data.prepare import Prepared
from trainer.model.quantisation import Quantisation

STEPS = 5


def names_for(world: int) -> list[str]:
    """The strategies that make sense at this world size."""
    return ["ddp", "fsdp2", "zero1", "zero2", "zero3"] + (["hsdp"] if world >= 4 else [])


def config(job: Job, strategy: str, tuning: str, accumulation: int):
    model = job.first_here(lambda: model_dir(job.root))
    micro = GLOBAL_BATCH // (job.runtime.world_size * accumulation)
    return run_config(model, strategy, tuning, micro=micro, steps=STEPS)


def masked(job: Job, masks: str) -> Prepared:
    """Documents with even or uneven masks, or with uneven ones and weights."""
    return job.first_here(lambda: data_set(job.root, uneven=masks != "even", weighted=masks == "weighted"))


def curve(job: Job, strategy: str, tuning: str, masks: str, accumulation: int) -> Curve:
    """Loss and grad norm of each step."""
    data = masked(job, masks)
    trainer = job.trainer(config(job, strategy, tuning, accumulation), data)
    assert trainer.loader.accumulation == accumulation
    return [list(row) for row in take_steps(trainer, STEPS)]


def lone(job: Job, tuning: str, masks: str) -> dict[str, Curve]:
    """The same under `single`, and at a rate of zero."""
    data = masked(job, masks)
    plain = config(job, "single", tuning, 1)
    return {"curve": job.lone(plain, STEPS, data), "still": job.still(plain, STEPS, data)}


def sockets(job: Job, strategy: str) -> Curve:
    """As ranks on several hosts would exchange: all others did through the memory of theirs."""
    settings = config(job, strategy, "full", 1)
    assert job.trainer(settings).engine.host_memory is not None
    trainer = trainer_for(settings, job.data, replace(job.runtime, shared_memory=False))
    assert trainer.engine.host_memory is None
    return [list(row) for row in take_steps(trainer, STEPS)]


def quantised_hsdp(job: Job) -> dict[str, Curve]:
    """The one strategy that the two ranks of `bases.py` cannot have."""
    settings = config(job, "hsdp", "lora", 1)
    settings = replace(settings, model=replace(settings.model, quantisation=Quantisation.nf4))
    return {"found": job.curve(settings, STEPS), "expected": job.lone(settings, STEPS)}
