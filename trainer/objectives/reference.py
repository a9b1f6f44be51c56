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
from trainer.data.batches.cutting import sequence_cut
from trainer.data.batches.loader import EvalShare, eval_micro_batches
from trainer.data.objective_spec import LookAheadSample
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset
from trainer.objectives.causal import counted_here, sequence_logps

MISMATCHED_REFERENCE = "reference_ahead"
"""Mark of a sequence: the recorded log-probability of its prompt with another answer (`DataSpec.look_ahead_sample`)."""


@dataclass(frozen=True, slots=True)
class RecordingSettings:
    """How the log-probabilities of the initial model are recorded."""

    collator: Collator
    look_ahead_of: LookAheadSample | None
    """Gives the mismatched sequence of each sequence, whose log-probability is recorded too; None without such."""
    max_batch: int
    """Most sequences in one micro-batch of a rank."""
    directory: Path
    """Where the columns are kept."""
    key: str
    """Text of everything that decides the initial model and the tokens: part of the file's name."""


@dataclass(frozen=True, slots=True)
class _ReferenceColumn:
    """A column of recorded log-probabilities, one for each sequence of a data set."""

    name: str
    """Of the column in the data set."""
    file_prefix: str
    """Tells its file from those of the other columns."""
    sample_of: LookAheadSample
    """Gives for each sequence of the data set the sample whose log-probability is recorded."""


def record_reference_logps(
    datasets: dict[str, TokenDataset | None],
    engine: Engine,
    settings: RecordingSettings,
    runtime: processes.Runtime,
    stop_now: Callable[[], bool] = lambda: False,
) -> None:
    """Attach to each split how likely the model finds its sequences before training: their log-probabilities, as marks.

    A mark is a number beside the tokens of a sequence. The log-probabilities are read from `settings.directory`, else computed by
    `engine` and written there: one column for the sequences, and, for KTO, one for mismatched samples (a prompt with the answer
    to another).

    Call before a checkpoint is loaded: afterwards the model is no longer the initial one. All ranks must call. Raises
    StorageError on all ranks alike, and Preempted if `stop_now`, asked on all ranks after each micro-batch, says so.
    """
    for split, dataset in datasets.items():
        if dataset is None or not len(dataset):
            continue
        # A file of another name belongs to another model, or to other tokens.
        name = hashlib.sha256(f"{settings.key}/{dataset.fingerprint}".encode()).hexdigest()[:16]
        columns = [_ReferenceColumn(REFERENCE, file_prefix="", sample_of=TokenDataset.sample)]
        if settings.look_ahead_of is not None:
            columns.append(
                _ReferenceColumn(MISMATCHED_REFERENCE, file_prefix="mismatched-", sample_of=settings.look_ahead_of)
            )
        for column in columns:
            path = settings.directory / f"{split}-{column.file_prefix}{name}.npy"
            logps = _read_logps_column(path, len(dataset), runtime)
            if logps is None:
                logps = _compute_logps(dataset, engine, settings, column.sample_of, runtime, stop_now)
                _write_logps_column(path, logps, runtime)
            dataset.attach_mark(column.name, logps)


class RecordLogps:
    """Stands in for the objective during the recording pass: gives each sequence's log-probability instead of a loss."""

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`logps`, `[S]` float32."""
        logps, _ = sequence_logps(model, batch)
        return {"logps": logps}


def _compute_logps(
    dataset: TokenDataset,
    engine: Engine,
    settings: RecordingSettings,
    sample_of: Callable[[TokenDataset, int], Sample],
    runtime: processes.Runtime,
    stop_now: Callable[[], bool],
) -> np.ndarray:
    """Compute the log-probability of each of the dataset's N sequences under the model as it is now, float32 [N].

    `sample_of(dataset, index)` gives the sequence. All ranks must call. Raises Preempted if `stop_now` says so.
    """
    device = runtime.device
    logps_by_sequence = torch.zeros(len(dataset), dtype=torch.float64, device=device)
    # This rank's micro-batches: the indices of their sequences.
    micro_batches = eval_micro_batches(dataset, EvalShare(settings.max_batch, runtime.dp_rank, runtime.dp_size))
    cut = sequence_cut(runtime)
    with engine.inference() as module:
        # Through the root module's own forward, in which a sharding engine gathers parameters. So the step module is given
        # another objective while this runs.
        step_module: Any = module
        training_objective = step_module.objective
        step_module.objective = RecordLogps()
        try:
            for sequences in micro_batches:
                samples = [sample_of(dataset, index) for index in sequences]
                if not samples:  # this rank has none left, and must run the model as often as the others
                    samples = settings.collator.filler_samples(dataset, 1)
                batch = settings.collator(samples, cut)
                logps = step_module(to_device(batch, device))["logps"]
                # Ranks that share a row all know its sequences. One of them counts, since the sum below goes over all ranks.
                if sequences and counted_here(batch):
                    logps_by_sequence[torch.tensor(sequences, device=device)] = logps.double()
                if stop_now():
                    raise Preempted("asked to stop while the reference was computed; start the same run again")
        finally:
            step_module.objective = training_objective
    return _sum_over_ranks(logps_by_sequence, runtime).astype(np.float32)


def _sum_over_ranks(local_values: torch.Tensor, runtime: processes.Runtime) -> np.ndarray:
    """The sum of all ranks' values, on every rank. All ranks must call."""
    if runtime.world_size > 1:
        local_values = processes.sum_over_ranks(local_values)
    return local_values.cpu().numpy()


def _read_logps_column(path: Path, length: int, runtime: processes.Runtime) -> np.ndarray | None:
    """Read a recorded column (one number a sequence) from rank 0's file, on every rank. All ranks must call.

    None if there is no file, or if it is torn or not of this `length`.
    """
    column = None
    if runtime.is_main and path.exists():
        try:
            column = np.load(path, allow_pickle=False)
        except (OSError, ValueError):  # torn: the column is computed again
            column = None
    if not processes.broadcast_object(column is not None and column.shape == (length,), runtime):
        return None
    # Zeros on all ranks but 0, so that the sum is rank 0's column.
    local_column = torch.zeros(length, device=runtime.device)
    if column is not None:
        local_column.copy_(torch.from_numpy(column))
    return _sum_over_ranks(local_column, runtime)


def _write_logps_column(path: Path, column: np.ndarray, runtime: processes.Runtime) -> None:
    """Write a column of log-probabilities on rank 0, so that a resumed run need not compute it again. All ranks must call.

    Raises StorageError on every rank.
    """
    failure: OSError | None = None
    if runtime.is_main:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Under its own name only when it is complete: another run may read it.
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, column)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            failure = error
    rank_error = processes.first_rank_error(failure, runtime)
    if rank_error is not None:
        raise StorageError(f"{path}: cannot write the reference log-probabilities: {rank_error}")
