"""Processes forked from one that has imported what they need: where neither importing nor torchrun is what is tested.

A run of two ranks takes 10 CPU seconds, nearly all of which four processes spend importing torch. Here the launcher runs in
the test's process and its ranks are forked; what they do, and all they write, is that of `python -m launch.train`.
`forked` is any `python -m module ...` in a session of its own, which takes signals and ends as one that was started.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

from launch.cluster import torchrun
from tests.helpers.launching import ROOT, clean_environment, command_here, free_port
from tests.helpers.nursery import WITHOUT_THREADS
from tests.helpers.speed import seconds


class Nursery:
    """The process that ranks are forked from, with the modules `also` imported beside what all need; gone with this one."""

    def __init__(self, *also: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.helpers.nursery", str(theirs.fileno()), *also]
        env = clean_environment(**WITHOUT_THREADS)
        process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._socket, self._pid, self._wait = ours, process.pid, process.wait

    @classmethod
    def of(cls, ours: socket.socket, pid: int) -> "Nursery":
        """One that this process has forked: its child `pid`, asked through `ours`."""
        made = cls.__new__(cls)
        made._socket, made._pid, made._wait = ours, pid, lambda: os.waitpid(pid, 0)[1]
        return made

    def run(self, verb: str, world: int, env: dict[str, str], outputs: list[int], look: Any, *, also: str = "") -> int:
        """The first exit code that is not 0 of ranks 0 to `world - 1` of `verb`; `look` is called a few times a second.

        `also`: a module that each of them imports.
        """
        request = json.dumps({"verb": verb, "world": world, "env": env, "cwd": str(Path.cwd()), "also": also})
        socket.send_fds(self._socket, [request.encode()], outputs)
        self._socket.settimeout(0.2)
        while True:
            with contextlib.suppress(TimeoutError):
                answer = self._socket.recv(64)
                assert answer, "the process that forks ranks has ended"
                return int(answer)
            look()

    def process(self, job: dict[str, Any], descriptors: list[int]) -> "Forked":
        """A process of its own that does `job`; it has copies of `descriptors`, of which the first two are its outputs."""
        tells, told = os.pipe()
        socket.send_fds(self._socket, [json.dumps(job).encode()], [told, *descriptors])
        os.close(told)
        return Forked(tells)

    def close(self) -> None:
        """End it with the ranks that it has forked."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        self._wait()
        nursery.cache_clear()


class Forked:
    """What `subprocess.Popen` is of a process that was started: `pid`, `returncode`, `poll`, `wait` and `send_signal`."""

    def __init__(self, tells: int) -> None:
        self._tells, self.returncode = os.fdopen(tells, "rb", buffering=0), None
        self.pid = int(self._line())

    def _line(self) -> bytes:
        line = self._tells.readline()
        assert line, "the process that forks others has ended"
        return line

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._tells], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            self.returncode = int(self._line())
            self._tells.close()
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forked(
    command: Sequence[Any],
    env: dict[str, str],
    output: int,
    *,
    errors: int | None = None,
    cwd: Path = ROOT,
    ranks: bool = False,
    passed: Sequence[int] = (),
    also: str = "",
) -> Forked:
    """`subprocess.Popen` of `[sys.executable, "-m", module, ...]`; what it says to stderr goes to `output` too without `errors`.

    `ranks`: those that it starts are forked as well. `passed`: descriptors that it has as `PASSED` and following ones. `also`: a
    module that is imported beside what all need, once for all that name it. What
    its environment says to libraries when they are imported, such as the number of their threads, comes too late;
    `sitecustomize` on its PYTHONPATH is found.
    """
    python, flag, module, *words = map(str, command)
    assert (python, flag) == (sys.executable, "-m"), command
    job = {"module": module, "words": words, "env": env, "cwd": str(cwd), "ranks": ranks, "also": also}
    return nursery().process(job, [output, output if errors is None else errors, *passed])


def heard(command: Sequence[Any], env: dict[str, str], **how: Any) -> tuple[Forked, TextIO]:
    """The same, and what it says, to be read as it comes."""
    reads, writes = os.pipe()
    try:
        return forked(command, env, writes, **how), os.fdopen(reads)
    finally:
        os.close(writes)


def run_ranks(words: Sequence[Any], world: int, *, cwd: Path = ROOT, timeout_s: float = 300) -> None:
    """Run `python <words>`, of a module, on `world` gloo ranks, as torchrun does; all end well within `timeout_s`, scaled."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    place |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    with tempfile.TemporaryFile("w+") as said:
        ranks = [
            forked(
                [sys.executable, *words],
                clean_environment(**place, RANK=str(rank), LOCAL_RANK=str(rank)),
                said.fileno(),
                cwd=cwd,
            )
            for rank in range(world)
        ]
        try:
            codes = [rank.wait(seconds(timeout_s)) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        said.seek(0)
        assert codes == [0] * world, (codes, said.read()[-6000:])


@cache
def nursery() -> Nursery:
    found = Nursery()
    atexit.register(found.close)
    return found


def start(
    config: Any, run_dir: Path, run_id: str, redirected: Any = None, *, program: torchrun.RankProgram = torchrun.TRAIN
) -> torchrun.RanksEnd:
    """In place of `launch.cluster.torchrun.run_ranks_on_this_host`: the same ranks in the same environment, without torchrun."""
    world = config.launcher.processes or 1
    env = {**os.environ, "SHARDTUNE_CONFIG": str(run_dir / program.config), "SHARDTUNE_RUN_DIR": str(run_dir)}
    env |= {"SHARDTUNE_LAUNCHER": str(os.getpid()), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    forks = nursery()
    with contextlib.ExitStack() as opened:
        if redirected is None:
            sys.stdout.flush()
            outputs = [_descriptor(sys.stdout, 1), _descriptor(sys.stderr, 2)]
        else:
            redirected.output.parent.mkdir(parents=True, exist_ok=True)
            outputs = [opened.enter_context(redirected.output.open("ab")).fileno()] * 2
        try:
            verb, poll = program.module.rpartition(".")[2], (lambda: None) if redirected is None else redirected.poll
            also = "deepspeed" if config.strategy.name.startswith("zero") else ""
            return torchrun.RanksEnd(forks.run(verb, world, env, outputs, poll, also=also), set())
        except BaseException:  # the test's limit, say
            forks.close()
            raise


def interrupted(*given: Any, **named: Any) -> torchrun.RanksEnd:
    """`start`, to which Ctrl-C is an end of the ranks as to `launch.cluster.torchrun.run_ranks_on_this_host`."""
    try:
        return start(*given, **named)
    except KeyboardInterrupt:
        return torchrun.RanksEnd(130, {signal.SIGINT})


def _descriptor(stream: Any, usual: int) -> int:
    try:
        return stream.fileno()
    except OSError:
        return usual


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Runs of several ranks that are launched in this process have theirs forked."""
    with mock.patch("launch.cluster.torchrun.run_ranks_on_this_host", start):
        yield


def command_warm(words: list[str]) -> int:
    """As `command_here`, for a run of several ranks."""
    with forked_ranks():
        return command_here(words)
