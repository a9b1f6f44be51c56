"""Starts a preflight on the nodes, and collects their reports until they suffice."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cluster.containers import INSIDE_CONTAINER
from launch.cluster.preflight.node import REPORT_MARK
from launch.cluster.preflight.node_facts import REQUEST_VARIABLE, VISIBLE_S, PreflightRequest
from launch.cluster.preflight.verdict import NodeReports, PreflightVerdict, judge
from strategies.errors import StorageError
from trainer.config.host_memory import node_gib
from trainer.config.sbatch_options import gpu_request, ranks_per_node
from trainer.data.read.paths import is_hub_path, is_remote_address

FACTS_TIMEOUT_S = 30.0
"""Seconds within which each node must have said what it sees."""
AFTER_ERROR_S = 3.0
"""Seconds in which further reports may come after a node has ended with an error."""
AFTER_ERROR_OTHERS_S = 10.0
"""The same while other nodes have not answered yet."""
LABELLED = re.compile(r"\s*(\d+): ?(.*)")
"""A line of `srun --label`: the number of the node's task before what it printed."""
# Groups: node, rank, number of the piece, how many pieces, text. A line looks like: preflight 3 -1 1/2 {"look": {"node": 3, ...
# The texts of all pieces together are one JSON object. Rank -1 stands for the node itself.
REPORT_LINE = re.compile(rf"{REPORT_MARK} (\d+) (-?\d+) (\d+)/(\d+) (.*)")
TASK_ENDED = re.compile(r"srun: error: (\S+): task (\d+): ")
"""srun's message about a task that ended with an error: its host and number."""
SHELL = 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"'


def preflight_request(tree: dict[str, Any], nodes: int) -> PreflightRequest:
    """What each node must have for a run: ranks, GPUs, run directory, model and data.

    `tree`: the run's configuration as nested dictionaries. `nodes`: how many nodes the job has.
    """
    launcher, model, data, run = (tree[section] for section in ("launcher", "model", "data", "run"))
    # GPUs of a node: those that the job requests, else one for each rank.
    processes = ranks_per_node(launcher)
    requested_gpus = gpu_request(launcher)
    if requested_gpus is not None:
        gpus = requested_gpus.count
    else:
        gpus = processes if run["device"] == "cuda" else 0

    # Data files and directories that each node must see: not what is on the Hub or at a URL.
    source_paths = [source.get("path") for source in (data["sources"] or {}).values()]
    local_paths = []
    for setting in (data["path"], *source_paths):
        paths = setting if isinstance(setting, list) else [setting]
        for path in paths:
            if path is not None and not is_hub_path(str(path)) and not is_remote_address(str(path)):
                local_paths.append(str(path))
    downloads = model["download"]  # whether the run downloads the model: then no node needs to have it
    run_dir = str(Path(run["dir"]).expanduser().absolute()) if run["dir"] else None
    return PreflightRequest(
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        memory_gib=node_gib(tree, processes) if gpus else 0.0,
        run_dir=run_dir,
        model=None if downloads else model["path"],
        tokenizer=None if downloads else model["tokenizer"],
        revision=model["revision"],
        paths=local_paths,
        exchange=launcher.get("preflight", "full") == "full",
        device=str(run["device"]),
    )


@dataclass(slots=True)
class NodeCommand:
    """A process that runs the preflight of one node, or srun, which runs it on all of them."""

    argv: list[str]
    env: Mapping[str, str]
    node: int | None = None
    """The number of the node; None for srun, which labels the lines of each node with its number."""


