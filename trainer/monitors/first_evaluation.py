"""The evaluation before the first step, by micro-batch, kept in the run directory. Later ones are paired with it."""

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
class HeldOutBefore:
    """Metrics before the first step; empty if nothing was evaluated then."""

    values: dict[str, float] = field(default_factory=dict)
    """By name, as `eval/loss`."""
    batches: dict[str, list[float]] = field(default_factory=dict)
    """Sums over each micro-batch in the order of the documents, by the same names."""

    def pairs_with(self, name: str, batches: Mapping[str, list[float]]) -> tuple[list[float], list[float]] | None:
        """Sums (before, now) of a metric; None if the micro-batches are others (`evaluation.batch` was changed)."""
        old = self.batches.get(name)
        new = batches.get(name)
        if old is None or new is None:
            return None
        # Another number of ranks has another number of empty micro-batches at the end, which sum to 0.
        common = min(len(old), len(new))
        if any(old[common:]) or any(new[common:]):
            return None
        return old[:common], new[:common]


class KeptHeldOut:
    """That evaluation on the disk, so that a resumed run still knows it."""

    def __init__(self, run_dir: Path, runtime: Runtime) -> None:
        self.path = run_dir / FILE
        self.runtime = runtime

    def read(self) -> HeldOutBefore:
        """What rank 0 finds, on every rank; empty if there is nothing, or it cannot be read. All ranks must call."""
        before = HeldOutBefore()
        if self.runtime.is_main and self.path.is_file():
            try:
                before = HeldOutBefore(**json.loads(self.path.read_text(encoding="utf-8")))
                _check(before)
            except (OSError, ValueError, TypeError, AttributeError):
                before = HeldOutBefore()  # the run is then judged without pairs
        of_main: HeldOutBefore = broadcast_object(before, self.runtime)
        return of_main

    def write(self, before: HeldOutBefore) -> None:
        """For rank 0. Errors: StorageError."""
        if self.runtime.is_main:
            write_text_atomic(self.path, json_text(asdict(before)) + "\n")


def _check(before: HeldOutBefore) -> None:
    """Raises ValueError, TypeError or AttributeError if a metric or a sum is no number."""
    for metric in before.values.values():
        float(metric)
    for sums in before.batches.values():
        for batch_sum in sums:
            float(batch_sum)
