"""The hosts of `launcher.hosts`: how each is reached, its facts, and whether it can run the frozen configuration."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import IO, Any

from launch.cluster.hosts import is_loopback, local_address_towards
from launch.cluster.snapshot import code_digest, read_code
from strategies.errors import ConfigError, NodesUnfit
from strategies.hardware import count_nvidia_gpus
from strategies.parent_death import die_with_parent
from trainer.config.run import LauncherConfig
from trainer.reporting.code_revision import CODE_DIRECTORY

NODE_MODULE = "launch.cluster.node"
"""What runs on a host."""
CONNECT_TIMEOUT_S = 10
"""Seconds for a connection, where the user's options say no others."""
FACTS_TIMEOUT_S = 60.0
"""Seconds in which a host must have sent its facts."""
HEARTBEAT_S = 5.0
"""Seconds between messages to the nodes, and between ssh's own heartbeats."""
MISSED_HEARTBEATS = 6
"""Heartbeats of a host that may be missing in a row before it is taken for lost."""
SSH_FAILED = 255
"""ssh's own exit code: no connection, or none any more."""
NUM_SHOWN_LINES = 4
"""Last lines of a host that are shown where it said nothing else."""


@dataclass(slots=True)
class Node:
    """A host of `launcher.hosts` and the ssh process that leads to it, as seen from the host that starts the run."""

    name: str
    """As in `launcher.hosts`."""
    process: subprocess.Popen[bytes]
    """ssh, with pipes to the node's stdin, stdout and stderr."""
    host_facts: dict[str, Any] | None = None
    """What the host said about itself (`node.describe_host`); None until it has."""
    last_lines: list[str] = field(default_factory=list)
    """Its last lines on stderr, or before its facts, for messages about a failure."""
    log: IO[bytes] | None = None
    """The file with all of its output."""
    output_readers: list[threading.Thread] = field(default_factory=list)
    """The threads that read its pipes."""

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the node as a line of JSON. A node that has ended gets nothing, which is no error."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close_stdin(self) -> None:
        """Close the node's stdin, at which it ends its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    @property
    def is_disconnected(self) -> bool:
        """Whether ssh ended by itself, rather than what it had started: the connection or the host is lost."""
        code = self.process.returncode
        return code is not None and (code == SSH_FAILED or code < 0)

    @property
    def last_output_text(self) -> str:
        """The node's last lines in one, for messages."""
        shown_lines = [line for line in self.last_lines[-NUM_SHOWN_LINES:] if line]
        return "; ".join(shown_lines) or "it said nothing"


def ssh_command(host: str, launcher: LauncherConfig) -> list[str]:
    """The ssh command that starts `launch.cluster.node` on a host, at the same paths as here.

    `host`: as ssh takes it. `launcher`: the user's options are in `launcher.ssh`, such as ["-p", "2222"].
    """
    node_command = ["exec", "/usr/bin/env", f"PYTHONPATH={CODE_DIRECTORY}", sys.executable, "-P", "-m", NODE_MODULE]
    default_options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_TIMEOUT_S,
        "ServerAliveInterval": int(HEARTBEAT_S),
        "ServerAliveCountMax": MISSED_HEARTBEATS,
    }
    # ssh takes the first value that it is given of an option: the user's come before the defaults.
    ssh_options = [*launcher.ssh]
    for name, setting in default_options.items():
        ssh_options += ["-o", f"{name}={setting}"]
    # The last argument is read by the login shell there, whichever that is.
    return ["ssh", "-T", *ssh_options, "--", host, shlex.join(node_command)]


def connect(host: str, launcher: LauncherConfig) -> Node:
    """Start the ssh process that leads to a host of the run, without waiting for the connection. `host`: as ssh takes it."""
    process = subprocess.Popen(
        ssh_command(host, launcher),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is for us alone
        preexec_fn=die_with_parent,
    )
    return Node(host, process)


def wait_for_host_facts(nodes: list[Node], pending_signals: list[int]) -> bool:
    """Wait until every host of the run has sent its facts (GPUs, versions, addresses) or has ended.

    Returns False if a signal came meanwhile, so that the start is given up. After `FACTS_TIMEOUT_S` seconds the wait ends too,
    with True: whether facts are missing is checked by `refuse_unfit_hosts`.
    `pending_signals`: filled by the signal handler.
    """
    deadline = time.monotonic() + FACTS_TIMEOUT_S
    while any(node.host_facts is None and node.process.poll() is None for node in nodes):
        if pending_signals:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for node in nodes:
        has_failed = node.host_facts is None and node.process.poll() is not None
        if has_failed:
            # Its output is read to the end, so that its last lines can say why.
            for reader_thread in node.output_readers:
                reader_thread.join(1)  # at most a second: a process that it has started may keep the pipe open
    return True


