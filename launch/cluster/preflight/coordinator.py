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
from typing import Any, NamedTuple

from launch.cluster.containers import INSIDE_CONTAINER
from launch.cluster.preflight.node import REPORT_MARK
from launch.cluster.preflight.node_facts import (
    COORDINATOR_FILE,
    REQUEST_VARIABLE,
    VISIBILITY_TIMEOUT_S,
    NodeFacts,
    PreflightRequest,
)
from launch.cluster.preflight.verdict import FailedRank, NodeReports, PreflightVerdict, judge_preflight
from strategies.errors import StorageError
from trainer.config.host_memory import host_gib_of_recomputed_inputs
from trainer.config.sbatch_options import gpus_per_node_request, ranks_per_node
from trainer.data.read.paths import is_hub_path, is_remote_address

FACTS_TIMEOUT_S = 30.0
"""Seconds within which each node must have said what it sees."""
PATIENCE_AFTER_ERROR_S = 3.0
"""Seconds in which further reports may come after a node has ended with an error."""
PATIENCE_WHILE_UNANSWERED_S = 10.0
"""Seconds in which further reports may come after that, while other nodes have neither answered nor ended."""
LABELLED_LINE_REGEX = re.compile(r"\s*(\d+): ?(.*)")
"""A line of `srun --label`: the number of the node's task before what it printed."""
# A line looks like: preflight 3 -1 1/2 {"node_facts": {"node": 3, ...
# The texts of all pieces together are one JSON object. Rank -1 stands for the node itself.
REPORT_LINE_REGEX = re.compile(
    rf"{REPORT_MARK} (?P<node>\d+) (?P<rank>-?\d+) (?P<piece>\d+)/(?P<num_pieces>\d+) (?P<text>.*)"
)
TASK_ENDED_REGEX = re.compile(r"srun: error: (?P<host>\S+): task (?P<node>\d+): ")
"""srun's message about a task that ended with an error; there is one task on each node."""
SETUP_AND_EXEC_SCRIPT = 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"'
"""A script of `bash -c`: runs the function `setup` of the job, then becomes the command in its arguments."""


def preflight_request(settings: dict[str, Any], num_nodes: int, rendezvous: str | None = None) -> PreflightRequest:
    """What to ask of each node of a job before its ranks start: GPUs, memory, run directory, model and data of the run.

    `settings`: the run's configuration as nested dictionaries.
    `rendezvous`: host:port at which the ranks of the communication test meet; None if the nodes find out from SLURM.
    A model that the run downloads is not asked for, nor data on the hub or at a URL.
    """
    launcher, model, run = (settings[section] for section in ("launcher", "model", "run"))
    num_ranks = ranks_per_node(launcher)
    requested_gpus = gpus_per_node_request(launcher)
    if requested_gpus is not None:
        num_gpus = requested_gpus.count
    else:  # the job requests none by number: one for each rank
        num_gpus = num_ranks if run["device"] == "cuda" else 0
    downloads_model = model["download"]
    return PreflightRequest(
        num_nodes=num_nodes,
        ranks_per_node=num_ranks,
        gpus_per_node=num_gpus,
        memory_gib=host_gib_of_recomputed_inputs(settings, num_ranks) if num_gpus else 0.0,
        run_dir=str(Path(run["dir"]).expanduser().absolute()) if run["dir"] else None,
        model=None if downloads_model else model["path"],
        tokenizer=None if downloads_model else model["tokenizer"],
        revision=model["revision"],
        data_paths=_local_data_paths(settings["data"]),
        wants_communication_test=launcher.get("preflight", "full") == "full",
        device=str(run["device"]),
        rendezvous=rendezvous,
    )


def _local_data_paths(data_settings: dict[str, Any]) -> list[str]:
    """The files, directories and patterns of a run's training data that lie on a disk, and not on the hub or at a URL.

    `data_settings`: the section `data` of the run's configuration.
    """
    path_settings = [data_settings["path"]]
    path_settings += [source.get("path") for source in (data_settings["sources"] or {}).values()]
    local_paths = []
    for path_setting in path_settings:
        for path in path_setting if isinstance(path_setting, list) else [path_setting]:
            if path is not None and not is_hub_path(str(path)) and not is_remote_address(str(path)):
                local_paths.append(str(path))
    return local_paths


