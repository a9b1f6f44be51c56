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
SLOW = 0.5
"""Share of the usual rate below which a node is named."""
BUSY_MIB = 1024


@dataclass(slots=True)
class Heard:
    """What came of the nodes."""

    hosts: list[str]
    """Their names in the order of their numbers, as far as known; else `node 0`, `node 1`, ..."""
    looks: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each saw, by its number."""
    exchange: dict[str, Any] | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)
    """`node`, `rank` and `error` of ranks that could not exchange."""
    said: dict[int, list[str]] = field(default_factory=dict)
    """What each printed beside, last lines last."""
    unplaced: list[str] = field(default_factory=list)
    """What was printed by nobody in particular."""
    visible: set[int] = field(default_factory=set)
    """Nodes whose file in the run directory was seen by the one that asked."""
    waited_s: float = 0.0
    cut_off: set[int] = field(default_factory=set)
    """Nodes that were not waited for, since another one had ended without a word: nobody knows what is wrong with them."""

    def name(self, node: int) -> str:
        """A node for messages."""
        return self.looks[node]["host"] if node in self.looks else self.hosts[node]


@dataclass(frozen=True, slots=True)
class PreflightVerdict:
    """`problems` keep a job from starting, `notes` are worth knowing."""

    problems: list[str]
    notes: list[str]


def judge(asked: PreflightRequest, heard: Heard, *, whole: bool = True) -> PreflightVerdict:
    """All that is wrong. `whole`: no more will be heard, so that silence is a problem too."""
    problems = [*_of_nodes(asked, heard), *_unlike(heard)]
    if whole:
        problems = [*_silent(asked, heard), *problems, *_unseen(asked, heard)]
        problems = problems or list(_of_exchange(asked, heard))  # after a problem nobody waited for it
    return PreflightVerdict(problems, [*_notes(heard), *_slow(heard)])


def _silent(asked: PreflightRequest, heard: Heard) -> Iterable[str]:
    for node in range(asked.nodes):
        if node not in heard.looks and node not in heard.cut_off:
            said = " / ".join(heard.said.get(node, [])[-3:]) or " / ".join(heard.unplaced[-3:])
            why = f": {said}" if said else f" within {heard.waited_s:.0f} s"
            yield f"{heard.name(node)}: gave no answer{why}"


def _of_nodes(asked: PreflightRequest, heard: Heard) -> Iterable[str]:
    for _, seen in sorted(heard.looks.items()):
        host, place = seen["host"], seen.get("run_dir")
        if "torch" not in seen["packages"]:
            yield f"{host}: {seen['executable']} has no torch; the environment must be there on every node (launcher.setup)"
        if place is not None and not place["sees"]:
            yield f"{host}: does not see run.dir={asked.run_dir} as the others do; it must be on a disk that all nodes share"
        elif place is not None and place["problem"]:
            yield f"{host}: run.dir={asked.run_dir} cannot be written ({place['problem']})"
        elif place is not None and place["free_gib"] < LEAST_FREE:
            yield f"{host}: run.dir={asked.run_dir} has {place['free_gib']:.2f} GiB free; a checkpoint would not fit"
        for path in (path for path, there in seen["paths"].items() if not there):
            yield f"{host}: does not see {path}; data must be on a disk that all nodes share"
        for model, held in seen["models"].items():
            if not held["files"]:
                yield f"{host}: does not have the model {model}; put it where all nodes see it, or into each node's cache"
            elif held["lacking"]:
                yield f"{host}: {model} is not whole: {', '.join(held['lacking'][:3])} is missing; download it again"
        if seen["gpu_count"] < asked.gpus:
            yield f"{host}: shows {seen['gpu_count']} GPUs, and {asked.gpus} are needed (launcher.gpus_per_node, launcher.gres)"


def _unlike(heard: Heard) -> Iterable[str]:
    """In what nodes differ that must be the same: from most of them, or from the first."""
    names = sorted({name for seen in heard.looks.values() for name in seen["packages"]} - {"torch"})
    wants: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("Python", lambda seen: seen["python"]),
        ("the code", lambda seen: seen["clone"]["digest"]),
        ("torch", lambda seen: seen["packages"].get("torch", "missing")),
        *((name, lambda seen, name=name: seen["packages"].get(name, "missing")) for name in names),  # type: ignore[misc]
        *(
            (f"the model {model}", lambda seen, model=model: seen["models"][model]["digest"])  # type: ignore[misc]
            for model in {model for seen in heard.looks.values() for model in seen["models"]}
        ),
        ("the kind of GPU", lambda seen: seen["gpus"][0]["name"] if seen["gpus"] else None),
    ]
    for what, of in wants:
        values = {node: of(seen) for node, seen in sorted(heard.looks.items())}
        if len(set(values.values())) < 2 or None in values.values():
            continue
        usual = Counter(values.values()).most_common(1)[0][0]  # the first node's, where they are as many
        like = next(heard.name(node) for node, value in values.items() if value == usual)
        for node, value in values.items():
            if value != usual:
                where = f" ({heard.looks[node]['clone']['path']})" if what == "the code" else ""
                yield f"{heard.name(node)}: {what} is {value}{where}, and {usual} on {like}; all nodes need the same"


def _unseen(asked: PreflightRequest, heard: Heard) -> Iterable[str]:
    for node in sorted(set(heard.looks) - heard.visible):
        place = heard.looks[node].get("run_dir")
        if place is not None and place["sees"] and not place["problem"]:
            yield (
                f"{heard.name(node)}: what it wrote into run.dir={asked.run_dir} is not seen on {heard.name(0)}; it must be on a "
                "disk that all nodes share"
            )


def _of_exchange(asked: PreflightRequest, heard: Heard) -> Iterable[str]:
    if not asked.exchange or asked.nodes * asked.processes == 1 or heard.exchange:
        return
    for failed in heard.failed:
        said = " ".join(failed["error"].split())[:200]
        yield f"{heard.name(failed['node'])}: rank {failed['rank']} could not exchange with the others: {said}"
    if not heard.failed:
        said = " / ".join(line for node in sorted(heard.said) for line in heard.said[node][-2:])
        yield f"the ranks did not exchange within {heard.waited_s:.0f} s{': ' + said if said else ''}"


def _notes(heard: Heard) -> Iterable[str]:
    for _, seen in sorted(heard.looks.items()):
        host, place = seen["host"], seen.get("run_dir") or {}
        if LEAST_FREE <= place.get("free_gib", LITTLE_FREE) < LITTLE_FREE:
            yield f"{host}: the run directory's disk has {place['free_gib']:.1f} GiB free"
        if abs(place.get("behind_s", 0.0)) > CLOCK_S:
            yield f"{host}: its clock is {-place['behind_s']:+.0f} s off that of the run directory's disk"
        for gpu in seen["gpus"]:
            if gpu.get("ecc_errors"):
                yield f"{host}: GPU {gpu['index']} has had {gpu['ecc_errors']} memory errors that could not be corrected"
            if gpu["slowed"]:
                yield f"{host}: GPU {gpu['index']} is slowed down by its hardware (heat or power)"
            if (gpu.get("used_mib") or 0) > BUSY_MIB:
                yield f"{host}: {gpu['used_mib']} MiB of GPU {gpu['index']} are in use by somebody"
        if seen["gpu_processes"]:
            yield f"{host}: other processes are on its GPUs: {'; '.join(seen['gpu_processes'][:3])}"
    times = {node: seen["time"] - seen.get("heard_at", seen["time"]) for node, seen in heard.looks.items()}
    for node, off in sorted(times.items()):
        if abs(off - statistics.median(times.values())) > CLOCK_S:
            yield f"{heard.name(node)}: its clock is {off - statistics.median(times.values()):+.0f} s off that of the others"
    clocks = {
        node: gpu["clock_mhz"] for node, seen in heard.looks.items() for gpu in seen["gpus"] if gpu.get("clock_mhz")
    }
    for node, clock in sorted(clocks.items()):
        if clock < max(clocks.values()):
            yield f"{heard.name(node)}: its GPUs run at most at {clock} MHz, and at {max(clocks.values())} MHz elsewhere"


def _slow(heard: Heard) -> Iterable[str]:
    """The nodes whose pairs are far slower than pairs usually are."""
    pairs = (heard.exchange or {}).get("pairs", [])
    nodes = sorted({node for pair in pairs for node in pair[:2]})
    if len(nodes) < 3:  # of two nobody is the odd one
        return
    usual = statistics.median(rate for _, _, rate in pairs)
    for node in nodes:
        own = statistics.median(rate for a, b, rate in pairs if node in (a, b))
        if own < SLOW * usual:
            yield f"{heard.name(node)}: exchanges {own:.2f} GB/s with another node, and {usual:.2f} GB/s is usual here"
