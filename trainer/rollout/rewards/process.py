"""Worker processes of rewards, seen from the rank that started them: they are started, asked, killed and started again.

A worker is a plain child (`python -m`), neither forked nor spawned by `multiprocessing`: it inherits no CUDA context, no
threads and no store, and its main thread is free for the alarms that some reward functions set.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from strategies.errors import DataError
from trainer.rollout.rewards.worker import LENGTH_BYTES, send_message

ROOT = Path(__file__).resolve().parents[3]
"""Directory of the packages, for the search path of a worker."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
RANK_PREFIXES = ("MASTER_", "SLURM_", "SRUN_", "PMI_", "PMIX_", "TORCHELASTIC_", "NCCL_")
"""Variables by which libraries take a process for a rank of the job."""
THREAD_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
GPU_VISIBILITY_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
LOAD_TIMEOUT_S = 300.0
"""Seconds that the reward files may take to be imported."""
POLL_INTERVAL_S = 0.2
"""Seconds after which a waiting rank looks whether it was asked to stop."""
MAX_TIMEOUTS_WITHOUT_SUCCESS = 8
"""If so many calls of a reward took too long and none was in time, in a round or since the workers began, the run ends."""


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Make the environment of a worker process from that of the rank that starts it.

    Without variables that say which rank of the job it is; no GPU is visible, libraries use one thread, the hash seed is fixed so
    that sets have the same order every time, and this code base comes first on PYTHONPATH.
    """
    cleaned = {}
    for name, value in environment.items():
        if name not in RANK_VARIABLES and not name.startswith(RANK_PREFIXES):
            cleaned[name] = value
    cleaned |= dict.fromkeys(THREAD_COUNT_VARIABLES, "1") | dict.fromkeys(GPU_VISIBILITY_VARIABLES, "")
    cleaned["TOKENIZERS_PARALLELISM"] = "false"
    cleaned["PYTHONHASHSEED"] = "0"
    search_path = [str(ROOT)]
    if environment.get("PYTHONPATH"):
        search_path.append(environment["PYTHONPATH"])
    cleaned["PYTHONPATH"] = os.pathsep.join(search_path)
    return cleaned


class WorkerDied(Exception):
    """A worker process has ended by itself. The message says how."""


class RewardProcess:
    """One worker process. It is started with the first call, and again after `kill`."""

    def __init__(self, rewards: dict[str, dict[str, Any]], log: Path) -> None:
        """`rewards`: what `load_reward` takes, by name. `log`: where it writes what the rewards print."""
        self._setup = {"rewards": rewards, "log": str(log)}
        """The first message to the worker."""
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        # Set by `start`: the pipe to the process, and the file descriptor of the pipe from it.
        self._call_pipe: BinaryIO
        self.reply_fd: int
        self._received = b""
        """Bytes of messages that have not arrived completely."""

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not killed since."""
        return self._process is not None

    def start(self) -> None:
        """Start the process unless it runs, and send it the rewards to load.

        Its first message will be {"ready": true}, or why one cannot be loaded: {"reward": "maths", "problem": "cannot be loaded",
        "traceback": "..."}.
        """
        if self._process is not None:
            return
        call_read, call_write = os.pipe()
        reply_read, reply_write = os.pipe()
        command = [
            sys.executable,
            "-m",
            "trainer.rollout.rewards.worker",
            str(call_read),  # it reads calls from here
            str(reply_write),  # and writes replies here
            str(os.getpid()),  # it ends with this process
        ]
        self._process = subprocess.Popen(
            command,
            env=worker_environment(os.environ),
            pass_fds=(call_read, reply_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the trainer, and `kill` ends what the worker started too
        )
        os.close(call_read)
        os.close(reply_write)
        self._call_pipe = os.fdopen(call_write, "wb")
        self.reply_fd = reply_read
        self._received = b""
        with contextlib.suppress(BrokenPipeError):  # it died at once: `read_message` says how
            send_message(self._call_pipe, self._setup)

    def ask(self, call: dict[str, Any]) -> None:
        """Send a call. A worker reads each call before it runs anything, so that this does not wait for a reward."""
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: `read_message` says how
            send_message(self._call_pipe, call)

    def read_message(self) -> dict[str, Any] | None:
        """Receive bytes from the worker. Returns its next message if all of it has arrived, else None.

        A message is JSON, after its length in `LENGTH_BYTES` bytes. Bytes after it are kept for the next call. Call it when
        `reply_fd` can be read, so that it does not wait. Raises WorkerDied if the process has ended.
        """
        chunk = os.read(self.reply_fd, 1 << 20)
        if not chunk:
            raise WorkerDied(self._cause_of_death())
        self._received += chunk
        if len(self._received) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._received[:LENGTH_BYTES], "little")
        if len(self._received) < LENGTH_BYTES + length:
            return None
        message: dict[str, Any] = json.loads(self._received[LENGTH_BYTES : LENGTH_BYTES + length])
        self._received = self._received[LENGTH_BYTES + length :]
        return message

    def _cause_of_death(self) -> str:
        """How the process ended, in words for an error: its exit code, or the signal that ended it."""
        assert self._process is not None
        code = self._process.wait()
        if code >= 0:
            return f"its process ended with exit code {code}"
        hint = ""
        if -code == signal.SIGKILL:
            hint = ", as the kernel does where a host runs out of memory"
        return f"its process was ended by {signal.Signals(-code).name}{hint}"

    def kill(self) -> None:
        """End the process and what it has started, such as after a call that took too long. May be called when there is none."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._call_pipe.close()
        os.close(self.reply_fd)
        self._process = None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a reward that a worker shall make: for answers to one prompt."""

    reward: str
    answers: dict[str, Any]
    """The arguments of `AnswersOfGroup`."""
    origin: str
    """Row of the prompt, as `file:line`."""
    timeout_s: float


