"""Starts, watches and ends the ranks of this host by torchrun. torchrun's arguments are made by a pure function.

torchrun loses exit codes and prints a long report of its own when a rank fails. So it runs inside a small wrapper
here and in SLURM's job scripts (`python -m launch.torchrun <torchrun arguments>`), and the run directory says how the
run ended. When `run_ranks_on_this_host` returns, every process that it started is gone, at most about ten seconds
after a failure or Ctrl-C.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from launch.cluster.hosts import ThisHost, locate_this_host
from launch.cluster.killed_rank import record_killed_rank
from launch.cluster.rendezvous import MissingHostsReport, StuckTorchrunGuard, rdzv_port
from strategies import exit_codes
from strategies.heartbeat import HEARTBEAT_DIRECTORY_VARIABLE
from strategies.network import check_gloo_interfaces, check_loopback_address, check_port_is_free
from strategies.parent_death import die_with_parent
from strategies.runtime import num_out_of_memory_kills
from trainer.config.run import LauncherConfig, RunConfig
from trainer.reporting.status import read_status
from trainer.stopping.signals import STOP_SIGNALS, block_signals, unblock_signals

NEXT_NOTICE_AFTER_S = 15.0
"""Seconds of silence after which the start of many processes says that it goes on."""
STOP_GRACE_S = 5
"""Seconds between asking a process to end and killing it, once a rank has failed or Ctrl-C was pressed."""


@dataclass(frozen=True, slots=True)
class RedirectedOutput:
    """A file instead of the terminal for the output of a run's processes."""

    output: Path
    """The file, which is appended to."""
    poll: Callable[[], None]
    """Called a few times a second while the processes run."""


class StartNotice:
    """Prints that processes are being started, and repeats it until the run writes its status.

    Loading the libraries may take long, and nothing else is printed meanwhile.
    """

    def __init__(self, run_dir: Path, processes: int, cores: int) -> None:
        self._run_dir = run_dir
        self._status_before: dict[str, Any] | None = read_status(run_dir)
        """None once the run has written another status."""
        self._began = time.monotonic()
        self._last_notice = self._began
        share = f" on {cores} cores, where loading the libraries takes them long" if processes > 2 * cores else ""
        print(f"starting {processes} processes{share}", file=sys.stderr, flush=True)

    def print_loading_notice(self) -> None:
        """Print that the processes are loading, if nothing was printed for `NEXT_NOTICE_AFTER_S` seconds; called often.

        Once the run has written another status, nothing is printed any more: rank 0 then says how far it is.
        """
        now = time.monotonic()
        has_run_reported = self._status_before is None
        if has_run_reported or now - self._last_notice <= NEXT_NOTICE_AFTER_S:
            return
        self._last_notice = now
        if read_status(self._run_dir) != self._status_before:
            self._status_before = None
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
    """The command-line arguments with which this host starts torchrun, up to the module that the ranks run.

    - One host: a rendezvous of its own.
    - Several hosts that all know their rank: a static rendezvous at `launcher.rdzv`.
    - Several hosts otherwise: a rendezvous there at which they agree on their ranks (c10d).

    `run_id`: names the rendezvous of several hosts.
    `this_host`: this host's address, and its rank among the hosts as far as `launcher.rdzv` and `launcher.node_rank` tell it;
        None if the run has one host.
    """
    arguments = [f"--nproc-per-node={launcher.processes or 1}", f"--shutdown-timeout={STOP_GRACE_S}"]
    if launcher.nodes == 1:
        # The loopback name: a laptop's or container's own host name need not resolve.
        arguments += ["--standalone", "--local-addr=localhost"]
    else:
        assert this_host is not None
        arguments += [f"--nnodes={launcher.nodes}", f"--rdzv-endpoint={launcher.rdzv}", f"--rdzv-id={run_id}"]
        arguments += [f"--local-addr={this_host.address}"]
        # Of two hosts, the one that is not the host of the rendezvous has rank 1.
        all_know_their_rank = launcher.nodes == 2 or launcher.node_rank is not None
        if this_host.node_rank is not None and all_know_their_rank:
            arguments += ["--rdzv-backend=static", f"--node-rank={this_host.node_rank}"]
        else:
            arguments += ["--rdzv-backend=c10d", f"--rdzv-conf=is_host={int(this_host.is_first)}"]
    return [*arguments, "-m", module]


class RanksEnd(NamedTuple):
    """How the ranks of one start ended."""

    exit_code: int
    """That of torchrun, or 130 after Ctrl-C."""
    received_signals: set[int]
    """Numbers of the signals that this process received meanwhile."""


