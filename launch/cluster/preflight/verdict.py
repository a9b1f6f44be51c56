"""Judges the nodes of a preflight by their facts and transfer times, and names the one that differs from the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from launch.cluster.preflight.node_facts import NodeFacts, PreflightRequest

MIN_FREE_GIB = 0.5
"""GiB of the run directory's disk below which a run cannot start."""
LOW_FREE_GIB = 5.0
"""GiB of the run directory's disk below which a note says so."""
MAX_CLOCK_OFFSET_S = 5.0
"""Seconds by which a clock may be off before a note says so."""
SLOW_SHARE = 0.5
"""Share of the usual rate below which a node is named."""
BUSY_MIB = 1024
"""GPU memory that is in use before the run, above which a note says so."""


class FailedRank(NamedTuple):
    """A rank that could not communicate with the other ranks."""

    node: int
    rank: int
    error: str
    """The message of its error."""


@dataclass(slots=True)
class NodeReports:
    """What the nodes of a preflight have reported."""

    hosts: list[str]
    """Their names in the order of their numbers, as far as known; else `node 0`, `node 1`, ..."""
    facts: dict[int, NodeFacts] = field(default_factory=dict)
    """The facts of each node that answered, by its number."""
    communication_rates: dict[str, Any] | None = None
    """What the communication test measured (`exchange.measure_communication`); None without a result."""
    failed_ranks: list[FailedRank] = field(default_factory=list)
    """Ranks that could not communicate."""
    output_lines_by_node: dict[int, list[str]] = field(default_factory=dict)
    """Other lines that a node printed, the newest last."""
    unlabelled_output: list[str] = field(default_factory=list)
    """Lines that came from no node, for example of srun."""
    visible_nodes: set[int] = field(default_factory=set)
    """Nodes whose file in the run directory is visible to the coordinator."""
    waited_s: float = 0.0
    """Seconds for which reports were collected."""
    not_waited_for: set[int] = field(default_factory=set)
    """Nodes without an answer that were not waited for, because another node had ended with an error."""

    def host_name(self, node: int) -> str:
        """The name of a node for messages: the one that it reported itself, else the one that is known here."""
        return self.facts[node]["host"] if node in self.facts else self.hosts[node]


@dataclass(frozen=True, slots=True)
class PreflightVerdict:
    """What a preflight found, as messages: `problems` keep a job from starting, `notes` are worth knowing."""

    problems: list[str]
    notes: list[str]


def judge_preflight(request: PreflightRequest, reports: NodeReports, *, is_final: bool = True) -> PreflightVerdict:
    """Judge the nodes of a preflight: what keeps the job from starting (problems), and what is worth knowing (notes).

    `request`: what each node must have.
    `reports`: what the nodes and their ranks have reported so far.
    `is_final`: no further report will come. Only then are a silent node, a run directory that is not shared, and a communication
        test without a result problems too.
    """
    problems = [*_problems_of_nodes(request, reports), *_problems_of_deviating_nodes(reports)]
    if is_final:
        # In the order in which the user reads them: a node that gave no answer at all comes first.
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
    """A problem for each node that gave no answer, with its last three lines of output, else the last three of srun.

    A node that was not waited for, because another node had ended with an error, is no problem.
    """
    for node in range(request.num_nodes):
        if node not in reports.facts and node not in reports.not_waited_for:
            last_lines = reports.output_lines_by_node.get(node, [])[-3:] or reports.unlabelled_output[-3:]
            explanation = f": {' / '.join(last_lines)}" if last_lines else f" within {reports.waited_s:.0f} s"
            yield f"{reports.host_name(node)}: gave no answer{explanation}"


