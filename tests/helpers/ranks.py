"""Ranks that stay up between tests and compute one case at a time, when a test asks for it.

A test knows its case alone: a case that fails or takes too long ends the ranks and fails the tests that asked for it, and the
next case starts new ones. So one slow case is one failure, and running one test computes one case.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.garbage import set_aside
from tests.helpers.launching import clean_environment, free_port
from tests.helpers.nursery import PASSED
from tests.helpers.speed import seconds
from tests.helpers.warm import Forked, forked

CASE_S, START_S = 90, 120
"""Seconds that one case, and the start of the ranks, may take on the machine that `tests/helpers/speed.py` measures by."""
RENEWED_AFTER = 400
"""Cases after which ranks make room for new ones: engines leave about 2 MiB each behind."""
_PIPE = "RANKS_PIPE"


class Ranks:
    """`world` processes of `python -m module directory`, each of which calls `serve`; forked when first asked.

    `also`: a module that all need; it is imported once, not by each rank.
    """

    def __init__(self, module: str, world: int, directory: Path, *, also: str = "") -> None:
        self.module, self.world, self.directory, self.also = module, world, directory, also
        self._processes: list[Forked] = []
        self._pipes: list[Connection] = []
        self._known: dict[str, tuple[bool, str]] = {}
        self.starts, self._answered = 0, 0

    def ask(self, *question: Any, limit_s: float = CASE_S) -> Any:
        """What rank 0 answers to `question`; asked again, the same. The test fails where a rank fails or the limit is met."""
        key = json.dumps(question)
        if key not in self._known:
            try:
                self._known[key] = self._asked(key, seconds(limit_s))
            except (
                BaseException
            ):  # the test's own limit, say: what the ranks still answer would be taken for the next case's
                self.stop()
                raise
        good, answer = self._known[key]
        if not good:
            pytest.fail(f"{self.module} {key}: {answer}", pytrace=False)
        return json.loads(answer)

    def _asked(self, key: str, limit_s: float) -> tuple[bool, str]:
        if self._answered >= RENEWED_AFTER:
            self.stop()
        if not self._processes:
            self._start()
            limit_s += seconds(START_S)
        answers: dict[int, str] = {}
        problem, deadline = "", time.monotonic() + limit_s
        with contextlib.suppress(BrokenPipeError):  # a rank that died: seen below
            for pipe in self._pipes:
                pipe.send(key)
        while not problem and len(answers) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(waiting, max(0.0, deadline - time.monotonic())):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                    problem = problem or ("" if good else f"rank {rank}:\n{answers[rank]}")
                except (EOFError, ConnectionResetError):
                    problem = f"rank {rank} ended without an answer"
            if not problem and time.monotonic() > deadline:
                problem = f"no answer within {limit_s:.0f} s of ranks {sorted(set(range(self.world)) - set(answers))}"
        if not problem:
            self._answered += 1
            return True, answers[0]
        self.stop()
        return False, f"{problem}\n{self._said()}"

    def _start(self) -> None:
        self.starts, self._answered = self.starts + 1, 0
        port = free_port()
        for rank in range(self.world):
            ours, theirs = socket.socketpair()
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, _PIPE: PASSED}
            env = clean_environment(**{name: str(value) for name, value in place.items()})
            command = [sys.executable, "-m", self.module, self.directory]
            with (self.directory / f"rank{rank}.log").open("w") as log:
                self._processes.append(forked(command, env, log.fileno(), passed=[theirs.fileno()], also=self.also))
            theirs.close()
            self._pipes.append(Connection(ours.detach()))

    def _said(self) -> str:
        """The ends of what the ranks wrote."""
        logs = [self.directory / f"rank{rank}.log" for rank in range(self.world)]
        return "\n".join(f"{log.name}: ... {log.read_text(errors='replace')[-2000:]}" for log in logs)

    def stop(self) -> None:
        """End the ranks and whatever they started."""
        for pipe in self._pipes:
            pipe.close()
        for rank in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
        self._pipes, self._processes = [], []


def serve(answer: Callable[..., Any]) -> None:
    """In a rank: answer what is asked until nobody asks any more. An error is reported and ends the rank."""
    with Connection(int(os.environ[_PIPE])) as pipe:
        while True:
            try:
                question = json.loads(pipe.recv())
            except (EOFError, ConnectionResetError):
                return
            try:
                found = json.dumps(answer(*question))
            except BaseException:  # whatever it is, the test shows it
                pipe.send((False, traceback.format_exc()[-6000:]))
                raise
            pipe.send((True, found))
            set_aside()