def run_ranks_on_this_host(
    config: RunConfig,
    run_dir: Path,
    run_id: str,
    redirected: RedirectedOutput | None = None,
    *,
    program: RankProgram = TRAIN,
) -> RanksEnd:
    """Run a run's ranks on this host to their end, by torchrun; every process that it started is gone when it returns.

    `config`: as it stands in `run_dir`.
    `run_id`: names the rendezvous of several hosts.
    `redirected`: where the output goes; None for the terminal.
    `program`: what the ranks run.
    Signals that ask the run to save are passed on to the ranks; Ctrl-C gives them `STOP_GRACE_S` seconds to save, then kills.
    Raises ConfigError for network settings with which the ranks could not meet.
    """
    # torchrun's command line and environment.
    this_host = locate_this_host(config.launcher) if config.launcher.nodes > 1 else None
    _refuse_unusable_network(config.launcher, this_host)
    arguments = torchrun_arguments(config.launcher, run_id, this_host, program.module)
    command = [sys.executable, "-m", "launch.torchrun", *arguments]
    processes = config.launcher.processes or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = _torchrun_environment(config, this_host, cores)
    env["SHARDTUNE_CONFIG"] = str(run_dir / program.config)
    env["SHARDTUNE_RUN_DIR"] = str(run_dir)
    # Run it.
    _adopt_orphans()
    with (
        collected_signals() as signals,
        _output_streams(redirected) as streams,
        _heartbeat_directory() as env[HEARTBEAT_DIRECTORY_VARIABLE],
    ):
        # A session of its own keeps the terminal's Ctrl-C for us alone.
        torchrun_process = subprocess.Popen(
            command, env=env, start_new_session=True, preexec_fn=_prepare_torchrun_process, **streams
        )
        # Functions that are called a few times a second while torchrun runs.
        polls: list[Callable[[], None]] = []
        if redirected is not None:
            polls.append(redirected.poll)
        elif processes > 1:
            polls.append(StartNotice(run_dir, processes, cores).print_loading_notice)
        if this_host is not None:
            polls += _multi_host_polls(torchrun_process.pid, config.launcher, this_host, run_dir)
        try:
            exit_code = _wait_for_torchrun(torchrun_process, signals.pending, polls)
            return RanksEnd(exit_code, signals.received)
        finally:
            _kill_remaining_processes(torchrun_process)


def _torchrun_environment(config: RunConfig, this_host: ThisHost | None, cores: int) -> dict[str, str]:
    """The environment variables for torchrun and its ranks: those of this process, with threads, network and import path set.

    `this_host`: None if the run has one host. `cores`: CPU cores of this host, which the ranks share.
    """
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


def _refuse_unusable_network(launcher: LauncherConfig, this_host: ThisHost | None) -> None:
    """Raise ConfigError for network settings that would keep the ranks from meeting; torchrun would end in a traceback.

    `this_host`: None if the run has one host.
    It is raised if:

    - GLOO_SOCKET_IFNAME and the like name an interface that this host does not have;
    - the run has one host and several ranks, and this host has no loopback interface;
    - this is the first of several hosts, and another process listens at the port of `launcher.rdzv`.
    """
    check_gloo_interfaces()
    if this_host is None:
        check_loopback_address(launcher.processes or 1)
    elif this_host.is_first:
        check_port_is_free(f"launcher.rdzv={launcher.rdzv}", rdzv_port(launcher))


def _multi_host_polls(
    torchrun_pid: int, launcher: LauncherConfig, this_host: ThisHost, run_dir: Path
) -> list[Callable[[], None]]:
    """Functions to call a few times a second while a run on several hosts goes on.

    The first reports hosts that have not joined the rendezvous, the second kills a torchrun whose ranks have ended.
    `torchrun_pid`: its process on this host.
    """
    import psutil

    torchrun_process = psutil.Process(torchrun_pid)
    missing_hosts = MissingHostsReport(launcher, this_host)
    stuck_guard = StuckTorchrunGuard(run_dir)
    return [partial(missing_hosts.poll, torchrun_process), partial(stuck_guard.poll, torchrun_process)]


def _heartbeat_directory() -> tempfile.TemporaryDirectory[str]:
    """A temporary directory in which ranks leave their last heartbeat, to be read after a rank was killed."""
    return tempfile.TemporaryDirectory(prefix="shardtune-")


def _prepare_torchrun_process() -> None:
    """Runs in torchrun's process before its program: ends it with its parent, and holds the signals that ask to save.

    The ranks inherit the mask of held signals, and release them once they can save.
    """
    die_with_parent()
    block_signals()


