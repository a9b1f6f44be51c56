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

from launch.cluster.containers import INSIDE
from launch.cluster.preflight.node import MARK
from launch.cluster.preflight.node_facts import REQUEST_VARIABLE, VISIBLE_S, PreflightRequest
from launch.cluster.preflight.verdict import NodeReports, PreflightVerdict, judge
from strategies.errors import StorageError
from trainer.config.sbatch_options import gpu_request, ranks_per_node
from trainer.data.read.paths import is_address, is_hub

FACTS_TIMEOUT_S = 30.0
"""Seconds within which each node must have said what it sees."""
GRACE_S, LATE_S = 3.0, 10.0
"""Seconds for what is still said when a node has ended without a word, and for what others see that are slow."""
LABELLED = re.compile(r"\s*(\d+): ?(.*)")
REPORT_LINE = re.compile(rf"{MARK} (\d+) (-?\d+) (\d+)/(\d+) (.*)")
TASK_ENDED = re.compile(r"srun: error: (\S+): task (\d+): ")
SHELL = 'set -e; eval "$SHARDTUNE_SETUP"; setup >&2; exec "$@"'


def preflight_request(tree: dict[str, Any], nodes: int) -> PreflightRequest:
    """What the nodes are to look at for a run whose configuration, as plain values, is `tree`."""
    launcher, model, data, run = (tree[part] for part in ("launcher", "model", "data", "run"))
    processes = ranks_per_node(launcher)
    request = gpu_request(launcher)
    gpus = processes if run["device"] == "cuda" else 0
    if request is not None:
        gpus = request.count
    sources = [source.get("path") for source in (data["sources"] or {}).values()]
    paths = [
        str(path) for listed in (data["path"], *sources) for path in (listed if isinstance(listed, list) else [listed])
    ]
    local_paths = [path for path in paths if path != "None" and not is_hub(path) and not is_address(path)]
    model_path = None if model["download"] else model["path"]
    return PreflightRequest(
        nodes=nodes,
        processes=processes,
        gpus=gpus,
        run_dir=str(Path(run["dir"]).expanduser().absolute()) if run["dir"] else None,
        model=model_path,
        tokenizer=None if model["download"] else model["tokenizer"],
        revision=model["revision"],
        paths=local_paths,
        exchange=launcher.get("preflight", "full") == "full",
        device=str(run["device"]),
    )


@dataclass(slots=True)
class Command:
    """What is started, for one node or (`node` None, srun with labels) for all of them."""

    argv: list[str]
    env: Mapping[str, str]
    node: int | None = None


@dataclass(slots=True)
class _ReportCollector:
    """Lines as they come."""

    request: PreflightRequest
    reports: NodeReports
    lines: queue.Queue[tuple[int | None, str] | None] = field(default_factory=queue.Queue)
    pieces: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    ended_nodes: set[int] = field(default_factory=set)
    """Nodes whose process has ended with an error."""

    def add_line(self, node: int | None, line: str) -> None:
        """Sort one line out."""
        if node is None and (label := LABELLED.fullmatch(line)):
            node, line = int(label[1]), label[2]
        if (report := REPORT_LINE.fullmatch(line)) is not None:
            reporter, rank, number, of, piece = (
                int(report[1]),
                int(report[2]),
                int(report[3]),
                int(report[4]),
                report[5],
            )
            self.pieces.setdefault((reporter, rank), []).append(piece)
            if number == of:
                self._add_report(reporter, rank, json.loads("".join(self.pieces.pop((reporter, rank)))))
            return
        if (ended_task := TASK_ENDED.match(line)) is not None:
            self.ended_nodes.add(int(ended_task[2]))
            self.reports.hosts[int(ended_task[2])] = ended_task[1]
        if line.strip() and not line.startswith(("srun: job ", "srun: launch/", "srun: Terminating")):
            (self.reports.unlabelled_output if node is None else self.reports.output.setdefault(node, [])).append(
                line.strip()[:300]
            )

    def _add_report(self, node: int, rank: int, report: dict[str, Any]) -> None:
        if "look" in report:
            self.reports.facts[node] = {**report["look"], "heard_at": time.time()}
        elif "exchange" in report:
            self.reports.exchange = report["exchange"]
        else:
            self.reports.failed_ranks.append({"node": node, "rank": rank, "error": report["error"]})