def refuse_unfit_hosts(nodes: list[Node], launcher: LauncherConfig, config_sha256: str) -> None:
    """Raise NodesUnfit if a host cannot run the run, with a line for everything that is wrong with each; nothing runs yet.

    First come hosts that sent no facts, then hosts whose facts do not fit, then hosts that are listed under two names.
    `nodes`: the hosts with what they sent.
    `config_sha256`: of the run's `config.yaml`, which every host must see alike.
    """
    problems = []
    for node in nodes:
        if node.host_facts is None:
            problems.append(f"  {node.name}: {_why_no_facts(node)}")
    own_versions = _own_versions()
    for node in nodes:
        if node.host_facts is not None:
            for problem in _reasons_unfit(node.host_facts, launcher, config_sha256, own_versions):
                problems.append(f"  {node.name}: {problem}")
    problems += _hosts_named_twice(nodes)
    if problems:
        raise NodesUnfit("\n".join(["launcher.hosts: the run cannot start, and nothing was started:", *problems]))


def _reasons_unfit(
    host_facts: dict[str, Any], launcher: LauncherConfig, config_sha256: str, own_versions: dict[str, str]
) -> list[str]:
    """Why a host cannot run the run that this host has prepared; empty if it can.

    Other code, another Python or torch, another configuration in the run directory, or GPUs of which this host cannot know how
    many to use.

    `host_facts`: what the host has sent (`node.describe_host`): {"code": digest, "python": "3.12.1", "gpus": 8, ...}.
    `config_sha256`: of the run's `config.yaml` as this host sees it.
    `own_versions`: this host's: {"code": digest, "python": "3.12.1", "torch": "2.8.0"}.
    """
    problems = []
    if host_facts["code"] != own_versions["code"]:
        problems.append(f"has another code than that of this host ({CODE_DIRECTORY})")
    for key in ("python", "torch"):
        if host_facts[key] != own_versions[key]:
            problems.append(f"has another {key} {host_facts[key]} than {own_versions[key]} ({sys.executable})")
    if host_facts["config"] != config_sha256:
        problems.append(
            "does not see the run directory as it was written here; run.dir must be on a file system that all hosts share"
        )
    # Without GPUs on this host, the 1 of `per_node` is only a default.
    if host_facts["gpus"] > launcher.per_node and launcher.per_node == 1 and not count_nvidia_gpus():
        problems.append(f"has {host_facts['gpus']} GPUs, and this host none to tell by; give launcher.processes")
    return problems


def _hosts_named_twice(nodes: list[Node]) -> list[str]:
    """A problem for each host that `launcher.hosts` lists under two names, by the address at which ssh reached it.

    A loopback address does not count: every host has the same.
    """
    problems = []
    name_by_address: dict[str, str] = {}
    for node in nodes:
        ssh_addresses = node.host_facts["ssh"] if node.host_facts is not None else ()
        for address in ssh_addresses:
            if is_loopback(address):
                continue
            first_name = name_by_address.setdefault(address, node.name)
            if first_name != node.name:
                problems.append(f"  {node.name}: is the same host as {first_name} ({address}); name each once")
    return problems


def _own_versions() -> dict[str, str]:
    """The code, Python and torch of this host, with the keys of a node's facts."""
    return {"code": code_digest(read_code()), "python": sys.version.split()[0], "torch": metadata.version("torch")}


def _why_no_facts(node: Node) -> str:
    """Why a host of the run has not sent its facts, for a message; by ssh's exit code, which is that of the command there.

    The first case that holds:

    - ssh still runs: it is late;
    - ssh failed: it is not reached;
    - its shell cannot run the command: it has no Python at the same path;
    - its last lines say that the module is missing: it has no shardtune at the same path;
    - else: its exit code and last lines.
    """
    code = node.process.poll()  # the exit code of ssh, which is that of the command there; None while it runs
    if code is None:
        return f"is reached, but did not answer within {FACTS_TIMEOUT_S:.0f} s ({node.last_output_text})"
    if code == SSH_FAILED:
        return (
            f"is not reached: {node.last_output_text}; `ssh {node.name} true` must work without a password "
            "(~/.ssh/config, launcher.ssh)"
        )
    if code in (126, 127):  # from the shell: cannot be executed, not found
        return f"has no {sys.executable}, the Python that runs here ({node.last_output_text}); it must be at the same place"
    if any("launch" in line and "No module named" in line for line in node.last_lines):
        return f"has no shardtune at {CODE_DIRECTORY}, from where it runs here; the clone must be at the same place"
    return f"ended with exit code {code}: {node.last_output_text}"


def rendezvous_address(nodes: list[Node]) -> str:
    """Choose host:port at which the ranks of all hosts meet: a free port of the first host, by the address that ssh used.

    If ssh reached it by a loopback address, it is this host. Then its address towards the second host is taken. Raises
    ConfigError if only loopback addresses are known.
    """
    first_facts = nodes[0].host_facts
    assert first_facts is not None
    ssh_addresses = first_facts["ssh"]
    address = ssh_addresses[0] if ssh_addresses else "127.0.0.1"
    if is_loopback(address) and len(nodes) > 1:
        second_facts = nodes[1].host_facts
        assert second_facts is not None
        for second_address in second_facts["ssh"]:
            if not is_loopback(second_address):
                address = local_address_towards(second_address, f"launcher.hosts: {nodes[1].name}")
                break
        if is_loopback(address):
            raise ConfigError(
                f"launcher.hosts: {nodes[0].name} is reached by a loopback address, at which the others do not find it; name it "
                "as they reach it, or give launcher.rdzv=host:port"
            )
    is_ipv6 = ":" in address
    return f"[{address}]:{first_facts['port']}" if is_ipv6 else f"{address}:{first_facts['port']}"
