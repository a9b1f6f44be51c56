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

from launch.cluster.killed_rank import only_says_peer_was_lost
from launch.cluster.node import HOST_FACTS_PREFIX, variables_to_carry
from launch.cluster.ssh_nodes import (
    HEARTBEAT_S,
    NUM_SHOWN_LINES,
    Node,
    connect,
    refuse_unfit_hosts,
    rendezvous_address,
    wait_for_host_facts,
)
from launch.cluster.torchrun import (
    STOP_GRACE_S,
    TRAIN,
    RankProgram,
    RanksEnd,
    RedirectedOutput,
    collected_signals,
)
from strategies import exit_codes
from strategies.errors import ConfigError, ShardtuneError
from trainer.config.run import RunConfig
from trainer.reporting.code_revision import CODE_DIRECTORY
from trainer.reporting.status import read_failure, record_failure

NODE_END_S = 8.0
"""Seconds that a node has to end its ranks in, beside `STOP_GRACE_S`."""
WAIT_POLL_S = 0.1
"""Seconds between two looks at whether the nodes have ended."""


def run_ranks_on_hosts(
    config: RunConfig,
    run_dir: Path,
    run_id: str,
    redirected: RedirectedOutput | None = None,
    *,
    program: RankProgram = TRAIN,
) -> RanksEnd:
    """Run the ranks of a run on all of `launcher.hosts`, started by ssh; every process has ended when it returns.

    `config`: the run's configuration, as it stands in `run_dir`, which all hosts must see.
    `run_id`: names the rendezvous.
    `redirected`: where the output goes; None for the terminal.
    `program`: what the ranks run.
    Returns how the ranks ended. Raises ConfigError without ssh, NodesUnfit if a host cannot be reached or cannot run the run.
    """
    launcher = config.launcher
    config_file = (run_dir / program.config).absolute()
    if shutil.which("ssh") is None:
        raise ConfigError(
            "launcher.hosts: there is no ssh here (PATH); install OpenSSH's client, or start on each host"
        )
    config_digest = hashlib.sha256(config_file.read_bytes()).hexdigest()
    env = variables_to_carry(dict(os.environ))
    env["PYTHONPATH"] = os.pathsep.join([str(CODE_DIRECTORY), *filter(None, [env.get("PYTHONPATH")])])
    job = {
        "env": env,
        "cwd": str(Path.cwd()),
        "config": str(config_file),
        "module": program.module,
        "sha256": config_digest,
    }
    ranks = "1 process" if launcher.per_node == 1 else f"{launcher.per_node} processes"
    output = NodeOutput(run_dir / "logs", redirected)
    with collected_signals() as signals, output:
        print(f"starting {ranks} on each of {', '.join(launcher.hosts)}", file=sys.stderr, flush=True)
        nodes = [connect(name, launcher) for name in launcher.hosts]
        try:
            output.start_reading_output(nodes)
            for node in nodes:
                node.send(job)
            if not wait_for_host_facts(nodes, signals.pending):
                exit_code = exit_codes.INTERRUPTED if signal.SIGINT in signals.received else 1
                return RanksEnd(exit_code, signals.received)
            # All hosts are judged before any of them starts a rank.
            refuse_unfit_hosts(nodes, launcher, config_digest)
            rdzv = launcher.rdzv or rendezvous_address(nodes)
            for node_rank, node in enumerate(nodes):
                node.send({"rank": node_rank, "rdzv": rdzv, "run_id": run_id})
            on_tick = redirected.poll if redirected is not None else None
            exit_code = _wait_for_nodes(nodes, signals.pending, on_tick)
            if exit_code != exit_codes.INTERRUPTED:  # not after Ctrl-C
                # Nobody else records the failure of a lost host. The first one is the cause.
                for node_rank, node in enumerate(nodes):
                    if node.is_disconnected:
                        _record_lost_host(run_dir, node, node_rank * launcher.per_node)
                        break
            return RanksEnd(exit_code, signals.received)
        finally:
            _end_nodes(nodes)


