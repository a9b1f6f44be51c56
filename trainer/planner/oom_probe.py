"""Two real steps of the longest documents, to see whether a choice fits in memory. All ranks must call."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass
from datetime import timedelta

import torch

from strategies.compat.process_groups import default_store
from strategies.errors import DoesNotFit
from strategies.runtime import Runtime, free_host_memory_bytes
from trainer.build.inputs import RunInputs
from trainer.build.parts import build_engine, largest_micro_batch
from trainer.build.recomputation import USABLE_SHARE, device_memory_gib, longest_micro_batch
from trainer.config.parallel import accumulation_steps
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import sequence_cut
from trainer.planner.fit_check import TIMEOUT_SHARE
from trainer.planner.hardware import GIB
from trainer.planner.minimal_step import build_step_batch, minimal_trainer
from trainer.planner.oom_report import is_out_of_memory

PROBE_STEPS = 2
"""The first step creates the optimizer's state, the second holds it from its beginning."""


_RAN_OUT, _HELD = "out", "held"
"""The outcome of a probe on one rank, as the ranks' store has it: out of memory, or the steps were taken."""


@dataclass(frozen=True, slots=True)
class ProbeDescription:
    """A probe in the words of its messages."""

    setting: str
    """The key that is `auto`, such as `batch.micro`."""
    choice: str
    """The choice that is probed, in words; it must be unique in a run, since the ranks' outcomes are stored under it."""
    remedy: str
    """What to set if only some ranks run out."""


def available_device_gib(runtime: Runtime) -> float:
    """GiB of its device's memory that this rank may plan with, when the run chooses what fits.

    On a GPU all of it. On a CPU the rank's part of the host's memory or of the job's limit, or of what is free now if that is
    less. A share of it is kept back.
    """
    device_gib = device_memory_gib(runtime)
    if runtime.device.type == "cuda":
        return device_gib
    free_bytes = free_host_memory_bytes()
    if free_bytes is None:
        return USABLE_SHARE * device_gib
    return USABLE_SHARE * min(device_gib, free_bytes / GIB / runtime.local_world_size)


def probe_runs_out_of_memory(config: RunConfig, inputs: RunInputs, probe: ProbeDescription) -> bool:
    """Try whether a choice of `batch.micro=auto` or `strategy=auto` fits: take two real steps of the longest documents with it.

    Returns whether all ranks ran out of memory. Model and optimizer of the probe are freed again. `config`: with the choice.
    `probe`: the choice in words, for messages. Raises DoesNotFit if some ranks run out and others do not. All ranks must call.
    """
    reason: str | None = None
    try:
        take_probe_steps(config, inputs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Keep the text alone: the error's stack frames keep the probe's tensors alive.
        reason = (str(error).strip() or "out of memory").splitlines()[0]
    gc.collect()
    if inputs.runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(inputs.runtime.device)
    return all_ranks_ran_out(probe, reason, inputs.runtime)


def take_probe_steps(config: RunConfig, inputs: RunInputs) -> None:
    """Build model and engine, take two steps of the longest documents, and close the engine, to see if memory suffices.

    Raises what an allocation raises if it does not. All ranks must call.
    """
    # `scores_answers`: with reward models, since they hold memory beside the steps of the run.
    engine, built, _ = build_engine(
        config, inputs.tokenizer, inputs.data, inputs.precision, inputs.runtime, scores_answers=True
    )
    built.set_total_steps(PROBE_STEPS + 1)  # as in `minimal_trainer`, there is a last step that is not taken
    runtime = inputs.runtime
    # Two micro-batches hold as much as any number: the second adds to the gradients that the first left.
    num_micro_batches = min(2, accumulation_steps(config, runtime.world_size))
    cut = sequence_cut(runtime)  # this rank's slice of a row, if ranks share rows
    longest = longest_micro_batch(built, largest_micro_batch(config, inputs.data, cut))
    trainer = minimal_trainer(engine)  # the run's training loop, which takes steps and nothing else
    try:
        for _ in range(PROBE_STEPS):
            trainer.train_step(build_step_batch([longest] * num_micro_batches, runtime.device))
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
    finally:
        engine.close()


def all_ranks_ran_out(probe: ProbeDescription, reason: str | None, runtime: Runtime) -> bool:
    """Learn after a probe whether all ranks ran out of memory: True if all did, False if none did; DoesNotFit if some did.

    `reason`: why this rank ran out; None if it did not. If only some ranks run out, the others hang in a collective that those do
    not join. So outcomes are exchanged through the ranks' key-value store, where a rank can stop waiting, and DoesNotFit ends
    the job, with the ranks that hang. `probe`: what was tried, in words, for the message. All ranks must call.
    """
    ran_out = reason is not None
    if runtime.world_size == 1:
        return ran_out
    # Report this rank's outcome, and wait for those of the others.
    store = default_store()
    keys = [f"shardtune/{probe.setting}/{probe.choice}/{rank}" for rank in range(runtime.world_size)]
    store.set(keys[runtime.rank], _RAN_OUT if ran_out else _HELD)
    timeout_s = TIMEOUT_SHARE * runtime.timeout_s
    if ran_out:  # give up before the others do, which could not say which rank ran out, and why
        timeout_s /= 2
    outcome_by_rank: list[str] = []  # empty if some ranks did not report in time
    # Suppressed: the time is up, or the process that keeps the store has ended.
    with contextlib.suppress(RuntimeError, ValueError):
        store.wait(keys, timedelta(seconds=timeout_s))
        outcome_by_rank = [store.get(key).decode() for key in keys]
    all_agree = len(set(outcome_by_rank)) == 1
    if all_agree:
        return ran_out

    # Some ranks ran out, and others did not or hang.
    ranks_out = [rank for rank, outcome in enumerate(outcome_by_rank) if outcome == _RAN_OUT]
    if not ranks_out and ran_out:  # the others did not report in time
        ranks_out = [runtime.rank]
    who_ran_out = f"rank {', '.join(map(str, ranks_out))} runs" if ranks_out else "some rank ran"
    because = f" ({reason})" if reason else ""
    raise DoesNotFit(
        f"{probe.setting}=auto: with {probe.choice} {who_ran_out} out of memory{because}, and the others do not; "
        f"{probe.remedy}, or free that device"
    )
