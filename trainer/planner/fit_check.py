"""`run.must_fit`: whether a run fits its GPUs, simulated in a process of its own before the model is built."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig
from strategies.errors import ConfigError, DoesNotFit
from strategies.parent_death import die_with_parent
from strategies.runtime import Runtime, broadcast_object, gather_objects
from trainer.build.parts import workload
from trainer.build.recomputation import device_gib, longest_lengths
from trainer.config.run import RunConfig
from trainer.data.prepare import Prepared
from trainer.model.config import Quantisation
from trainer.objectives.registry import reading_of
from trainer.planner.hardware import GIB, Fit, fit_of, groups_of
from trainer.reporting.run_record import MemoryCheck
from trainer.stopping.signals import SIGNALS
from trainer.tuning.base import TuningName

OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 0.8
"""Share of `run.timeout_s` that a simulation may take: after all of it the ranks that wait would give up."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What a rank's step holds at most."""

    live: int
    """Bytes of tensors."""
    when: str
    groups: int
    """Of ranks, that exchange something."""


def simulable(strategy: StrategyConfig) -> StrategyConfig:
    """The strategy as it can be simulated: not compiled, and gradients that wait only where they fit do not."""
    strategy = replace(strategy, compile=False)
    if isinstance(strategy, Fsdp2Config) and strategy.defer_sync is None:
        strategy = replace(strategy, defer_sync=False)
    return strategy


def unsimulated(error: Exception) -> str:
    """Why there is no answer, whatever an architecture did that cannot be simulated."""
    said = (str(error).strip() or "no message").splitlines()[0][:160]
    return f"cannot be simulated yet ({type(error).__name__}: {said})"


def one_step(config: RunConfig, world: int, *, auto: ActivationCheckpointing) -> RunConfig:
    """The run with a step that says what any of its steps holds, and can be simulated.

    Where the run would choose by memory what it recomputes, all blocks do as `auto` says.
    """
    strategy = simulable(config.strategy)
    if strategy.activation_checkpointing is ActivationCheckpointing.auto:
        strategy = replace(strategy, activation_checkpointing=auto)
    micro = config.batch["micro"]
    accumulation = min(2, config.batch["global"] // (micro * world))  # more micro-batches hold no more
    return replace(config, strategy=strategy, batch={"global": micro * world * max(1, accumulation), "micro": micro})


def must_fit(
    config: RunConfig, data: Prepared, precision: Precision, runtime: Runtime, say: Callable[[str], None]
) -> dict[str, Any]:
    """The `must_fit` of the run record, simulated for the longest micro-batch; nothing where `run.must_fit` does not ask.

    All ranks must call: rank 0 simulates in another process, and all go by the card with the least memory. Raises DoesNotFit
    on every rank, also where it cannot be told; ConfigError where the ranks have no GPUs.
    """
    if not config.run.must_fit:
        return {}
    if runtime.kind != "cuda":
        raise ConfigError("run.must_fit=true: asks for the memory of GPUs, and this run has none; leave it out")
    say("simulating whether the run fits its GPUs (run.must_fit)")
    least = min(gather_objects(device_gib(runtime), runtime))
    found: Peak | str = ""
    if runtime.is_main:
        step = one_step(config, runtime.world_size, auto=ActivationCheckpointing.full)
        lengths = longest_lengths(reading_of(config.objective), workload(config, data))
        ranks = runtime.world_size, runtime.local_world_size
        found = simulated_apart(replace(step, precision=precision), lengths, ranks, PATIENCE * config.run.timeout_s)
    found = broadcast_object(found, runtime)
    if isinstance(found, str):
        raise DoesNotFit(
            f"run.must_fit=true: it is not known whether the run fits, since {found}; leave it out to try it"
        )
    fit = fit_of(found.live, found.groups, least)
    if fit.margin < 0:
        raise DoesNotFit(refusal(fit, found, config))
    simulated = MemoryCheck(
        live_gib=found.live / GIB, needed_gib=fit.total / GIB, device_gib=least, when=str(found.when)
    )
    return {"must_fit": simulated}


def refusal(fit: Fit, peak: Peak, config: RunConfig) -> str:
    """What is needed, what is there, and what could be set otherwise."""
    beside = (fit.total - fit.live) / GIB
    micro, mode = config.batch["micro"], config.strategy.activation_checkpointing
    knobs = [f"batch.micro below {micro}"] if micro > 1 else []
    knobs += [f"data.max_length below {config.data.max_length}"]
    if mode not in (ActivationCheckpointing.full, ActivationCheckpointing.auto):
        knobs += ["strategy.activation_checkpointing=full"]
    knobs += ["a strategy that shards more, or more GPUs"]
    if config.tuning.name is TuningName.full:
        knobs += ["tuning=lora"]
    elif config.model.quantisation is Quantisation.none:
        knobs += ["model.quantisation=nf4"]
    return (
        f"run.must_fit=true: the run needs {fit.total / GIB:.2f} GiB on a GPU of {fit.limit / GIB:.2f} GiB: tensors take "
        f"{fit.live / GIB:.2f} GiB in {peak.when}, libraries, allocator and groups of ranks about {beside:.2f} GiB. What helps: "
        f"{', '.join(knobs)}. `shardtune plan` compares them; run.must_fit=false tries it all the same"
    )


def simulated_apart(config: RunConfig, lengths: list[int], ranks: tuple[int, int], patience_s: float) -> Peak | str:
    """The peak of a step of sequences of `lengths` tokens on (all ranks, those of a host), or why it cannot be told."""
    found: Peak | str = answered_apart(_simulate, (config, lengths, ranks), patience_s)
    return found


def answered_apart(ask: Callable[..., Any], given: tuple[Any, ...], patience_s: float) -> Any:
    """What `ask`, a function of a module, answers to `given` in a process of its own, or text why it does not.

    A process that is part of a job, or has GPUs, cannot simulate: another one is started for it.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(its, ask, given), daemon=True)
    child.start()
    its.close()
    try:
        if not mine.poll(patience_s):
            return f"its simulation took more than {patience_s:.0f} s (of run.timeout_s)"
        return mine.recv()
    except EOFError:
        return "the process that simulates it ended without an answer"
    finally:
        child.kill()
        child.join()
        mine.close()


def _answer(out: Connection, ask: Callable[..., Any], given: tuple[Any, ...]) -> None:
    asker = multiprocessing.parent_process()
    die_with_parent(None if asker is None else asker.pid)
    for number in (*SIGNALS, signal.SIGINT):  # meant for the run, which saves and ends
        signal.signal(number, signal.SIG_IGN)
    for name in OF_A_JOB:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its context would take memory of the run's card
    out.send(ask(*given))


def _simulate(config: RunConfig, lengths: list[int], ranks: tuple[int, int]) -> Peak | str:
    from trainer.planner.simulation import simulate_depth

    try:
        found = simulate_depth(config, lengths, world_size=ranks[0], local_world_size=ranks[1])
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that is an answer
        return f"its step {unsimulated(error)}"
    return Peak(found.total, str(found.peak), groups_of(found))
