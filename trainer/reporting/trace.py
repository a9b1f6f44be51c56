"""Summarises a profiler trace: top operators, communication that is not overlapped, idle time, memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

COMMUNICATION = re.compile(
    r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|broadcast|exchange", re.IGNORECASE
)
"""Operators and kernels by which ranks exchange."""
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 15
"""Operators that are kept."""
POINTS = 200
"""Of the memory's course."""
Spans = list[tuple[float, float]]


def summarise(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds and GiB of a trace in Chrome's format (times in microseconds).

    On GPUs of what ran on the device; elsewhere of operators on all threads, whose `self` time is without those that they called.
    `exposed_s` is communication during which nothing was computed, `idle_s` time in which neither was.
    """
    timed = [event for event in events if event.get("ph") == "X" and isinstance(event.get("dur"), int | float)]
    device = [event for event in timed if event.get("cat") in ON_DEVICE]
    used = device or [event for event in timed if event.get("cat") == "cpu_op"]
    taken = {event["name"]: 0.0 for event in used}
    calls = dict.fromkeys(taken, 0)
    for event, own in _own(used):
        taken[event["name"]] += own
        calls[event["name"]] += 1
    spans = {True: Spans(), False: Spans()}
    for event in used:
        spans[COMMUNICATION.search(event["name"]) is not None].append((event["ts"], event["ts"] + event["dur"]))
    whole = _union([*spans[True], *spans[False]])
    window = whole[-1][1] - whole[0][0] if whole else 0.0
    busy, computed = _length(whole), _length(_union(spans[False]))
    top = sorted(taken, key=lambda name: -taken[name])[:TOP]
    return {
        "of": "device" if device else "operators",
        "window_s": window / 1e6,
        "communication_s": _length(_union(spans[True])) / 1e6,
        "exposed_s": (busy - computed) / 1e6,
        "idle_s": (window - busy) / 1e6,
        "operators": [{"name": name, "self_s": taken[name] / 1e6, "calls": calls[name]} for name in top],
        "memory": _memory(events),
    }


def _own(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Each event with its duration less that of the events within it, thread by thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for each in threads.values():
        open_ones: list[list[Any]] = []  # [event, own]
        for event in sorted(each, key=lambda event: (event["ts"], -event["dur"])):
            while open_ones and open_ones[-1][0]["ts"] + open_ones[-1][0]["dur"] <= event["ts"]:
                yield tuple(open_ones.pop())  # type: ignore[misc]
            if open_ones:
                open_ones[-1][1] -= event["dur"]
            open_ones.append([event, event["dur"]])
        yield from (tuple(left) for left in open_ones)  # type: ignore[misc]


def _union(spans: Spans) -> Spans:
    """The same time without overlaps, in order."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def _memory(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was allocated, GiB over seconds; of a CPU since the trace began. The largest of each stretch, so that peaks stay."""
    noted = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]" and event.get("args")]
    kinds = {args.get("Device Type") for _, args in noted}
    kind = max(kinds - {None}, default=0)  # 1 is CUDA, 0 the CPU
    points = sorted((at, args["Total Allocated"]) for at, args in noted if args.get("Device Type") == kind)
    if not points:
        return []
    begin, width = points[0][0], (points[-1][0] - points[0][0]) / POINTS or 1.0
    most: dict[int, tuple[float, float]] = {}
    for at, held in points:
        place = int((at - begin) / width)
        if place not in most or held > most[place][1]:
            most[place] = (at, held)
    return [{"s": (at - begin) / 1e6, "gib": held / 2**30} for at, held in most.values()]
