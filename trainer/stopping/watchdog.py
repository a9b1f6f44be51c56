"""A small process that kills the one which prepares a run if a request to stop cannot reach Python any more.

Some native code keeps the interpreter's lock (the tokenizers library while it encodes a text, Python's own powers of
large integers). No thread of the process runs then, and its blocked signals stay pending, which Linux shows in
`/proc`. The watchdog looks there. It imports nothing of the project: `python -I -S watchdog.py <mask of the signals,
hexadecimal> <seconds>`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

LOOK_INTERVAL_S = 0.5


class Watchdog:
    """The watchdog of this process, from here to `close`. Without Linux's `/proc` there is none."""

    def __init__(self, signals: Iterable[signal.Signals], patience_s: float) -> None:
        """Start a process that kills this one when one of the signals has been pending for `patience_s` seconds.

        A pending signal was sent and not received: native code lets no thread run. Only on Linux.
        """
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux" or not sys.executable:
            return
        signal_mask = 0  # as /proc shows pending signals: bit n - 1 stands for signal n
        for number in signals:
            signal_mask |= 1 << (number - 1)
        environment = dict(os.environ)
        environment.pop("RANK", None)  # it is no rank, and is not to be sent what ranks are sent
        command = [sys.executable, "-I", "-S", __file__, f"{signal_mask:x}", str(patience_s)]
        with suppress(OSError):  # no room for another process: the run continues without
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def close(self) -> None:
        """End the watchdog. It also ends by itself when the watched process does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


def pending_signal_mask(status: str) -> int:
    """The mask of signals that wait for any thread of a process, by the text of its `/proc/<pid>/status`."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "ShdPnd":
            return int(value, 16)
    return 0


def is_suspended(status: str) -> bool:
    """Whether the process was stopped (SIGSTOP, `scontrol suspend`) or is traced; then it can take no signal."""
    return "\nState:\tT" in status or "\nState:\tt" in status


def kill_parent_when_stuck(pid: int, signal_mask: int, patience_s: float) -> None:
    """Kill our parent, process `pid`, once a signal was pending for `patience_s` seconds: it is stuck in native code.

    Looks every `LOOK_INTERVAL_S` seconds. Returns when it has killed the parent, or when the parent needs no watchdog any more:
    it has ended, or closed the pipe. `signal_mask`: as in /proc, bit n - 1 for signal n (SIGTERM, 15: 0x4000).
    """
    pending_s = 0.0
    while os.getppid() == pid:
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_INTERVAL_S)
        if readable:  # the pipe was closed
            return
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return
        if is_suspended(status):  # it cannot take a signal now, and the time does not count
            continue
        if not pending_signal_mask(status) & signal_mask:
            pending_s = 0.0
            continue
        pending_s += LOOK_INTERVAL_S
        if pending_s >= patience_s and os.getppid() == pid:
            os.kill(pid, signal.SIGKILL)
            return


if __name__ == "__main__":
    kill_parent_when_stuck(os.getppid(), int(sys.argv[1], 16), float(sys.argv[2]))
