"""Starts a run on the hosts of `launcher.hosts=[n1,n2]`, from one of them or from any other, by the user's own ssh.

`launch.cluster.node` is started on each host and describes it. If all hosts can run the same run, they are told where
to meet, and their ranks start as by the command on each host. The output of node 0 is printed on stdout, that of the
others on stderr with the host's name. All of it is kept in `logs/hosts-<start>-<node>.log` of the run. When one node
fails, all are ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from launch.cluster.node import MARK, carried
from launch.cluster.ssh_nodes import ALIVE_S, SHOWN, Node, connect, hear, meeting_of, refuse_unfit
from launch.cluster.torchrun import STOP_GRACE_S, TRAIN, Aside, What, only_lost_a_peer, signals_held
from strategies.errors import ConfigError, ShardtuneError
from trainer.config.run import RunConfig
from trainer.reporting.code_revision import ROOT
from trainer.reporting.status import read_failure, record_failure

END_S = 8.0
"""Seconds that a node has to end its ranks in, beside `STOP_GRACE_S`."""


def start(
    config: RunConfig, run_dir: Path, run_id: str, aside: Aside | None = None, *, what: What = TRAIN
) -> tuple[int, set[int]]:
    """As `launch.cluster.torchrun.start`, on all of `launcher.hosts`; when it returns every process on every host has ended.

    Errors: ConfigError without ssh, NodesUnfit where a host cannot be reached or cannot run the run.
    """
    launcher, path = config.launcher, (run_dir / what.config).absolute()
    if shutil.which("ssh") is None:
        raise ConfigError(
            "launcher.hosts: there is no ssh here (PATH); install OpenSSH's client, or start on each host"
        )
    frozen = hashlib.sha256(path.read_bytes()).hexdigest()
    env = carried(dict(os.environ))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    job = {"env": env, "cwd": str(Path.cwd()), "config": str(path), "module": what.module, "sha256": frozen}
    ranks = "1 process" if launcher.per_node == 1 else f"{launcher.per_node} processes"
    screen = Screen(run_dir / "logs", aside)
    with signals_held() as (pending, came), screen:
        print(f"starting {ranks} on each of {', '.join(launcher.hosts)}", file=sys.stderr, flush=True)
        nodes = [connect(name, launcher) for name in launcher.hosts]
        try:
            screen.listen(nodes)
            for node in nodes:
                node.tell(job)
            if not hear(nodes, pending):
                return 130 if signal.SIGINT in came else 1, came
            refuse_unfit(nodes, launcher, frozen)
            rdzv = launcher.rdzv or meeting_of(nodes)
            for rank, node in enumerate(nodes):
                node.tell({"rank": rank, "rdzv": rdzv, "run_id": run_id})
            look = aside.look if aside is not None else None
            code = _watch(nodes, pending, look)
            lost = next((number for number, node in enumerate(nodes) if node.broken), None)
            if lost is not None and code != 130:
                _note_lost(run_dir, nodes[lost], lost * launcher.per_node)
            return code, came
        finally:
            _end_all(nodes)


def _watch(nodes: list[Node], pending: list[int], look: Callable[[], None] | None) -> int:
    """Until all have ended, or the others of one that ended badly had their time; the first exit code that is not 0."""
    failed_at = interrupted_at = None
    told = 0.0
    while True:
        if look is not None:
            look()
        now = time.monotonic()
        while pending:
            number = pending.pop(0)
            interrupted_at = (interrupted_at or now) if number == signal.SIGINT else interrupted_at
            for node in nodes:
                node.tell({"signal": int(number)})
        if now - told > ALIVE_S:
            told = now
            for node in nodes:
                node.tell({})
        codes = [node.process.poll() for node in nodes]
        bad = next((code for code in codes if code), None)
        failed_at = (failed_at or now) if bad is not None else None
        over = None not in codes or (failed_at is not None and now - failed_at > STOP_GRACE_S)
        if interrupted_at is not None and (None not in codes or now - interrupted_at > STOP_GRACE_S + END_S):
            return 130
        if over and interrupted_at is None:
            return bad or 0
        time.sleep(0.1)


def _end_all(nodes: list[Node]) -> None:
    """End whatever still runs on any host: Ctrl-C twice, as far as it can be told; then nobody talks with it any more."""
    for _ in range(2):
        for node in nodes:
            if node.hello is not None and node.process.poll() is None:
                node.tell({"signal": int(signal.SIGINT)})
        if all(node.process.poll() is not None for node in nodes):
            break
        time.sleep(0.5)
    deadline = time.monotonic() + STOP_GRACE_S + END_S
    for node in nodes:
        node.close()
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(max(0.0, deadline - time.monotonic()))
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()
    for node in nodes:
        for reader in node.readers:
            reader.join(1)
        if node.log is not None:
            node.log.close()


def _note_lost(run_dir: Path, node: Node, rank: int) -> None:
    """Leave in the run directory that a host was lost, which none of its ranks can; what they lost by it is no cause."""
    before = read_failure(run_dir)
    lost = ShardtuneError(f"host {node.name} was lost ({node.last})")
    record_failure(
        run_dir, rank, lost, "host", replace=only_lost_a_peer(before), host=node.name, pid=None, retry="node_fail"
    )


class Screen:
    """Where lines of the nodes go: to the screen, and each node's to its file."""

    def __init__(self, logs: Path, aside: Aside | None) -> None:
        self._logs, self._aside = logs, aside
        self._lock = threading.Lock()
        self._to: IO[bytes] | None = None

    def __enter__(self) -> Screen:
        self._logs.mkdir(parents=True, exist_ok=True)
        if self._aside is not None:
            self._aside.output.parent.mkdir(parents=True, exist_ok=True)
            self._to = self._aside.output.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._to is not None:
            self._to.close()

    def listen(self, nodes: list[Node]) -> None:
        """Read what the nodes say until they end."""
        numbers = [int(found[1]) for path in self._logs.iterdir() if (found := re.match(r"hosts-(\d+)-", path.name))]
        number = max(numbers, default=0) + 1
        for rank, node in enumerate(nodes):
            node.log = (self._logs / f"hosts-{number}-{rank}.log").open("ab", buffering=0)
            self._keep(node, f"# {node.name}\n".encode())
            for pipe, error in ((node.process.stdout, False), (node.process.stderr, True)):
                reader = threading.Thread(target=self._read, args=(node, pipe, error, rank == 0), daemon=True)
                reader.start()
                node.readers.append(reader)

    def _read(self, node: Node, pipe: IO[bytes], error: bool, first: bool) -> None:
        for line in pipe:
            text = line.decode(errors="replace").rstrip("\n")
            if node.hello is None and not error:
                if text.startswith(MARK):
                    node.hello = json.loads(text.removeprefix(MARK))
                    continue
                node.said.append(text.strip())
                continue
            if error:
                node.said = [*node.said[-SHOWN:], text.strip()]
            self._keep(node, line)
            if node.hello is not None and (first or error):
                self._show(line if first else f"{node.name}: ".encode() + line, error)

    def _keep(self, node: Node, line: bytes) -> None:
        assert node.log is not None
        # On a full disk, too, what a node says is read on: its ranks would wait to say it.
        with contextlib.suppress(OSError):
            node.log.write(line)

    def _show(self, line: bytes, error: bool) -> None:
        stream = sys.stderr if error else sys.stdout
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._to is not None:
                self._to.write(line)
                self._to.flush()
            else:
                stream.write(line.decode(errors="replace"))
                stream.flush()
