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
    on_device = [event for event in timed if event.get("cat") in ON_DEVICE]
    counted = on_device or [event for event in timed if event.get("cat") == "cpu_op"]
    self_us = {event["name"]: 0.0 for event in counted}
    calls = dict.fromkeys(self_us, 0)
    for event, duration_us in _self_times(counted):
        self_us[event["name"]] += duration_us
        calls[event["name"]] += 1

    communication: Spans = []
    computation: Spans = []
    for event in counted:
        is_communication = COMMUNICATION.search(event["name"]) is not None
        spans = communication if is_communication else computation
        spans.append((event["ts"], event["ts"] + event["dur"]))
    busy = _merged([*communication, *computation])
    window_us = busy[-1][1] - busy[0][0] if busy else 0.0
    busy_us = _total_length(busy)
    computed_us = _total_length(_merged(computation))
    longest = sorted(self_us, key=lambda name: -self_us[name])[:TOP]
    return {
        "of": "device" if on_device else "operators",
        "window_s": window_us / 1e6,
        "communication_s": _total_length(_merged(communication)) / 1e6,
        "exposed_s": (busy_us - computed_us) / 1e6,
        "idle_s": (window_us - busy_us) / 1e6,
        "operators": [{"name": name, "self_s": self_us[name] / 1e6, "calls": calls[name]} for name in longest],
        "memory": _memory(events),
    }


def _self_times(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Each event with its duration less that of the events within it, thread by thread."""
    events_by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        events_by_thread[event.get("pid"), event.get("tid")].append(event)
    for thread_events in events_by_thread.values():
        # Events around the current one, the outermost first, each with what is left of its duration.
        stack: list[list[Any]] = []
        # An event that begins with the one around it is the shorter one.
        for event in sorted(thread_events, key=lambda event: (event["ts"], -event["dur"])):
            while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
                yield tuple(stack.pop())  # type: ignore[misc]
            if stack:
                stack[-1][1] -= event["dur"]
            stack.append([event, event["dur"]])
        yield from (tuple(entry) for entry in stack)  # type: ignore[misc]


def _merged(spans: Spans) -> Spans:
    """The spans merged where they overlap, in order."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _total_length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)


def _memory(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was allocated, GiB over seconds; of a CPU since the trace began. The largest of each stretch, so that peaks stay."""
    recorded = [
        (event["ts"], event["args"]) for event in events if event.get("name") == "[memory]" and event.get("args")
    ]
    device_types = {args.get("Device Type") for _, args in recorded}
    device_type = max(device_types - {None}, default=0)  # 1 is CUDA, 0 the CPU
    points = sorted((at, args["Total Allocated"]) for at, args in recorded if args.get("Device Type") == device_type)
    if not points:
        return []
    first_at = points[0][0]
    stretch_us = (points[-1][0] - first_at) / POINTS or 1.0
    peak_by_stretch: dict[int, tuple[float, float]] = {}
    for at, allocated_bytes in points:
        stretch = int((at - first_at) / stretch_us)
        if stretch not in peak_by_stretch or allocated_bytes > peak_by_stretch[stretch][1]:
            peak_by_stretch[stretch] = (at, allocated_bytes)
    return [{"s": (at - first_at) / 1e6, "gib": allocated / 2**30} for at, allocated in peak_by_stretch.values()]
