"""Judges the nodes of a preflight by their facts and transfer times, and names the one that differs from the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest

LEAST_FREE_GIB = 0.5
"""GiB of the run directory's disk below which a run cannot start."""
LITTLE_FREE_GIB = 5.0
"""GiB of the run directory's disk below which a note says so."""
CLOCK_S = 5.0
"""Seconds by which a clock may be off before a note says so."""
SLOW_SHARE = 0.5
"""Share of the usual rate below which a node is named."""
BUSY_MIB = 1024
"""GPU memory that is in use before the run, above which a note says so."""


@dataclass(slots=True)
class NodeReports:
    """What the nodes of a preflight have reported."""

    hosts: list[str]
    """Their names in the order of their numbers, as far as known; else `node 0`, `node 1`, ..."""
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """`node_facts()` of each node that answered, by its number."""
    exchange: dict[str, Any] | None = None
    failed_ranks: list[dict[str, Any]] = field(default_factory=list)
    """`node`, `rank` and `error` of ranks that could not exchange."""
    output: dict[int, list[str]] = field(default_factory=dict)
    """Other lines that a node printed, the newest last."""
    unlabelled_output: list[str] = field(default_factory=list)
    """Lines that came from no node, for example of srun."""
    visible_nodes: set[int] = field(default_factory=set)
    """Nodes whose file in the run directory is visible to the coordinator."""
    waited_s: float = 0.0
    not_waited_for: set[int] = field(default_factory=set)
    """Nodes without an answer that were not waited for, because another node had ended with an error."""

    def host_name(self, node: int) -> str:
        """A node for messages."""
        return self.facts[node]["host"] if node in self.facts else self.hosts[node]


@dataclass(frozen=True, slots=True)
class PreflightVerdict:
    """What a preflight found, as messages: `problems` keep a job from starting, `notes` are worth knowing."""

    problems: list[str]
    notes: list[str]


def judge(request: PreflightRequest, reports: NodeReports, *, is_final: bool = True) -> PreflightVerdict:
    """Judge the nodes of a preflight: what keeps the job from starting, and what is worth knowing.

    `is_final`: no further report will come. Only then are a silent node, a run directory that is not shared, and a communication
    test without a result problems too.
    """
    problems = [*_problems_of_nodes(request, reports), *_problems_of_differing_nodes(reports)]
    if is_final:
        problems = [
            *_problems_of_silent_nodes(request, reports),
            *problems,
            *_problems_of_unshared_run_dir(request, reports),
        ]
        if not problems:  # after a problem nobody waited for the communication test
            problems = list(_problems_of_communication(request, reports))
    notes = [
        *_notes_on_single_nodes(reports),
        *_notes_on_clocks(reports),
        *_notes_on_gpu_clocks(reports),
        *_notes_on_slow_nodes(reports),
    ]
    return PreflightVerdict(problems, notes)