def run_preflight(
    request: PreflightRequest, commands: list[Command], hosts: list[str], *, is_queued: bool = False
) -> tuple[NodeReports, PreflightVerdict]:
    """Start the commands, hear the nodes, and judge. `is_queued`: the nodes may first have to be waited for, in SLURM's queue.

    Everything that was started has ended when it returns. Errors: StorageError where the run directory cannot be written here.
    """
    request.token = uuid.uuid4().hex[:12]
    with _shared_directory(request) as place:
        reports = NodeReports(hosts)
        collector = _ReportCollector(request, reports)
        started = [_start(command, request, collector.lines) for command in commands]
        try:
            reports.waited_s = _collect(collector, started, is_queued)
        finally:
            _end_processes(started)
        end = time.monotonic() + VISIBLE_S
        while place is not None:
            reports.visible_nodes = {node for node in reports.facts if (place / str(node)).exists()}
            if reports.visible_nodes == set(reports.facts) or time.monotonic() > end:
                break
            time.sleep(0.2)
        else:
            reports.visible_nodes = set(reports.facts)
    return reports, judge(request, reports)


@contextlib.contextmanager
def _shared_directory(request: PreflightRequest) -> Iterator[Path | None]:
    """The place in the run directory where the asker and the nodes see each other's files; gone afterwards."""
    if request.run_dir is None:
        yield None
        return
    place = Path(request.run_dir).expanduser() / "preflight" / request.token
    try:
        place.mkdir(parents=True)
        (place / "asked").write_text(request.token, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{place}: cannot be written ({error.strerror or error}); free space, or set run.dir"
        ) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            place.parent.rmdir()


def _start(command: Command, request: PreflightRequest, lines: queue.Queue[Any]) -> subprocess.Popen[str]:
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


def _collect(collector: _ReportCollector, started: list[subprocess.Popen[str]], is_queued: bool) -> float:
    """Until all was said, something is wrong, or time is up; seconds since the first sign of the nodes."""
    request, reports = collector.request, collector.reports
    began: float | None = None if is_queued else time.monotonic()
    open_pipes, first_end_at, answered_at = 2 * len(started), 0.0, 0.0
    while True:
        now = time.monotonic()
        waited = 0.0 if began is None else now - began
        all_answered = len(reports.facts) == request.nodes
        if collector.ended_nodes - set(reports.facts) and not first_end_at:
            first_end_at = now
        if open_pipes == 0 or (not all_answered and waited > FACTS_TIMEOUT_S):
            return waited
        unanswered = set(range(request.nodes)) - set(reports.facts) - collector.ended_nodes
        if first_end_at and now - first_end_at > (LATE_S if unanswered else GRACE_S):
            reports.not_waited_for = unanswered
            return waited
        if all_answered:
            answered_at = answered_at or now
            if (
                judge(request, reports, is_final=False).problems
                or not request.exchange
                or request.nodes * request.processes == 1
            ):
                return waited
            if (
                reports.exchange
                or (reports.failed_ranks and now - answered_at > GRACE_S)
                or now - answered_at > 2 * request.timeout_s
            ):
                return waited
        try:
            line = collector.lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            open_pipes -= 1
            continue
        collector.add_line(*line)
        began = began or (time.monotonic() if reports.facts or reports.output else None)


def _end_processes(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
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
) -> list[Command]:
    """All nodes through one srun, with `options` of its own; `SHARDTUNE_SETUP` in the environment is the set-up of a node.

    `prefix` stands before the command: what puts it into a container.
    """
    argv = [
        "srun",
        "--label",
        f"--export=ALL,{INSIDE}=1",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *options,
    ]
    argv += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    argv += [*prefix, "bash", "-c", SHELL, "setup", python, "-m", "launch.cluster.preflight.node", "node"]
    return [Command(argv, environment if environment is not None else os.environ)]


def commands_here(env: Mapping[str, str] | None = None) -> list[Command]:
    """This host as the only node."""
    root = str(Path(__file__).resolve().parents[3])
    node_env = {
        **(os.environ if env is None else env),
        "PYTHONPATH": root,
        "PYTHONSAFEPATH": "1",
        "SHARDTUNE_NODE": "0",
    }
    return [Command([sys.executable, "-m", "launch.cluster.preflight.node", "node"], node_env, 0)]
