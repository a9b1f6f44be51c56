"""Findings of the detectors, from `challenges` in a run's record: for its last lines, `status.json` and its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_SHOWN_REMEDIES = 3
"""Remedies of a finding that stand in the last lines, the cheapest ones; `run.json` has all."""


@dataclass(frozen=True, slots=True)
class RecordedFinding:
    """A problem that a detector found in a run, and that the run has not recovered from."""

    name: str
    """Name of the detector, or of the kind of problem that it found, such as `diverged`."""
    step: int
    """The step at which it was found first."""
    observation: str
    """What was seen, with its numbers."""
    remedies: list[str]
    """What the user can do, the cheapest first."""

    @property
    def sentence(self) -> str:
        """The finding as one sentence, such as `diverged, since step 40: the loss is 9.1, and was 2.3`."""
        return f"{self.name}, since step {self.step}: {self.observation}"


def findings_in(challenges: Mapping[str, Any] | None) -> list[RecordedFinding]:
    """List what the detectors found wrong with a run, as its record has it, without what it has recovered from.

    `challenges`: what `run.json` has under this key, by detector, such as {"overfitting": {"found": true, "first_step": 40,
    "says": "overfitting: the held-out loss rises", "remedies": ["stop earlier"]}}; None if the run wrote nothing there.
    """
    findings = []
    for detector, detector_record in (challenges or {}).items():
        if not isinstance(detector_record, Mapping) or not detector_record.get("found"):
            continue
        name = str(detector_record.get("verdict") or detector)
        # A detector that looks once, such as at the first evaluation, records `step` alone.
        first_step = int(detector_record.get("first_step", detector_record.get("step", 0)))
        # The sentence begins with the name, which is shown beside it.
        observation = str(detector_record.get("says", "")).removeprefix(f"{name}: ")
        remedies = [*detector_record.get("remedies", [])]
        findings.append(RecordedFinding(name=name, step=first_step, observation=observation, remedies=remedies))
    return findings


def findings_summary(challenges: Mapping[str, Any] | None) -> str | None:
    """What detectors found wrong with a run, in a few words for `status.json`: "diverged, since step 40"; None if nothing."""
    notes = [f"{finding.name}, since step {finding.step}" for finding in findings_in(challenges)]
    return "; ".join(notes) or None