@dataclass(slots=True)
class Reply:
    """What became of a call: the scores, or that there was no time for them."""

    scores: list[float | None] | None
    """None: it took longer than its time limit."""
    logged_numbers: dict[str, list[float]]
    """Numbers that the reward logged for the metrics, by name; any number of them."""
    extra_columns: dict[str, list[Any]]
    """Further values for the record of answers, by name: one for each answer, or None."""

    @classmethod
    def unscored(cls) -> Reply:
        """The reply to a call that took longer than its time limit."""
        return cls(scores=None, logged_numbers={}, extra_columns={})


class Stopped(Exception):
    """The run was asked to stop while this rank waited for replies."""


@dataclass(frozen=True, slots=True)
class _RunningCall:
    """A call that a worker is making."""

    worker: RewardProcess
    index: int
    """Index of the call in its round."""
    deadline: float
    """Moment of `time.monotonic` after which the worker is killed."""


class WorkerPool:
    """The worker processes of this rank, which share the calls of each round; they run the user's code apart from training."""

    def __init__(
        self, rewards: dict[str, dict[str, Any]], logs: Sequence[Path], stop_asked: Callable[[], bool]
    ) -> None:
        """`logs`: the log of each worker. `stop_asked`: whether this process was asked to stop; no collective."""
        self._workers = [RewardProcess(rewards, log) for log in logs]
        self._stop_asked = stop_asked
        self._timeouts_without_success: Counter[str] = Counter(dict.fromkeys(rewards, 0))
        """Calls of all rounds that took too long, of each reward that was never in time so far."""

    def start(self) -> None:
        """Start all workers, and wait until they have loaded the rewards. Raises DataError if one cannot, and Stopped."""
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            self._wait_until_ready(worker)

    def _wait_until_ready(self, worker: RewardProcess) -> None:
        """Wait until a worker that was just started has loaded the rewards.

        Raises DataError if it cannot load them or takes longer than `LOAD_TIMEOUT_S`, and Stopped.
        """
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(worker.reply_fd, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                self._raise_if_stopping()
                if not selector.select(POLL_INTERVAL_S):
                    continue
                try:
                    message = worker.read_message()
                except WorkerDied as death:
                    raise DataError(f"objective.rewards: cannot be loaded: {death}") from None
                if message is None:
                    continue
                if message.get("ready"):
                    return
                trace = message["traceback"]
                raise DataError(f"objective.rewards.{message['reward']}: {message['problem']}\n{trace}")
        worker.kill()
        raise DataError(
            f"objective.rewards: the files took longer than {LOAD_TIMEOUT_S:.0f} s to be imported; import less in them"
        )

    def run(self, calls: Sequence[Call]) -> list[Reply]:
        """Have the workers make the calls of a round; returns the reply to each, in the order of the calls.

        A worker whose call takes longer than its time limit is killed and started again; the reply then has no scores. A call
        during which the worker dies is tried once more. Raises DataError, with the row, for a reward that fails, and Stopped.
        """
        round_of_calls = _RoundOfCalls(calls, self._timeouts_without_success)
        idle_workers = [self._restart_if_killed(worker) for worker in self._workers]
        running: dict[int, _RunningCall] = {}  # by `reply_fd` of the worker
        with selectors.DefaultSelector() as selector:
            while round_of_calls.waiting_indices or running:
                self._raise_if_stopping()
                # Give calls to idle workers.
                while idle_workers and round_of_calls.waiting_indices:
                    call = self._send_call(idle_workers.pop(), round_of_calls)
                    selector.register(call.worker.reply_fd, selectors.EVENT_READ)
                    running[call.worker.reply_fd] = call
                # Receive replies, for at most `POLL_INTERVAL_S` seconds, then end calls that are past their deadline.
                finished = []
                for key, _ in selector.select(POLL_INTERVAL_S):
                    if self._receive_reply(round_of_calls, running[key.fd]):
                        finished.append(key.fd)
                for fd in finished:  # before workers are started again, which may get the same file descriptors
                    selector.unregister(fd)
                for fd in finished:
                    idle_workers.append(self._restart_if_killed(running.pop(fd).worker))
                now = time.monotonic()
                overdue = [fd for fd, call in running.items() if now > call.deadline]
                for fd in overdue:
                    selector.unregister(fd)
                    call = running.pop(fd)
                    call.worker.kill()  # there is no other way to stop a function that hangs
                    idle_workers.append(self._restart_if_killed(call.worker))
                    round_of_calls.give_up_call(call.index)
        replies = [reply for reply in round_of_calls.replies if reply is not None]
        assert len(replies) == len(calls), "each call has a reply, or an error was raised"
        return replies

    def _send_call(self, worker: RewardProcess, round_of_calls: _RoundOfCalls) -> _RunningCall:
        """Take the next waiting call of the round and send it to a worker."""
        call_index = round_of_calls.waiting_indices.popleft()
        call = round_of_calls.calls[call_index]
        worker.ask({"reward": call.reward, "answers": call.answers})
        return _RunningCall(worker, call_index, deadline=time.monotonic() + call.timeout_s)

    def _receive_reply(self, round_of_calls: _RoundOfCalls, call: _RunningCall) -> bool:
        """Read what a worker has sent. Returns whether its call is over: it has replied, or the process has died.

        Notes the reply in `round_of_calls`, or the death, after which the process is killed for good.
        """
        try:
            message = call.worker.read_message()
        except WorkerDied as death:
            call.worker.kill()
            round_of_calls.retry_after_death(call.index, f"{death}; its log is {call.worker.log}")
            return True
        if message is None:
            return False
        round_of_calls.keep_reply(call.index, message)
        return True

    def _restart_if_killed(self, worker: RewardProcess) -> RewardProcess:
        """Start a worker again if it was killed, and wait until it has loaded the rewards. Returns the worker."""
        if not worker.is_running:
            worker.start()
            self._wait_until_ready(worker)
        return worker

    def _raise_if_stopping(self) -> None:
        """Raise Stopped if this process was asked to stop."""
        if self._stop_asked():
            raise Stopped

    def close(self) -> None:
        """End all workers. May be called twice."""
        for worker in self._workers:
            worker.kill()


class _RoundOfCalls:
    """The calls of a round, what became of them, and what is still to do."""

    def __init__(self, calls: Sequence[Call], timeouts_without_success: Counter[str]) -> None:
        """`timeouts_without_success`: calls of all rounds that took too long, of rewards that were never in time.

        `give_up_call` counts in it, and `keep_reply` takes a reward out for good once it is in time.
        """
        self.calls = calls
        self._timeouts_without_success = timeouts_without_success
        self.replies: list[Reply | None] = [None] * len(calls)
        """Of each call, once it has one."""
        self.waiting_indices = deque(range(len(calls)))
        self._timeouts_in_round: Counter[str] = Counter()
        self._rewards_in_time: set[str] = set()
        self._deaths_by_call: Counter[int] = Counter()

    def keep_reply(self, call_index: int, message: dict[str, Any]) -> None:
        """Keep the scores of a call. Raises DataError if the reward failed.

        `call_index`: of the call in the round.
        `message`: {"scores": [1.0], "logged": {...}, "extra": {...}}, or {"problem": "..."}.
        """
        call = self.calls[call_index]
        if "problem" in message:
            trace = f"\n{message['traceback']}" if "traceback" in message else ""
            raise DataError(f"objective.rewards.{call.reward}: {message['problem']} ({call.origin}){trace}")
        self._rewards_in_time.add(call.reward)
        self._timeouts_without_success.pop(call.reward, None)
        self.replies[call_index] = Reply(message["scores"], message["logged"], message["extra"])

    def give_up_call(self, call_index: int) -> None:
        """Leave the answers of a call that took longer than its time limit unscored, and end the run if its reward always does.

        Raises DataError if `MAX_TIMEOUTS_WITHOUT_SUCCESS` calls of the reward took too long and none was in time, in this round
        or in all.
        """
        call = self.calls[call_index]
        self._timeouts_in_round[call.reward] += 1
        if call.reward in self._timeouts_without_success:
            self._timeouts_without_success[call.reward] += 1
        self.replies[call_index] = Reply.unscored()
        # A round of few groups has few calls: a reward that always hangs is known after several rounds.
        num_timeouts = max(self._timeouts_in_round[call.reward], self._timeouts_without_success[call.reward])
        if call.reward not in self._rewards_in_time and num_timeouts >= MAX_TIMEOUTS_WITHOUT_SUCCESS:
            raise DataError(
                f"objective.rewards.{call.reward}: {MAX_TIMEOUTS_WITHOUT_SUCCESS} calls took longer "
                f"than timeout_s={call.timeout_s:g}, and "
                f"none was in time (the last one: {call.origin}); does it wait for something that never comes? Mend it, or "
                f"raise objective.rewards.{call.reward}.timeout_s"
            )

    def retry_after_death(self, call_index: int, cause: str) -> None:
        """Try a call again during which its worker process has ended. Raises DataError the second time."""
        call = self.calls[call_index]
        self._deaths_by_call[call_index] += 1
        if self._deaths_by_call[call_index] > 1:
            raise DataError(
                f"objective.rewards.{call.reward}: failed twice with the same answers ({call.origin}): {cause}"
            )
        self.waiting_indices.append(call_index)