@dataclass(slots=True)
class NodeCommand:
    """A process that runs the preflight of one node, or srun, which runs it on all of them."""

    argv: list[str]
    env: Mapping[str, str]
    node: int | None = None
    """The number of the node; None for srun, which labels the lines of each node with its number."""


class PrintedLine(NamedTuple):
    """A line that a node of a preflight, or srun, has printed."""

    node: int | None
    """The number of the node; None for a line of srun."""
    text: str


@dataclass(slots=True)
class _ReportCollector:
    """Collects the lines that the nodes of a preflight print into `reports`, and decides when nothing more is waited for.

    A preflight asks all nodes of a job, before its ranks start, whether they can run it.
    """

    request: PreflightRequest
    reports: NodeReports
    lines: queue.Queue[PrintedLine | None] = field(default_factory=queue.Queue)
    """Lines as read by the threads of `_start_command`; None if one of their pipes has ended."""
    pieces: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    """Pieces of a report that is not complete, by node and rank."""
    ended_nodes: set[int] = field(default_factory=set)
    """Nodes whose process has ended with an error."""
    first_error_at: float | None = None
    """When a node was first seen to have ended without an answer, by the monotonic clock."""
    all_answered_at: float | None = None
    """When the last node answered, by the monotonic clock."""

    def collect(self, num_pipes: int, *, is_queued: bool) -> float:
        """Collect the nodes' reports into `reports` until they suffice, or waiting is pointless; returns the seconds waited.

        `num_pipes`: stdout and stderr of each ssh or srun, from which threads read `lines`.
        `is_queued`: the seconds begin with the first line of a node, because the wait in SLURM's queue does not count.
        """
        began_at = None if is_queued else time.monotonic()
        num_open_pipes = num_pipes
        while True:
            now = time.monotonic()
            waited_s = 0.0 if began_at is None else now - began_at
            self._note_progress(now)
            if num_open_pipes == 0 or self._is_waiting_over(now, waited_s):
                return waited_s
            # Take the next line, if one comes within 0.2 s.
            try:
                line = self.lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                num_open_pipes -= 1
                continue
            self.sort_line(line.node, line.text)
            if began_at is None and (self.reports.facts or self.reports.output_lines_by_node):
                began_at = time.monotonic()

    def _is_waiting_over(self, now: float, waited_s: float) -> bool:
        """Whether no further report is to be waited for, although the nodes' processes still run.

        `now`: of the monotonic clock. `waited_s`: seconds since the reports were first waited for. The first that holds:

        - some nodes have not answered within `FACTS_TIMEOUT_S` seconds;
        - a node ended without an answer, and the others had a few seconds more. Then `reports.not_waited_for` is set to the nodes
          that have neither answered nor ended;
        - all nodes have answered, and the communication test has reported too, or is not waited for.
        """
        if self.all_answered_at is None and waited_s > FACTS_TIMEOUT_S:
            return True
        if self._is_patience_over(now):
            self.reports.not_waited_for = self._missing_nodes()
            return True
        if self.all_answered_at is None:
            return False
        return _is_communication_settled(self.request, self.reports, since_answers_s=now - self.all_answered_at)

    def _note_progress(self, now: float) -> None:
        """Set `first_error_at` and `all_answered_at` to `now` if that has happened since the last call."""
        answered_nodes = set(self.reports.facts)
        if self.first_error_at is None and self.ended_nodes - answered_nodes:
            self.first_error_at = now
        if self.all_answered_at is None and len(answered_nodes) == self.request.num_nodes:
            self.all_answered_at = now

    def _missing_nodes(self) -> set[int]:
        """Nodes that have neither answered nor ended."""
        return set(range(self.request.num_nodes)) - set(self.reports.facts) - self.ended_nodes

    def _is_patience_over(self, now: float) -> bool:
        """Whether a node of the preflight ended without an answer, and the other nodes have had their time to report too.

        Such a node is a problem, whatever the others say. So they get only `PATIENCE_AFTER_ERROR_S` seconds more, or
        `PATIENCE_WHILE_UNANSWERED_S` while some of them have not answered.
        `now`: of the monotonic clock.
        """
        if self.first_error_at is None:
            return False
        patience_s = PATIENCE_WHILE_UNANSWERED_S if self._missing_nodes() else PATIENCE_AFTER_ERROR_S
        return now - self.first_error_at > patience_s

    def sort_line(self, node: int | None, line: str) -> None:
        """Sort one line that a node of a preflight or srun printed into `reports`: a report, a message, or other output.

        `node`: the number of the node; None for a line of srun, which may carry it as a label ("3: text").
        By the line:

        - a piece of a report: kept, and the report added once its last piece is there;
        - srun's message about a task that ended: the node counts as ended, and its host is known; kept as output, too;
        - an empty line, or one in which srun only tells of its progress: dropped;
        - anything else: output of its node, or unlabelled output, cut to 300 characters.
        """
        if node is None and (label := LABELLED_LINE_REGEX.fullmatch(line)):
            node = int(label[1])
            line = label[2]
        report_piece = REPORT_LINE_REGEX.fullmatch(line)
        if report_piece is not None:
            self._add_piece(report_piece)
            return
        ended_task = TASK_ENDED_REGEX.match(line)
        if ended_task is not None:
            ended_node = int(ended_task["node"])
            self.ended_nodes.add(ended_node)
            self.reports.hosts[ended_node] = ended_task["host"]
        if not line.strip() or line.startswith(("srun: job ", "srun: launch/", "srun: Terminating")):
            return
        if node is None:
            self.reports.unlabelled_output.append(line.strip()[:300])
        else:
            self.reports.output_lines_by_node.setdefault(node, []).append(line.strip()[:300])

    def _add_piece(self, report_piece: re.Match[str]) -> None:
        """Keep a piece of a node's report, which comes in several lines because srun breaks long ones; the last completes it.

        `report_piece`: a match of `REPORT_LINE_REGEX`.
        """
        node = int(report_piece["node"])
        rank = int(report_piece["rank"])
        self.pieces.setdefault((node, rank), []).append(report_piece["text"])
        # The pieces of one report come in order: one process prints them.
        if report_piece["piece"] == report_piece["num_pieces"]:
            json_text = "".join(self.pieces.pop((node, rank)))
            self._add_report(node, rank, json.loads(json_text))

    def _add_report(self, node: int, rank: int, report: dict[str, Any]) -> None:
        """Add a complete report of a node or one of its ranks to `reports`, by its one key.

        - {"node_facts": facts of the node}: with `heard_at`, the time of this host's clock, by which clocks are compared;
        - {"communication_rates": rates of the communication test}, from rank 0;
        - {"error": message of a rank}, whose test failed.
        """
        if "node_facts" in report:
            facts: NodeFacts = report["node_facts"]
            facts["heard_at"] = time.time()
            self.reports.facts[node] = facts
        elif "communication_rates" in report:
            self.reports.communication_rates = report["communication_rates"]
        else:
            self.reports.failed_ranks.append(FailedRank(node, rank, report["error"]))


