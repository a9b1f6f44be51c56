"""Writes a comparison as JSON values and as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from launch.compare import repeats
from launch.compare.comparison import ComparedPoint, Comparison
from launch.compare.conclusion import Conclusion
from launch.compare.quality import RankedJobs
from launch.compare.run_files import RunMeasurements

FIELDS_WITH_SEVERAL_NUMBERS = (
    "metrics_before_training",
    "metrics_at_end",
    "tokens_per_s_quartiles",
    "exchanged_bytes",
)
LOSS_DIFFERENCE_KEYS = ("early", "early_step", "drift", "drift_step")


def comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values: the content of `compare.json`, and what `--json` prints.

    Sizes are GiB, times seconds, speeds those of all ranks together. `test_documents`: {point: what its first run recorded
    of the test documents}; null for a run without them.
    """
    test_documents = {point.name: point.first_repeat.record.test for point in comparison.points}
    return {
        "first": comparison.default_baseline_name,
        "answer": _conclusion_as_dict(comparison.conclusion),
        "runs": [_point_as_dict(comparison, point_index) for point_index in range(len(comparison.points))],
        "notes": list(comparison.notes),
        "test_documents": test_documents,
    }


def _conclusion_as_dict(conclusion: Conclusion) -> dict[str, Any]:
    """The entry `answer` of `compare.json`: what the comparison concludes.

    - `sentences`: the answer in words.
    - `take`: which point to take for which goal; its `settings` are those to paste behind `shardtune train`.
    - `quality`: the jobs by a held-out metric, the best first; null if the quality of the jobs was not compared.
    """
    recommendations = []
    for recommendation in conclusion.recommendations:
        recommendations.append(
            {
                "for": recommendation.goal,
                "run": recommendation.point.name,
                "why": recommendation.why,
                "settings": recommendation.arguments,
            }
        )
    quality = None if conclusion.ranked is None else _quality_as_dict(conclusion.ranked)
    return {"sentences": list(conclusion.sentences), "take": recommendations, "quality": quality}


def _quality_as_dict(ranked: RankedJobs) -> dict[str, Any]:
    """The entry `quality` of `compare.json`: the jobs by a held-out metric, the best first, and which are shown to be worse.

    A job is all points that train the same: they differ in seed and strategy alone. `shown_worse`: whether the job is
    significantly worse than the best one. `interval` and `seed_interval`: confidence intervals of the relative difference
    from the best job, over held-out documents and over seeds; null for the best job.
    """
    jobs = []
    for job, difference in zip(ranked.jobs, ranked.differences, strict=True):
        jobs.append(
            {
                "runs": [point.name for point in job.points],
                "value": ranked.value(job),
                "shown_worse": difference is not None and difference.is_significant,
                "interval": None if difference is None else difference.document_interval,
                "seed_interval": None if difference is None else difference.seed_interval,
                "seeds": job.num_seeds,
            }
        )
    return {"metric": ranked.metric.name, "greater_is_better": ranked.metric.greater_is_better, "jobs": jobs}


def _point_as_dict(comparison: Comparison, point_index: int) -> dict[str, Any]:
    """An entry of `runs` in `compare.json`: one point, which is one combination of settings.

    `repeats`: the run directory of each. `against`: the point that it is compared with. `same_job`: whether both must have
    the same loss, because they differ in strategy alone. `differing`: its values of the settings in which the points
    differ.
    """
    point = comparison.points[point_index]
    run_dirs = point.run_dirs
    loss_difference = None
    if point.loss_difference is not None:
        loss_difference = point.loss_difference.as_json()
    differing_values = {setting.key: setting.values[point_index] for setting in comparison.differences}
    return {
        "name": point.name,
        "directory": run_dirs[0] if run_dirs else None,
        "repeats": run_dirs,
        "state": point.state,
        "reason": point.reason,
        "measured": _measurements_as_dict(point.measured) | asdict(point.summary),
        "against": point.baseline_name,
        "same_job": point.should_have_loss_of_baseline,
        "loss_difference": loss_difference,
        "not_comparable": [str(difference) for difference in point.incomparable_settings],
        "verdict": point.verdict,
        "differing": differing_values,
    }