@dataclass(slots=True)
class _ReportCollector:
    """Puts the lines that the nodes of a preflight print together to `reports`."""

    request: PreflightRequest
    reports: NodeReports
    lines: queue.Queue[tuple[int | None, str] | None] = field(default_factory=queue.Queue)
    """(node, line) as read by the threads of `_start`; None if one of their pipes has ended."""
    pieces: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    """Pieces of a report that is not complete, by node and rank."""
    ended_nodes: set[int] = field(default_factory=set)
    """Nodes whose process has ended with an error."""

    def add_line(self, node: int | None, line: str) -> None:
        """Sort one line that a node or srun printed into `reports`.

        - a piece of a report: kept, and the report added once its last piece is there;
        - srun's message about a task that ended: the node counts as ended, and its host is known; kept as output, too;
        - an empty line, or one in which srun only tells of its progress: dropped;
        - anything else: output of its node, or unlabelled output, cut to 300 characters.
        `node`: the number of the node; None for a line of srun, which may carry it as a label ("3: text").
        """
        if node is None and (label := LABELLED.fullmatch(line)):
            node = int(label[1])
            line = label[2]
        piece = REPORT_LINE.fullmatch(line)
        if piece is not None:
            self._add_piece(piece)
            return
        ended_task = TASK_ENDED.match(line)
        if ended_task is not None:
            ended_node = int(ended_task[2])
            self.ended_nodes.add(ended_node)
            self.reports.hosts[ended_node] = ended_task[1]
        if not line.strip() or line.startswith(("srun: job ", "srun: launch/", "srun: Terminating")):
            return
        if node is None:
            self.reports.unlabelled_output.append(line.strip()[:300])
        else:
            self.reports.output.setdefault(node, []).append(line.strip()[:300])

    def _add_piece(self, piece: re.Match[str]) -> None:
        """Keep a piece of a report (a match of `REPORT_LINE`); the last one completes the report."""
        node, rank, number, number_of_pieces = (int(piece[group]) for group in (1, 2, 3, 4))
        self.pieces.setdefault((node, rank), []).append(piece[5])
        if number == number_of_pieces:
            json_text = "".join(self.pieces.pop((node, rank)))
            self._add_report(node, rank, json.loads(json_text))

    def _add_report(self, node: int, rank: int, report: dict[str, Any]) -> None:
        """Take a complete report, which has one of three forms.

        {"look": facts of the node}, {"exchange": communication rates, from rank 0} or {"error": message of a rank}.
        """
        if "look" in report:
            self.reports.facts[node] = {**report["look"], "heard_at": time.time()}
        elif "exchange" in report:
            self.reports.exchange = report["exchange"]
        else:
            self.reports.failed_ranks.append({"node": node, "rank": rank, "error": report["error"]})


def run_preflight(
    request: PreflightRequest, commands: list[NodeCommand], hosts: list[str], *, is_queued: bool = False
) -> tuple[NodeReports, PreflightVerdict]:
    """Start the commands that check the nodes, collect what they report, and judge it.

    `hosts`: the nodes' names, by number. `is_queued`: the nodes may first have to be waited for, in SLURM's queue. All processes
    have ended when it returns. Errors: StorageError if the run directory cannot be written here.
    """
    request.token = uuid.uuid4().hex[:12]
    with _shared_directory(request) as shared_directory:
        reports = NodeReports(hosts)
        collector = _ReportCollector(request, reports)
        processes = [_start(command, request, collector.lines) for command in commands]
        try:
            reports.waited_s = _collect(collector, processes, is_queued=is_queued)
        finally:
            _end_processes(processes)
        reports.visible_nodes = _visible_nodes(shared_directory, set(reports.facts))
    return reports, judge(request, reports)


def _visible_nodes(shared_directory: Path | None, nodes: set[int]) -> set[int]:
    """The nodes whose file in the shared directory is visible on this host, within `VISIBLE_S` seconds.

    `shared_directory`: None if the run has no directory yet; then all `nodes` count as visible.
    """
    if shared_directory is None:
        return nodes
    deadline = time.monotonic() + VISIBLE_S  # seconds
    while True:
        visible = {node for node in nodes if (shared_directory / str(node)).exists()}
        if visible == nodes or time.monotonic() > deadline:
            return visible
        time.sleep(0.2)  # a network file system shows a new file late


@contextlib.contextmanager
def _shared_directory(request: PreflightRequest) -> Iterator[Path | None]:
    """Create `<run directory>/preflight/<token>`, where this host and the nodes look for each other's files.

    It is removed after the block. Yields None if the run has no directory. Errors: StorageError if it cannot be written.
    """
    if request.run_dir is None:
        yield None
        return
    directory = Path(request.run_dir).expanduser() / "preflight" / request.token
    try:
        directory.mkdir(parents=True)
        (directory / "asked").write_text(request.token, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{directory}: cannot be written ({error.strerror or error}); free space, or set run.dir"
        ) from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):  # another preflight of the run may still use it
            directory.parent.rmdir()