class PreflightResult(NamedTuple):
    """What the nodes of a preflight have reported, and what that means for the job."""

    reports: NodeReports
    verdict: PreflightVerdict


def run_preflight(
    request: PreflightRequest, commands: list[NodeCommand], hosts: list[str], *, is_queued: bool = False
) -> PreflightResult:
    """Ask all nodes of a job whether they can run it: start the commands that check them, collect the reports, and judge them.

    `request`: what each node must have; its `token` is set, which names this preflight.
    `commands`: one for each node, or one of srun for all.
    `hosts`: the nodes' names, by number.
    `is_queued`: the nodes may first have to be waited for, in SLURM's queue.
    All processes have ended when it returns.
    Raises StorageError if the run directory cannot be written here.
    """
    request.token = uuid.uuid4().hex[:12]
    with _shared_directory(request) as shared_directory:
        reports = NodeReports(hosts)
        collector = _ReportCollector(request, reports)
        processes = [_start_command(command, request, collector.lines) for command in commands]
        try:
            num_pipes = 2 * len(processes)  # stdout and stderr of each
            reports.waited_s = collector.collect(num_pipes, is_queued=is_queued)
        finally:
            _end_processes(processes)
        # Nodes whose file in the run directory this host sees, as it must.
        reports.visible_nodes = _nodes_sharing_directory(shared_directory, set(reports.facts))
    return PreflightResult(reports, judge_preflight(request, reports))


