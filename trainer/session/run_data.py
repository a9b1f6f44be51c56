"""Rebuilds a run's model from what the run recorded of its data, with or without the rows: label names, fingerprint, length.

`data.path` may be replaced, grow or disappear after the training. An export, and tasks with a file of their own, do not need
it. Tasks on the run's own documents and the loss that `bits=` measures do: they get the documents of the training, or stop.
"""

from __future__ import annotations

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
from trainer.reporting.status import read_json_or_empty
from trainer.session.base_files import IDENTITY_FILE

DATA_KIND = "data"
"""The word in `accept=[...]` that accepts other rows, and the kind in `identity.json`."""
STAND_IN_TOKENS = 2
"""Tokens of each sequence that stands in for the data: two, so that the last one is a target."""


@dataclass(frozen=True, slots=True)
class DataRecord:
    """What a run recorded of its data when it began, for commands that rebuild its model or find the same data again."""

    run_dir: Path
    fingerprint: str
    """Of the prepared training split."""
    directory: Path | None
    """Where it was prepared; None if the run's record does not say."""
    label_names: list[str] | None
    """In the order of their numbers; None without labels."""
    total_steps: int | None
    """Steps of the run's budget; None if the run's record does not say."""
    has_label_names: bool
    """Whether `run.json` could be read, so that `label_names` is what the run had (None: no labels). Without it, the label
    names have to come from the prepared data."""


def read_data_record(run_dir: Path) -> DataRecord:
    """Read what the run in `run_dir` recorded of its data, so that its model can be built again without the data.

    Raises ConfigError if neither `run.json` nor `identity.json` has the fingerprint of the data.
    """
    record = readable_run_record(run_dir)
    identity = read_json_or_empty(run_dir / IDENTITY_FILE)
    # Either file may be damaged: both have the fingerprint.
    fingerprint = (identity.get(DATA_KIND) or {}).get("fingerprint") or record.data_fingerprint
    if not fingerprint:
        raise ConfigError(
            f"{run_dir}: neither run.json nor {IDENTITY_FILE} can be read, and they alone say which data the run was trained on; "
            "bring one of them back"
        )
    return DataRecord(
        run_dir=run_dir,
        fingerprint=str(fingerprint),
        directory=Path(record.data_directory) if record.data_directory else None,
        label_names=record.label_names,
        total_steps=record.total_steps or None,
        has_label_names="label_names" in record.keys,
    )


@dataclass(frozen=True, slots=True)
class ReasonToReadRows:
    """Why an export or an evaluation reads the run's own documents."""

    purpose: str
    """A clause on what needs them, such as `split=test: asks the run's test documents`."""
    way_out: str
    """What to do if they are missing, as a command to the user, such as `Leave split=test out`."""


@dataclass(frozen=True, slots=True)
class RunData:
    """What the model of an earlier run is built with, beside its configuration."""

    objective: ObjectiveConfig
    """The objective of the configuration, without class weights if the data is a stand-in."""
    data: PreparedData
    """The run's own documents, or a stand-in that only gives shapes."""
    accepted_differences: list[str]
    """What differs from the data of the training and was accepted, as lines; empty if it is the same data."""


def load_run_data(
    config: RunConfig,
    record: DataRecord,
    tokenizer: Any,
    *,
    reason_to_read: ReasonToReadRows | None,
    accept_changed_rows: bool,
    stop: Callable[[], bool] = lambda: False,
    print_line: PrintLine = print_on_rank_0,
) -> RunData:
    """Get the data to build the model of an earlier run with, for an export or an evaluation. No collective.

    - Nothing needs the run's own documents (`reason_to_read` is None): a stand-in, one document that only gives shapes.
    - The same, but `run.json` cannot be read: the documents all the same, since the names of the labels come from them.
    - Else the documents that the run was trained on. Raises DataError if they do not exist any more, unless `accept_changed_rows`
      takes the rows that are there now.

    `stop`: asked while rows are prepared again; True ends that with Preempted.
    """
    if reason_to_read is None and record.has_label_names:
        objective, data = stand_in_data(config, record)
        return RunData(objective, data, accepted_differences=[])
    if reason_to_read is None:
        reason_to_read = ReasonToReadRows(
            purpose="run.json cannot be read, and the labels' names come from the rows", way_out="Bring run.json back"
        )
    documents, accepted_differences = training_documents(
        config,
        record,
        tokenizer,
        reason_to_read,
        accept_changed_rows=accept_changed_rows,
        stop=stop,
        print_line=print_line,
    )
    return RunData(config.objective, documents, accepted_differences)


