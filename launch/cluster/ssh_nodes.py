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

from launch.cluster.hosts import is_loopback, towards
from launch.cluster.snapshot import digest, read
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
ALIVE_S = 5.0
"""Seconds between words to the nodes, and between ssh's own signs of life."""
LOST = 6
"""Signs of life of a host that may be missing in a row before it is taken for lost."""
BROKEN = 255
"""ssh's own exit code: no connection, or none any more."""
SHOWN = 4
"""Last lines of a host that are shown where it said nothing else."""


@dataclass(slots=True)
class Node:
    """A host, as seen from here."""

    name: str
    process: subprocess.Popen[bytes]
    hello: dict[str, Any] | None = None
    said: list[str] = field(default_factory=list)
    """Its last lines that went to stderr, or before it said what it is."""
    log: IO[bytes] | None = None
    readers: list[threading.Thread] = field(default_factory=list)

    def tell(self, what: dict[str, Any]) -> None:
        """A line to it; it may have ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """Let it know that nobody talks with it any more: it ends its ranks."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    @property
    def broken(self) -> bool:
        """Whether the connection has ended, rather than what was started there."""
        code = self.process.returncode
        return code is not None and (code == BROKEN or code < 0)

    @property
    def last(self) -> str:
        return "; ".join(line for line in self.said[-SHOWN:] if line) or "it said nothing"


def command(host: str, launcher: LauncherConfig) -> list[str]:
    """The command that starts a node. Its last word is read by the login shell there, whichever that is."""
    there = ["exec", "/usr/bin/env", f"PYTHONPATH={ROOT}", sys.executable, "-P", "-m", NODE]
    # ssh takes the first value that it is given of an option: the user's go before ours.
    options = {"BatchMode": "yes", "ConnectTimeout": CONNECT_S}
    options |= {"ServerAliveInterval": int(ALIVE_S), "ServerAliveCountMax": LOST}
    ours = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return ["ssh", "-T", *launcher.ssh, *ours, "--", host, shlex.join(there)]


def connect(host: str, launcher: LauncherConfig) -> Node:
    """Start a node on a host; whether that succeeds is heard of it."""
    process = subprocess.Popen(
        command(host, launcher),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # the terminal's Ctrl-C is for us alone
        preexec_fn=die_with_parent,
    )
    return Node(host, process)


def hear(nodes: list[Node], pending: list[int]) -> bool:
    """Wait until every node has said what it is, has ended, or is late; False where a signal came first."""
    deadline = time.monotonic() + HELLO_S
    while any(node.hello is None and node.process.poll() is None for node in nodes):
        if pending:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for node in nodes:
        if node.hello is None and node.process.poll() is not None:
            for reader in node.readers:
                reader.join(1)
    return True


def refuse_unfit(nodes: list[Node], launcher: LauncherConfig, frozen: str) -> None:
    """Raise NodesUnfit with what is wrong with each host that cannot run what is frozen here."""
    problems = [f"  {node.name}: {why}" for node in nodes if node.hello is None and (why := _silent(node))]
    here = _own()
    heard = [(node, node.hello) for node in nodes if node.hello is not None]
    for node, hello in heard:
        for key, value in here.items():
            if hello[key] != value:
                whose = "code" if key == "code" else f"{key} {hello[key]}"
                mine = "that of this host" if key == "code" else value
                problems.append(
                    f"  {node.name}: has another {whose} than {mine} ({ROOT if key == 'code' else sys.executable})"
                )
        if hello["config"] != frozen:
            problems.append(
                f"  {node.name}: does not see the run directory as it was written here; run.dir must be on a file system that "
                "all hosts share"
            )
        if hello["gpus"] > launcher.per_node and launcher.per_node == 1 and not listed_gpus():
            problems.append(
                f"  {node.name}: has {hello['gpus']} GPUs, and this host none to tell by; give launcher.processes"
            )
    seen: dict[str, str] = {}
    for node, hello in heard:
        for address in hello["ssh"]:
            if not is_loopback(address) and seen.setdefault(address, node.name) != node.name:
                problems.append(f"  {node.name}: is the same host as {seen[address]} ({address}); name each once")
    if problems:
        raise NodesUnfit("\n".join(["launcher.hosts: the run cannot start, and nothing was started:", *problems]))


def _own() -> dict[str, str]:
    return {"code": digest(read()), "python": sys.version.split()[0], "torch": metadata.version("torch")}


def _silent(node: Node) -> str:
    """Why a host has not said what it is."""
    code = node.process.poll()
    if code is None:
        return f"is reached, and did not answer within {HELLO_S:.0f} s ({node.last})"
    if code == BROKEN:
        return f"is not reached: {node.last}; `ssh {node.name} true` must work without a password (~/.ssh/config, launcher.ssh)"
    if code in (126, 127):
        return f"has no {sys.executable}, the Python that runs here ({node.last}); it must be at the same place"
    if any("launch" in line and "No module named" in line for line in node.said):
        return f"has no shardtune at {ROOT}, from where it runs here; the clone must be at the same place"
    return f"ended with exit code {code}: {node.last}"


def meeting_of(nodes: list[Node]) -> str:
    """host:port on the first host, under the address by which it was reached. Raises ConfigError where that tells nothing."""
    first = nodes[0].hello
    assert first is not None
    address = next(iter(first["ssh"]), "127.0.0.1")
    if is_loopback(address) and len(nodes) > 1:  # it is this host, as its own name says
        other = nodes[1].hello
        assert other is not None
        beyond = next((each for each in other["ssh"] if not is_loopback(each)), None)
        address = towards(beyond, f"{nodes[1].name}") if beyond else address
        if is_loopback(address):
            raise ConfigError(
                f"launcher.hosts: {nodes[0].name} is reached by a loopback address, at which the others do not find it; name it "
                "as they reach it, or give launcher.rdzv=host:port"
            )
    return f"[{address}]:{first['port']}" if ":" in address else f"{address}:{first['port']}"