def _adopt_orphans() -> None:
    """Become the parent of ranks that torchrun leaves behind, so that they can be found and ended."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36  # of <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1)


@dataclass(frozen=True, slots=True)
class CollectedSignals:
    """Numbers of the signals that this process has received. A signal handler adds to both while they are read."""

    pending: list[int] = field(default_factory=list)
    """Those that are still to be passed on to the ranks, in order. Whoever passes one on removes it."""
    received: set[int] = field(default_factory=set)
    """All of them."""


@contextlib.contextmanager
def collected_signals() -> Iterator[CollectedSignals]:
    """Within the block, collect Ctrl-C and the signals that ask a run to save, for passing them on to ranks.

    Signals that were held since this process began are delivered when the block begins. After it, the handlers and the held
    signals are as before.
    """
    signals = CollectedSignals()

    def record_signal(signal_number: int, _: FrameType | None) -> None:
        signals.pending.append(signal_number)
        signals.received.add(signal_number)

    previous_handlers = {}
    for signal_number in (*STOP_SIGNALS, signal.SIGINT):
        previous_handlers[signal_number] = signal.signal(signal_number, record_signal)
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    unblock_signals()
    try:
        yield signals
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


def _wait_for_torchrun(
    torchrun_process: subprocess.Popen[bytes], pending_signals: list[int], polls: list[Callable[[], None]]
) -> int:
    """Wait for torchrun to end, and pass signals on to its ranks meanwhile; returns the exit code.

    `pending_signals`: filled by the handler of `collected_signals` while this runs, and emptied here.
    `polls`: called a few times a second.
    Ctrl-C reaches the ranks as TERM, at which they save. The code is torchrun's; or 130 after Ctrl-C: when torchrun has ended, at
    a second Ctrl-C, or after `STOP_GRACE_S`.
    """
    interrupted_at: float | None = None
    while True:
        for poll in polls:
            poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = torchrun_process.wait(timeout=0.2)  # raises TimeoutExpired while torchrun runs
            return exit_codes.INTERRUPTED if interrupted_at is not None else code
        is_second_interrupt = interrupted_at is not None and pending_signals.count(signal.SIGINT) > 0
        if is_second_interrupt:
            return exit_codes.INTERRUPTED
        if signal.SIGINT in pending_signals:
            interrupted_at = time.monotonic()
            # Changed one by one: a signal that the handler appends meanwhile is not lost.
            for index, signal_number in enumerate(pending_signals):
                pending_signals[index] = signal.SIGTERM if signal_number == signal.SIGINT else signal_number
        # A signal stays pending until there are ranks to receive it.
        if pending_signals and _signal_ranks(torchrun_process.pid, pending_signals[0]):
            pending_signals.pop(0)
        if interrupted_at is not None and time.monotonic() - interrupted_at > STOP_GRACE_S:
            return exit_codes.INTERRUPTED


def _signal_ranks(torchrun_pid: int, signal_number: int) -> bool:
    """Send a signal to the ranks that torchrun runs on this host; returns whether there were any.

    Never to torchrun itself: it would end at once, and its ranks with it, unsaved.
    """
    import psutil

    signalled = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(torchrun_pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library, or a rank that has not begun
                    child.send_signal(signal_number)
                    signalled = True
    return signalled


def _kill_remaining_processes(torchrun_process: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the run on this host that still live, and wait for their end: torchrun, its descendants, orphans.

    Orphans are processes whose parent has ended. They have become children of this process (`_adopt_orphans`), and are told from
    its other children by the variable SHARDTUNE_LAUNCHER in their environment.
    """
    import psutil

    candidates: list[psutil.Process] = []
    if torchrun_process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            candidates += psutil.Process(torchrun_process.pid).children(recursive=True)
    for child in psutil.Process().children(recursive=True):
        if child.pid != torchrun_process.pid and child not in candidates:
            candidates.append(child)
    for process in candidates:
        with contextlib.suppress(psutil.Error):
            is_of_run = process.environ().get("SHARDTUNE_LAUNCHER") == str(os.getpid())
            if is_of_run:
                process.kill()
    if torchrun_process.poll() is None:
        torchrun_process.kill()
    torchrun_process.wait()
    psutil.wait_procs(candidates, timeout=5)


def run_torchrun(argv: list[str]) -> int:
    """Run torchrun in this process without its long report of errors; returns 0, or 1 if a rank failed.

    `argv`: torchrun's arguments.
    If a signal killed a rank, that is recorded in the run directory, since the rank itself cannot.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # For good: this process does nothing else, and torchrun's loggers would print a traceback for each rank that fails.
    logging.disable(logging.CRITICAL)
    # Processes that the kernel has killed for want of memory so far; None if it does not count them.
    oom_kills_before = num_out_of_memory_kills()
    with contextlib.ExitStack() as cleanup:
        # The ranks leave their last heartbeats in this directory. Outside SLURM the launcher, which outlives this process, has
        # named it already.
        if HEARTBEAT_DIRECTORY_VARIABLE not in os.environ:
            os.environ[HEARTBEAT_DIRECTORY_VARIABLE] = cleanup.enter_context(_heartbeat_directory())
        try:
            torchrun(argv)
        except ChildFailedError as error:
            oom_kills_after = num_out_of_memory_kills()
            kernel_killed_for_memory = (oom_kills_after or 0) > (oom_kills_before or 0)
            record_killed_rank(error, kernel_killed_for_memory=kernel_killed_for_memory)
            return 1
    return 0
