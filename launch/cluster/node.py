"""One host of a run that is started over ssh. `launch/cluster/ssh.py` starts `python -m launch.cluster.node` there.

The two talk in lines of JSON. First comes the environment: the process restarts itself with it. Then comes the
address where the hosts meet, then signals. The first line that goes out describes this host; all further lines are
output of the ranks. If nothing comes in for `SILENT_S` seconds, or the other end closes, the ranks are ended: nothing
outlives the command.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import select
import signal
import socket
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from strategies.compat.python import end_process
from strategies.hardware import listed_gpus
from trainer.stopping.signals import hold

MARK = "shardtune-node "
"""Begins the line that says what a host is; what a login shell prints stands before it."""
TOLD = "SHARDTUNE_NODE_TOLD"
SILENT_S = 60.0
"""Seconds without a word from the other end, which says one every few, after which it is taken for lost."""
END_S = 10.0
"""Seconds between asking the ranks to end and ending without them; they die with what started them."""
SEEN_S = 10.0
"""Seconds in which a file that was just written may appear on a network file system."""
OF_THE_HOST = re.compile(
    "HOME|USER|LOGNAME|SHELL|SHLVL|MAIL|HOSTNAME|TMPDIR|(OLD)?PWD|_|(COLOR)?TERM|(WAYLAND_)?DISPLAY|XAUTHORITY|LS_COLORS|"
    "(SSH|XDG)_.*|DBUS_SESSION_BUS_ADDRESS"
)
"""Variables that are not carried, since each host and each login has its own."""


def carried(env: dict[str, str]) -> dict[str, str]:
    """What of an environment the other hosts are given, as it is."""
    return {key: value for key, value in env.items() if not OF_THE_HOST.fullmatch(key)}


def main(module: str = "launch.cluster.node") -> int:
    """Be told, say what this host is, run the ranks; returns the exit code of their end (`launch.cluster.torchrun.start`).

    `module` is the one that calls this.
    """
    hold()  # as the command does: a request that comes while libraries are loaded is kept
    try:
        return _main(module)
    except (
        EOFError,
        KeyboardInterrupt,
    ):  # nobody talks with it any more, or it was told to end before there were ranks
        return 130


def _main(module: str) -> int:
    if TOLD not in os.environ:
        _begin_anew(json.loads(_line(0)), module)
    told = json.loads(os.environ.pop(TOLD))
    words = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # ranks read nothing
    sys.stdout.write(MARK + json.dumps(look(told)) + "\n")
    sys.stdout.flush()
    begin = json.loads(_line(words, SILENT_S))
    threading.Thread(target=_heed, args=(words,), daemon=True).start()
    return run(told, begin)


def _begin_anew(job: dict[str, Any], module: str) -> None:
    """Take the place of this process by one in the environment that was told, which its interpreter may need to begin with."""
    own = {key: value for key, value in os.environ.items() if OF_THE_HOST.fullmatch(key)}
    env = {**job.pop("env"), **own, TOLD: json.dumps(job)}
    try:
        os.chdir(job["cwd"])
    except OSError as error:
        sys.exit(f"{job['cwd']}: is not there ({error.strerror}); the hosts must see the same files")
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], env)


def look(told: dict[str, Any]) -> dict[str, Any]:
    """What this host is, for whoever starts the run; `config`: the frozen file as it is seen here."""
    from launch.cluster.hosts import interfaces
    from launch.cluster.snapshot import digest, read

    path, deadline = Path(told["config"]), time.monotonic() + SEEN_S
    while (seen := _sha256(path)) != told["sha256"] and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        "host": socket.gethostname(),
        "ssh": (os.environ.get("SSH_CONNECTION") or "").split()[2:3],
        "addresses": interfaces(),
        "port": _port(),
        "python": sys.version.split()[0],
        "torch": metadata.version("torch"),
        "code": digest(read()),
        "config": seen,
        "gpus": listed_gpus(),
    }


def run(told: dict[str, Any], begin: dict[str, Any]) -> int:
    """The ranks of this host, to their end."""
    from launch.cluster.torchrun import What, start
    from launch.config.frozen import load_frozen

    path = Path(told["config"])
    config = load_frozen(path)
    config.launcher.node_rank, config.launcher.rdzv = begin["rank"], begin["rdzv"]
    code, _ = start(config, path.parent, begin["run_id"], what=What(told["module"], path.name))
    return code


def _heed(words: int) -> None:
    """Act on what comes in; where nothing does any more, end."""
    while True:
        try:
            told = json.loads(_line(words, SILENT_S))
        except (EOFError, ValueError):
            break
        if "signal" in told:
            os.kill(os.getpid(), told["signal"])
    for _ in range(2):  # as Ctrl-C: a few seconds to save, then none
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_S)
    end_process(130)


def _line(descriptor: int, timeout_s: float | None = None) -> bytes:
    """The next line. Raises EOFError where none comes: the other end is closed, or silent for too long."""
    found = bytearray()
    while not found.endswith(b"\n"):
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise EOFError("silent")
        piece = os.read(descriptor, 1)
        if not piece:
            raise EOFError("closed")
        found += piece
    return bytes(found)


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _port() -> int:
    """A port of this host at which nobody listens, below those that are given out to connections."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for _ in range(50):
        number = random.randrange(20000, 30000)
        try:
            with socket.create_server(("", number), family=family, dualstack_ipv6=family == socket.AF_INET6):
                return number
        except OSError:
            continue
    return 29400


if __name__ == "__main__":
    sys.exit(main())
