"""Rebuilds a run's model from what the run recorded of its data, with or without the rows: label names, fingerprint, length.

`data.path` may be replaced, grow or disappear after the training. An export, and tasks with a file of their own, do not need
it. Tasks on the run's own documents and the loss that `bits=` measures do: they get the documents of the training, or stop.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.config.run import RunConfig, settled_template_date
from trainer.data.cache import MANIFEST_FILE
from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import Preparation, PreparedData, keep_or_first_date, open_prepared
from trainer.data.report.progress import PrintLine, print_on_rank_0
from trainer.data.store.sequences import Sample, Sequences, StoreWriter, TokenDataset
from trainer.objectives.base import ObjectiveConfig
from trainer.objectives.classification import ClassificationConfig
from trainer.objectives.registry import data_spec_of
from trainer.reporting.run_record import readable_run_record
from trainer.session.base_files import IDENTITY

DATA = "data"
"""The word in `accept=[...]` that accepts other rows, and the kind in `identity.json`."""
STAND_IN_TOKENS = 2
"""Tokens of each sequence that stands in for the data: two, so that the last one is a target."""


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What a run recorded of its data when it began."""

    run_dir: Path
    fingerprint: str
    """Of the prepared training split."""
    directory: Path | None
    """Where it was prepared; None if the run's record does not say."""
    label_names: list[str] | None
    """In the order of their numbers; None without labels."""
    total_steps: int | None
    """Steps of the run's budget; None if the run's record does not say."""
    is_whole: bool
    """Whether `run.json` could be read. Without it, the label names have to come from the prepared data."""


