"""Two real steps of the longest documents, to see whether a choice fits in memory. All ranks must call."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from strategies.base import Precision
from strategies.compat.process_groups import default_store
from strategies.errors import DoesNotFit
from strategies.runtime import Runtime, free_host_memory
from trainer.build.parts import build_engine, workload
from trainer.build.recomputation import USABLE_SHARE, device_gib, longest_micro_batch
from trainer.config.run import RunConfig
from trainer.data.prepare import Prepared
from trainer.planner.fit_check import PATIENCE
from trainer.planner.hardware import GIB
from trainer.planner.minimal_step import bare_trainer, batch_of
from trainer.planner.oom_report import of_memory

STEPS = 2
"""The first makes the optimizer's state, the second has it."""


@dataclass(frozen=True, slots=True)
class TrialInputs:
    """What a run has before its model is built."""

    tokenizer: Any
    data: Prepared
    precision: Precision
    runtime: Runtime


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried, in the words of a message."""

    setting: str
    """The key that is `auto`."""
    of: str
    """What it is tried as; once a run."""
    remedy: str
    """What to set where some ranks alone run out."""


def memory_gib(runtime: Runtime) -> float:
    """Memory of this rank's device in GiB; on a CPU its part of what the host has to give now, or the job's limit."""
    if runtime.device.type == "cuda":
        return device_gib(runtime)
    there, free = device_gib(runtime), free_host_memory()
    return USABLE_SHARE * (there if free is None else min(there, free / GIB / runtime.local_world_size))


def runs_out(config: RunConfig, given: TrialInputs, trial: Trial) -> bool:
    """Whether two steps of the longest documents run out of memory on all ranks; nothing of them stays. All ranks must call.

    Raises DoesNotFit where some ranks run out alone.
    """
    why: str | None = None
    try:
        take_steps(config, given)
    except (RuntimeError, MemoryError) as error:
        if not of_memory(error):
            raise
        why = (str(error).strip() or "out of memory").splitlines()[0]  # the error's frames hold what was allocated
    gc.collect()
    if given.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(given.runtime.device)
    return agreed(trial, why, given.runtime)


def take_steps(config: RunConfig, given: TrialInputs) -> None:
    """Two steps of the longest documents by an engine that is closed again. All ranks must call."""
    engine, built, _ = build_engine(config, given.tokenizer, given.data, given.precision, given.runtime)
    if built.step_module.plan.optimizer_hooks is not None:
        built.step_module.plan.optimizer_hooks.begin(STEPS + 1)
    micro_batches = min(2, config.batch["global"] // (config.batch["micro"] * given.runtime.world_size))
    longest = longest_micro_batch(built, workload(config, given.data))
    trainer = bare_trainer(engine)
    try:
        for _ in range(STEPS):
            trainer.train_step(batch_of([longest] * micro_batches, given.runtime.device))
        if given.runtime.device.type == "cuda":
            torch.cuda.synchronize(given.runtime.device)
    finally:
        engine.close()


def agreed(trial: Trial, why: str | None, runtime: Runtime) -> bool:
    """Whether all ranks ran out of memory (`why` says it of this one); False where none did. All ranks must call.

    A rank that runs out alone leaves the others in an exchange that it cannot join: it waits for them a while, in the store
    that is not used for exchange, and raises DoesNotFit, which ends the job.
    """
    if runtime.world_size == 1:
        return why is not None
    store = default_store()
    keys = [f"shardtune/{trial.setting}/{trial.of}/{rank}" for rank in range(runtime.world_size)]
    store.set(keys[runtime.rank], "out" if why else "held")
    patience = PATIENCE * runtime.timeout_s / (2 if why else 1)
    try:
        store.wait(keys, timedelta(seconds=patience))
        answers = [store.get(key).decode() for key in keys]
    except (RuntimeError, ValueError):
        answers = []
    if answers and len(set(answers)) == 1:
        return why is not None
    alone = [rank for rank, answer in enumerate(answers) if answer == "out"] or ([runtime.rank] if why else [])
    said = f"rank {', '.join(map(str, alone))} runs" if alone else "some rank ran"
    raise DoesNotFit(
        f"{trial.setting}=auto: with {trial.of} {said} out of memory{f' ({why})' if why else ''}, and the others do not; "
        f"{trial.remedy}, or free that device"
    )
