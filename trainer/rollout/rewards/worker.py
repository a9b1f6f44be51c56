"""The program of a worker process: `python -m trainer.rollout.rewards.worker READ_FD WRITE_FD PARENT_PID`.

It calls rewards in its main thread, so that functions may set alarms, with one thread for libraries that compute and with the
default handlers of signals. Messages are JSON texts, each after its length in 8 bytes. The first one says which rewards there
are; it is answered once they are loaded. Each further one is a call. What rewards print goes into a log, as far as it is short.

It imports no torch: a worker starts in a fraction of a second, and is started again after each call that takes too long.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from strategies.parent_death import die_with_parent
from trainer.rollout.rewards.functions import AnswersOfGroup, BadScore, CallResult, FunctionReward
from trainer.rollout.rewards.kinds import KindReward

LENGTH_BYTES = 8
MAX_LOG_BYTES = 4 << 20
"""Of what a worker's rewards print, so much is kept."""
TRACEBACK_LINES = 24
Reward = Callable[[AnswersOfGroup], CallResult]


class LimitedLog(io.TextIOBase):
    """A text stream into a file that takes the first `MAX_LOG_BYTES` bytes and forgets the rest.

    A worker goes on with the log of the one before it, but begins it anew once it is full: a run may start many.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_full = file.exists() and file.stat().st_size >= MAX_LOG_BYTES
        self._file = file.open("wb" if is_full else "ab", buffering=0)
        self._bytes_left = MAX_LOG_BYTES

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> int:
        if self._bytes_left > 0:
            kept = text[: self._bytes_left].encode("utf-8", "replace")
            self._bytes_left -= len(kept)
            self._file.write(kept)
            if self._bytes_left <= 0:
                self._file.write(b"\n[what is printed from here on is not kept]\n")
        return len(text)


def send_message(stream: BinaryIO, message: Any) -> None:
    """Write one message: `LENGTH_BYTES` bytes with its length, then JSON. Raises BrokenPipeError if nobody reads any more."""
    text = json.dumps(message).encode()
    stream.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    stream.flush()


def receive_message(stream: BinaryIO) -> Any:
    """Read one message. Raises EOFError if the other end is closed."""
    head = stream.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        raise EOFError
    return json.loads(stream.read(int.from_bytes(head, "little")))


def load_reward(settings: dict[str, Any]) -> Reward:
    """The reward of `{"kind" or "file" and "function", "options"}`. Raises what a reward file raises."""
    if settings.get("file"):
        return FunctionReward.load(Path(settings["file"]), settings["function"], settings["options"])
    return KindReward(settings["kind"], settings["options"])


def reply_to_call(reward_by_name: dict[str, Reward], call: dict[str, Any]) -> dict[str, Any]:
    """Call a reward, and return the reply for the trainer: scores, or what went wrong.

    `call`: {"reward": "maths", "answers": the arguments of `AnswersOfGroup`}. Returns {"scores": [1.0, None], "logged": ...,
    "extra": ...}, or {"problem": "...", "traceback": "..."}, without a traceback if the reward refuses the row (BadScore).
    """
    try:
        result = reward_by_name[call["reward"]](AnswersOfGroup(**call["answers"]))
    except BadScore as error:
        return {"problem": str(error)}
    except BaseException:  # noqa: BLE001 - also SystemExit: whatever it is, the run ends with it
        return {"problem": "raised an exception", "traceback": short_traceback()}
    return {"scores": result.scores, "logged": result.logged_numbers, "extra": result.extra_columns}


def short_traceback() -> str:
    """The exception that is being handled as text: its last `TRACEBACK_LINES` lines, without the frames of this program."""
    kind, error, trace = sys.exc_info()
    program_files = (__file__, str(Path(__file__).with_name("functions.py")))
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in program_files:
        trace = trace.tb_next
    lines = "".join(traceback.format_exception(kind, error, trace)).rstrip().splitlines()
    return "\n".join(lines[-TRACEBACK_LINES:])


def main(read_fd: int, write_fd: int, parent: int) -> None:
    """Be a worker process: load the reward functions, then score answers until the trainer closes the pipe.

    `read_fd`, `write_fd`: pipes from and to the trainer, with the setup as the first message.
    `parent`: the trainer's process id; the worker ends with it.

    What rewards print goes to a log file.
    """
    die_with_parent(parent)
    # The trainer blocks signals that ask it to save; a process that it starts inherits that.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    with os.fdopen(read_fd, "rb") as calls, os.fdopen(write_fd, "wb") as replies:
        # Setup: {"log": path of the log file, "rewards": {name: settings}}. What is printed from here on goes to the log.
        setup = receive_message(calls)
        log = LimitedLog(Path(setup["log"]))
        sys.stdout = sys.stderr = log  # type: ignore[assignment]
        faulthandler.enable(log)  # of a crash in native code, the log has the place
        rewards: dict[str, Reward] = {}
        for name, settings in setup["rewards"].items():
            try:
                rewards[name] = load_reward(settings)
            except BaseException:  # noqa: BLE001 - whatever a file raises is told
                send_message(replies, {"reward": name, "problem": "cannot be loaded", "traceback": short_traceback()})
                return
        send_message(replies, {"ready": True})
        # Calls, until the trainer closes its end.
        while True:
            try:
                call = receive_message(calls)
            except EOFError:
                return
            send_message(replies, reply_to_call(rewards, call))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
