"""The job of `shardtune evaluate`: what its ranks evaluate, and where the report goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EVALUATION_SPLIT = "eval"
TEST_FILE = "test.json"
"""The report of an evaluation of the test documents, in the directory of its processes."""

_KEY_BY_FIELD = {"report_dir": "to", "is_opponent": "asked_first"}
"""Fields with another name in `job.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What to evaluate and to compare, in addition to the configuration.

    The command writes it to `job.json` (`as_json`), where the ranks read it.
    """

    report_dir: str
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
    is_opponent: bool = False
    """Whether this model is the one that another model, evaluated later, is compared with."""
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

    def as_json(self) -> dict[str, Any]:
        """The fields under their keys in `job.json`."""
        return {_KEY_BY_FIELD.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvaluationJob:
        """The job whose `as_json` is `content`."""
        field_by_key = {key: name for name, key in _KEY_BY_FIELD.items()}
        return cls(**{field_by_key.get(key, key): value for key, value in content.items()})
