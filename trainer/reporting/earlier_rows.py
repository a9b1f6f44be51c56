"""What a resumed run measured before it was interrupted, from its own rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from trainer.reporting.metric_names import POSITION_METRICS

SPEED_METRICS = ("tokens_per_s", "tokens_per_s_per_rank", "mfu", "supervised_tokens_per_s", "step_s")


@dataclass(slots=True)
class EarlierResults:
    """Results of the steps before a resumed run's first."""

    metrics_before_training: dict[str, float] = field(default_factory=dict)
    """Held-out metrics before the first step of the whole run."""
    last_metrics: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the last evaluation in these rows."""
    last_row: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    """As `Meter.median_speeds`, over steps instead of logging intervals."""
    training_s: float = 0.0
    """Seconds of all their steps."""


def earlier_results(rows: Iterable[dict[str, Any]]) -> EarlierResults:
    """Sum up what a resumed run measured before: held-out metrics, last row and median speeds, for the end of the whole run.

    `rows`: of `metrics.jsonl`, oldest first. A row of a step has a `loss`; one of an evaluation has none, such as {"step":
    100, "eval/loss": 2.1}.
    """
    results = EarlierResults()
    values_by_speed: dict[str, list[float]] = {}  # of each step, by the names in SPEED_METRICS
    for row in rows:
        if "loss" in row:
            results.last_row = row
            for name in SPEED_METRICS:
                if isinstance(row.get(name), int | float):
                    values_by_speed.setdefault(name, []).append(row[name])
            continue
        # A row without a loss is of an evaluation.
        metrics = {name: metric for name, metric in row.items() if name not in POSITION_METRICS}
        if row["step"] == 0:
            results.metrics_before_training = metrics
        results.last_metrics = metrics
    results.training_s = sum(values_by_speed.get("step_s", []))
    results.speed = {name: median(values) for name, values in values_by_speed.items()}
    return results