def _problems_of_silent_nodes(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """A problem for each node that gave no answer, with its last lines of output, or those of srun."""
    for node in range(request.nodes):
        if node not in reports.facts and node not in reports.not_waited_for:
            node_output = " / ".join(reports.output.get(node, [])[-3:])
            output = node_output or " / ".join(reports.unlabelled_output[-3:])
            why = f": {output}" if output else f" within {reports.waited_s:.0f} s"
            yield f"{reports.host_name(node)}: gave no answer{why}"


def _problems_of_nodes(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """What keeps single nodes from running their ranks: no torch, no data or model, too few GPUs, no run directory."""
    for _, facts in sorted(reports.facts.items()):
        host = facts["host"]
        if "torch" not in facts["packages"]:
            yield f"{host}: {facts['executable']} has no torch; the environment must be there on every node (launcher.setup)"
        yield from _run_dir_problems(host, request.run_dir, facts.get("run_dir"))
        for path, is_visible in facts["paths"].items():
            if not is_visible:
                yield f"{host}: does not see {path}; data must be on a disk that all nodes share"
        for model, model_facts in facts["models"].items():
            missing = model_facts.get("lacking")
            if not model_facts["files"]:
                yield f"{host}: does not have the model {model}; put it where all nodes see it, or into each node's cache"
            elif missing:
                yield f"{host}: {model} is incomplete: {', '.join(missing[:3])} is missing; download it again"
        free_gib = facts["memory_free_gib"]
        if free_gib is not None and free_gib < request.memory_gib:
            yield (
                f"{host}: has {free_gib:.0f} GiB of memory free, and strategy.offload_activations=true takes "
                f"{request.memory_gib:.0f} GiB of a node; lower data.max_length or batch.micro, or set it to false"
            )
        if facts["gpu_count"] < request.gpus:
            yield (
                f"{host}: has {facts['gpu_count']} GPUs, but {request.gpus} are needed "
                "(launcher.gpus_per_node, launcher.gres)"
            )


def _run_dir_problems(host: str, run_dir: str | None, run_dir_facts: dict[str, Any] | None) -> Iterable[str]:
    """What is wrong with the run directory on one node.

    `run_dir_facts`: from `node_facts.run_dir_facts` on that node; None for a run without `run.dir`.
    """
    if run_dir_facts is None:
        return
    if not run_dir_facts["sees"]:
        yield (
            f"{host}: does not see run.dir={run_dir}, which the other nodes see; it must be on a disk that all nodes "
            "share"
        )
    elif run_dir_facts["problem"]:
        yield f"{host}: run.dir={run_dir} cannot be written ({run_dir_facts['problem']})"
    elif run_dir_facts["free_gib"] < LEAST_FREE_GIB:
        yield f"{host}: run.dir={run_dir} has {run_dir_facts['free_gib']:.2f} GiB free; a checkpoint would not fit"


def _problems_of_differing_nodes(reports: NodeReports) -> Iterable[str]:
    """A problem for each node that differs from most others in what must be the same on all: Python, code, libraries, model.

    An example: "gpu02: torch is 2.7.0, but 2.8.0 on gpu01; all nodes need the same".
    """
    for subject, version_of in _equal_on_all_nodes(reports):
        version_by_node = {node: version_of(facts) for node, facts in sorted(reports.facts.items())}
        versions = list(version_by_node.values())
        all_equal = len(set(versions)) < 2
        if all_equal or None in versions:  # None: a node that does not know
            continue
        # If several versions are equally frequent, this is the one that comes first: that of the first node.
        usual = Counter(versions).most_common(1)[0][0]
        usual_node = list(version_by_node)[versions.index(usual)]
        usual_host = reports.host_name(usual_node)
        for node, version in version_by_node.items():
            if version != usual:
                path = f" ({reports.facts[node]['clone']['path']})" if subject == "the code" else ""
                yield (
                    f"{reports.host_name(node)}: {subject} is {version}{path}, but {usual} on {usual_host}; all nodes need "
                    "the same"
                )


def _equal_on_all_nodes(reports: NodeReports) -> list[tuple[str, Callable[[dict[str, Any]], Any]]]:
    """What must be the same on all nodes, as (name for messages, function that reads it from the facts of a node).

    An example: ("Python", a function with {"python": "3.12.1", ...} -> "3.12.1").
    """
    packages: set[str] = set()
    models: dict[str, None] = {}  # a set that keeps its order
    for facts in reports.facts.values():
        packages |= facts["packages"].keys()
        models |= dict.fromkeys(facts["models"])

    def package_version(name: str, facts: dict[str, Any]) -> str:
        return facts["packages"].get(name, "missing")

    def model_digest(model: str, facts: dict[str, Any]) -> str | None:
        return facts["models"][model]["digest"]

    def gpu_name(facts: dict[str, Any]) -> str | None:
        return facts["gpus"][0]["name"] if facts["gpus"] else None

    subjects: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("Python", lambda facts: facts["python"]),
        ("the code", lambda facts: facts["clone"]["digest"]),
        ("torch", partial(package_version, "torch")),
    ]
    subjects += [(name, partial(package_version, name)) for name in sorted(packages - {"torch"})]
    subjects += [(f"the model {model}", partial(model_digest, model)) for model in models]
    subjects.append(("the kind of GPU", gpu_name))
    return subjects


def _problems_of_unshared_run_dir(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """A problem for each node whose file in the run directory does not appear on the first node: the disk is not shared."""
    for node in sorted(set(reports.facts) - reports.visible_nodes):
        run_dir_facts = reports.facts[node].get("run_dir")
        if run_dir_facts is not None and run_dir_facts["sees"] and not run_dir_facts["problem"]:
            yield (
                f"{reports.host_name(node)}: a file that it wrote into run.dir={request.run_dir} does not appear on "
                f"{reports.host_name(0)}; it must be on a disk that all nodes share"
            )


def _problems_of_communication(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """Why the communication test of the ranks failed: the error of each rank, or that it took too long."""
    if not request.exchange or request.nodes * request.processes == 1 or reports.exchange:
        return
    for failed in reports.failed_ranks:
        error = " ".join(failed["error"].split())[:200]
        yield (
            f"{reports.host_name(failed['node'])}: rank {failed['rank']} could not communicate with the other ranks: {error}"
        )
    if not reports.failed_ranks:
        last_lines: list[str] = []
        for node in sorted(reports.output):
            last_lines += reports.output[node][-2:]
        why = f": {' / '.join(last_lines)}" if last_lines else ""
        yield f"the communication test of the ranks did not finish within {reports.waited_s:.0f} s{why}"


def _notes_on_single_nodes(reports: NodeReports) -> Iterable[str]:
    """What is worth knowing about each node by itself: little free space, a wrong clock, GPUs that are slow or in use."""
    for _, facts in sorted(reports.facts.items()):
        host = facts["host"]
        run_dir_facts = facts.get("run_dir") or {}
        free_gib = run_dir_facts.get("free_gib", LITTLE_FREE_GIB)
        if LEAST_FREE_GIB <= free_gib < LITTLE_FREE_GIB:
            yield f"{host}: the run directory's disk has {free_gib:.1f} GiB free"
        behind_s = run_dir_facts.get("behind_s", 0.0)
        if abs(behind_s) > CLOCK_S:
            yield f"{host}: its clock differs by {-behind_s:+.0f} s from that of the run directory's disk"
        for gpu in facts["gpus"]:
            if gpu.get("ecc_errors"):
                yield f"{host}: GPU {gpu['index']} has had {gpu['ecc_errors']} memory errors that could not be corrected"
            if gpu["slowed"]:
                yield f"{host}: GPU {gpu['index']} is slowed down by its hardware (heat or power)"
            if (gpu.get("used_mib") or 0) > BUSY_MIB:
                yield f"{host}: other processes use {gpu['used_mib']} MiB of GPU {gpu['index']}"
        if facts["gpu_processes"]:
            yield f"{host}: other processes are on its GPUs: {'; '.join(facts['gpu_processes'][:3])}"


def _notes_on_clocks(reports: NodeReports) -> Iterable[str]:
    """A note for each node whose clock differs from that of most nodes by more than `CLOCK_S`."""
    # Seconds by which a node's clock was ahead of the coordinator's when its report came in (`heard_at`).
    ahead_s_by_node = {}
    for node, facts in reports.facts.items():
        ahead_s_by_node[node] = facts["time"] - facts.get("heard_at", facts["time"])
    for node, ahead_s in sorted(ahead_s_by_node.items()):
        off_s = ahead_s - statistics.median(ahead_s_by_node.values())
        if abs(off_s) > CLOCK_S:
            yield f"{reports.host_name(node)}: its clock differs by {off_s:+.0f} s from that of the other nodes"


def _notes_on_gpu_clocks(reports: NodeReports) -> Iterable[str]:
    """A note for each node whose GPUs have a lower clock limit than those of another node."""
    limit_mhz_by_node = {}
    for node, facts in reports.facts.items():
        for gpu in facts["gpus"]:
            if gpu.get("clock_mhz"):
                limit_mhz_by_node[node] = gpu["clock_mhz"]
    for node, limit_mhz in sorted(limit_mhz_by_node.items()):
        highest_mhz = max(limit_mhz_by_node.values())
        if limit_mhz < highest_mhz:
            yield (
                f"{reports.host_name(node)}: its GPUs are limited to {limit_mhz} MHz, those of other nodes to {highest_mhz} MHz"
            )


def _notes_on_slow_nodes(reports: NodeReports) -> Iterable[str]:
    """A note for each node whose transfers to other nodes are far slower than transfers usually are here."""
    # Of the communication test, if there was one: (node, node, GB/s) for each pair.
    pairs = (reports.exchange or {}).get("pairs", [])
    nodes = set()
    for first, second, _ in pairs:
        nodes |= {first, second}
    if len(nodes) < 3:  # of two nodes neither is the odd one
        return
    usual_rate = statistics.median(rate for _, _, rate in pairs)
    for node in sorted(nodes):
        node_rate = statistics.median(rate for first, second, rate in pairs if node in (first, second))
        if node_rate < SLOW_SHARE * usual_rate:
            yield (
                f"{reports.host_name(node)}: reaches {node_rate:.2f} GB/s with another node, and {usual_rate:.2f} GB/s is "
                "usual here"
            )