def _wait_for_nodes(nodes: list[Node], pending_signals: list[int], on_tick: Callable[[], None] | None) -> int:
    """Wait until the ranks on all hosts have ended, passing signals on to them; a node is a host with the ssh that leads to it.

    If one fails, the others get `STOP_GRACE_S` seconds to end too: their ranks notice by themselves that their peers are lost.

    `pending_signals`: filled by the signal handler, and emptied here.
    `on_tick`: called a few times a second; None for nothing.
    Returns 130 after Ctrl-C, else the first exit code that is not 0, in the order of the nodes, or 0.
    """
    # Times by the monotonic clock; None until it happens.
    failed_at: float | None = None
    interrupted_at: float | None = None
    last_heartbeat_at = 0.0
    while True:
        if on_tick is not None:
            on_tick()
        now = time.monotonic()
        if signal.SIGINT in _pass_signals_on(nodes, pending_signals) and interrupted_at is None:
            interrupted_at = now
        # A heartbeat is an empty message. A node ends its ranks if it receives no message for a while.
        if now - last_heartbeat_at > HEARTBEAT_S:
            last_heartbeat_at = now
            for node in nodes:
                node.send({})

        node_codes = [node.process.poll() for node in nodes]  # None while a node runs
        all_ended = None not in node_codes
        failed_codes = [code for code in node_codes if code]
        if failed_codes and failed_at is None:
            failed_at = now
        # Has the run ended? After Ctrl-C the nodes first let their ranks save, then end them.
        if interrupted_at is not None:
            if all_ended or now - interrupted_at > STOP_GRACE_S + NODE_END_S:
                return exit_codes.INTERRUPTED
        elif all_ended or (failed_at is not None and now - failed_at > STOP_GRACE_S):
            return failed_codes[0] if failed_codes else 0
        time.sleep(WAIT_POLL_S)


def _pass_signals_on(nodes: list[Node], pending_signals: list[int]) -> list[int]:
    """Send each pending signal to the ranks on all hosts, in order; returns the signals that were sent.

    `pending_signals`: emptied one by one, since the signal handler may append to it meanwhile.
    """
    sent_signals = []
    while pending_signals:
        signal_number = pending_signals.pop(0)
        for node in nodes:
            node.send({"signal": int(signal_number)})
        sent_signals.append(signal_number)
    return sent_signals


def _end_nodes(nodes: list[Node]) -> None:
    """End whatever still runs on any host of the run, and close the logs.

    In this order: send Ctrl-C twice to the nodes with ranks, close the connections, kill the ssh processes that do not end.
    """
    _interrupt_ranks(nodes)
    _close_connections(nodes)
    for node in nodes:
        for reader in node.output_readers:
            reader.join(1)
        if node.log is not None:
            node.log.close()


def _interrupt_ranks(nodes: list[Node]) -> None:
    """Send Ctrl-C to the hosts whose ranks may run, and once more half a second later unless all have ended.

    The first Ctrl-C lets the ranks save, the second does not wait.
    """
    for _ in range(2):
        for node in nodes:
            has_ranks = node.host_facts is not None  # a node reports its facts before it starts ranks
            if has_ranks and node.process.poll() is None:
                node.send({"signal": int(signal.SIGINT)})
        if all(node.process.poll() is not None for node in nodes):
            break
        time.sleep(0.5)


def _close_connections(nodes: list[Node]) -> None:
    """Close the connection to each host, which ends what still runs there, and kill the ssh processes that do not end in time."""
    # All connections are closed first, so that the hosts end their ranks side by side and not one after the other.
    deadline = time.monotonic() + STOP_GRACE_S + NODE_END_S
    for node in nodes:
        node.close_stdin()
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.process.wait(max(0.0, deadline - time.monotonic()))
        if node.process.poll() is None:
            node.process.kill()
            node.process.wait()


def _record_lost_host(run_dir: Path, node: Node, first_rank: int) -> None:
    """Record in the run's `failure.json` that a host was lost, which none of its ranks can.

    `first_rank`: the first rank of that host.
    Replaces an existing record in which another rank says that it lost its peers, but not one of a failure of its own.
    """
    recorded_failure = read_failure(run_dir)
    error = ShardtuneError(f"host {node.name} was lost ({node.last_output_text})")
    record_failure(
        run_dir,
        first_rank,
        error,
        phase="host",
        replace=only_says_peer_was_lost(recorded_failure),
        host=node.name,
        pid=None,
        retry="node_fail",
    )


