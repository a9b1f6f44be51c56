"""Summarises a profiler trace: top operators, communication that is not overlapped, idle time, memory."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COMMUNICATION_REGEX = re.compile(
    r"nccl|gloo|c10d::|all_?reduce|all_?gather|reduce_?scatter|broadcast|exchange", re.IGNORECASE
)
"""Names of operators and kernels of collectives, such as `nccl:all_reduce`."""
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of events that ran on the GPU."""
MAX_OPERATORS = 15
"""Operators that a summary has, those that took longest."""
MEMORY_POINTS = 200
"""Points of the curve of memory over time."""
Spans = list[tuple[float, float]]
"""(begin, end) in microseconds."""


def summarise_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up a trace of torch's profiler for the run's page: top operators, communication, idle time (seconds), memory (GiB).

    `events`: `traceEvents` of Chrome's format, times in microseconds, such as {"ph": "X", "name": "aten::mm", "cat": "cpu_op",
    "ts": 12.5, "dur": 3.0, "pid": 1, "tid": 1}. If anything ran on a GPU, only that is counted; else operators on all threads
    of the CPU. An operator's `self_s` is without the operators that it called. `exposed_s` is communication during which
    nothing was computed, `idle_s` time with neither communication nor computation.
    """
    timed_events = [event for event in events if event.get("ph") == "X" and isinstance(event.get("dur"), int | float)]
    device_events = [event for event in timed_events if event.get("cat") in DEVICE_CATEGORIES]
    counted_events = device_events or [event for event in timed_events if event.get("cat") == "cpu_op"]

    # Per operator: its own time and its calls.
    self_us = {event["name"]: 0.0 for event in counted_events}
    num_calls = dict.fromkeys(self_us, 0)
    for event, duration_us in _own_durations_us(counted_events):
        self_us[event["name"]] += duration_us
        num_calls[event["name"]] += 1

    # Over time: spans of communication and of computation, which may overlap.
    communication: Spans = []
    computation: Spans = []
    for event in counted_events:
        is_communication = COMMUNICATION_REGEX.search(event["name"]) is not None
        spans = communication if is_communication else computation
        spans.append((event["ts"], event["ts"] + event["dur"]))
    busy_spans = _merge_spans([*communication, *computation])
    window_us = busy_spans[-1][1] - busy_spans[0][0] if busy_spans else 0.0
    busy_us = _total_span_us(busy_spans)
    computed_us = _total_span_us(_merge_spans(computation))

    longest_names = sorted(self_us, key=lambda name: -self_us[name])[:MAX_OPERATORS]
    operators = []
    for name in longest_names:
        operators.append({"name": name, "self_s": self_us[name] / 1e6, "calls": num_calls[name]})
    return {
        "of": "device" if device_events else "operators",
        "window_s": window_us / 1e6,
        "communication_s": _total_span_us(_merge_spans(communication)) / 1e6,
        "exposed_s": (busy_us - computed_us) / 1e6,  # what is neither idle nor computation
        "idle_s": (window_us - busy_us) / 1e6,
        "operators": operators,
        "memory": _memory_curve(events),
    }


@dataclass(slots=True)
class _OpenEvent:
    """An event of a trace that has begun and not yet ended at some moment."""

    event: dict[str, Any]
    """The event in Chrome's format."""
    end_us: float
    self_us: float
    """Its duration without the events that it has called so far."""


def _own_durations_us(events: list[dict[str, Any]]) -> Iterable[tuple[dict[str, Any], float]]:
    """Find out what each event of a trace took by itself: yields (event, microseconds without the events that it called).

    If `linear` takes 10 us and calls `mm`, which takes 7, then `linear` has 3 us and `mm` 7. Operators call each other, so
    events of one thread are nested: a stack holds those that have begun and not ended at each moment.
    """
    events_by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        events_by_thread[event.get("pid"), event.get("tid")].append(event)
    for thread_events in events_by_thread.values():
        open_events: list[_OpenEvent] = []  # the outermost first
        # Of two events that begin together, the longer one is around the other.
        for event in sorted(thread_events, key=lambda event: (event["ts"], -event["dur"])):
            # Those that ended before this one begins are complete.
            while open_events and open_events[-1].end_us <= event["ts"]:
                complete = open_events.pop()
                yield complete.event, complete.self_us
            if open_events:  # the innermost one has called this one
                open_events[-1].self_us -= event["dur"]
            open_events.append(_OpenEvent(event, end_us=event["ts"] + event["dur"], self_us=event["dur"]))
        for left_open in open_events:
            yield left_open.event, left_open.self_us


def _merge_spans(spans: Spans) -> Spans:
    """Merge spans of time that overlap or touch, so that no moment counts twice; returns them in order of time."""
    merged: Spans = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _total_span_us(spans: Spans) -> float:
    """The sum of the lengths of the spans in microseconds; the spans must not overlap."""
    return sum(end - begin for begin, end in spans)


def _memory_curve(events: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Draw the curve of allocated memory over time: about `MEMORY_POINTS` points such as {"s": 0.25, "gib": 1.5}.

    Seconds count from the first point.
    It is the GPU's memory if there is a GPU; else the CPU's, of which only what was allocated since the trace began is known.
    Time is cut into equal stretches, and each is represented by its largest value, so that peaks stay.
    """
    recorded = []  # (microseconds, arguments) of each allocation and release
    for event in events:
        if event.get("name") == "[memory]" and event.get("args"):
            recorded.append((event["ts"], event["args"]))
    device_types = {args.get("Device Type") for _, args in recorded}
    device_type = max(device_types - {None}, default=0)  # 1 is CUDA, 0 the CPU
    points = []  # (microseconds, allocated bytes)
    for time_us, args in recorded:
        if args.get("Device Type") == device_type:
            points.append((time_us, args["Total Allocated"]))
    points.sort()
    if not points:
        return []

    first_us = points[0][0]
    duration_us = points[-1][0] - first_us
    stretch_us = duration_us / MEMORY_POINTS or 1.0
    peak_by_stretch: dict[int, tuple[float, float]] = {}
    for time_us, allocated_bytes in points:
        stretch = int((time_us - first_us) / stretch_us)
        if stretch not in peak_by_stretch or allocated_bytes > peak_by_stretch[stretch][1]:
            peak_by_stretch[stretch] = (time_us, allocated_bytes)
    curve = []
    for time_us, allocated_bytes in peak_by_stretch.values():
        curve.append({"s": (time_us - first_us) / 1e6, "gib": allocated_bytes / 2**30})
    return curve
