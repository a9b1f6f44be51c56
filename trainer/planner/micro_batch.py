"""`batch.micro=auto`: the largest micro-batch that fits in memory, chosen once and frozen into the configuration.

The run's own step is simulated for every micro-batch. The largest that should fit is tried by two real steps of the
longest documents, on all ranks. If any rank runs out of memory, the next smaller one is tried. What a trial built is
built anew for the run, so that it takes the same steps as a run with a given micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, Precision
from strategies.errors import DoesNotFit
from strategies.runtime import SIMULATED, Runtime, broadcast_object, gather_objects
from trainer.config.run import AUTO, MICRO, RunConfig, asked_micro
from trainer.data.prepare import Prepared
from trainer.objectives.registry import reading_of
from trainer.planner.cost_model import Form
from trainer.planner.fit_check import PATIENCE, answered_apart, one_step, unsimulated
from trainer.planner.hardware import GIB, fit_of, groups_of
from trainer.planner.lengths import Lengths, divisors, drawn
from trainer.planner.oom_probe import STEPS, Trial, TrialInputs, memory_gib, runs_out
from trainer.reporting.resolution import OutOfMemoryTrial, Resolution

UNPLANNED = 4
"""Documents that are tried first where the step cannot be simulated."""


def settle_micro(
    config: RunConfig, given: TrialInputs, say: Callable[[str], None], freeze: Callable[[RunConfig], None]
) -> RunConfig:
    """The run with its micro-batch: that of the configuration, or the one that is chosen here and handed to `freeze`.

    All ranks must call; they follow rank 0, which may have read what was chosen before. Raises DoesNotFit on every rank where
    not even the smallest holds, or where some ranks alone run out of memory.
    """
    runtime = given.runtime
    batch, earlier = broadcast_object((config.batch, config.resolution(MICRO)), runtime)
    config = _with(config, batch["micro"], earlier)
    part = batch["global"] // runtime.world_size
    known = batch["micro"] != AUTO
    if known and not (asked_micro(batch, config.substitutions) == AUTO and part % batch["micro"]):
        return config
    say("choosing the micro-batch (batch.micro=auto): simulating a step")
    memory = min(gather_objects(memory_gib(runtime), runtime))
    found: tuple[int, str] = (0, "")
    if runtime.is_main:
        ranks = runtime.world_size, runtime.local_world_size
        patience = PATIENCE * runtime.timeout_s
        found = proposed(config, given.data, given.precision, ranks, (runtime.kind, memory), patience)
    micro, why = broadcast_object(found, runtime)
    tried: list[OutOfMemoryTrial] = []
    while runs_out(_with(config, micro, None), given, _trial(micro)):
        tried.append(OutOfMemoryTrial(micro))
        smaller = [each for each in divisors(part) if each < micro]
        if not smaller:
            raise DoesNotFit(
                f"batch.micro=auto: a step of one document in each forward pass runs out of memory ({why}); shorten them "
                "(data.max_length), recompute (strategy.activation_checkpointing=full), shard more or take tuning=lora; "
                "`shardtune plan` compares them"
            )
        say(f"batch.micro={micro} runs out of memory; trying {smaller[-1]}")
        micro = smaller[-1]
    reason = f"{why}; {STEPS} steps of the longest documents held"
    settled = _with(config, micro, Resolution(MICRO, AUTO, micro, reason, tuple(tried)))
    freeze(settled)
    return settled


def would_choose(config: RunConfig, data: Prepared) -> RunConfig:
    """The run with the micro-batch that it would try first on devices like those of this host; for a run without ranks yet."""
    if config.batch["micro"] != AUTO:
        return config
    kind, local = str(config.run.device), config.launcher.per_node
    if kind == "cuda" and not torch.cuda.is_available():
        return _with(config, 1, f"{AUTO} -> as memory allows, on the host with the GPUs; the figures here are for 1")
    runtime = Runtime(
        0, local * config.launcher.nodes, 0, local, torch.device("cuda" if kind == "cuda" else "cpu"), None
    )
    ranks, device = (runtime.world_size, local), (runtime.kind, memory_gib(runtime))
    micro, why = proposed(config, data, config.precision, ranks, device, PATIENCE * config.run.timeout_s)
    reason = f"{why}; {STEPS} steps of the longest documents will be tried"
    return _with(config, micro, Resolution(MICRO, AUTO, micro, reason))


def _trial(micro: int) -> Trial:
    return Trial(MICRO, f"{micro} documents in each forward pass", "give batch.micro a smaller number")


def _with(config: RunConfig, micro: Any, note: Resolution | str | None) -> RunConfig:
    noted = {key: text for key, text in config.substitutions.items() if key != MICRO} | ({MICRO: note} if note else {})
    return replace(config, batch={**config.batch, "micro": micro}, substitutions=noted)


def proposed(
    config: RunConfig,
    data: Prepared,
    precision: Precision,
    ranks: tuple[int, int],
    device: tuple[str, float],
    patience_s: float,
) -> tuple[int, str]:
    """(the largest micro-batch that is planned to fit, why) for (all ranks, those of a host) on (kind, GiB of each device)."""
    world, (kind, memory) = ranks[0], device
    per = reading_of(config.objective).sequences_per_document
    lengths = drawn(config, data.train, per).lengths(config.data, per)
    sizes = divisors(config.batch["global"] // world)
    asked = config.strategy.activation_checkpointing
    # What may be recomputed as memory allows is, where nothing fits without.
    auto = asked is ActivationCheckpointing.auto
    modes = (ActivationCheckpointing.none, ActivationCheckpointing.full) if auto else (asked,)
    told = ""
    for mode in modes:
        step = replace(one_step(_with(config, 1, None), world, auto=mode), precision=precision)
        length = int(lengths.longest[0]) // per
        form: Form | str = answered_apart(simulated_form, (step, length, ranks, kind), patience_s)
        if isinstance(form, str):
            first = max(size for size in sizes if size <= UNPLANNED)
            return first, f"not planned: {form}"
        if form.alone:
            return 1, "the model is right for one document at a time only"
        needed = {size: needed_gib(form, size, lengths, memory) for size in sizes}
        fitting = [size for size in sizes if needed[size] <= memory]
        size = fitting[-1] if fitting else 1
        told = f"planned {needed[size]:.2f} of {memory:.2f} GiB"
        if fitting:
            return size, told
    return 1, told


def needed_gib(form: Form, size: int, lengths: Lengths, memory: float) -> float:
    """GiB of a rank with so many documents in each forward pass."""
    taken = form.at(float(size) if form.rows else lengths.most(size))
    return fit_of(taken.total, groups_of(form), memory).total / GIB


def simulated_form(config: RunConfig, length: int, ranks: tuple[int, int], kind: str) -> Form | str:
    """Rank 0's step on (all ranks, those of a host) of that kind, or why it cannot be simulated; not for a process of a job."""
    from trainer.planner.simulation import simulate_form

    device = SIMULATED if kind == "cuda" else torch.device("cpu")
    accumulation = config.batch["global"] // ranks[0]
    try:
        return simulate_form(
            config, length, accumulation=accumulation, world_size=ranks[0], local_world_size=ranks[1], device=device
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that is an answer
        return f"its step {unsimulated(error)}"
