"""One host of a run that is started over ssh. `launch/cluster/ssh.py` starts `python -m launch.cluster.node` there.

The two talk in lines of JSON. First comes the environment: the process restarts itself with it. Then comes the
address where the hosts meet, then signals. The first line that goes out describes this host; all further lines are
output of the ranks. If nothing comes in for `MESSAGE_TIMEOUT_S` seconds, or the other end closes, the ranks are ended: nothing
outlives the command.
"""

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
from typing import Any, NoReturn

from strategies import exit_codes
from strategies.compat.python import end_process
from strategies.hardware import count_nvidia_gpus
from trainer.stopping.signals import block_signals

STDIN_FD = 0
HOST_FACTS_PREFIX = "shardtune-node "
"""Begins the line that says what a host is; what a login shell prints stands before it."""
JOB_VARIABLE = "SHARDTUNE_NODE_TOLD"
"""Carries the job, as JSON, over the restart of this process in the job's environment."""
MESSAGE_TIMEOUT_S = 60.0
"""Seconds without a line from the other end after which it counts as lost. It sends one every few seconds."""
RANKS_END_S = 10.0
"""Seconds between asking the ranks to end and ending without them; they die with what started them."""
FILE_VISIBLE_S = 10.0
"""Seconds in which a file that was just written may appear on a network file system."""
HOST_VARIABLES_REGEX = re.compile(
    "HOME|USER|LOGNAME|SHELL|SHLVL|MAIL|HOSTNAME|TMPDIR|(OLD)?PWD|_|(COLOR)?TERM|(WAYLAND_)?DISPLAY|XAUTHORITY|LS_COLORS|"
    "(SSH|XDG)_.*|DBUS_SESSION_BUS_ADDRESS"
)
"""Variables that are not carried, since each host and each login has its own."""


def variables_to_carry(env: dict[str, str]) -> dict[str, str]:
    """The environment variables that the ranks on other hosts get: all but those that belong to a host or a login."""
    return {key: value for key, value in env.items() if not HOST_VARIABLES_REGEX.fullmatch(key)}


def main(module: str = "launch.cluster.node") -> int:
    """Run one host's part of a run that another host has started here by ssh: read the job, describe this host, run the ranks.

    `module`: the one that calls this: the process restarts itself (exec) with it.
    Returns the exit code; 130 if the connection to the host that started the run is lost, or Ctrl-C came, before there were
    ranks.
    """
    block_signals()  # as the command does: a request to save that comes while libraries are loaded is kept
    try:
        return _run_node(module)
    except (EOFError, KeyboardInterrupt):
        return exit_codes.INTERRUPTED


def _run_node(module: str) -> int:
    """Talk with the host that started the run over stdin and stdout, and run this host's ranks; returns the exit code.

    Called twice. The first time it reads the job from stdin and replaces this process by one in the job's environment, which
    calls it again. The second time it prints this host's facts, reads where the ranks meet, and runs them, while a thread
    receives signals. Raises EOFError if the connection is lost.
    """
    if JOB_VARIABLE not in os.environ:
        _restart_in_environment(json.loads(_read_line(STDIN_FD)), module)  # never returns
    job = json.loads(os.environ.pop(JOB_VARIABLE))
    # Messages keep coming through a copy of stdin; stdin itself becomes empty, since ranks read nothing.
    message_fd = os.dup(STDIN_FD)
    os.dup2(os.open(os.devnull, os.O_RDONLY), STDIN_FD)
    host_facts = describe_host(Path(job["config"]), job["sha256"])
    sys.stdout.write(HOST_FACTS_PREFIX + json.dumps(host_facts) + "\n")
    sys.stdout.flush()
    rendezvous = json.loads(_read_line(message_fd, MESSAGE_TIMEOUT_S))
    threading.Thread(target=_relay_signals, args=(message_fd,), daemon=True).start()
    return run_ranks(job, rendezvous)


def _restart_in_environment(job: dict[str, Any], module: str) -> NoReturn:
    """Replace this process (exec) by one in the environment of the host that starts the run, in its working directory.

    The interpreter may need the variables from its beginning on.
    `job`: what that host has sent: `env` and `cwd`, and what the new process reads from `JOB_VARIABLE`: `config`, `sha256` and
    `module`. The job's variables `env` come first, then those that each host has for itself. If the directory is missing here,
    the process ends with a message.
    """
    host_variables = {key: value for key, value in os.environ.items() if HOST_VARIABLES_REGEX.fullmatch(key)}
    env = {**job.pop("env"), **host_variables, JOB_VARIABLE: json.dumps(job)}
    try:
        os.chdir(job["cwd"])
    except OSError as error:
        sys.exit(f"{job['cwd']}: is not there ({error.strerror}); the hosts must see the same files")
    os.execve(sys.executable, [sys.executable, "-P", "-m", module], env)