def data_record(run_dir: Path) -> DataRecord:
    """What the run in a directory recorded of its data. Errors: ConfigError if neither `run.json` nor `identity.json` says it."""
    record = readable_run_record(run_dir)
    identity = _read_object(run_dir / IDENTITY)
    # Either file may be damaged: both have the fingerprint.
    fingerprint = (identity.get(DATA) or {}).get("fingerprint") or record.data_fingerprint
    if not fingerprint:
        raise ConfigError(
            f"{run_dir}: neither run.json nor {IDENTITY} can be read, and they alone say which data the run was trained on; "
            "bring one of them back"
        )
    directory = None
    if record.data_directory:
        directory = Path(record.data_directory)
    return DataRecord(
        run_dir=run_dir,
        fingerprint=str(fingerprint),
        directory=directory,
        label_names=record.label_names,
        total_steps=record.total_steps or None,
        is_whole="label_names" in record.keys,
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class RowsNeeded:
    """Why an export or an evaluation reads the run's own documents."""

    purpose: str
    """A clause on what needs them, such as `split=test: asks the run's test documents`."""
    way_out: str
    """What to do if they are gone, as a command to the user."""


def data_of_run(
    config: RunConfig,
    record: DataRecord,
    tokenizer: Any,
    *,
    needed: RowsNeeded | None,
    accept: bool,
    stop: Callable[[], bool] = lambda: False,
    print_line: PrintLine = print_on_rank_0,
) -> tuple[ObjectiveConfig, PreparedData, list[str]]:
    """(objective, data, accepted differences) to build the model of an earlier run with. No collective.

    `needed`: why the run's own documents are read; None if nothing needs them, and then the data is a stand-in that only gives
    shapes. Errors: DataError if the documents are needed and do not exist any more, unless `accept` takes the present rows.
    """
    if needed is None and record.is_whole:
        return *stand_in_data(config, record), []
    if needed is None:
        needed = RowsNeeded("run.json cannot be read, and the labels' names come from the rows", "Bring run.json back")
    return config.objective, *training_documents(
        config, record, tokenizer, needed, accept=accept, stop=stop, print_line=print_line
    )


def stand_in_data(config: RunConfig, record: DataRecord) -> tuple[ObjectiveConfig, PreparedData]:
    """(objective, data) to build the run's model with, without reading a row. No collective.

    The data is a single document without meaning, which only gives shapes. The objective has no class weights, which may have
    been computed from the labels of all rows: they belong to the loss, not to the model.
    """
    objective = config.objective
    if isinstance(objective, ClassificationConfig):
        objective = replace(objective, class_weights=None)
    # The data set keeps its files open, so that it can be read after they were deleted.
    with tempfile.TemporaryDirectory(prefix="shardtune-") as directory:
        train = _one_document(Path(directory), data_spec_of(config.objective), record.fingerprint)
    return objective, PreparedData(
        train, None, Path(directory), {}, record.label_names, date=settled_template_date(config), has_rows=False
    )


def _one_document(directory: Path, data_spec: DataSpec, fingerprint: str) -> TokenDataset:
    """An open data set of one document without meaning. Its files in `directory` may be deleted afterwards."""
    num_sequences = data_spec.sequences_per_document
    samples = []
    for _ in range(num_sequences):
        input_ids = np.zeros(STAND_IN_TOKENS, np.int32)
        supervised = np.ones(STAND_IN_TOKENS, np.bool_)
        samples.append(Sample(input_ids, supervised, dict(data_spec.marks)))
    sequences = Sequences.of(samples, data_spec.counts)
    zeros = np.zeros(num_sequences, np.int64)
    sequences.columns |= {"document": zeros, "source": zeros, "ended": zeros}
    store = StoreWriter(directory)
    store.append(sequences)
    store.finish()
    return TokenDataset(directory, {"fingerprint": fingerprint, "sources": ["data"]})


def training_documents(
    config: RunConfig,
    record: DataRecord,
    tokenizer: Any,
    needed: RowsNeeded,
    *,
    accept: bool,
    stop: Callable[[], bool] = lambda: False,
    print_line: PrintLine = print_on_rank_0,
) -> tuple[PreparedData, list[str]]:
    """(the prepared documents that the run was trained on, accepted differences). No collective.

    They come from the prepared data of the training if that still exists, else from the rows of `data.path`. Errors: DataError if
    neither has them, unless `accept` takes the present rows.
    """
    # The prepared data of the training: where the run made it, or in the cache of this host, by its fingerprint.
    cached_directory = Path(config.data.cache_dir).expanduser() / record.fingerprint[:32]
    for directory in (record.directory, cached_directory):
        if directory is not None and _is_prepared(directory, record):
            prepared = open_prepared(directory, verify=config.data.verify)
            prepared.date = settled_template_date(config)
            return _checked_label_names(prepared, record, needed), []

    # It is gone. Prepare the rows again, if they are still the same.
    data_spec = data_spec_of(config.objective)
    try:
        preparation = Preparation(
            config.data,
            tokenizer,
            data_spec,
            seed=config.run.seed,
            stop=stop,
            choose_date=keep_or_first_date(settled_template_date(config)),
            print_line=print_line,
        )
    except (ConfigError, DataError) as error:
        raise DataError(
            f"{error}\n    {record.run_dir}: {needed.purpose}, and the prepared data of the training is gone, too. "
            f"{needed.way_out}, or bring the rows back"
        ) from error
    # The fingerprint is known before anything is prepared. It covers the rows and everything that prepares them.
    has_changed = f"{preparation.fingerprint}/train" != record.fingerprint
    if has_changed and not accept:
        raise DataError(
            f"{record.run_dir}: {needed.purpose}. The rows of data.path, of data.eval_path or data.test_path, or what prepares "
            f"them, have changed since the training, and the data that was prepared then is gone. {needed.way_out}, bring the "
            "rows back, or take those of today: "
            f"accept=[{DATA}]"
        )
    prepared = preparation.open_or_prepare()
    data_spec.check(prepared.train)
    accepted = []
    if has_changed:
        accepted.append(f"{DATA}: other rows than the run was trained on")
    return _checked_label_names(prepared, record, needed), accepted


def _is_prepared(directory: Path, record: DataRecord) -> bool:
    """Whether the prepared data with the run's fingerprint is complete in a directory."""
    manifest = _read_object(directory / MANIFEST_FILE)
    return f"{manifest.get('fingerprint')}/train" == record.fingerprint


def _checked_label_names(data: PreparedData, record: DataRecord, needed: RowsNeeded) -> PreparedData:
    """Return `data` itself if its label names are the run's. Raises DataError otherwise: a label id would mean another label."""
    if record.is_whole and data.label_names != record.label_names:
        raise DataError(
            f"{record.run_dir}: was trained with the labels {record.label_names}, and the rows of today have {data.label_names}. "
            f"{needed.way_out}"
        )
    return data
