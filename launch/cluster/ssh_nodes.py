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
from strategies.hardware import listed_gpus
from strategies.parent_death import die_with_parent
from trainer.config.run import LauncherConfig
from trainer.reporting.code_revision import ROOT

NODE = "launch.cluster.node"
"""What runs on a host."""
CONNECT_S = 10
"""Seconds for a connection, where the user's options say no others."""
HELLO_S = 60.0
"""Seconds in which a host must have said what it is."""
SIGN_OF_LIFE_S = 5.0
"""Seconds between words to the nodes, and between ssh's own signs of life."""
MISSED_SIGNS = 6
"""Signs of life of a host that may be missing in a row before it is taken for lost."""
SSH_FAILED = 255
"""ssh's own exit code: no connection, or none any more."""
SHOWN_LINES = 4
"""Last lines of a host that are shown where it said nothing else."""


@dataclass(slots=True)
class Node:
    """A host, as seen from here."""

    name: str
    process: subprocess.Popen[bytes]
    facts: dict[str, Any] | None = None
    last_lines: list[str] = field(default_factory=list)
    """Its last lines that went to stderr, or before it said what it is."""
    log: IO[bytes] | None = None
    readers: list[threading.Thread] = field(default_factory=list)

    def send(self, message: dict[str, Any]) -> None:
        """A line to it; it may have ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Let it know that nobody talks with it any more: it ends its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection has ended, rather than what was started there."""
        code = self.process.returncode
        return code is not None and (code == SSH_FAILED or code < 0)

    @property
    def last_words(self) -> str:
        return "; ".join(line for line in self.last_lines[-SHOWN_LINES:] if line) or "it said nothing"


def ssh_command(host: str, launcher: LauncherConfig) -> list[str]:
    """The command that starts a node. Its last word is read by the login shell there, whichever that is."""
    node_command = ["exec", "/usr/bin/env", f"PYTHONPATH={ROOT}", sys.executable, "-P", "-m", NODE]
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_S,
        "ServerAliveInterval": int(SIGN_OF_LIFE_S),
        "ServerAliveCountMax": MISSED_SIGNS,
    }
    option_words = []
    for name, setting in options.items():
        option_words += ["-o", f"{name}={setting}"]
    # ssh takes the first value that it is given of an option: the user's come before ours.
    return ["ssh", "-T", *launcher.ssh, *option_words, "--", host, shlex.join(node_command)]


def connect(host: str, launcher: LauncherConfig) -> Node:
    """Start a node on a host, without waiting for the connection."""
    process = subprocess.Popen(
        ssh_command(host, launcher),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is for us alone
        preexec_fn=die_with_parent,
    )
    return Node(host, process)


def wait_for_facts(nodes: list[Node], pending: list[int]) -> bool:
    """Wait until every node has sent its facts, has ended, or is late; False if a signal came first."""
    deadline = time.monotonic() + HELLO_S
    while any(node.facts is None and node.process.poll() is None for node in nodes):
        if pending:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for node in nodes:
        if node.facts is None and node.process.poll() is not None:
            for reader in node.readers:
                reader.join(1)
    return True


def refuse_unfit(nodes: list[Node], launcher: LauncherConfig, frozen: str) -> None:
    """Raise NodesUnfit with what is wrong with each host that cannot run the run; `frozen`: the digest of its configuration."""
    problems = []
    for node in nodes:
        if node.facts is None and (reason := _why_silent(node)):
            problems.append(f"  {node.name}: {reason}")
    own_versions = _own_versions()
    for node in nodes:
        if node.facts is not None:
            problems += [f"  {node.name}: {problem}" for problem in _unfit(node.facts, launcher, frozen, own_versions)]
    problems += _named_twice(nodes)
    if problems:
        raise NodesUnfit("\n".join(["launcher.hosts: the run cannot start, and nothing was started:", *problems]))


def _unfit(facts: dict[str, Any], launcher: LauncherConfig, frozen: str, own_versions: dict[str, str]) -> list[str]:
    """Why a host, by its facts, cannot run what is frozen here."""
    problems = []
    if facts["code"] != own_versions["code"]:
        problems.append(f"has another code than that of this host ({ROOT})")
    for key in ("python", "torch"):
        if facts[key] != own_versions[key]:
            problems.append(f"has another {key} {facts[key]} than {own_versions[key]} ({sys.executable})")
    if facts["config"] != frozen:
        problems.append(
            "does not see the run directory as it was written here; run.dir must be on a file system that all hosts share"
        )
    # Without GPUs on this host, `per_node` 1 is only a default.
    if facts["gpus"] > launcher.per_node and launcher.per_node == 1 and not listed_gpus():
        problems.append(f"has {facts['gpus']} GPUs, and this host none to tell by; give launcher.processes")
    return problems


def _named_twice(nodes: list[Node]) -> list[str]:
    """Hosts that are listed under two names."""
    problems = []
    host_of_address: dict[str, str] = {}
    for node in nodes:
        for address in node.facts["ssh"] if node.facts is not None else ():
            if is_loopback(address):
                continue
            host = host_of_address.setdefault(address, node.name)
            if host != node.name:
                problems.append(f"  {node.name}: is the same host as {host} ({address}); name each once")
    return problems


def _own_versions() -> dict[str, str]:
    return {"code": code_digest(read_code()), "python": sys.version.split()[0], "torch": metadata.version("torch")}


def _why_silent(node: Node) -> str:
    """Why a host has not sent its facts."""
    code = node.process.poll()
    if code is None:
        return f"is reached, but did not answer within {HELLO_S:.0f} s ({node.last_words})"
    if code == SSH_FAILED:
        return (
            f"is not reached: {node.last_words}; `ssh {node.name} true` must work without a password "
            "(~/.ssh/config, launcher.ssh)"
        )
    if code in (126, 127):
        return f"has no {sys.executable}, the Python that runs here ({node.last_words}); it must be at the same place"
    if any("launch" in line and "No module named" in line for line in node.last_lines):
        return f"has no shardtune at {ROOT}, from where it runs here; the clone must be at the same place"
    return f"ended with exit code {code}: {node.last_words}"


def rendezvous_address(nodes: list[Node]) -> str:
    """host:port on the first host, under the address by which it was reached. Raises ConfigError if that is a loopback."""
    first_facts = nodes[0].facts
    assert first_facts is not None
    address = next(iter(first_facts["ssh"]), "127.0.0.1")
    if is_loopback(address) and len(nodes) > 1:  # the first host is this one
        second_facts = nodes[1].facts
        assert second_facts is not None
        for second_address in second_facts["ssh"]:
            if not is_loopback(second_address):
                address = local_address_towards(second_address, nodes[1].name)
                break
        if is_loopback(address):
            raise ConfigError(
                f"launcher.hosts: {nodes[0].name} is reached by a loopback address, at which the others do not find it; name it "
                "as they reach it, or give launcher.rdzv=host:port"
            )
    return f"[{address}]:{first_facts['port']}" if ":" in address else f"{address}:{first_facts['port']}"