def _problems_of_nodes(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """What keeps single nodes from running their ranks, a line for each problem of each node.

    In this order: no torch, an unusable run directory, data that it does not see, a model that is missing or incomplete, too
    little memory for offloaded activations (`request.memory_gib`), too few GPUs. Nodes that have not answered are left out.
    """
    for _, facts in sorted(reports.facts.items()):
        host = facts["host"]
        if "torch" not in facts["packages"]:
            yield f"{host}: {facts['executable']} has no torch; the environment must be there on every node (launcher.setup)"
        yield from _run_dir_problems(host, request.run_dir, facts.get("run_dir"))
        for path, is_visible in facts["paths"].items():
            if not is_visible:
                yield f"{host}: does not see {path}; data must be on a disk that all nodes share"
        yield from _model_problems(host, facts["models"])
        free_gib = facts["memory_free_gib"]
        if free_gib is not None and free_gib < request.memory_gib:
            yield (
                f"{host}: has {free_gib:.0f} GiB of memory free, and strategy.offload_activations=true takes "
                f"{request.memory_gib:.0f} GiB of a node; lower data.max_length or batch.micro, or set it to false"
            )
        if facts["gpu_count"] < request.gpus_per_node:
            yield (
                f"{host}: has {facts['gpu_count']} GPUs, but {request.gpus_per_node} are needed "
                "(launcher.gpus_per_node, launcher.gres)"
            )


def _model_problems(host: str, facts_by_model: dict[str, dict[str, Any]]) -> Iterable[str]:
    """A problem for each model or tokenizer of the run that one node lacks, or that lacks files of its weights there.

    `facts_by_model`: from `node_facts.model_facts` on that node: {"org/model": {"files": 12, "lacking": [], ...}}.
    """
    for model, model_facts in facts_by_model.items():
        missing_files = model_facts.get("lacking")
        if not model_facts["files"]:
            yield f"{host}: does not have the model {model}; put it where all nodes see it, or into each node's cache"
        elif missing_files:
            yield f"{host}: {model} is incomplete: {', '.join(missing_files[:3])} is missing; download it again"


def _run_dir_problems(host: str, run_dir: str | None, run_dir_facts: dict[str, Any] | None) -> Iterable[str]:
    """What is wrong with the run directory on one node, at most one line: not visible, not writable, or little space.

    `run_dir_facts`: from `node_facts.check_run_dir` on that node; None for a run without `run.dir`.
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
    elif run_dir_facts["free_gib"] < MIN_FREE_GIB:
        yield f"{host}: run.dir={run_dir} has {run_dir_facts['free_gib']:.2f} GiB free; a checkpoint would not fit"


def _problems_of_deviating_nodes(reports: NodeReports) -> Iterable[str]:
    """A problem for each node that differs from most others in what must be the same on all: Python, code, libraries, model.

    "gpu02: torch is 2.7.0, but 2.8.0 on gpu01; all nodes need the same". A fact that some node does not know is not compared.
    """
    for common_fact in _facts_common_to_all_nodes(reports):
        value_by_node = {node: common_fact.read(facts) for node, facts in sorted(reports.facts.items())}
        values = list(value_by_node.values())
        all_equal = len(set(values)) < 2
        is_unknown_to_some = None in values
        if all_equal or is_unknown_to_some:
            continue
        # If several values are equally frequent, `Counter` takes the one that comes first: that of the first node.
        usual_value, _ = Counter(values).most_common(1)[0]
        usual_node = list(value_by_node)[values.index(usual_value)]
        for node, value in value_by_node.items():
            if value != usual_value:
                path = common_fact.read_path(reports.facts[node])
                path_text = f" ({path})" if path else ""
                yield (
                    f"{reports.host_name(node)}: {common_fact.name} is {value}{path_text}, but {usual_value} on "
                    f"{reports.host_name(usual_node)}; all nodes need the same"
                )


class _CommonFact(NamedTuple):
    """What must be the same on all nodes."""

    name: str
    """For messages, such as "torch"."""
    read: Callable[[NodeFacts], str | None]
    """Takes the version, digest or name out of a node's facts; None if the node does not know it."""
    read_path: Callable[[NodeFacts], str | None] = lambda facts: None
    """Takes the path at which the node has it out of the facts; None if the message needs none."""


def _facts_common_to_all_nodes(reports: NodeReports) -> list[_CommonFact]:
    """What must be the same on all nodes: Python, the code, every library and model that any node has, and the kind of GPU.

    Each has a name for messages, and a function that takes its value out of a node's facts: "Python" takes "3.12.1" out of
    {"python": "3.12.1", ...}.
    """
    packages: set[str] = set()
    models: dict[str, None] = {}  # a set that keeps its order
    for node_facts in reports.facts.values():
        packages |= node_facts["packages"].keys()
        models |= dict.fromkeys(node_facts["models"])

    def read_package_version(name: str, facts: NodeFacts) -> str:
        return facts["packages"].get(name, "missing")

    def read_model_digest(model: str, facts: NodeFacts) -> str | None:  # None if the node lacks the model
        return facts["models"][model]["digest"]

    def read_gpu_name(facts: NodeFacts) -> str | None:
        return facts["gpus"][0]["name"] if facts["gpus"] else None

    common_facts = [
        _CommonFact("Python", lambda facts: facts["python"]),
        _CommonFact("the code", lambda facts: facts["clone"]["digest"], lambda facts: facts["clone"]["path"]),
        _CommonFact("torch", partial(read_package_version, "torch")),
    ]
    for name in sorted(packages - {"torch"}):
        common_facts.append(_CommonFact(name, partial(read_package_version, name)))
    for model in models:
        common_facts.append(_CommonFact(f"the model {model}", partial(read_model_digest, model)))
    common_facts.append(_CommonFact("the kind of GPU", read_gpu_name))
    return common_facts


def _problems_of_unshared_run_dir(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """A problem for each node whose file in the run directory does not appear on this host: the disk is not shared.

    Nodes that could not write there have a problem of their own already.
    """
    for node in sorted(set(reports.facts) - reports.visible_nodes):
        run_dir_facts = reports.facts[node].get("run_dir")
        if run_dir_facts is not None and run_dir_facts["sees"] and not run_dir_facts["problem"]:
            yield (
                f"{reports.host_name(node)}: a file that it wrote into run.dir={request.run_dir} does not appear on "
                f"{reports.host_name(0)}; it must be on a disk that all nodes share"
            )


def _problems_of_communication(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    """Why the communication test gave no rates: the error of each rank that failed, else that it did not finish in time.

    Nothing if it gave rates, or if there is no such test. `request`: whether there is one.
    """
    if not request.tests_communication or reports.communication_rates:
        return
    for failed_rank in reports.failed_ranks:
        error = " ".join(failed_rank.error.split())[:200]
        yield (
            f"{reports.host_name(failed_rank.node)}: rank {failed_rank.rank} could not communicate with the other ranks: {error}"
        )
    if not reports.failed_ranks:
        last_lines: list[str] = []
        for node in sorted(reports.output_lines_by_node):
            last_lines += reports.output_lines_by_node[node][-2:]
        why = f": {' / '.join(last_lines)}" if last_lines else ""
        yield f"the communication test of the ranks did not finish within {reports.waited_s:.0f} s{why}"


def _notes_on_single_nodes(reports: NodeReports) -> Iterable[str]:
    """What is worth knowing about each node by itself, though it does not keep the job from starting.

    Little free space or a wrong clock of the run directory's disk; GPUs with memory errors, slowed down or in use.
    """
    for _, facts in sorted(reports.facts.items()):
        host = facts["host"]
        run_dir_facts = facts.get("run_dir") or {}
        # Without the fact nothing is said. Less than MIN_FREE_GIB is a problem, and so no note.
        free_gib = run_dir_facts.get("free_gib", LOW_FREE_GIB)
        if MIN_FREE_GIB <= free_gib < LOW_FREE_GIB:
            yield f"{host}: the run directory's disk has {free_gib:.1f} GiB free"
        behind_s = run_dir_facts.get("behind_s", 0.0)
        if abs(behind_s) > MAX_CLOCK_OFFSET_S:
            # The sign is that of this node's clock: +7 s if it is ahead of the disk's.
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
    """A note for each node whose clock differs from that of most nodes by more than `MAX_CLOCK_OFFSET_S`.

    The coordinator's own clock may be the wrong one, so nodes are compared with each other.
    """
    # Seconds by which a node's clock was ahead of the coordinator's when its report came in (`heard_at`).
    ahead_s_by_node = {}
    for node, facts in reports.facts.items():
        heard_at = facts.get("heard_at", facts["time"])  # without it, the clock counts as right
        ahead_s_by_node[node] = facts["time"] - heard_at
    if not ahead_s_by_node:
        return
    usual_ahead_s = statistics.median(ahead_s_by_node.values())
    for node, ahead_s in sorted(ahead_s_by_node.items()):
        offset_s = ahead_s - usual_ahead_s
        if abs(offset_s) > MAX_CLOCK_OFFSET_S:
            yield f"{reports.host_name(node)}: its clock differs by {offset_s:+.0f} s from that of the other nodes"


def _notes_on_gpu_clocks(reports: NodeReports) -> Iterable[str]:
    """A note for each node whose GPUs have a lower clock limit than those of another node, since the slowest sets the pace.

    Nodes whose driver does not tell the limit are left out. If the GPUs of a node differ, the last one counts.
    """
    limit_mhz_by_node = {}
    for node, facts in reports.facts.items():
        for gpu in facts["gpus"]:
            if gpu.get("clock_mhz"):
                limit_mhz_by_node[node] = gpu["clock_mhz"]
    highest_mhz = max(limit_mhz_by_node.values(), default=0)
    for node, limit_mhz in sorted(limit_mhz_by_node.items()):
        if limit_mhz < highest_mhz:
            yield (
                f"{reports.host_name(node)}: its GPUs are limited to {limit_mhz} MHz, those of other nodes to {highest_mhz} MHz"
            )


def _notes_on_slow_nodes(reports: NodeReports) -> Iterable[str]:
    """A note for each node whose transfers to other nodes are slower than `SLOW_SHARE` of the usual rate here.

    Nothing without a communication test, or with fewer than three nodes: of two, neither is the odd one.
    """
    # (node, node, GB/s) of each pair that was measured
    pairs = (reports.communication_rates or {}).get("pairs", [])
    nodes = set()
    for first_node, second_node, _ in pairs:
        nodes |= {first_node, second_node}
    if len(nodes) < 3:
        return
    usual_gb_per_s = statistics.median(rate for _, _, rate in pairs)
    for node in sorted(nodes):
        node_gb_per_s = statistics.median(rate for first, second, rate in pairs if node in (first, second))
        if node_gb_per_s < SLOW_SHARE * usual_gb_per_s:
            yield (
                f"{reports.host_name(node)}: reaches {node_gb_per_s:.2f} GB/s with another node, and {usual_gb_per_s:.2f} GB/s "
                "is usual here"
            )
