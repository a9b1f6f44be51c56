"""Ranks forked from a process that has imported what they need: for runs whose start, signals and end are not what is tested.

A run of two ranks takes 10 CPU seconds, nearly all of which four processes spend importing torch. Here the launcher runs in
the test's process and its ranks are forked; what they do, and all they write, is that of `python -m launch.train`.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from launch import torchrun
from tests.helpers.launching import ROOT, clean_environment, command_here

IMPORTED = (
    "launch.compose",
    "launch.train",
    "launch.torchrun",
    "trainer.run",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "peft",
)
"""DeepSpeed is not among them: importing it starts a thread, which forked ranks would miss. They import it themselves."""
_by_torchrun = torchrun.start
GRACE_S = 5
"""Seconds between the failure of a rank and the end of its peers, as under torchrun."""


class Nursery:
    """The process that ranks are forked from; started when first asked, and gone with this one."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.helpers.warm", str(theirs.fileno())]
        env = clean_environment(OPENBLAS_NUM_THREADS="1")  # a process with threads cannot be forked
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._socket = ours

    def run(self, world: int, env: dict[str, str], outputs: list[int], look: Any) -> int:
        """The first exit code of ranks 0 to `world - 1` that is not 0; `look` is called a few times a second."""
        request = json.dumps({"world": world, "env": env, "cwd": str(Path.cwd())})
        socket.send_fds(self._socket, [request.encode()], outputs)
        self._socket.settimeout(0.2)
        while True:
            with contextlib.suppress(TimeoutError):
                answer = self._socket.recv(64)
                assert answer, "the process that forks ranks has ended"
                return int(answer)
            look()

    def close(self) -> None:
        """End it with the ranks that it has forked."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        nursery.cache_clear()


@cache
def nursery() -> Nursery:
    found = Nursery()
    atexit.register(found.close)
    return found


def start(
    config: Any, run_dir: Path, run_id: str, aside: Any = None, *, what: torchrun.What = torchrun.TRAIN
) -> tuple[int, set[int]]:
    """In place of `launch.torchrun.start`: the same ranks of a training run in the same environment, without torchrun."""
    if what is not torchrun.TRAIN:
        return _by_torchrun(config, run_dir, run_id, aside, what=what)
    world = config.launcher.processes or 1
    env = {**os.environ, "SHARDTUNE_CONFIG": str(run_dir / what.config), "SHARDTUNE_RUN_DIR": str(run_dir)}
    env |= {"SHARDTUNE_LAUNCHER": str(os.getpid()), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    with socket.create_server(("localhost", 0)) as free:
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    forks = nursery()
    with contextlib.ExitStack() as opened:
        if aside is None:
            sys.stdout.flush()
            outputs = [_descriptor(sys.stdout, 1), _descriptor(sys.stderr, 2)]
        else:
            aside.output.parent.mkdir(parents=True, exist_ok=True)
            outputs = [opened.enter_context(aside.output.open("ab")).fileno()] * 2
        try:
            return forks.run(world, env, outputs, (lambda: None) if aside is None else aside.look), set()
        except BaseException:  # the test's limit, say
            forks.close()
            raise


def _descriptor(stream: Any, usual: int) -> int:
    try:
        return stream.fileno()
    except OSError:
        return usual


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Runs of several ranks that are launched in this process have theirs forked."""
    with mock.patch("launch.torchrun.start", start):
        yield


def command_warm(words: list[str]) -> int:
    """As `command_here`, for a run of several ranks."""
    with forked_ranks():
        return command_here(words)


def main(descriptor: int) -> None:
    """In the process that forks: import, and start ranks as they are asked for, until nobody asks any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "threads, which a forked process would miss"
    with socket.socket(fileno=descriptor) as asked:
        while True:
            request, outputs, _, _ = socket.recv_fds(asked, 1 << 20, 2)
            if not request:
                return
            asked.send(str(_ranks(json.loads(request), outputs)).encode())
            for output in outputs:
                os.close(output)


def _ranks(job: dict[str, Any], outputs: list[int]) -> int:
    running, code, deadline = {}, 0, float("inf")
    for rank in range(job["world"]):
        if (pid := os.fork()) == 0:
            _rank(rank, job, outputs)
        running[pid] = rank
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            del running[pid]
            code = code or os.waitstatus_to_exitcode(status)
            if code and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S
        elif time.monotonic() > deadline:
            for left in running:
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    return code


def _rank(rank: int, job: dict[str, Any], outputs: list[int]) -> None:
    from launch.main import guarded
    from launch.train import end
    from trainer.stopping.signals import hold

    try:
        hold()
        for output, place in zip(outputs, (1, 2), strict=True):
            os.dup2(output, place)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update({**job["env"], "RANK": str(rank), "LOCAL_RANK": str(rank)})
        end(guarded("train", []))
    finally:
        os._exit(70)  # `end` did not come back: never on into the loop of the process that forked this one


if __name__ == "__main__":
    main(int(sys.argv[1]))
