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
JOB_VARIABLE = "SHARDTUNE_NODE_TOLD"
SILENT_S = 60.0
"""Seconds without a line from the other end after which it counts as lost. It sends one every few seconds."""
END_S = 10.0
"""Seconds between asking the ranks to end and ending without them; they die with what started them."""
VISIBLE_S = 10.0
"""Seconds in which a file that was just written may appear on a network file system."""
HOST_VARIABLES = re.compile(
    "HOME|USER|LOGNAME|SHELL|SHLVL|MAIL|HOSTNAME|TMPDIR|(OLD)?PWD|_|(COLOR)?TERM|(WAYLAND_)?DISPLAY|XAUTHORITY|LS_COLORS|"
    "(SSH|XDG)_.*|DBUS_SESSION_BUS_ADDRESS"
)
"""Variables that are not carried, since each host and each login has its own."""


def variables_to_carry(env: dict[str, str]) -> dict[str, str]:
    """What of an environment the other hosts are given, as it is."""
    return {key: value for key, value in env.items() if not HOST_VARIABLES.fullmatch(key)}


def main(module: str = "launch.cluster.node") -> int:
    """Read the job, report what this host is, and run the ranks; returns the exit code (`launch.cluster.torchrun.start`).

    `module` is the one that calls this: the process replaces itself by it.
    """
    hold()  # as the command does: a request to save that comes while libraries are loaded is kept
    try:
        return _main(module)
    except (EOFError, KeyboardInterrupt):  # the other end has gone, or a signal came before there were ranks
        return 130


def _main(module: str) -> int:
    """Run this host's part of the job, first in the environment of the process that started it. Errors: EOFError."""
    if JOB_VARIABLE not in os.environ:
        _restart_in_environment(json.loads(_read_line(0)), module)
    job = json.loads(os.environ.pop(JOB_VARIABLE))
    commands = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # ranks read nothing
    sys.stdout.write(MARK + json.dumps(describe_host(job)) + "\n")
    sys.stdout.flush()
    begin = json.loads(_read_line(commands, SILENT_S))
    threading.Thread(target=_obey, args=(commands,), daemon=True).start()
    return run(job, begin)


def _restart_in_environment(job: dict[str, Any], module: str) -> None:
    """Replace this process by one in the job's environment, which the interpreter may need from its beginning on."""
    host_variables = {key: value for key, value in os.environ.items() if HOST_VARIABLES.fullmatch(key)}
    env = {**job.pop("env"), **host_variables, JOB_VARIABLE: json.dumps(job)}
    try:
        os.chdir(job["cwd"])
    except OSError as error:
        sys.exit(f"{job['cwd']}: is not there ({error.strerror}); the hosts must see the same files")
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], env)


def describe_host(job: dict[str, Any]) -> dict[str, Any]:
    """Facts of this host, for the host that starts the run; `config`: the digest of the frozen file as it is seen here."""
    from launch.cluster.hosts import interfaces
    from launch.cluster.snapshot import code_digest, read_code

    path = Path(job["config"])
    deadline = time.monotonic() + VISIBLE_S
    config_digest = _sha256(path)
    while config_digest != job["sha256"] and time.monotonic() < deadline:
        time.sleep(0.5)
        config_digest = _sha256(path)
    return {
        "host": socket.gethostname(),
        "ssh": (os.environ.get("SSH_CONNECTION") or "").split()[2:3],
        "addresses": interfaces(),
        "port": _free_port(),
        "python": sys.version.split()[0],
        "torch": metadata.version("torch"),
        "code": code_digest(read_code()),
        "config": config_digest,
        "gpus": listed_gpus(),
    }


def run(job: dict[str, Any], begin: dict[str, Any]) -> int:
    """The ranks of this host, to their end."""
    from launch.cluster.torchrun import RankProgram, start
    from launch.config.frozen import load_frozen

    path = Path(job["config"])
    config = load_frozen(path)
    config.launcher.node_rank = begin["rank"]
    config.launcher.rdzv = begin["rdzv"]
    code, _ = start(config, path.parent, begin["run_id"], program=RankProgram(job["module"], path.name))
    return code


def _obey(commands: int) -> None:
    """Pass on the signals that the other end sends; end the ranks once it is silent or gone."""
    while True:
        try:
            message = json.loads(_read_line(commands, SILENT_S))
        except (EOFError, ValueError):
            break
        if "signal" in message:
            os.kill(os.getpid(), message["signal"])
    for _ in range(2):  # as Ctrl-C: a few seconds to save, then none
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(END_S)
    end_process(130)


def _read_line(descriptor: int, timeout_s: float | None = None) -> bytes:
    """The next line. Raises EOFError where none comes: the other end is closed, or silent for too long."""
    line = bytearray()
    while not line.endswith(b"\n"):
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise EOFError("silent")
        piece = os.read(descriptor, 1)
        if not piece:
            raise EOFError("closed")
        line += piece
    return bytes(line)


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _free_port() -> int:
    """A port of this host at which nobody listens, below those that are given out to connections."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for _ in range(50):
        port = random.randrange(20000, 30000)
        try:
            with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
                return port
        except OSError:
            continue
    return 29400


if __name__ == "__main__":
    sys.exit(main())
