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

from launch.cluster.hosts import HostPlace, place_of
from launch.cluster.rendezvous import AgentLeftBehind, WaitingForHosts, port_of
from strategies.heartbeat import LAST_WORDS, LOST_PEER, TIMED_OUT, last_words
from strategies.network import refuse_taken_port, refuse_unknown_interface, refuse_without_loopback
from strategies.parent_death import die_with_parent
from strategies.runtime import out_of_memory_kills
from trainer.config.run import LauncherConfig, RunConfig
from trainer.reporting.status import read_status
from trainer.stopping.signals import SIGNALS, hold, release

TELL_S = 15.0
"""Seconds of silence after which the start of many processes says that it goes on."""
STOP_GRACE_S = 5
"""Seconds between asking a process to end and killing it, once a rank has failed or Ctrl-C was pressed."""


OUT_OF_MEMORY = (
    ": out of memory (the kernel counted a kill for it); lower batch.micro or data.max_length, shard more of the model "
    "(strategy=fsdp2 or zero3), or give the job more memory (launcher.mem under SLURM)"
)
"""Of a rank that the kernel killed: an error, which another start would meet again."""


@dataclass(frozen=True, slots=True)
class Aside:
    """Where what the processes print is appended, in place of the terminal, and who is called a few times a second."""

    output: Path
    look: Callable[[], None]


class Starting:
    """Says that processes are being started, and goes on saying so until the run writes something itself."""

    def __init__(self, run_dir: Path, processes: int, cores: int) -> None:
        self._run_dir = run_dir
        self._before: dict[str, Any] | None = read_status(run_dir)
        self._began = self._told = time.monotonic()
        share = f" on {cores} cores, where loading the libraries takes them long" if processes > 2 * cores else ""
        print(f"starting {processes} processes{share}", file=sys.stderr, flush=True)

    def look(self) -> None:
        """A line where it was silent for long."""
        now = time.monotonic()
        if now - self._told > TELL_S and self._before is not None:
            self._told = now
            if read_status(self._run_dir) != self._before:
                self._before = None  # from here on rank 0 says how far it is
            else:
                print(f"{now - self._began:.0f} s: the processes load their libraries", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class What:
    """What the ranks do: the module they run, and the file of their configuration in the directory."""

    module: str
    config: str


TRAIN = What("launch.train", "config.yaml")


def arguments(
    launcher: LauncherConfig, run_id: str, place: HostPlace | None = None, module: str = TRAIN.module
) -> list[str]:
    """torchrun's own arguments for these processes; `run_id` names the rendezvous of several hosts, `place` this one."""
    words = [f"--nproc-per-node={launcher.processes or 1}", f"--shutdown-timeout={STOP_GRACE_S}"]
    if launcher.nodes == 1:
        # The loopback name: a laptop's or container's own host name need not resolve.
        words += ["--standalone", "--local-addr=localhost"]
    else:
        assert place is not None
        words += [f"--nnodes={launcher.nodes}", f"--rdzv-endpoint={launcher.rdzv}", f"--rdzv-id={run_id}"]
        words += [f"--local-addr={place.address}"]
        if place.rank is not None and (launcher.nodes == 2 or launcher.node_rank is not None):
            words += ["--rdzv-backend=static", f"--node-rank={place.rank}"]
        else:
            words += ["--rdzv-backend=c10d", f"--rdzv-conf=is_host={int(place.first)}"]
    return [*words, "-m", module]


def start(
    config: RunConfig, run_dir: Path, run_id: str, aside: Aside | None = None, *, what: What = TRAIN
) -> tuple[int, set[int]]:
    """Run the frozen configuration of `run_dir` to its end, as ranks of `what`.

    Returns torchrun's exit code, or 130 after Ctrl-C, and the signals that came. Those that ask to save are passed on to the
    ranks; Ctrl-C gives them a few seconds, then kills.
    """
    place = place_of(config.launcher) if config.launcher.nodes > 1 else None
    _refuse_network(config.launcher, place)
    command = [sys.executable, "-m", "launch.torchrun", *arguments(config.launcher, run_id, place, what.module)]
    processes = config.launcher.processes or 1
    env = {**os.environ, "SHARDTUNE_CONFIG": str(run_dir / what.config), "SHARDTUNE_RUN_DIR": str(run_dir)}
    env["SHARDTUNE_LAUNCHER"] = str(os.getpid())
    # torchrun would set one thread a rank, whatever the host has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env.setdefault("OMP_NUM_THREADS", str(config.run.threads or max(1, cores // processes)))
    if place is not None:  # gloo would take what the host's own name means, often 127.0.1.1
        env.setdefault("GLOO_SOCKET_IFNAME", place.interface)
    env["PYTHONSAFEPATH"] = "1"  # a trainer.py or launch/ where the command is typed hides nothing
    root = str(Path(__file__).resolve().parents[2])  # started from anywhere: `-m launch.train` must be found
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    _adopt_orphans()
    with signals_held() as (pending, came), _printed(aside) as printed, _last_words() as env[LAST_WORDS]:
        # A session of its own keeps the terminal's Ctrl-C for us alone.
        agent = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=_begin_agent, **printed)
        looks: list[Callable[[], None]] = []
        if aside is not None:
            looks.append(aside.look)
        elif processes > 1:
            looks.append(Starting(run_dir, processes, cores).look)
        if place is not None:
            looks += _looks_at_hosts(agent.pid, config.launcher, place, run_dir)
        try:
            return _watch(agent, pending, looks), came
        finally:
            _end_all(agent)