class NodeOutput:
    """Shows what the hosts of a run print on the screen, and keeps each host's output in a file.

    Use as a context, which opens and closes the file that may take the place of the screen.
    """

    def __init__(self, logs: Path, redirected: RedirectedOutput | None) -> None:
        self._log_dir = logs
        self._redirected = redirected
        self._lock = threading.Lock()
        self._redirected_file: IO[bytes] | None = None
        """Takes the place of the screen if the output is redirected."""

    def __enter__(self) -> NodeOutput:
        self._log_dir.mkdir(parents=True, exist_ok=True)
        if self._redirected is not None:
            self._redirected.output.parent.mkdir(parents=True, exist_ok=True)
            self._redirected_file = self._redirected.output.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._redirected_file is not None:
            self._redirected_file.close()

    def start_reading_output(self, nodes: list[Node]) -> None:
        """Open a log file for each host of the run, and start the threads that read what it prints until it ends.

        Sets `log` and `output_readers` of each node; `_end_nodes` closes the logs. The files are numbered by start:
        `hosts-<start>-<node>.log`.
        """
        earlier_starts = [0]
        for path in self._log_dir.iterdir():
            if match := re.match(r"hosts-(\d+)-", path.name):
                earlier_starts.append(int(match[1]))
        start_number = max(earlier_starts) + 1
        for node_rank, node in enumerate(nodes):
            node.log = (self._log_dir / f"hosts-{start_number}-{node_rank}.log").open("ab", buffering=0)
            self._write_to_log(node, f"# {node.name}\n".encode())
            for pipe, is_stderr in ((node.process.stdout, False), (node.process.stderr, True)):
                arguments = {"node": node, "pipe": pipe, "is_stderr": is_stderr, "is_first_node": node_rank == 0}
                reader = threading.Thread(target=self._read_pipe, kwargs=arguments, daemon=True)
                reader.start()
                node.output_readers.append(reader)

    def _read_pipe(self, node: Node, pipe: IO[bytes], is_stderr: bool, is_first_node: bool) -> None:
        """Read one pipe of a host's ssh to its end, in a thread: take the host's facts, log its lines, and show some of them.

        `is_stderr`: which pipe. `is_first_node`: its lines need no name before them.

        The first line on stdout with `HOST_FACTS_PREFIX` describes the host. Lines before it are what the login shell there
        prints: they are only kept for error messages. Once the host is described, lines of stderr and of the first host are
        shown.
        """
        for line in pipe:
            text = line.decode(errors="replace").rstrip("\n")
            is_before_facts = node.host_facts is None and not is_stderr
            if is_before_facts:
                if text.startswith(HOST_FACTS_PREFIX):
                    node.host_facts = json.loads(text.removeprefix(HOST_FACTS_PREFIX))
                else:
                    node.last_lines.append(text.strip())
                continue
            if is_stderr:
                node.last_lines = [*node.last_lines[-NUM_SHOWN_LINES:], text.strip()]
            self._write_to_log(node, line)
            if node.host_facts is not None and (is_first_node or is_stderr):
                shown_line = line if is_first_node else f"{node.name}: ".encode() + line
                self._show_line(shown_line, is_stderr=is_stderr)

    def _write_to_log(self, node: Node, line: bytes) -> None:
        """Append a line to the log file of a node. A full disk is no error: a node that is not read on would wait to print."""
        assert node.log is not None
        with contextlib.suppress(OSError):
            node.log.write(line)

    def _show_line(self, line: bytes, *, is_stderr: bool) -> None:
        """Print a line that a host has printed to the screen, or, if the output is redirected, write it to that file.

        The lock keeps lines of several hosts apart. An error is no reason to stop reading: the line is in the host's log.
        """
        stream = sys.stderr if is_stderr else sys.stdout
        # ValueError: a thread that still reads meets a file that was closed.
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._redirected_file is not None:
                self._redirected_file.write(line)
                self._redirected_file.flush()
            else:
                stream.write(line.decode(errors="replace"))
                stream.flush()
