"""Log-probabilities of every answer before training, recorded once for objectives that compare with that model.

With an adapter, the base model is available at any step by switching the adapter off. If the model itself trains, a
second copy would cost its memory again; a pass over the data before the first step costs about a third of an epoch,
once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies import runtime as processes
from strategies.base import Engine
from strategies.errors import Preempted, StorageError
from trainer.data.batches.collate import Collator, to_device
from trainer.data.batches.loader import EvalShare, eval_plan
from trainer.data.objective_spec import AheadOf
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset
from trainer.objectives.causal import sequence_logps

REFERENCE_AHEAD = "reference_ahead"
"""Mark of a sequence: the reference of what is looked at of it before the first backward pass."""


@dataclass(frozen=True, slots=True)
class Recording:
    """How the reference is recorded."""

    collator: Collator
    ahead: AheadOf | None
    """What is looked at of each sequence beside itself, and recorded too."""
    batch: int
    """Most sequences in one micro-batch of a rank."""
    directory: Path
    """Where the columns are kept."""
    key: str
    """Names what decides the initial model and the tokens."""


def record(
    datasets: dict[str, TokenDataset | None],
    engine: Engine,
    how: Recording,
    runtime: processes.Runtime,
    stop_now: Callable[[], bool] = lambda: False,
) -> None:
    """Give each split its reference column, from `how.directory` or by a pass of `engine`'s initial model.

    Call before a checkpoint is loaded. All ranks must call. Raises StorageError on all ranks alike, and Preempted where
    `stop_now`, asked on all ranks after each micro-batch, says so.
    """
    for split, dataset in datasets.items():
        if dataset is None or not len(dataset):
            continue
        name = hashlib.sha256(f"{how.key}/{dataset.fingerprint}".encode()).hexdigest()[:16]
        wanted: list[tuple[str, str, AheadOf]] = [("", REFERENCE, TokenDataset.sample)]
        if how.ahead is not None:
            wanted.append(("mismatched-", REFERENCE_AHEAD, how.ahead))
        for prefix, mark, read in wanted:
            path = how.directory / f"{split}-{prefix}{name}.npy"
            column = _read(path, len(dataset), runtime)
            if column is None:
                column = _compute(dataset, engine, how, read, runtime, stop_now)
                _write(path, column, runtime)
            dataset.attach(mark, column)


class RecordLogps:
    """Stands in for the objective for a pass over the data: each sequence's log-probability instead of a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps`, `[S]` float32."""
        return {"logps": sequence_logps(model, batch)[0]}


def _compute(
    dataset: TokenDataset,
    engine: Engine,
    how: Recording,
    read: Callable[[TokenDataset, int], Sample],
    runtime: processes.Runtime,
    stop_now: Callable[[], bool],
) -> np.ndarray:
    """float32 [N]: the log-probability of each sequence, as `read` gives it, under the model as it is now.

    All ranks must call.
    """
    device = runtime.device
    found = torch.zeros(len(dataset), dtype=torch.float64, device=device)
    plan = eval_plan(dataset, EvalShare(how.batch, engine.dp_rank, engine.dp_size))
    with engine.inference() as module:
        # Asked through the root module's own forward: only there are its parameters gathered.
        step: Any = module
        objective, step.objective = step.objective, RecordLogps()
        try:
            for sequences in plan:
                samples = [read(dataset, number) for number in sequences] or how.collator.fillers(dataset, 1)
                logps = step(to_device(how.collator(samples), device))["logps"]
                if sequences:
                    found[torch.tensor(sequences, device=device)] = logps.double()
                if stop_now():
                    raise Preempted("asked to stop while the reference was computed; start the same run again")
        finally:
            step.objective = objective
    return _summed(found, runtime).astype(np.float32)


def _summed(values: torch.Tensor, runtime: processes.Runtime) -> np.ndarray:
    """The sum over the ranks of this run, on every one of them. All ranks must call."""
    return (processes.dist_sum(values) if runtime.world_size > 1 else values).cpu().numpy()


def _read(path: Path, length: int, runtime: processes.Runtime) -> np.ndarray | None:
    """Rank 0's file, on every rank; None where there is none of this length. All ranks must call."""
    column = None
    if runtime.is_main and path.exists():
        try:
            column = np.load(path, allow_pickle=False)
        except (OSError, ValueError):  # torn: it is made again
            column = None
    if not processes.broadcast_object(column is not None and column.shape == (length,), runtime):
        return None
    whole = torch.zeros(length, device=runtime.device)
    if column is not None:
        whole.copy_(torch.from_numpy(column))
    return _summed(whole, runtime)


def _write(path: Path, column: np.ndarray, runtime: processes.Runtime) -> None:
    failed: OSError | None = None
    if runtime.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".tmp")
            with aside.open("wb") as file:
                np.save(file, column)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            failed = error
    if (message := processes.first_error(failed, runtime)) is not None:
        raise StorageError(f"{path}: cannot write the reference log-probabilities: {message}")
