"""Evaluations by micro-batch, kept in the run directory: the one before the first step, and the last one.

Later evaluations are paired with the one before the first step. `shardtune compare` pairs the last ones of two runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from strategies.runtime import Runtime, broadcast_object
from trainer.reporting.jsonl import json_text
from trainer.reporting.status import write_text_atomic

FILE = "held-out-before.json"


@dataclass(slots=True)
class HeldOutEvaluation:
    """Metrics of one evaluation, as a rule of that before the first step; empty if nothing was evaluated then."""

    values: dict[str, float] = field(default_factory=dict)
    """By name, as `eval/loss`."""
    batches: dict[str, list[float]] = field(default_factory=dict)
    """Sums over each micro-batch in the order of the documents, by the same names."""
    step: int = 0
    """The step after which it was evaluated."""

    def paired_batch_sums(
        self, name: str, batches: Mapping[str, list[float]]
    ) -> tuple[list[float], list[float]] | None:
        """Pair this evaluation with a later one, micro-batch by micro-batch, for a paired test: returns (sums here, sums there).

        `name`: the metric. `batches`: the sums of the later one, by metric. Micro-batch i has the same documents in both
        lists. None if the micro-batches are other ones, as after a change of `evaluation.batch`.
        """
        sums_before = self.batches.get(name)
        sums_now = batches.get(name)
        if sums_before is None or sums_now is None:
            return None
        # Another number of ranks has another number of empty micro-batches at the end, which sum to 0.
        num_common = min(len(sums_before), len(sums_now))
        if any(sums_before[num_common:]) or any(sums_now[num_common:]):
            return None
        return sums_before[:num_common], sums_now[:num_common]


class HeldOutFile:
    """A file with one evaluation by micro-batch. Of the one before the first step a resumed run still knows it by this file."""

    def __init__(self, run_dir: Path, runtime: Runtime, name: str = FILE) -> None:
        self.path = run_dir / name
        self.runtime = runtime

    def read(self) -> HeldOutEvaluation:
        """Read the kept evaluation, on rank 0 for all ranks; empty if there is none, or if it is damaged. All ranks must call."""
        evaluation = HeldOutEvaluation()
        if self.runtime.is_main and self.path.is_file():
            try:
                evaluation = HeldOutEvaluation(**json.loads(self.path.read_text(encoding="utf-8")))
                _raise_if_not_numbers(evaluation)
            except (OSError, ValueError, TypeError, AttributeError):
                evaluation = HeldOutEvaluation()  # the run is then judged without pairs
        evaluation_of_rank_0: HeldOutEvaluation = broadcast_object(evaluation, self.runtime)
        return evaluation_of_rank_0

    def write(self, evaluation: HeldOutEvaluation) -> None:
        """Replace the file, on rank 0 alone. Raises StorageError if that fails."""
        if self.runtime.is_main:
            write_text_atomic(self.path, json_text(asdict(evaluation)) + "\n")


def _raise_if_not_numbers(evaluation: HeldOutEvaluation) -> None:
    """Raise ValueError, TypeError or AttributeError if a metric or a sum that was read from a file is no number."""
    for metric in evaluation.values.values():
        float(metric)
    for sums in evaluation.batches.values():
        for batch_sum in sums:
            float(batch_sum)