def _measurements_as_dict(measured: RunMeasurements) -> dict[str, Any]:
    """The measurements of a point under their names in `compare.json`, which calls the held-out metrics `before` and `after`."""
    values = asdict(measured)
    values["before"] = values.pop("metrics_before_training")
    values["after"] = values.pop("metrics_at_end")
    return values


def comparison_csv(comparison: Comparison) -> str:
    """Write `compare.csv`: a row for each point, with its measurements, then the settings in which the points differ."""
    # All rows must have the same columns: those of every metric and collective that any point has.
    metrics = comparison.held_out_metrics
    collectives: dict[str, None] = {}  # a dict as an ordered set
    for point in comparison.points:
        collectives |= dict.fromkeys(point.measured.exchanged_bytes)
    rows = []
    for point_index in range(len(comparison.points)):
        rows.append(_csv_row(comparison, point_index, metrics, list(collectives)))
    csv_file = io.StringIO()
    writer = csv.DictWriter(csv_file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return csv_file.getvalue()


def _csv_row(comparison: Comparison, point_index: int, metrics: list[str], collectives: list[str]) -> dict[str, Any]:
    """The row of `compare.csv` for the point at `point_index`, as {column: cell}.

    `metrics` and `collectives`: those that any point has, because every row must have the same columns. A point without a
    metric has an empty cell.
    """
    point = comparison.points[point_index]
    run_dirs = point.run_dirs
    slowest, fastest = point.summary.spread or (None, None)
    loss_difference = {} if point.loss_difference is None else point.loss_difference.as_json()
    row = {
        "name": point.name,
        "directory": run_dirs[0] if run_dirs else None,
        "state": point.state,
        "reason": point.reason,
        "verdict": point.verdict,
        **_measured_cells(point, collectives),
        **_summary_cells(point),
        "tokens_per_s_slowest": slowest,
        "tokens_per_s_fastest": fastest,
        "against": point.baseline_name,
        # Relative, from the baseline's loss: over the first common steps (`early`), and over all of them (`drift`).
        **{f"loss_difference_{key}": loss_difference.get(key) for key in LOSS_DIFFERENCE_KEYS},
        "not_comparable": "; ".join(map(str, point.incomparable_settings)),
    }
    for metric in metrics:
        row[f"before/{metric}"] = point.measured.metrics_before_training.get(metric)
    for metric in metrics:
        row[f"after/{metric}"] = point.measured.metrics_at_end.get(metric)
    for setting in comparison.differences:
        row[setting.key] = setting.values[point_index]
    return row


def _measured_cells(point: ComparedPoint, collectives: list[str]) -> dict[str, Any]:
    """The cells of `compare.csv` with a point's measurements; each of the `collectives`, such as `all_gather`, has a column."""
    cells = asdict(point.measured)
    # A cell of CSV holds one number, and these fields hold several. `_csv_row` writes the held-out metrics, one by one; the other
    # two get their columns below.
    for field_with_several_numbers in FIELDS_WITH_SEVERAL_NUMBERS:
        del cells[field_with_several_numbers]
    for collective in collectives:
        cells[f"exchanged_{collective}_gib"] = point.measured.exchanged_bytes.get(collective, 0) / 2**30
    low, high = point.measured.tokens_per_s_quartiles or (None, None)
    return {**cells, "tokens_per_s_low": low, "tokens_per_s_high": high}


def _summary_cells(point: ComparedPoint) -> dict[str, Any]:
    """The cells of `compare.csv` with the figures over a point's repeats; each part of a step has a column of its own."""
    cells = asdict(point.summary)
    # A cell of CSV holds one number, and these fields hold several. `_csv_row` writes the slowest and the fastest repeat; the
    # parts of a step get their columns below.
    for field_with_several_numbers in ("tokens_per_s_repeats", "memory_gib_repeats", "parts_s"):
        del cells[field_with_several_numbers]
    for part in (*repeats.STEP_PARTS, "rest"):
        cells[f"{part}_s"] = point.summary.parts_s.get(part)
    return cells
