"""The job of `shardtune evaluate`: what its ranks evaluate, and where the report goes."""

from __future__ import annotations

from dataclasses import dataclass, field

EVALUATION_SPLIT = "eval"
TEST_FILE = "test.json"
"""The report of an evaluation of the test documents, in the directory of its processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What to evaluate and to compare, in addition to the configuration.

    The command writes it to `job.json`, and the ranks read it by the names of these fields.
    """

    to: str
    """Directory of the report."""
    run: str | None = None
    """Directory of the run whose checkpoint is evaluated; None: the model as it is."""
    checkpoint: str | None = None
    """Directory of the checkpoint."""
    base: bool = False
    """Whether the model before training is evaluated too, for a comparison."""
    report: str | None = None
    """File of an earlier report to compare with."""
    gate: bool = False
    """Whether the command fails if a metric is worse than in that report."""
    against: str | None = None
    """What is compared with, as the user wrote it."""
    asked_first: bool = False
    """Whether this model is evaluated for the comparison of another one with it."""
    kept: bool = True
    """Whether the report becomes a record of the run. A review wants only the answers."""
    data_run: str | None = None
    """Directory of the run whose data is used; None: the data that the configuration names."""
    accept_data: bool = False
    """Whether tasks on the run's own documents may use today's files if those of the training are gone."""
    accepted: list[str] = field(default_factory=list)
    """How the base differs from the one that the run was trained on, if the user accepts that.

    Such a report is about weights that the run never had, so it is no record of the run."""
    recorded: bool = True
    """Whether the report may be written to the run's records. False for a run of another user."""
    split: str = EVALUATION_SPLIT
    """`test`: the metrics of the run's test documents are measured, and no task is run."""
