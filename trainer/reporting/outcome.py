"""How a run's training ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from strategies.base import Progress


@dataclass(slots=True)
class TrainingOutcome:
    """How training ended, equal on all ranks."""

    progress: Progress
    metrics_before_training: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step (empty where not evaluated)."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    """Held-out metrics at the last evaluation."""
    test: dict[str, float] = field(default_factory=dict)
    """Metrics of the test documents with the weights that are exported (empty without test documents)."""
    last_row: dict[str, Any] = field(default_factory=dict)
    """The row of `metrics.jsonl` of the last step (empty if no step was logged)."""
    speed: dict[str, float] = field(default_factory=dict)
    """`Meter.median_speeds` of the whole run."""
    experts: list[dict[str, float]] = field(default_factory=list)
    """How even the experts of each layer were in the last logging interval (`trainer/reporting/expert_load.py`)."""
    slow_ranks: list[dict[str, Any]] = field(default_factory=list)
    """Ranks that held the others up, from when and until when (`trainer/monitors/stragglers.py`)."""
    findings_by_detector: dict[str, Any] = field(default_factory=dict)
    """What the detectors found, by their names (`trainer/monitors/`)."""
    stopped_early: bool = False
    chat_answers: list[dict[str, str]] = field(default_factory=list)
    """Two questions with the answers of base and tuned model: `question`, `base`, `tuned`; empty if they were not asked."""
    overfitting_sentence: str = ""
    """Whether the run overfits, and whether more steps would help, as one sentence."""
    saved_for_export: bool = False
    """Whether the last checkpoint was only written for the export, so that it does not stay."""
    export_follows: bool = False
    """Whether a later job of the pipeline writes the export."""
    watched_metric: str = "eval/loss"
    """Metric that decides the best checkpoint."""
    greater_is_better: bool = False
    """Whether a larger value of it is better."""
