"""Starts, watches and ends the ranks of this host by torchrun. torchrun's arguments are made by a pure function.

torchrun loses exit codes and prints a long report of its own when a rank fails. So it runs inside a small wrapper
here and in SLURM's job scripts (`python -m launch.torchrun <torchrun arguments>`), and the run directory says how the
run ended. When `start` returns, every process that it started is gone, at most about ten seconds after a failure or
Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from launch.cluster.hosts import ThisHost, locate_this_host
from launch.cluster.rendezvous import MissingHostsReport, StuckAgentGuard, rdzv_port
from strategies.heartbeat import HEARTBEAT_DIRECTORY, LOST_PEER, TIMED_OUT, read_last_heartbeat
from strategies.network import refuse_taken_port, refuse_unknown_interface, refuse_without_loopback
from strategies.parent_death import die_with_parent
from strategies.runtime import out_of_memory_kills
from trainer.config.run import LauncherConfig, RunConfig
from trainer.reporting.status import read_status
from trainer.stopping.signals import SIGNALS, hold, release

NOTICE_AFTER_S = 15.0
"""Seconds of silence after which the start of many processes says that it goes on."""
STOP_GRACE_S = 5
"""Seconds between asking a process to end and killing it, once a rank has failed or Ctrl-C was pressed."""


OUT_OF_MEMORY = (
    ": out of memory (the kernel counted a kill for it); lower batch.micro or data.max_length, shard more of the model "
    "(strategy=fsdp2 or zero3), or give the job more memory (launcher.mem under SLURM)"
)
"""The end of the message about a rank that the kernel killed for memory. Another start would run out again."""


@dataclass(frozen=True, slots=True)
class RedirectedOutput:
    """A file instead of the terminal for the output of a run's processes."""

    output: Path
    """The file, which is appended to."""
    poll: Callable[[], None]
    """Called a few times a second while the processes run."""


class StartNotice:
    """Prints that processes are being started, and repeats it until the run writes its status."""

    def __init__(self, run_dir: Path, processes: int, cores: int) -> None:
        self._run_dir = run_dir
        self._status_before: dict[str, Any] | None = read_status(run_dir)
        """None once the run has written another status."""
        self._began = time.monotonic()
        self._last_notice = self._began
        share = f" on {cores} cores, where loading the libraries takes them long" if processes > 2 * cores else ""
        print(f"starting {processes} processes{share}", file=sys.stderr, flush=True)

    def poll(self) -> None:
        """Print that the processes are loading, if nothing was printed for `NOTICE_AFTER_S` seconds."""
        now = time.monotonic()
        if self._status_before is None or now - self._last_notice <= NOTICE_AFTER_S:
            return
        self._last_notice = now
        if read_status(self._run_dir) != self._status_before:
            self._status_before = None  # from here on rank 0 says how far it is
        else:
            print(f"{now - self._began:.0f} s: the processes load their libraries", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class RankProgram:
    """The program that each rank of a run executes."""

    module: str
    """The Python module that each rank runs."""
    config: str
    """The file in the run directory with their configuration."""


TRAIN = RankProgram("launch.train", "config.yaml")


def torchrun_arguments(
    launcher: LauncherConfig, run_id: str, this_host: ThisHost | None = None, module: str = TRAIN.module
) -> list[str]:
    """The command-line arguments of torchrun on this host, up to the module that the ranks run.

    `run_id`: names the rendezvous of several hosts. `this_host`: None if the run has one host.
    """
    arguments = [f"--nproc-per-node={launcher.processes or 1}", f"--shutdown-timeout={STOP_GRACE_S}"]
    if launcher.nodes == 1:
        # The loopback name: a laptop's or container's own host name need not resolve.
        arguments += ["--standalone", "--local-addr=localhost"]
    else:
        assert this_host is not None
        arguments += [f"--nnodes={launcher.nodes}", f"--rdzv-endpoint={launcher.rdzv}", f"--rdzv-id={run_id}"]
        arguments += [f"--local-addr={this_host.address}"]
        all_know_their_rank = launcher.nodes == 2 or launcher.node_rank is not None
        if this_host.rank is not None and all_know_their_rank:
            arguments += ["--rdzv-backend=static", f"--node-rank={this_host.rank}"]
        else:  # the hosts agree on their ranks when they meet
            arguments += ["--rdzv-backend=c10d", f"--rdzv-conf=is_host={int(this_host.is_first)}"]
    return [*arguments, "-m", module]


def start(
    config: RunConfig,
    run_dir: Path,
    run_id: str,
    redirected: RedirectedOutput | None = None,
    *,
    program: RankProgram = TRAIN,
) -> tuple[int, set[int]]:
    """Run the frozen configuration of `run_dir` to its end, as ranks of `program` on this host.

    `run_id`: names the rendezvous of several hosts. `redirected`: where the output goes; None for the terminal.
    Signals that ask the run to save are passed on to the ranks; Ctrl-C gives them `STOP_GRACE_S` seconds to save, then kills.
    Returns (torchrun's exit code, or 130 after Ctrl-C; the numbers of all signals received).
    """
    # torchrun's command line and environment.
    this_host = locate_this_host(config.launcher) if config.launcher.nodes > 1 else None
    _refuse_network(config.launcher, this_host)
    arguments = torchrun_arguments(config.launcher, run_id, this_host, program.module)
    command = [sys.executable, "-m", "launch.torchrun", *arguments]
    processes = config.launcher.processes or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = _agent_environment(config, this_host, cores)
    env["SHARDTUNE_CONFIG"] = str(run_dir / program.config)
    env["SHARDTUNE_RUN_DIR"] = str(run_dir)
    # Run it.
    _adopt_orphans()
    with (
        collected_signals() as (pending, received),
        _output_streams(redirected) as streams,
        _heartbeat_directory() as env[HEARTBEAT_DIRECTORY],
    ):
        # A session of its own keeps the terminal's Ctrl-C for us alone.
        agent = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_prepare_agent_process, **streams)
        # Called a few times a second while torchrun runs.
        watchers: list[Callable[[], None]] = []
        if redirected is not None:
            watchers.append(redirected.poll)
        elif processes > 1:
            watchers.append(StartNotice(run_dir, processes, cores).poll)
        if this_host is not None:
            watchers += _host_watchers(agent.pid, config.launcher, this_host, run_dir)
        try:
            return _wait_for_agent(agent, pending, watchers), received
        finally:
            _kill_remaining_processes(agent)


