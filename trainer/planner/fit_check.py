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
from trainer.build.parts import largest_micro_batch
from trainer.build.recomputation import device_memory_gib, longest_sequence_lengths
from trainer.config.parallel import accumulation_steps, dp_size_of
from trainer.config.run import RunConfig
from trainer.data.prepare import PreparedData
from trainer.model.config import Quantisation
from trainer.objectives.registry import data_spec_of
from trainer.planner.hardware import GIB, MemoryFit, device_memory_fit, num_rank_groups
from trainer.planner.rank_devices import RankCounts
from trainer.reporting.run_record import MemoryCheck
from trainer.stopping.signals import STOP_SIGNALS
from trainer.tuning.base import TuningName

JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_SHARE = 0.8
"""Share of `run.timeout_s` that a simulation may take: after all of it the ranks that wait would give up."""


@dataclass(frozen=True, slots=True)
class NotSimulated:
    """What a simulation returns in place of a peak or a cost model if it failed."""

    reason: str
    """A clause for a message, such as `its step cannot be simulated yet (KeyError: 'x')`."""


@dataclass(frozen=True, slots=True)
class SimulatedPeak:
    """The peak memory of a rank's step."""

    live_bytes: int
    """Bytes of tensors."""
    phase: str
    """In which phase of the step the peak is, such as `backward 0: head`."""
    num_groups: int
    """Groups of ranks that exchange something: NCCL takes memory for each."""


def strategy_for_simulation(strategy: StrategyConfig) -> StrategyConfig:
    """Bring the run's strategy into a form that can be simulated: not compiled.

    Where FSDP2 may choose when it reduces gradients (`defer_sync` is None), it reduces them in each micro-batch. What waiting for
    the last one would take is computed from that.
    """
    uncompiled = replace(strategy, compile=False)
    if isinstance(uncompiled, Fsdp2Config) and uncompiled.defer_sync is None:
        return replace(uncompiled, defer_sync=False)
    return uncompiled


def why_not_simulated(error: Exception) -> str:
    """The reason to give when a simulation failed: the error's class and the first line of its message."""
    message = (str(error).strip() or "no message").splitlines()[0][:160]
    return f"cannot be simulated yet ({type(error).__name__}: {message})"


def single_step_config(config: RunConfig, world_size: int, *, mode_if_auto: ActivationCheckpointing) -> RunConfig:
    """Make of a run the one whose step is simulated for it: at most two micro-batches, which take as much memory as more.

    It is not compiled, which cannot be simulated. `config.batch["micro"]` must be a number. `world_size`: ranks of the run.
    `mode_if_auto`: what blocks recompute in the simulation if the run chooses that by memory
    (`strategy.activation_checkpointing=auto`).
    """
    strategy = strategy_for_simulation(config.strategy)
    if strategy.activation_checkpointing is ActivationCheckpointing.auto:
        strategy = replace(strategy, activation_checkpointing=mode_if_auto)
    micro_batch = config.batch["micro"]
    # The second micro-batch adds to the gradients that the first left; a third one would take no more memory.
    num_micro_batches = min(2, accumulation_steps(config, world_size))
    global_batch = micro_batch * dp_size_of(config, world_size) * num_micro_batches
    return replace(config, strategy=strategy, batch={"global": global_batch, "micro": micro_batch})