def _refuse_network(launcher: LauncherConfig, place: HostPlace | None) -> None:
    """Raise ConfigError for what keeps the ranks from meeting, before torchrun ends in a traceback over it."""
    refuse_unknown_interface()
    if place is None:
        refuse_without_loopback(launcher.processes or 1)
    elif place.first:
        refuse_taken_port(f"launcher.rdzv={launcher.rdzv}", port_of(launcher))


def _looks_at_hosts(
    agent_pid: int, launcher: LauncherConfig, place: HostPlace, run_dir: Path
) -> list[Callable[[], None]]:
    """What to call a few times a second while several hosts run: names those that do not come, ends torchrun without ranks."""
    import psutil

    agent = psutil.Process(agent_pid)
    waiting = WaitingForHosts(launcher, place)
    left_behind = AgentLeftBehind(run_dir)
    return [partial(waiting.look, agent), partial(left_behind.look, agent)]


def _last_words() -> tempfile.TemporaryDirectory[str]:
    """Where ranks keep what they last said of themselves (`strategies/heartbeat.py`)."""
    return tempfile.TemporaryDirectory(prefix="shardtune-")


def _begin_agent() -> None:
    """In torchrun's process before it begins: the mask is inherited by the ranks, which are told of a request as it comes."""
    die_with_parent()
    hold()


def _adopt_orphans() -> None:
    """Become the parent of ranks that torchrun leaves behind, so that they can be found and ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(36, 1)


@contextlib.contextmanager
def signals_held() -> Iterator[tuple[list[int], set[int]]]:
    """Collect signals instead of acting on them: those to be passed on, and all that came."""
    pending: list[int] = []
    came: set[int] = set()

    def note(number: int, _: FrameType | None) -> None:
        pending.append(number)
        came.add(number)

    before = {number: signal.signal(number, note) for number in (*SIGNALS, signal.SIGINT)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    release()
    try:
        yield pending, came
    finally:
        # Held again first: how the run ended is still to be written down.
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _printed(aside: Aside | None) -> Iterator[dict[str, Any]]:
    """Where the processes print to, as `Popen` takes it."""
    if aside is None:
        yield {}
        return
    aside.output.parent.mkdir(parents=True, exist_ok=True)
    with aside.output.open("ab") as file:
        yield {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}


def _watch(agent: subprocess.Popen[bytes], pending: list[int], looks: list[Callable[[], None]]) -> int:
    interrupted_at: float | None = None
    while True:
        for look in looks:
            look()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = agent.wait(timeout=0.2)
            return 130 if interrupted_at is not None else code
        if pending.count(signal.SIGINT) and interrupted_at is not None:
            return 130  # a second Ctrl-C does not wait
        if signal.SIGINT in pending:
            interrupted_at = time.monotonic()
            for place, number in enumerate(pending):  # in its place: what comes meanwhile is not lost
                pending[place] = signal.SIGTERM if number == signal.SIGINT else number
        if pending and _signal_ranks(agent.pid, pending[0]):  # kept until there are ranks
            pending.pop(0)
        if interrupted_at is not None and time.monotonic() - interrupted_at > STOP_GRACE_S:
            return 130


def _signal_ranks(agent_pid: int, number: int) -> bool:
    """Pass a signal on to torchrun's ranks, never to torchrun, whom it would end first; whether there were any."""
    import psutil

    told = False
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(agent_pid).children():
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ():  # else a helper of a library, or a rank that has not begun
                    child.send_signal(number)
                    told = True
    return told