def stand_in_data(config: RunConfig, record: DataRecord) -> tuple[ObjectiveConfig, PreparedData]:
    """Make (objective, data) to build a run's model with, without reading a row. No collective.

    The data is a single document without meaning, which only gives shapes. The objective has no class weights, which may have
    been computed from the labels of all rows: they belong to the loss, not to the model.
    """
    objective = config.objective
    if isinstance(objective, ClassificationConfig):
        objective = replace(objective, class_weights=None)
    # The data set keeps its files open, so that it can be read after they were deleted.
    with tempfile.TemporaryDirectory(prefix="shardtune-") as directory:
        train = _data_set_of_one_document(Path(directory), data_spec_of(config.objective), record.fingerprint)
    data = PreparedData(
        train=train,
        evaluation=None,
        directory=Path(directory),
        report={},
        label_names=record.label_names,
        date=settled_template_date(config),
        has_rows=False,
    )
    return objective, data


def _data_set_of_one_document(directory: Path, data_spec: DataSpec, fingerprint: str) -> TokenDataset:
    """Make an open data set of one document without meaning. Its files in `directory` may be deleted afterwards.

    The document has as many sequences as `data_spec` asks for, each of STAND_IN_TOKENS tokens that all count for the loss.
    `fingerprint`: that of the run's data, for which it stands in.
    """
    num_sequences = data_spec.sequences_per_document
    samples = []
    for _ in range(num_sequences):
        input_ids = np.zeros(STAND_IN_TOKENS, np.int32)
        supervised = np.ones(STAND_IN_TOKENS, np.bool_)
        samples.append(Sample(input_ids, supervised, dict(data_spec.marks)))
    sequences = Sequences.from_samples(samples, data_spec.counts)
    zeros = np.zeros(num_sequences, np.int64)
    # Columns that every prepared data set has: of each sequence its document, the source of that, and whether it ends.
    sequences.columns |= {"document": zeros, "source": zeros, "ended": zeros}
    store = StoreWriter(directory)
    store.append(sequences)
    store.finish()
    return TokenDataset(directory, {"fingerprint": fingerprint, "sources": ["data"]})


def training_documents(
    config: RunConfig,
    record: DataRecord,
    tokenizer: Any,
    reason_to_read: ReasonToReadRows,
    *,
    accept_changed_rows: bool,
    stop: Callable[[], bool] = lambda: False,
    print_line: PrintLine = print_on_rank_0,
) -> tuple[PreparedData, list[str]]:
    """Find the documents that a run was trained on; returns (the prepared documents, accepted differences). No collective.

    They come from the prepared data of the training if that still exists, else from the rows of `data.path`. Raises DataError if
    neither has them, unless `accept_changed_rows` takes the rows that are there now.
    """
    # The prepared data of the training: where the run made it, or in the cache of this host, by its fingerprint.
    cached_directory = Path(config.data.cache_dir).expanduser() / record.fingerprint[:32]
    for directory in (record.directory, cached_directory):
        if directory is not None and _is_prepared(directory, record):
            prepared = open_prepared(directory, verify=config.data.verify)
            prepared.date = settled_template_date(config)
            _raise_if_labels_differ(prepared, record, reason_to_read)
            return prepared, []

    # It does not exist any more. Prepare the rows again, if they are still the same.
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
            f"{error}\n    {record.run_dir}: {reason_to_read.purpose}, and the prepared data of the training is gone, too. "
            f"{reason_to_read.way_out}, or bring the rows back"
        ) from error
    # The fingerprint is known before anything is prepared. It covers the rows and everything that prepares them.
    has_changed = f"{preparation.fingerprint}/train" != record.fingerprint
    if has_changed and not accept_changed_rows:
        raise DataError(
            f"{record.run_dir}: {reason_to_read.purpose}. The rows of data.path, of data.eval_path or data.test_path, or what "
            "prepares them, have changed since the training, and the data that was prepared then is gone. "
            f"{reason_to_read.way_out}, bring the rows back, or take those of today: accept=[{DATA_KIND}]"
        )
    prepared = preparation.open_or_prepare()
    data_spec.check(prepared.train)
    accepted = []
    if has_changed:
        accepted.append(f"{DATA_KIND}: other rows than the run was trained on")
    _raise_if_labels_differ(prepared, record, reason_to_read)
    return prepared, accepted


def _is_prepared(directory: Path, record: DataRecord) -> bool:
    """Whether the prepared data with the run's fingerprint is complete in a directory."""
    manifest = read_json_or_empty(directory / MANIFEST_FILE)
    return f"{manifest.get('fingerprint')}/train" == record.fingerprint


def _raise_if_labels_differ(data: PreparedData, record: DataRecord, reason_to_read: ReasonToReadRows) -> None:
    """Raise DataError if the label names of `data` are not those of the run: a label id would mean another label.

    If the record does not have the run's label names, they are not compared.
    """
    if record.has_label_names and data.label_names != record.label_names:
        raise DataError(
            f"{record.run_dir}: was trained with the labels {record.label_names}, and the rows of today have {data.label_names}. "
            f"{reason_to_read.way_out}"
        )