def describe_host(config_file: Path, expected_sha256: str) -> dict[str, Any]:
    """Describe this host, so that the host that starts the run can decide whether this one can take part.

    {"host": "n1", "python": "3.12.1", "torch": "2.8.0", ...}. The keys that are not plain: `ssh`, the address at which ssh
    reached this host, as a list that may be empty; `addresses`, the network interface of each IP address; `port`, a free one;
    `code`, a digest of shardtune's files; `config`, the SHA-256 of the run's configuration as it is visible here, None if it is
    not; `gpus`, their number.

    `config_file`: the run's configuration, and `expected_sha256`: its digest on the host that starts the run.
    """
    from launch.cluster.hosts import interface_by_address
    from launch.cluster.snapshot import code_digest, read_code

    # SSH_CONNECTION holds the client's address and port, then the address of this host and its port.
    ssh_connection = (os.environ.get("SSH_CONNECTION") or "").split()
    own_ssh_addresses = ssh_connection[2:3]  # empty without ssh
    config_sha256 = _sha256_once_visible(config_file, expected_sha256)  # before a port is chosen, since this may wait
    return {
        "host": socket.gethostname(),
        "ssh": own_ssh_addresses,
        "addresses": interface_by_address(),
        "port": _free_port(),
        "python": sys.version.split()[0],
        "torch": metadata.version("torch"),
        "code": code_digest(read_code()),
        "config": config_sha256,
        "gpus": count_nvidia_gpus(),
    }


def run_ranks(job: dict[str, Any], rendezvous: dict[str, Any]) -> int:
    """Run this host's ranks of a run on several hosts to their end; returns the exit code.

    `job`: the path of the run's configuration (`config`) and the `module` that ranks run.
    `rendezvous`: this host's `rank` among the hosts, `rdzv` (host:port at which the ranks meet), and `run_id`.
    """
    from launch.cluster.torchrun import RankProgram, run_ranks_on_this_host
    from launch.config.frozen import load_frozen_config

    config_file = Path(job["config"])
    config = load_frozen_config(config_file)
    config.launcher.node_rank = rendezvous["rank"]
    config.launcher.rdzv = rendezvous["rdzv"]
    program = RankProgram(job["module"], config_file.name)
    ranks_end = run_ranks_on_this_host(config, config_file.parent, rendezvous["run_id"], program=program)
    return ranks_end.exit_code


def _relay_signals(message_fd: int) -> None:
    """Send this process the signals that the host which started the run passes on; runs in a thread of its own.

    A message is a line of JSON: {"signal": 15}, or {} as a heartbeat. The connection counts as lost after `MESSAGE_TIMEOUT_S`
    seconds without a message. Then the ranks are ended, and the process with the exit code of Ctrl-C, 130: nothing outlives the
    command.
    """
    while True:
        try:
            message = json.loads(_read_line(message_fd, MESSAGE_TIMEOUT_S))
        except (EOFError, ValueError):
            break
        if "signal" in message:
            os.kill(os.getpid(), message["signal"])
    # As Ctrl-C pressed twice: the first time the ranks have a few seconds to save, the second time none.
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(RANKS_END_S)
    end_process(exit_codes.INTERRUPTED)


def _read_line(descriptor: int, timeout_s: float | None = None) -> bytes:
    """The next line from the host that started the run. `descriptor`: where its messages come from.

    Raises EOFError if the connection is closed, or silent for `timeout_s` seconds (None: waits without end).
    """
    line = bytearray()
    # Byte by byte: what is buffered here would be lost when this process replaces itself.
    while not line.endswith(b"\n"):
        is_ready, _, _ = select.select([descriptor], [], [], timeout_s)
        if not is_ready:
            raise EOFError("silent")
        byte = os.read(descriptor, 1)
        if not byte:
            raise EOFError("closed")
        line += byte
    return bytes(line)


def _sha256_once_visible(file: Path, expected_sha256: str) -> str | None:
    """The digest of a file as this host sees it, waited for until it is the expected one or `FILE_VISIBLE_S` seconds are over.

    A network file system may show a file late that another host has just written. None if the file cannot be read.
    """
    deadline = time.monotonic() + FILE_VISIBLE_S
    sha256 = _sha256(file)
    while sha256 != expected_sha256 and time.monotonic() < deadline:
        time.sleep(0.5)
        sha256 = _sha256(file)
    return sha256


def _sha256(path: Path) -> str | None:
    """The digest of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _free_port() -> int:
    """Choose a port of this host at which the ranks can meet: free, and below those that the kernel gives out to connections.

    Chosen at random, so that two runs that start at once rarely take the same one. 29400 if none is found.
    """
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
