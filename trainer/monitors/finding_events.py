"""Findings in `events.jsonl` of the run directory: what the detectors of this start append, and what earlier starts wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from strategies.errors import StorageError
from trainer.monitors.base import Finding
from trainer.reporting.jsonl import json_text
from trainer.reporting.metric_rows import read_rows


def is_in_events(events_file: Path | None, finding: Finding) -> bool:
    """Whether an earlier start of the run has written this finding into `events.jsonl`."""
    return any(
        event.get("challenge") == finding.detector and event["step"] == finding.step
        for event in recorded_events(events_file)
    )


def recorded_events(events_file: Path | None) -> list[dict[str, Any]]:
    """The rows of `events.jsonl`, on rank 0; empty elsewhere (`events_file` is None there), and if there are none."""
    if events_file is None:
        return []
    try:
        return read_rows(events_file).rows
    except OSError:
        return []


def findings_of_earlier_starts(events_file: Path | None, last_step: int) -> list[tuple[str, dict[str, Any]]]:
    """Read what detectors found in earlier starts of the run, up to the step it resumes from: (detector, record), oldest first.

    The record is as of `Finding.record`, such as {"found": True, "verdict": "diverged", "step": 40, ...}.
    """
    findings = []
    # An event is {"event": "challenge", "time": 1.7e9, "challenge": "divergence", "found": True, "step": 40, ...}, for example.
    for event in recorded_events(events_file):
        if event.get("event") == "challenge" and event["step"] <= last_step:
            record = {key: event[key] for key in event if key not in ("event", "time", "challenge")}
            findings.append((str(event["challenge"]), record))
    return findings


def append_event(events_file: Path | None, finding: Finding) -> None:
    """Append a finding to `events.jsonl`; nothing without `events_file`. Raises StorageError if that fails."""
    if events_file is not None:
        event = {"event": "challenge", "time": time.time(), "challenge": finding.detector, **finding.record()}
        try:
            with events_file.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise StorageError(f"{events_file}: cannot be written ({error}); free space") from error