def _end_all(agent: subprocess.Popen[bytes]) -> None:
    """Kill whatever the run still has: torchrun, its ranks and their helpers, and those it left to us."""
    import psutil

    left: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        left += psutil.Process(agent.pid).children(recursive=True) if agent.poll() is None else []
    # What was re-parented to us: no child of ours but torchrun is older than it.
    left += [p for p in psutil.Process().children(recursive=True) if p.pid != agent.pid and p not in left]
    for process in left:
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SHARDTUNE_LAUNCHER") == str(os.getpid()):
                process.kill()
    if agent.poll() is None:
        agent.kill()
    agent.wait()
    psutil.wait_procs(left, timeout=5)


def wrapper(argv: list[str]) -> int:
    """torchrun without its wall of errors; notes in the run directory that a rank was killed, which no rank can."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.CRITICAL)
    before = out_of_memory_kills()
    with contextlib.ExitStack() as ours:
        if LAST_WORDS not in os.environ:  # under SLURM; else it is the launcher's, who outlives this process
            os.environ[LAST_WORDS] = ours.enter_context(_last_words())
        try:
            torchrun(argv)
        except ChildFailedError as error:
            _note_killed(error, memory=(out_of_memory_kills() or 0) > (before or 0))
            return 1
    return 0


def only_lost_a_peer(failure: dict[str, Any]) -> bool:
    """Whether what was noted is no cause: a rank that lost its peer could write first.

    What any other rank wrote is one, and so is a rank that was stopped: that one torchrun has killed since.
    """
    return bool(failure.get("gone", LOST_PEER.search(failure.get("message", "")) is not None))


def _note_killed(error: BaseException, *, memory: bool) -> None:
    from strategies.errors import ShardtuneError
    from trainer.reporting.status import State, read_failure, record_failure, write_status

    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    killed_ranks = [
        rank for rank, failed in failures.items() if failed.exitcode < 0 and failed.exitcode != -signal.SIGTERM
    ]
    if not killed_ranks or "SHARDTUNE_RUN_DIR" not in os.environ:
        return
    # Seen in the same look, a peer's exit may bear the earlier time: a kill is the better explanation.
    rank = min(killed_ranks, key=lambda rank: failures[rank].timestamp)
    failure = failures[rank]
    name = signal.Signals(-failure.exitcode).name
    memory = memory and name == "SIGKILL"
    killed = ShardtuneError(
        f"rank {rank} (process {failure.pid}) was killed by {name}{OUT_OF_MEMORY if memory else ''}"
    )
    run_dir = Path(os.environ["SHARDTUNE_RUN_DIR"])
    before = read_failure(run_dir)
    # NCCL aborts whoever waits too long, and each has said before what it waited for.
    replace = only_lost_a_peer(before) and not (name == "SIGABRT" and TIMED_OUT.search(before.get("message", "")))
    same = before.get("rank") == rank and before.get("gone")
    phase, step = (before["phase"], before["step"]) if same else ("killed", None)
    if not same and (seen := last_words(Path(os.environ.get(LAST_WORDS, os.devnull)), rank)) is not None:
        phase, step = seen.phase, seen.step  # no peer lived long enough to tell
    retry = "out_of_memory" if memory else "node_fail"
    written = record_failure(run_dir, rank, killed, phase, step, replace=replace, pid=failure.pid, retry=retry)
    if written and "SHARDTUNE_LAUNCHER" not in os.environ:  # under SLURM nobody else shows it, or settles the status
        print(killed, file=sys.stderr, flush=True)
        with contextlib.suppress(ShardtuneError):
            write_status(run_dir, State.failed, step=step, reason=str(killed))