def _agent_environment(config: RunConfig, this_host: ThisHost | None, cores: int) -> dict[str, str]:
    """The environment of torchrun and its ranks. `this_host`: None if the run has one host; `cores`: CPU cores of this host."""
    env = {**os.environ, "SHARDTUNE_LAUNCHER": str(os.getpid())}
    # torchrun would set one thread a rank, however many cores the host has.
    processes = config.launcher.processes or 1
    threads = config.run.threads or max(1, cores // processes)
    env.setdefault("OMP_NUM_THREADS", str(threads))
    if this_host is not None:  # gloo would take what the host's own name means, often 127.0.1.1
        env.setdefault("GLOO_SOCKET_IFNAME", this_host.interface)
    env["PYTHONSAFEPATH"] = "1"  # a trainer.py or launch/ where the command is typed hides nothing
    root = str(Path(__file__).resolve().parents[2])  # started from anywhere: `-m launch.train` must be found
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env


def _refuse_network(launcher: LauncherConfig, this_host: ThisHost | None) -> None:
    """Refuse network settings that would keep the ranks from meeting, before torchrun ends in a traceback over them.

    Errors: ConfigError.
    """
    refuse_unknown_interface()
    if this_host is None:
        refuse_without_loopback(launcher.processes or 1)
    elif this_host.is_first:
        refuse_taken_port(f"launcher.rdzv={launcher.rdzv}", rdzv_port(launcher))


def _host_watchers(
    agent_pid: int, launcher: LauncherConfig, this_host: ThisHost, run_dir: Path
) -> list[Callable[[], None]]:
    """Functions to call a few times a second while a run on several hosts goes on. `agent_pid`: torchrun's process.

    The first reports hosts that have not joined the rendezvous, the second kills a torchrun whose ranks are gone.
    """
    import psutil

    agent = psutil.Process(agent_pid)
    missing_hosts = MissingHostsReport(launcher, this_host)
    stuck_agent = StuckAgentGuard(run_dir)
    return [partial(missing_hosts.poll, agent), partial(stuck_agent.poll, agent)]


def _heartbeat_directory() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory in which ranks leave their last heartbeat, to be read after a rank was killed."""
    return tempfile.TemporaryDirectory(prefix="shardtune-")


def _prepare_agent_process() -> None:
    """Runs in torchrun's process before its program: ends it with its parent, and holds the signals that ask to save.

    The ranks inherit the mask of held signals, and release them once they can save.
    """
    die_with_parent()
    hold()


def _adopt_orphans() -> None:
    """Become the parent of ranks that torchrun leaves behind, so that they can be found and ended."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36  # of <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1)


@contextlib.contextmanager
def collected_signals() -> Iterator[tuple[list[int], set[int]]]:
    """Within the block, collect signals instead of acting on them; yields (those still to be passed on, all that came)."""
    pending: list[int] = []
    received: set[int] = set()

    def note(signal_number: int, _: FrameType | None) -> None:
        pending.append(signal_number)
        received.add(signal_number)

    previous_handlers = {}
    for signal_number in (*SIGNALS, signal.SIGINT):
        previous_handlers[signal_number] = signal.signal(signal_number, note)
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    release()
    try:
        yield pending, received
    finally:
        # Held again first: how the run ended is still to be written down.
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


@contextlib.contextmanager
def _output_streams(redirected: RedirectedOutput | None) -> Iterator[dict[str, Any]]:
    """Keyword arguments of `Popen` for the standard streams of a run's processes: none, or those for `redirected`."""
    if redirected is None:
        yield {}
        return
    redirected.output.parent.mkdir(parents=True, exist_ok=True)
    with redirected.output.open("ab") as file:
        yield {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}


def _wait_for_agent(agent: subprocess.Popen[bytes], pending: list[int], watchers: list[Callable[[], None]]) -> int:
    """Wait for torchrun to end, and pass signals in `pending` on to its ranks.

    `pending`: numbers of received signals, filled by the signal handler while this runs and emptied here.
    `watchers` are called a few times a second.
    Returns torchrun's exit code; or 130 after Ctrl-C: when torchrun has ended, at a second Ctrl-C, or after `STOP_GRACE_S`.
    """
    interrupted_at: float | None = None
    while True:
        for poll in watchers:
            poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = agent.wait(timeout=0.2)  # raises TimeoutExpired while torchrun runs
            return 130 if interrupted_at is not None else code
        if pending.count(signal.SIGINT) and interrupted_at is not None:
            return 130  # a second Ctrl-C does not wait
        if signal.SIGINT in pending:
            interrupted_at = time.monotonic()
            # Ranks save on TERM. Changed item by item: a signal that the handler appends meanwhile is not lost.
            for index, signal_number in enumerate(pending):
                pending[index] = signal.SIGTERM if signal_number == signal.SIGINT else signal_number
        # A signal stays pending until there are ranks to receive it.
        if pending and _signal_ranks(agent.pid, pending[0]):
            pending.pop(0)
        if interrupted_at is not None and time.monotonic() - interrupted_at > STOP_GRACE_S:
            return 130


def _signal_ranks(agent_pid: int, signal_number: int) -> bool:
    """Send a signal to the ranks of torchrun (`agent_pid`); returns whether there were any.

    Never to torchrun itself: it would end at once, and its ranks with it, unsaved.
    """
    import psutil

    signalled = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent_pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library, or a rank that has not begun
                    child.send_signal(signal_number)
                    signalled = True
    return signalled


def _kill_remaining_processes(agent: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the run that still live: torchrun (`agent`), its ranks and their helpers, and orphans of these."""
    import psutil

    # Candidates: descendants of torchrun, and of this process.
    processes: list[psutil.Process] = []
    if agent.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += psutil.Process(agent.pid).children(recursive=True)
    # Orphans have become children of this process (`_adopt_orphans`).
    for child in psutil.Process().children(recursive=True):
        if child.pid != agent.pid and child not in processes:
            processes.append(child)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            # A child of this process that is not of the run does not have its variable.
            if process.environ().get("SHARDTUNE_LAUNCHER") == str(os.getpid()):
                process.kill()
    if agent.poll() is None:
        agent.kill()
    agent.wait()
    psutil.wait_procs(processes, timeout=5)


def run_torchrun(argv: list[str]) -> int:
    """Run torchrun in this process without its long report of errors; returns the exit code.

    `argv`: torchrun's arguments. If a signal killed a rank, that is recorded in the run directory, since the rank itself cannot.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.CRITICAL)
    # Processes that the kernel has killed for want of memory so far; None if it does not count them.
    kills_before = out_of_memory_kills()
    with contextlib.ExitStack() as cleanup:
        if HEARTBEAT_DIRECTORY not in os.environ:  # under SLURM; else it is the launcher's, who outlives this process
            os.environ[HEARTBEAT_DIRECTORY] = cleanup.enter_context(_heartbeat_directory())
        try:
            torchrun(argv)
        except ChildFailedError as error:
            kills_after = out_of_memory_kills()
            _record_killed_rank(error, out_of_memory=(kills_after or 0) > (kills_before or 0))
            return 1
    return 0


def only_lost_a_peer(failure: dict[str, Any]) -> bool:
    """Whether a recorded failure only says that a rank lost its peer, so that the cause may replace it.

    What a rank wrote about itself is a cause. So is a rank that hung and was stopped: torchrun has killed that one since.
    """
    lost_peer_by_message = LOST_PEER.search(failure.get("message", "")) is not None
    return bool(failure.get("gone", lost_peer_by_message))


def _record_killed_rank(error: BaseException, *, out_of_memory: bool) -> None:
    """Write the `failure.json` of a rank that a signal has killed; nothing if no rank was.

    `error`: torchrun's ChildFailedError. `out_of_memory`: whether the kernel has killed a process for memory meanwhile.
    """
    from strategies.errors import ShardtuneError
    from trainer.reporting.status import State, read_failure, record_failure, write_status

    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    killed_ranks = []
    for rank, rank_failure in failures.items():
        # torchrun itself ends the peers of a failed rank by TERM.
        if rank_failure.exitcode < 0 and rank_failure.exitcode != -signal.SIGTERM:
            killed_ranks.append(rank)
    if not killed_ranks or "SHARDTUNE_RUN_DIR" not in os.environ:
        return
    # Among exits that torchrun noticed at the same time, a peer's may have the earlier time. A kill explains more.
    rank = min(killed_ranks, key=lambda rank: failures[rank].timestamp)
    failure = failures[rank]
    signal_name = signal.Signals(-failure.exitcode).name
    out_of_memory = out_of_memory and signal_name == "SIGKILL"
    explanation = OUT_OF_MEMORY if out_of_memory else ""
    killed = ShardtuneError(f"rank {rank} (process {failure.pid}) was killed by {signal_name}{explanation}")

    run_dir = Path(os.environ["SHARDTUNE_RUN_DIR"])
    recorded = read_failure(run_dir)
    # NCCL aborts every rank that waits too long, and each has written before what it waited for.
    is_abort_after_wait = signal_name == "SIGABRT" and TIMED_OUT.search(recorded.get("message", ""))
    phase = "killed"
    step = None
    if recorded.get("rank") == rank and recorded.get("gone"):  # a peer has written where this rank was
        phase = recorded["phase"]
        step = recorded["step"]
    else:
        last_heartbeat = read_last_heartbeat(Path(os.environ.get(HEARTBEAT_DIRECTORY, os.devnull)), rank)
        if last_heartbeat is not None:
            phase = last_heartbeat.phase
            step = last_heartbeat.step
    was_recorded = record_failure(
        run_dir,
        rank,
        killed,
        phase,
        step,
        replace=only_lost_a_peer(recorded) and not is_abort_after_wait,
        pid=failure.pid,
        retry="out_of_memory" if out_of_memory else "node_fail",
    )
    # Under SLURM nobody else shows the failure, or writes the status.
    if was_recorded and "SHARDTUNE_LAUNCHER" not in os.environ:
        print(killed, file=sys.stderr, flush=True)
        with contextlib.suppress(ShardtuneError):
            write_status(run_dir, State.failed, step=step, reason=str(killed))