def _start(command: NodeCommand, request: PreflightRequest, lines: queue.Queue[Any]) -> subprocess.Popen[str]:
    """Start the process of a command, with threads that read its output.

    They put each line into `lines` as (node, line), and None when one of its two pipes has ended.
    """
    env = {**command.env, REQUEST_VARIABLE: request.to_json()}
    process = subprocess.Popen(
        command.argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def read(pipe: Any) -> None:
        for line in pipe:
            lines.put((command.node, line.rstrip("\n")))
        lines.put(None)

    for pipe in (process.stdout, process.stderr):
        threading.Thread(target=read, args=(pipe,), daemon=True).start()
    return process


def _collect(collector: _ReportCollector, processes: list[subprocess.Popen[str]], *, is_queued: bool) -> float:
    """Collect reports into `collector.reports` until one of these:

    - all processes have closed their output;
    - some nodes have not answered within `FACTS_TIMEOUT_S` seconds;
    - a node ended without an answer, and the others had a few seconds more (`reports.not_waited_for`: those still missing);
    - all nodes have answered, and the communication test has reported too or is not waited for.

    Returns the seconds since the start; with `is_queued`, since the nodes' first heartbeat.
    """
    request = collector.request
    reports = collector.reports
    # Times by the monotonic clock; None until it happens. The wait in SLURM's queue does not count.
    began_at: float | None = None if is_queued else time.monotonic()
    error_at: float | None = None
    all_answered_at: float | None = None
    open_pipes = 2 * len(processes)  # stdout and stderr of each
    while True:
        # Is there anything left to wait for?
        now = time.monotonic()
        waited_s = 0.0 if began_at is None else now - began_at
        answered = set(reports.facts)
        all_answered = len(answered) == request.nodes
        if open_pipes == 0 or (not all_answered and waited_s > FACTS_TIMEOUT_S):
            return waited_s
        # A node that ended without an answer is a problem, whatever the others say: they get a little more time.
        if error_at is None and collector.ended_nodes - answered:
            error_at = now
        unanswered = set(range(request.nodes)) - answered - collector.ended_nodes
        if error_at is not None:
            patience_s = AFTER_ERROR_OTHERS_S if unanswered else AFTER_ERROR_S
            if now - error_at > patience_s:
                reports.not_waited_for = unanswered
                return waited_s
        if all_answered:
            all_answered_at = all_answered_at or now
            if _is_exchange_settled(request, reports, now - all_answered_at):
                return waited_s

        # Take the next line, if one comes within 0.2 s.
        try:
            line = collector.lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            open_pipes -= 1
            continue
        collector.add_line(*line)
        if began_at is None and (reports.facts or reports.output):
            began_at = time.monotonic()


def _is_exchange_settled(request: PreflightRequest, reports: NodeReports, waited_s: float) -> bool:
    """Whether no more reports of the communication test need to be waited for, in any of these cases:

    - the nodes' answers already show problems, so that the result is known without the test;
    - there is no test, or only one rank;
    - rank 0 has reported the rates;
    - a rank has failed, and the others had `AFTER_ERROR_S` seconds to report theirs;
    - the time of the test is over.

    `waited_s`: seconds since all nodes have answered.
    """
    if judge(request, reports, is_final=False).problems:
        return True
    if not request.exchange or request.nodes * request.processes == 1:
        return True
    if reports.exchange:
        return True
    if reports.failed_ranks and waited_s > AFTER_ERROR_S:
        return True
    # The ranks have `timeout_s` to meet, and as long again to measure.
    return waited_s > 2 * request.timeout_s


def _end_processes(processes: list[subprocess.Popen[str]]) -> None:
    """End the processes that still run: by TERM, and by KILL after five seconds."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def commands_by_srun(
    nodes: int,
    python: str,
    options: list[str],
    environment: Mapping[str, str] | None = None,
    *,
    prefix: Sequence[str] = (),
) -> list[NodeCommand]:
    """The command that checks all nodes through one srun. `SHARDTUNE_SETUP` in the environment prepares each node.

    `options`: of srun, beside the usual ones. `prefix`: the command line of the container runtime, before the command itself.
    """
    argv = [
        "srun",
        "--label",
        f"--export=ALL,{INSIDE_CONTAINER}=1",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *options,
    ]
    argv += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    argv += [*prefix, "bash", "-c", SHELL, "setup", python, "-m", "launch.cluster.preflight.node", "node"]
    return [NodeCommand(argv, environment if environment is not None else os.environ)]


def commands_on_this_host(env: Mapping[str, str] | None = None) -> list[NodeCommand]:
    """The command that checks this host, as the only node."""
    node_env = dict(os.environ if env is None else env)
    node_env["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    node_env["PYTHONSAFEPATH"] = "1"
    node_env["SHARDTUNE_NODE"] = "0"
    return [NodeCommand([sys.executable, "-m", "launch.cluster.preflight.node", "node"], node_env, 0)]
