"""Findings in `events.jsonl` of the run directory: what the detectors of this start append, and what earlier starts wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from strategies.errors import StorageError
from trainer.monitors.base import Finding
from trainer.reporting.jsonl import json_text
from trainer.reporting.metric_rows import read_rows

EVENT_KEYS = ("event", "time", "challenge")
"""Keys of a finding in `events.jsonl` that are not in the record."""


def is_in_events(events: Path | None, finding: Finding) -> bool:
    """Whether an earlier start of the run has written this finding into `events.jsonl`."""
    return any(
        event.get("challenge") == finding.detector and event["step"] == finding.step
        for event in recorded_events(events)
    )


def recorded_events(events: Path | None) -> list[dict[str, Any]]:
    """The rows of `events.jsonl`, on rank 0; empty elsewhere (`events` is None there), and if there are none."""
    if events is None:
        return []
    try:
        return read_rows(events).rows
    except OSError:
        return []


def append_event(events: Path | None, finding: Finding) -> None:
    """Append a finding to `events.jsonl`; nothing without `events`. Raises StorageError if that fails."""
    if events is not None:
        event = {"event": "challenge", "time": time.time(), "challenge": finding.detector, **finding.record()}
        try:
            with events.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise StorageError(f"{events}: cannot be written ({error}); free space") from error
