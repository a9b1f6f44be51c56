"""Measures the test documents, and keeps a record of each look at them.

The test documents answer one question: how good is the model that leaves this run? Whoever chooses by their metrics (a
learning rate, a checkpoint, a method) makes them a second evaluation set, and has nothing left to answer that question with.
So they are measured when training has ended, with the weights that are exported. Each look is kept in `reports/`, and
`run.json` counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strategies.base import Engine
from strategies.errors import Interrupted, Preempted
from strategies.runtime import Runtime, broadcast_object, call_on_main
from trainer.data.prepare import PreparedData
from trainer.evaluation.base import Evaluator
from trainer.reporting.results import TEST_REPORT, add_to_run_record, keep_report, kept_reports
from trainer.reporting.run_record import RUN_RECORD
from trainer.reporting.status import read_json_or_empty

TEST_METRIC_PREFIX = "test/"
"""Of the names of metrics of the test documents."""
MEASURED_BY_RUN = "the run, as it ended"
MEASURED_BY_COMMAND = "shardtune evaluate"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointWeights:
    """The weights whose test metrics are measured, as the reports in `reports/` of the run name them."""

    run_dir: Path
    step: int
    checkpoint: str
    """Name of the checkpoint, such as `step-000014`."""
    manifest_sha256: str | None
    """SHA-256 of the checkpoint's manifest; None if there is no checkpoint of these weights."""


@dataclass(kw_only=True, slots=True)
class RecordedTestResult:
    """What `run.json` says of the test documents. The names of the fields are its keys."""

    metrics: dict[str, float] = field(default_factory=dict)
    """By name, such as `test/loss`."""
    step: int = 0
    """Of the weights that they are about."""
    documents: int = 0
    looks: int = 0
    """How often anything was measured on the test documents, this time included (`num_test_evaluations`)."""


def measure_test_metrics(evaluators: Sequence[Evaluator], engine: Engine) -> dict[str, float]:
    """Run evaluators that were built for the test documents; returns the metrics by names such as `test/loss`.

    All ranks must call. The evaluators name their metrics `eval/...`, as those of the evaluation documents do; `eval/` becomes
    `test/`. Raises Preempted, on all ranks or none, if the run is asked to stop meanwhile.
    """
    metrics = {}
    try:
        for evaluator in evaluators:
            for name, value in evaluator.run(engine):
                metrics[TEST_METRIC_PREFIX + name.removeprefix("eval/")] = value
    except Interrupted:
        raise Preempted(
            "stopped while the test documents were evaluated; start the same command again to continue"
        ) from None
    return metrics


def measure_or_recall_test_result(
    data: PreparedData,
    weights: CheckpointWeights,
    runtime: Runtime,
    make_evaluators: Callable[[], list[Evaluator]],
    engine: Engine,
) -> dict[str, Any] | None:
    """Measure the exported weights on the test documents when training has ended; returns `test` of `run.json`.

    All ranks must call. Each measurement counts, since many of them make the test documents a second evaluation set. So if an
    earlier start has measured the same checkpoint, its recorded metrics are taken.

    `weights`: which checkpoint the engine has.
    `make_evaluators`: called only if something is measured.

    None without test documents. Errors: StorageError, Preempted.
    """
    if data.test is None or len(data.test) == 0:
        return None
    metrics = broadcast_object(_recorded_metrics(weights) if runtime.is_main else None, runtime)
    is_new_evaluation = metrics is None
    if metrics is None:
        metrics = measure_test_metrics(make_evaluators(), engine)
    documents = num_test_documents(data)

    def record_and_count() -> int:
        if is_new_evaluation:
            record_test_evaluation(weights, metrics, documents, MEASURED_BY_RUN)
        return num_test_evaluations(weights.run_dir)

    num_evaluations = call_on_main(record_and_count, runtime)
    return asdict(RecordedTestResult(metrics=metrics, step=weights.step, documents=documents, looks=num_evaluations))


def num_test_documents(data: PreparedData) -> int:
    """The number of test documents; the sequences of one document, as of a preference pair, count once."""
    assert data.test is not None
    return len(set(data.test.documents.tolist()))


def _recorded_metrics(weights: CheckpointWeights) -> dict[str, float] | None:
    """The test metrics that the run itself has measured of the same checkpoint before; None if it has not."""
    for kept_report in kept_reports(weights.run_dir, TEST_REPORT):
        is_same_checkpoint = weights.manifest_sha256 is not None and kept_report.artefact == weights.manifest_sha256
        if is_same_checkpoint and kept_report.report.get("measured_by") == MEASURED_BY_RUN:
            return dict(kept_report.report.get("metrics") or {})
    return None


def record_test_evaluation(
    weights: CheckpointWeights, metrics: dict[str, float], documents: int, measured_by: str
) -> dict[str, Any]:
    """Write the report of an evaluation of the test documents into `reports/` of the run, where they are counted.

    `documents`: how many.
    `measured_by`: who asked for it, such as "shardtune evaluate".

    On rank 0 alone. Errors: StorageError.
    """
    report = {
        "time": time.time(),
        "model": {
            "run": str(weights.run_dir),
            "checkpoint": weights.checkpoint,
            "step": weights.step,
            "artefact": weights.manifest_sha256,
        },
        "documents": documents,
        "measured_by": measured_by,
        "metrics": metrics,
    }
    keep_report(weights.run_dir, TEST_REPORT, report)
    return report


def record_test_result(
    weights: CheckpointWeights, metrics: dict[str, float], documents: int, *, may_write_run_dir: bool
) -> dict[str, Any]:
    """Record what `shardtune evaluate` measured on a run's test documents, and count it; returns the result as JSON values.

    `may_write_run_dir`: False for a run of another user, in which nothing is written. On rank 0 alone. Errors: StorageError.
    """
    if may_write_run_dir:
        record_test_evaluation(weights, metrics, documents, MEASURED_BY_COMMAND)
    result = RecordedTestResult(
        metrics=metrics, step=weights.step, documents=documents, looks=num_test_evaluations(weights.run_dir)
    )
    if may_write_run_dir:
        # The metrics that the run itself measured at its end stay in `run.json`; only the number of looks grows.
        recorded_test = read_json_or_empty(weights.run_dir / RUN_RECORD).get("test") or asdict(result)
        add_to_run_record(weights.run_dir, "test", {**recorded_test, "looks": result.looks})
    return {"run": str(weights.run_dir), "checkpoint": weights.checkpoint, **asdict(result)}


def num_test_evaluations(run_dir: Path) -> int:
    """How often anything was measured on the run's test documents, by the run or by `shardtune evaluate`."""
    return len(kept_reports(run_dir, TEST_REPORT))