def check_run_fits(
    config: RunConfig, prepared: PreparedData, precision: Precision, runtime: Runtime, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Refuse a run that would run out of memory before its model is built, if `run.must_fit` asks for that check.

    Rank 0 simulates a step of the longest micro-batch in another process, and the peak is compared with the memory of the
    smallest GPU. Returns what `run.json` records, {"must_fit": MemoryCheck}; {} if not asked for. `announce`: prints a line
    for the user.

    Raises DoesNotFit on every rank if it does not fit, or if the simulation fails; ConfigError if the ranks have no GPUs. All
    ranks must call.
    """
    if not config.run.must_fit:
        return {}
    if runtime.kind != "cuda":
        raise ConfigError("run.must_fit=true: asks for the memory of GPUs, and this run has none; leave it out")
    announce("simulating whether the run fits its GPUs (run.must_fit)")
    least_gib = min(gather_objects(device_memory_gib(runtime), runtime))
    peak = _simulate_longest_step(config, prepared, precision, runtime)
    # With what the process, NCCL and torch's allocator take beside tensors.
    fit = device_memory_fit(peak.live_bytes, peak.num_groups, least_gib)
    if fit.margin_bytes < 0:
        raise DoesNotFit(does_not_fit_message(fit, peak, config))
    check = MemoryCheck(
        live_gib=peak.live_bytes / GIB, needed_gib=fit.needed_bytes / GIB, device_gib=least_gib, when=str(peak.phase)
    )
    return {"must_fit": check}


def _simulate_longest_step(
    config: RunConfig, prepared: PreparedData, precision: Precision, runtime: Runtime
) -> SimulatedPeak:
    """Find the peak memory of a step of the longest micro-batch: rank 0 simulates it in another process, and all ranks get it.

    Raises DoesNotFit on every rank if the step cannot be simulated. All ranks must call.
    """
    peak_of_rank_0: SimulatedPeak | NotSimulated | None = None
    if runtime.is_main:
        # `activation_checkpointing=auto` recomputes everything if it must: the run fits if it fits so.
        step_config = single_step_config(config, runtime.world_size, mode_if_auto=ActivationCheckpointing.full)
        step_config = replace(step_config, precision=precision)
        # Tokens of each sequence of the largest micro-batch that the data can give.
        lengths = longest_sequence_lengths(data_spec_of(config.objective), largest_micro_batch(config, prepared))
        timeout_s = TIMEOUT_SHARE * config.run.timeout_s
        peak_of_rank_0 = simulate_in_process(step_config, lengths, RankCounts.of_job(runtime), timeout_s)
    peak: SimulatedPeak | NotSimulated = broadcast_object(peak_of_rank_0, runtime)
    if isinstance(peak, NotSimulated):
        raise DoesNotFit(
            f"run.must_fit=true: it is not known whether the run fits, since {peak.reason}; leave it out to try it"
        )
    return peak


def does_not_fit_message(fit: MemoryFit, peak: SimulatedPeak, config: RunConfig) -> str:
    """Write the message for a run that does not fit: what it needs, what the GPU has, and which settings would take less.

    `fit`: a rank's memory by what takes it. `peak`: where in the step most is live. Settings that the run has already are not
    proposed.
    """
    micro_batch = config.batch["micro"]
    mode = config.strategy.activation_checkpointing
    remedies = []
    if micro_batch > 1:
        remedies.append(f"batch.micro below {micro_batch}")
    remedies.append(f"data.max_length below {config.data.max_length}")
    if mode not in (ActivationCheckpointing.full, ActivationCheckpointing.auto):
        remedies.append("strategy.activation_checkpointing=full")
    remedies.append("a strategy that shards more, or more GPUs")
    if config.tuning.name is TuningName.full:
        remedies.append("tuning=lora")
    elif config.model.quantisation is Quantisation.none:
        remedies.append("model.quantisation=nf4")
    other_gib = (fit.needed_bytes - fit.live_bytes) / GIB
    return (
        f"run.must_fit=true: the run needs {fit.needed_bytes / GIB:.2f} GiB on a GPU of {fit.device_bytes / GIB:.2f} GiB: "
        f"tensors take "
        f"{fit.live_bytes / GIB:.2f} GiB in {peak.phase}, libraries, allocator and groups of ranks about {other_gib:.2f} GiB. "
        f"What helps: {', '.join(remedies)}. `shardtune plan` compares them; run.must_fit=false tries it all the same"
    )


def simulate_in_process(
    config: RunConfig, lengths: list[int], rank_counts: RankCounts, timeout_s: float
) -> SimulatedPeak | NotSimulated:
    """The peak memory of a rank's step, simulated in a new process, or why it could not be simulated.

    `lengths`: tokens of each sequence of a micro-batch.
    """
    peak: SimulatedPeak | NotSimulated = call_in_process(_simulate_peak, (config, lengths, rank_counts), timeout_s)
    return peak


def call_in_process(function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> Any:
    """Run a simulation in a new process, since a process that is part of a job, or holds a GPU, cannot run it itself.

    Returns what `function(*arguments)` returns there; `NotSimulated`, with the reason, if it took more than `timeout_s` seconds,
    or if the process ended before it sent a value. `function` must be defined at the top of a module, so that the new process
    can import it.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_call_result, args=(sender, function, arguments), daemon=True)
    child.start()
    sender.close()  # the child has its own copy; with this one closed, `recv` raises EOFError when the child ends
    try:
        if not receiver.poll(timeout_s):
            return NotSimulated(f"its simulation took more than {timeout_s:.0f} s (of run.timeout_s)")
        return receiver.recv()
    except EOFError:
        return NotSimulated("the process that simulates it ended without an answer")
    finally:
        child.kill()
        child.join()
        receiver.close()


def _send_call_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Call `function(*arguments)` in a process that was started for a simulation, and send what it returns to the parent.

    Before that the process leaves the parent's job: it dies with its parent, ignores the job's signals, and sees neither the
    job's environment variables nor its GPUs.
    """
    parent = multiprocessing.parent_process()
    die_with_parent(None if parent is None else parent.pid)
    for signal_number in (*STOP_SIGNALS, signal.SIGINT):  # they are meant for the run, which saves and ends
        signal.signal(signal_number, signal.SIG_IGN)
    for variable in JOB_VARIABLES:
        os.environ.pop(variable, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # its context would take memory of the run's card
    sender.send(function(*arguments))


def _simulate_peak(config: RunConfig, lengths: list[int], rank_counts: RankCounts) -> SimulatedPeak | NotSimulated:
    """Simulate a step of the run, in a process of its own: the peak memory of a rank, or why it cannot be simulated.

    `lengths`: tokens of each sequence of a micro-batch.
    """
    from trainer.planner.simulation import simulate_depth

    try:
        step = simulate_depth(
            config, lengths, world_size=rank_counts.world_size, local_world_size=rank_counts.ranks_per_host
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that is an answer
        return NotSimulated(f"its step {why_not_simulated(error)}")
    return SimulatedPeak(live_bytes=step.peak_bytes, phase=str(step.peak_phase), num_groups=num_rank_groups(step))
