"""Starts the trainers of a comparison and lets them run in turn, a stretch of steps at a time."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import HERE, WORK, python_of

from training.cases import Case


class Failed(RuntimeError):
    """A trainer ended early, or said nothing for too long; the message is the end of what it printed."""


@dataclass(frozen=True, slots=True)
class Work:
    """How much everyone does."""

    inputs: Path
    warm: int = 2
    steps: int = 4
    rounds: int = 3
    batch: int = 4
    device: str = "cpu"
    patience_s: float = 400.0
    """Longest silence of a trainer."""

    def words(self) -> list[str]:
        """The options that all scripts share."""
        named = {"warm": self.warm, "steps": self.steps, "rounds": self.rounds, "batch": self.batch}
        return [f"--inputs={self.inputs}", f"--device={self.device}", *(f"--{k}={v}" for k, v in named.items())]


@dataclass(slots=True)
class Measured:
    """What one trainer reported."""

    ready: dict[str, Any] = field(default_factory=dict)
    stretches: list[dict[str, Any]] = field(default_factory=list)
    """One a round, in order; the warm-up is left out."""
    end: dict[str, Any] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    """Load average of the machine when each stretch ended."""


class Process:
    """One trainer, which waits at its gate until it is told to go on."""

    def __init__(self, case: Case, work: Work) -> None:
        self.case, self.work, self.found = case, work, Measured()
        self.out = WORK / "training" / case.name.replace(" ", "-").replace("(", "").replace(")", "").replace(",", "")
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.log = self.out / "log.txt"
        go_read, self.go = os.pipe()
        self.said, say_write = os.pipe()
        command = [python_of(case.environment), str(HERE / "peers" / f"train_{case.script}.py"), *work.words()]
        one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON", "ARROW")}
        environment = {**os.environ, **one, "BENCH_PIPES": f"{go_read},{say_write}", "BENCH_STARTED": str(time.time())}
        environment.pop("PYTHONPATH", None)
        if case.environment is None:
            environment["PYTHONPATH"] = str(HERE.parent)
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, f"--out={self.out}", *case.options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.out,
                pass_fds=(go_read, say_write),
            )
        os.close(go_read)
        os.close(say_write)
        self._rest = b""

    def hear(self) -> dict[str, Any]:
        """The next report. Raises Failed."""
        until = time.monotonic() + self.work.patience_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self.said], [], [], max(0.0, until - time.monotonic()))
            more = os.read(self.said, 65536) if ready else b""
            if not more:
                self.kill()
                silent = "" if ready else f"said nothing for {self.work.patience_s:.0f} s; "
                raise Failed(
                    f"{silent}{reason(self.log.read_text(errors='replace', encoding='utf-8'))} (see {self.log})"
                )
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def tell(self) -> None:
        """Let it run to its next gate."""
        os.write(self.go, b"g")

    def start(self) -> None:
        """Wait until it is ready, and let it warm up."""
        self.found.ready = self.hear()
        self.tell()
        self.hear()

    def stretch(self) -> None:
        """One round."""
        self.tell()
        self.found.stretches.append(self.hear())
        self.found.load.append(os.getloadavg()[0])

    def finish(self) -> None:
        """The rest of its run, and its last report."""
        self.tell()
        self.found.end = self.hear()
        self.process.wait(timeout=60)

    def kill(self) -> None:
        """End it, however far it is."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def reason(log: str) -> str:
    """The line of a log that says most about its end."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] and not line.startswith("File ")]
    return (errors or lines or ["no output"])[-1][:300]


def run(cases: tuple[Case, ...], work: Work, *, together: bool = True) -> tuple[dict[str, Measured], dict[str, str]]:
    """({name: what it reported}, {name: why it failed}).

    Together, all are started first and take turns, the order turned round each time; otherwise one runs after the other,
    where the memory of a device does not hold them all.
    """
    failed: dict[str, str] = {}
    alive: list[Process] = []
    done: dict[str, Measured] = {}

    def attempt(process: Process, what: str) -> bool:
        try:
            getattr(process, what)()
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            failed[process.case.name] = str(error)
            print(f"  {process.case.name}: failed: {error}", file=sys.stderr, flush=True)
            return False
        say(process, what)
        return True

    try:
        for batch in [cases] if together else [(case,) for case in cases]:
            alive = []
            for case in batch:
                alive.append(Process(case, work))
                if not attempt(alive[-1], "start"):
                    alive.pop()
            for number in range(work.rounds):
                order = alive if number % 2 == 0 else alive[::-1]
                bad = [process for process in order if not attempt(process, "stretch")]
                alive = [process for process in alive if process not in bad]
            done |= {process.case.name: process.found for process in list(alive) if attempt(process, "finish")}
    finally:
        for process in alive:
            process.kill()
    return done, failed


def say(process: Process, what: str) -> None:
    """A line on the terminal."""
    found, name = process.found, process.case.name
    if what == "start":
        print(f"  {name}: started, {found.ready['cpu']:.1f} CPU-s, {found.ready['wall']:.1f} s", flush=True)
    elif what == "stretch":
        last = found.stretches[-1]
        rate = last["tokens"] / max(1e-9, last["cpu"] - last["aside_cpu"])
        wall = last["tokens"] / max(1e-9, last["wall"] - last["aside_wall"])
        print(f"  {name}: round {len(found.stretches)}: {rate:.0f} tokens/CPU-s, {wall:.0f} tokens/s", flush=True)
    else:
        print(f"  {name}: loss {found.end['loss']:.5f}", flush=True)
