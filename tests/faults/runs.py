"""Real runs of tiny models in processes of their own, forked or, where that is the promise, started as users start them.

A forked one (`tests/helpers/warm.py`) does not import; it trains, saves, takes signals and ends as a started one. What is
about threads that libraries start when they are loaded, or about torchrun, is started: `Runs.start(..., own=True)`.
"""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import psutil

from strategies import shared_files
from tests.helpers.building import model_dir
from tests.helpers.launching import ROOT, clean_environment, command_here, free_port
from tests.helpers.speed import seconds
from tests.helpers.tokenizers import write_chat_data
from tests.helpers.warm import Forked, command_warm, forked

PACED = {"PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'pace'}:{ROOT}"}
"""What makes a run rest after each step."""
Process = subprocess.Popen | Forked
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def environment(**extra: str) -> dict[str, str]:
    """What a user's shell has."""
    return {key: value for key, value in clean_environment().items() if key not in THREADS} | extra


class Runs:
    """A directory with a model and data, and the runs in it."""

    def __init__(self, root: Path) -> None:
        self.root, self.started = root, []
        self.model = model_dir(root)
        write_chat_data(root / "train.jsonl", 48)
        write_chat_data(root / "eval.jsonl", 8, seed=1)

    def words(self, run: str, *words: str, verb: str = "train") -> list[str]:
        settings = {
            "model.path": self.model,
            "data.path": self.root / "train.jsonl",
            "data.cache_dir": self.root / "cache",
            "run.dir": self.root / run,
            "run.device": "cpu",
            "run.matmul": "blas",
            "run.threads": 1,  # of torch, once it trains; those of other libraries start as they do for a user
            "strategy": "single",
            "batch.global": 8,
            "batch.micro": 2,
            "budget.steps": 5000,
            "tuning": "lora",
            "optim.lr": 1e-3,
            "logging.every_steps": 1,
            "logging.wandb": "disabled",
            "logging.report": "false",
            "export.at_end": "false",
        }
        typed = {word.partition("=")[0] for word in words}
        if verb == "prepare":
            settings = {key: value for key, value in settings.items() if key.startswith(("model", "data"))}
        given = [f"{key}={value}" for key, value in settings.items() if key not in typed]
        return [sys.executable, "-m", "launch.main", verb, *given, *words]

    def start(
        self, run: str, *words: str, paced: bool = True, own: bool = False, ranks: bool = False, **extra: str
    ) -> Process:
        """`shardtune train` in a session of its own, resting after each step unless not `paced`; what it says goes to files.

        `own`: started as from a shell; else forked. What torchrun starts is started, but for `ranks`, where nothing is asked of
        torchrun.
        """
        started = self._popen if own else partial(self.forked, ranks=ranks)
        return started(self.words(run, *words), run, {**(PACED if paced else {}), **extra})

    def start_ranks(self, run: str, *words: str) -> list[Forked]:
        """Two forked ranks without torchrun, as srun starts them, each the first one of its host; they say to `<run>.<rank>`."""
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "launch.train", *self.words(run, *words)[4:]]
        return [self.forked(command, f"{run}.{rank}", {**job, "RANK": str(rank)}) for rank in range(2)]

    def forked(self, command: list[str], name: str, extra: dict[str, str], *, ranks: bool = False) -> Forked:
        """The command in a forked process; what it says goes to `<name>.out`. `ranks`: those it starts are forked as well."""
        with (self.root / f"{name}.out").open("w") as out:
            self.started.append(forked(command, environment(**extra), out.fileno(), ranks=ranks))
        return self.started[-1]

    def _popen(self, command: list[str], name: str, extra: dict[str, str]) -> subprocess.Popen:
        with (self.root / f"{name}.out").open("w") as out:
            started = subprocess.Popen(
                command,
                env=environment(**extra),
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(started)
        return started

    def held_at(self, run: str, step: int) -> dict[str, str]:
        """What keeps a paced run from going on after the row of this step before it is told to stop, or `let_on`."""
        return {"PACE_GATE": str(self.root / f"{run}.gate"), "PACE_LAST": str(step)}

    def let_on(self, run: str) -> None:
        """Let a run that is `held_at` a step go on."""
        (self.root / f"{run}.gate").touch()

    @contextlib.contextmanager
    def data_held(self) -> Iterator[str]:
        """The word by which runs wait for their data, as where another process prepares the same, as long as this is entered."""
        with self._data_lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield f"data.cache_dir={self._data_lock.parent}"

    @cached_property
    def _data_lock(self) -> Path:
        words = self.words("", f"data.cache_dir={self.root / 'held'}", verb="prepare")
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            assert command_here(words[3:]) == 0
        [done] = (self.root / "held").glob("*/manifest.json")
        done.unlink()
        return done.parent.with_name(f".{done.parent.name}.lock")

    def run(self, run: str, *words: str, **extra: str) -> tuple[int, str]:
        """The whole of a run in a process of its own: its exit code and what it said."""
        code = self.end(self.start(run, *words, paced=False, **extra))
        return code, self.said(run)

    def run_here(self, run: str, *words: str, **extra: str) -> tuple[int, str]:
        """The same in this process, which spares a start: where neither the process nor how it ends is what is tested.

        Several ranks are forked.
        """
        with (
            (self.root / f"{run}.out").open("w") as out,
            redirect_stdout(out),
            redirect_stderr(out),
            patch.dict(os.environ, extra),
        ):
            code = command_warm(self.words(run, *words)[3:])
        return code, self.said(run)

    def end(self, process: Process, limit: float = 120) -> int:
        return process.wait(timeout=seconds(limit))

    def said(self, run: str) -> str:
        return (self.root / f"{run}.out").read_text()

    def status(self, run: str) -> dict:
        return read(self.root / run / "status.json")

    def rows(self, run: str) -> list[dict]:
        path = self.root / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def curve(self, run: str) -> list[tuple]:
        return [(row["step"], row["loss"], row["grad_norm"]) for row in self.rows(run)]

    def wait_for_step(self, run: str, step: int, process: Process) -> None:
        wait(lambda: any(row["step"] >= step for row in self.rows(run)), f"step {step} of {run}", process)

    def close(self) -> None:
        for started in self.started:
            if started.poll() is not None:  # its number may be another one's by now
                continue
            for left in [*descendants(started.pid), started]:
                try:
                    left.send_signal(signal.SIGCONT)
                    left.kill()
                except (psutil.Error, ProcessLookupError):
                    continue
            started.wait()


def read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def wait(condition, what: str, process: Process | None = None, limit: float = 120, interval: float = 0.01) -> None:
    deadline = time.monotonic() + seconds(limit)
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(interval)


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def rank_of(launcher: int, rank: int) -> psutil.Process | None:
    """The process that is this rank of the run which `launcher` started."""
    for process in descendants(launcher):
        try:
            environ = process.environ()
        except psutil.Error:
            continue
        if environ.get("RANK") == str(rank) and process.ppid() != launcher:
            return process
    return None


def forked_rank_of(launcher: int, rank: int) -> psutil.Process:
    """The same where ranks are forked: children of the one child of the launcher, in the order of their ranks.

    Linux lists them as they were made; by their numbers the last one comes first where those begin anew. Ranks of
    DeepSpeed are one level lower: a child of that child has imported it and forks them.
    """
    [nursery] = psutil.Process(launcher).children()
    made = _children(nursery.pid)
    if len(made) == 1:
        made = _children(made[0])
    return psutil.Process(made[rank])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def flood(process: Process, *numbers: int, every_s: float = 0.02) -> int:
    """Send signals in turn, again and again, until the process is gone; its exit code."""
    deadline = time.monotonic() + seconds(120)
    again = itertools.cycle(numbers)
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            process.send_signal(next(again))
        time.sleep(every_s)
    return process.wait(timeout=seconds(10))


ELSEWHERE = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
ELSEWHERE += ['hostname elsewhere && exec "$@"', "elsewhere"]
"""Another host name and other process ids, as on another host that shares the disk."""


def can_be_elsewhere() -> bool:
    return subprocess.run([*ELSEWHERE, "true"], capture_output=True, check=False).returncode == 0


def start_elsewhere(runs, out, run, *words):
    with (runs.root / f"{out}.out").open("w") as file:
        command = [*ELSEWHERE, *runs.words(run, *words)]
        process = subprocess.Popen(command, env=environment(**PACED), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    runs.started.append(process)
    return process


def take_over(run_dir, owner):
    """As another attempt claims a directory that is looked at: at once whole."""
    claim = run_dir / "lease" / "000002.json"
    shared_files.claim_shared_file(claim, json.dumps(asdict(owner)).encode(), "elsewhere")
