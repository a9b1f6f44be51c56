"""Judges the nodes of a preflight by their facts and transfer times, and names the one that differs from the others."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from launch.cluster.preflight.node_facts import PreflightRequest

LEAST_FREE, LITTLE_FREE = 0.5, 5.0
"""GiB of the run directory's disk below which a run cannot start, and below which a word is said."""
CLOCK_S = 5.0
SLOW_SHARE = 0.5
"""Share of the usual rate below which a node is named."""
BUSY_MIB = 1024


@dataclass(slots=True)
class NodeReports:
    """What came of the nodes."""

    hosts: list[str]
    """Their names in the order of their numbers, as far as known; else `node 0`, `node 1`, ..."""
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each saw, by its number."""
    exchange: dict[str, Any] | None = None
    failed_ranks: list[dict[str, Any]] = field(default_factory=list)
    """`node`, `rank` and `error` of ranks that could not exchange."""
    output: dict[int, list[str]] = field(default_factory=dict)
    """What each printed beside, last lines last."""
    unlabelled_output: list[str] = field(default_factory=list)
    """What was printed by nobody in particular."""
    visible_nodes: set[int] = field(default_factory=set)
    """Nodes whose file in the run directory was seen by the one that asked."""
    waited_s: float = 0.0
    not_waited_for: set[int] = field(default_factory=set)
    """Nodes that were not waited for, since another one had ended without a word: nobody knows what is wrong with them."""

    def host_name(self, node: int) -> str:
        """A node for messages."""
        return self.facts[node]["host"] if node in self.facts else self.hosts[node]


@dataclass(frozen=True, slots=True)
class PreflightVerdict:
    """`problems` keep a job from starting, `notes` are worth knowing."""

    problems: list[str]
    notes: list[str]


def judge(request: PreflightRequest, reports: NodeReports, *, is_final: bool = True) -> PreflightVerdict:
    """All that is wrong. `is_final`: no more will be heard, so that silence is a problem too."""
    problems = [*_node_problems(request, reports), *_differences(reports)]
    if is_final:
        problems = [*_silent_nodes(request, reports), *problems, *_unseen_writes(request, reports)]
        problems = problems or list(_exchange_problems(request, reports))  # after a problem nobody waited for it
    return PreflightVerdict(problems, [*_notes(reports), *_slow_nodes(reports)])


def _silent_nodes(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    for node in range(request.nodes):
        if node not in reports.facts and node not in reports.not_waited_for:
            output = " / ".join(reports.output.get(node, [])[-3:]) or " / ".join(reports.unlabelled_output[-3:])
            why = f": {output}" if output else f" within {reports.waited_s:.0f} s"
            yield f"{reports.host_name(node)}: gave no answer{why}"


def _node_problems(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    for _, facts in sorted(reports.facts.items()):
        host, place = facts["host"], facts.get("run_dir")
        if "torch" not in facts["packages"]:
            yield f"{host}: {facts['executable']} has no torch; the environment must be there on every node (launcher.setup)"
        if place is not None and not place["sees"]:
            yield f"{host}: does not see run.dir={request.run_dir} as the others do; it must be on a disk that all nodes share"
        elif place is not None and place["problem"]:
            yield f"{host}: run.dir={request.run_dir} cannot be written ({place['problem']})"
        elif place is not None and place["free_gib"] < LEAST_FREE:
            yield f"{host}: run.dir={request.run_dir} has {place['free_gib']:.2f} GiB free; a checkpoint would not fit"
        for path in (path for path, is_visible in facts["paths"].items() if not is_visible):
            yield f"{host}: does not see {path}; data must be on a disk that all nodes share"
        for model, model_facts in facts["models"].items():
            if not model_facts["files"]:
                yield f"{host}: does not have the model {model}; put it where all nodes see it, or into each node's cache"
            elif model_facts["lacking"]:
                yield f"{host}: {model} is not whole: {', '.join(model_facts['lacking'][:3])} is missing; download it again"
        if facts["gpu_count"] < request.gpus:
            yield f"{host}: shows {facts['gpu_count']} GPUs, and {request.gpus} are needed (launcher.gpus_per_node, launcher.gres)"


def _differences(reports: NodeReports) -> Iterable[str]:
    """In what nodes differ that must be the same: from most of them, or from the first."""
    names = sorted({name for facts in reports.facts.values() for name in facts["packages"]} - {"torch"})
    wants: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("Python", lambda facts: facts["python"]),
        ("the code", lambda facts: facts["clone"]["digest"]),
        ("torch", lambda facts: facts["packages"].get("torch", "missing")),
        *((name, lambda facts, name=name: facts["packages"].get(name, "missing")) for name in names),  # type: ignore[misc]
        *(
            (f"the model {model}", lambda facts, model=model: facts["models"][model]["digest"])  # type: ignore[misc]
            for model in {model for facts in reports.facts.values() for model in facts["models"]}
        ),
        ("the kind of GPU", lambda facts: facts["gpus"][0]["name"] if facts["gpus"] else None),
    ]
    for subject, read in wants:
        versions = {node: read(facts) for node, facts in sorted(reports.facts.items())}
        if len(set(versions.values())) < 2 or None in versions.values():
            continue
        usual = Counter(versions.values()).most_common(1)[0][0]  # the first node's, where they are as many
        usual_host = next(reports.host_name(node) for node, version in versions.items() if version == usual)
        for node, version in versions.items():
            if version != usual:
                path = f" ({reports.facts[node]['clone']['path']})" if subject == "the code" else ""
                yield f"{reports.host_name(node)}: {subject} is {version}{path}, and {usual} on {usual_host}; all nodes need the same"


def _unseen_writes(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    for node in sorted(set(reports.facts) - reports.visible_nodes):
        place = reports.facts[node].get("run_dir")
        if place is not None and place["sees"] and not place["problem"]:
            yield (
                f"{reports.host_name(node)}: what it wrote into run.dir={request.run_dir} is not seen on {reports.host_name(0)}; it must be on a "
                "disk that all nodes share"
            )


def _exchange_problems(request: PreflightRequest, reports: NodeReports) -> Iterable[str]:
    if not request.exchange or request.nodes * request.processes == 1 or reports.exchange:
        return
    for failed in reports.failed_ranks:
        output = " ".join(failed["error"].split())[:200]
        yield f"{reports.host_name(failed['node'])}: rank {failed['rank']} could not exchange with the others: {output}"
    if not reports.failed_ranks:
        output = " / ".join(line for node in sorted(reports.output) for line in reports.output[node][-2:])
        yield f"the ranks did not exchange within {reports.waited_s:.0f} s{': ' + output if output else ''}"


def _notes(reports: NodeReports) -> Iterable[str]:
    for _, facts in sorted(reports.facts.items()):
        host, place = facts["host"], facts.get("run_dir") or {}
        if LEAST_FREE <= place.get("free_gib", LITTLE_FREE) < LITTLE_FREE:
            yield f"{host}: the run directory's disk has {place['free_gib']:.1f} GiB free"
        if abs(place.get("behind_s", 0.0)) > CLOCK_S:
            yield f"{host}: its clock is {-place['behind_s']:+.0f} s off that of the run directory's disk"
        for gpu in facts["gpus"]:
            if gpu.get("ecc_errors"):
                yield f"{host}: GPU {gpu['index']} has had {gpu['ecc_errors']} memory errors that could not be corrected"
            if gpu["slowed"]:
                yield f"{host}: GPU {gpu['index']} is slowed down by its hardware (heat or power)"
            if (gpu.get("used_mib") or 0) > BUSY_MIB:
                yield f"{host}: {gpu['used_mib']} MiB of GPU {gpu['index']} are in use by somebody"
        if facts["gpu_processes"]:
            yield f"{host}: other processes are on its GPUs: {'; '.join(facts['gpu_processes'][:3])}"
    times = {node: facts["time"] - facts.get("heard_at", facts["time"]) for node, facts in reports.facts.items()}
    for node, off in sorted(times.items()):
        if abs(off - statistics.median(times.values())) > CLOCK_S:
            yield f"{reports.host_name(node)}: its clock is {off - statistics.median(times.values()):+.0f} s off that of the others"
    clocks = {
        node: gpu["clock_mhz"] for node, facts in reports.facts.items() for gpu in facts["gpus"] if gpu.get("clock_mhz")
    }
    for node, clock in sorted(clocks.items()):
        if clock < max(clocks.values()):
            yield f"{reports.host_name(node)}: its GPUs run at most at {clock} MHz, and at {max(clocks.values())} MHz elsewhere"


def _slow_nodes(reports: NodeReports) -> Iterable[str]:
    """The nodes whose pairs are far slower than pairs usually are."""
    pairs = (reports.exchange or {}).get("pairs", [])
    nodes = sorted({node for pair in pairs for node in pair[:2]})
    if len(nodes) < 3:  # of two nobody is the odd one
        return
    usual = statistics.median(rate for _, _, rate in pairs)
    for node in nodes:
        rate = statistics.median(rate for a, b, rate in pairs if node in (a, b))
        if rate < SLOW_SHARE * usual:
            yield f"{reports.host_name(node)}: exchanges {rate:.2f} GB/s with another node, and {usual:.2f} GB/s is usual here"