def _nodes_sharing_directory(shared_directory: Path | None, nodes: set[int]) -> set[int]:
    """Which nodes have the run directory on a disk that this host shares: those whose file in it becomes visible here in time.

    Each node writes a file called by its number.
    `shared_directory`: None if the run has no directory yet; then all `nodes` count as visible.
    In time: within `VISIBILITY_TIMEOUT_S` seconds.
    """
    if shared_directory is None:
        return nodes
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_S
    while True:
        visible_nodes = {node for node in nodes if (shared_directory / str(node)).exists()}
        if visible_nodes == nodes or time.monotonic() > deadline:
            return visible_nodes
        time.sleep(0.2)  # a network file system shows a new file late


@contextlib.contextmanager
def _shared_directory(request: PreflightRequest) -> Iterator[Path | None]:
    """Within the block, a directory `<run directory>/preflight/<token>` exists, where host and nodes look for each other's files.

    So it shows whether they share the disk. Removed after the block. Yields None if the run has no directory. Raises StorageError
    if it cannot be written.
    """
    if request.run_dir is None:
        yield None
        return
    directory = Path(request.run_dir).expanduser() / "preflight" / request.token
    try:
        directory.mkdir(parents=True)
        (directory / COORDINATOR_FILE).write_text(request.token, encoding="utf-8")
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


def _start_command(
    command: NodeCommand, request: PreflightRequest, lines: queue.Queue[PrintedLine | None]
) -> subprocess.Popen[str]:
    """Start the process that checks one node (or srun for all), with two threads that read its stdout and stderr.

    The threads put each line into `lines`, and None when their pipe has ended. The process finds `request` in its environment, as
    JSON.
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

    def read_pipe(pipe: Any) -> None:
        for line in pipe:
            lines.put(PrintedLine(command.node, line.rstrip("\n")))
        lines.put(None)

    for pipe in (process.stdout, process.stderr):
        threading.Thread(target=read_pipe, args=(pipe,), daemon=True).start()
    return process


def _is_communication_settled(request: PreflightRequest, reports: NodeReports, since_answers_s: float) -> bool:
    """Whether no more reports of the communication test need to be waited for, once all nodes have answered.

    True in any of these cases:

    - the nodes' answers already show problems, so that the result is known without the test;
    - there is no test, or only one rank;
    - rank 0 has reported the rates;
    - a rank has failed, and the others had `PATIENCE_AFTER_ERROR_S` seconds to report theirs;
    - the time of the test is over.

    `since_answers_s`: seconds since all nodes have answered.
    """
    if judge_preflight(request, reports, is_final=False).problems:
        return True
    if not request.tests_communication:
        return True
    if reports.communication_rates:
        return True
    if reports.failed_ranks and since_answers_s > PATIENCE_AFTER_ERROR_S:
        return True
    # The ranks have `timeout_s` to meet, and as long again to measure.
    return since_answers_s > 2 * request.timeout_s


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


def srun_check_command(
    num_nodes: int,
    python: str,
    srun_options: list[str],
    environment: Mapping[str, str] | None = None,
    *,
    container_prefix: Sequence[str] = (),
) -> NodeCommand:
    """The srun command that runs the check (preflight) on each node of a job, once a node.

    `python`: the interpreter on the nodes.
    `srun_options`: beside the usual ones.
    `environment`: of the command, None for that of this process; the shell function in its `SHARDTUNE_SETUP` prepares each node.
    `container_prefix`: what starts the container on each node; it stands after the options of srun, before the command itself.
    """
    argv = ["srun", "--label", f"--export=ALL,{INSIDE_CONTAINER}=1"]
    argv += [f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    argv += srun_options
    argv += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]  # last: srun takes the last value of an option
    script_name = "setup"  # bash -c takes it as $0: the arguments of the script begin after it
    argv += [*container_prefix, "bash", "-c", SETUP_AND_EXEC_SCRIPT, script_name]
    argv += [python, "-m", "launch.cluster.preflight.node", "node"]
    return NodeCommand(argv, environment if environment is not None else os.environ)


def local_check_command() -> NodeCommand:
    """The command that checks this host, as the only node of a preflight."""
    code_directory = str(Path(__file__).resolve().parents[3])
    # A trainer.py in the current directory must not hide the code's own modules.
    env = {**os.environ, "PYTHONPATH": code_directory, "PYTHONSAFEPATH": "1", "SHARDTUNE_NODE": "0"}
    return NodeCommand([sys.executable, "-m", "launch.cluster.preflight.node", "node"], env, node=0)
