"""The interface of a detector: its inputs and its findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A problem that a detector found, in words and numbers; the same on all ranks."""

    detector: str
    """Name of the detector, as in the settings (`challenges.<name>`)."""
    step: int
    message: str
    """One sentence with what was seen, and the numbers."""
    numbers: dict[str, float]
    remedies: tuple[str, ...]
    """Words to type, the cheapest first."""
    ends_run: bool = False
    """Whether the run is to end for it."""
    verdict: str = ""
    """Which kind of problem it is, of a detector that finds several."""

    def record(self) -> dict[str, Any]:
        """As JSON values, for `run.json`."""
        record: dict[str, Any] = {"found": True}
        if self.verdict:
            record["verdict"] = str(self.verdict)
        record |= {"step": self.step, "says": self.message, **self.numbers}
        record["remedies"] = list(self.remedies)
        return record


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What the model wrote, and what it should have."""

    text: str
    reference: str


@dataclass(slots=True)
class Evidence:
    """What an evaluation hands to detectors; the same on all ranks."""

    step: int
    metrics: dict[str, float]
    """Metrics by name."""
    planned_evaluations: int
    """Evaluations of the whole run: the level of a test is divided by them, so that false alarms stay rare over all."""
    history: list[dict[str, float]] = field(default_factory=list)
    """`step`, `train` and `held_out` loss of each evaluation so far, this one with it."""
    answers: list[ModelAnswer] = field(default_factory=list)
    """What was written in it."""
    compared_tasks: list[Any] = field(default_factory=list)
    """`trainer/monitors/forgetting.py`'s comparisons with the base."""
    planned_task_evaluations: int | None = None
    """Evaluations of the whole run that ask tasks; None: all of them."""

    @property
    def task_evaluations(self) -> int:
        """Evaluations of the whole run that ask tasks, at least one."""
        planned = self.planned_evaluations if self.planned_task_evaluations is None else self.planned_task_evaluations
        return max(1, planned)
