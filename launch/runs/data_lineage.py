"""Finds the runs that trained on a document that must be deleted, from their prepared data and their progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.runs.metrics_tail import last_step
from strategies.errors import ConfigError, DataError
from trainer.reporting.run_record import RunRecord, readable_run_record

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.config.run import RunConfig
    from trainer.data.store.documents import DocumentTable
    from trainer.data.store.sequences import TokenDataset

HELD_OUT_SPLIT_NAMES = ("eval", "test")
MAX_SHOWN_DOCUMENTS = 5
"""Documents of one run that are named by file and line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentQuery:
    """The documents that are searched: one by its file and line, or all that contain a piece of text."""

    file: str | None = None
    """As in the settings of the run, or the end of that path; None to search for `text`."""
    line: int = 0
    text: str | None = None
    """Compared with the documents as they were prepared, after filters and redaction."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file is not None else f'"{self.text}"'


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentExposure:
    """Whether and how often one run was trained on the documents."""

    run: Path
    num_documents_by_split: dict[str, int] = field(default_factory=dict)
    """How many of them are in the run's data, by split."""
    shown_documents: tuple[str, ...] = ()
    """The first of them, as file:line."""
    times_trained: int = 0
    """How often training drew one of them, up to `step`."""
    step: int = 0
    """The last optimizer step of the run."""
    earlier_run: Path | None = None
    """An earlier run that was trained on them, and whose weights this one began with."""
    why_unknown: str | None = None
    """Why the exposure cannot be determined; None if it can."""

    @property
    def was_trained_on(self) -> bool:
        """Whether the run's weights have seen one of the documents, in its own training or in that of an earlier run."""
        return self.times_trained > 0 or self.earlier_run is not None


def document_exposures(runs: Iterable[tuple[Path, RunConfig | str]], query: DocumentQuery) -> list[DocumentExposure]:
    """Find out for each run whether its weights have seen the documents that somebody wants to be deleted, and how often.

    A run has seen them by its own training, or by that of an earlier run whose weights it began with: `earlier_run` names
    that one, beside the numbers of the run's own training. `runs`: (run directory, its frozen configuration, or a message
    that says why it cannot be read).
    """
    config_by_run = dict(runs)
    own_exposures = {run: _own_exposure(run, config, query) for run, config in config_by_run.items()}
    predecessors_by_run = {run: _predecessors(run, config, config_by_run) for run, config in config_by_run.items()}
    exposures = []
    for run, exposure in own_exposures.items():
        earlier_run = _nearest_exposed_predecessor(run, predecessors_by_run, own_exposures)
        exposures.append(exposure if earlier_run is None else replace(exposure, earlier_run=earlier_run))
    return exposures


def _nearest_exposed_predecessor(
    run: Path, predecessors_by_run: dict[Path, list[Path]], own_exposures: dict[Path, DocumentExposure]
) -> Path | None:
    """Find the nearest earlier run that was trained on the documents and whose weights reached `run`; None if there is none.

    The search is breadth first, through the predecessors of the predecessors.

    `predecessors_by_run`: the runs whose exports each run loaded. `own_exposures`: what each run saw by its own training.
    """
    visited = {run}
    to_visit = list(predecessors_by_run[run])
    while to_visit:
        predecessor = to_visit.pop(0)
        if predecessor in visited:
            continue
        if own_exposures[predecessor].times_trained:
            return predecessor
        visited.add(predecessor)
        to_visit += predecessors_by_run[predecessor]
    return None


def _predecessors(run: Path, config: RunConfig | str, all_runs: Iterable[Path]) -> list[Path]:
    """Find the runs (of `all_runs`) whose exports this run loaded: as base model, as adapters, or as the adapter it began with.

    `config`: the run's configuration, or a message that says why it cannot be read; then its adapters are not known.
    """
    record = readable_run_record(run)
    loaded_paths = [record.tuning_from.path if record.tuning_from else None, record.base_model]
    if not isinstance(config, str):
        loaded_paths += config.model.adapters
    predecessors = []
    for path in filter(None, loaded_paths):
        export_dir = Path(str(path)).expanduser().resolve()
        # An export is in the directory of its run. If runs are within runs, the innermost one made it.
        enclosing_runs = [
            any_run for any_run in all_runs if any_run != run and export_dir.is_relative_to(any_run.resolve())
        ]
        if enclosing_runs:
            predecessors.append(max(enclosing_runs, key=lambda enclosing_run: len(enclosing_run.parts)))
    return predecessors


def _own_exposure(run: Path, config: RunConfig | str, query: DocumentQuery) -> DocumentExposure:
    """Find out whether one run was itself trained on the documents; if that cannot be told, `why_unknown` says why.

    `config`: the run's configuration, or a message that says why it cannot be read.
    """
    if isinstance(config, str):
        return DocumentExposure(run=run, why_unknown=config)
    record = readable_run_record(run)
    if not record.data_fingerprint or not record.data_directory:
        return DocumentExposure(
            run=run, why_unknown="has no run.json: it never began to train, or was copied without it"
        )
    try:
        return _exposure_from_prepared_data(run, config, record, query)
    except (ConfigError, DataError, OSError) as error:
        return DocumentExposure(run=run, why_unknown=" ".join(str(error).split()))


def _exposure_from_prepared_data(
    run: Path, config: RunConfig, record: RunRecord, query: DocumentQuery
) -> DocumentExposure:
    """Count how often one run trained on the documents of the query, from its prepared data and how far it trained.

    Raises DataError, ConfigError and OSError if the data cannot be read, or is not what the run was trained on.
    """
    from trainer.data.store.documents import DocumentTable

    data_dir = Path(record.data_directory)
    split_by_name = _open_prepared_splits(data_dir, record.data_fingerprint)
    # The table has the documents of all splits; `documents` of a split holds, for each of its sequences, the row of its document
    # in the table.
    document_table = DocumentTable(data_dir)
    wanted_rows = matching_rows(document_table, query)
    rows_by_split = {name: np.intersect1d(split.documents, wanted_rows) for name, split in split_by_name.items()}
    rows_in_any_split = np.unique(np.concatenate(list(rows_by_split.values())))
    shown_documents = [document_table.row(int(row)) for row in rows_in_any_split[:MAX_SHOWN_DOCUMENTS]]

    # How far the run trained, as it recorded itself. `passed` are ranges of samples that a rollback left out.
    progress = record.outcome.progress if record.outcome else {}
    step = int(progress.get("step") or last_step(run))
    return DocumentExposure(
        run=run,
        num_documents_by_split={name: len(rows) for name, rows in rows_by_split.items() if len(rows)},
        shown_documents=tuple(f"{document['file']}:{document['line']}" for document in shown_documents),
        times_trained=_times_trained(
            split_by_name["train"],
            config,
            num_samples_drawn=int(progress.get("samples") or step * int(config.batch["global"])),
            skipped_ranges=progress.get("passed") or [],
            rows=rows_by_split["train"],
        ),
        step=step,
    )


def _open_prepared_splits(data_dir: Path, fingerprint: str) -> dict[str, TokenDataset]:
    """Open the prepared data of a run: {"train": ..., "eval": ...}, with the held-out splits that it has.

    `fingerprint`: of the data that the run was trained on, as it recorded it. Raises DataError if the data is not there, or
    has another fingerprint.
    """
    from trainer.data.store.sequences import TokenDataset

    if not (data_dir / "train").is_dir():
        raise DataError(f"its prepared data {data_dir} is not there; the same command prepares it again")
    split_by_name = {"train": TokenDataset.open(data_dir / "train")}
    if split_by_name["train"].fingerprint != fingerprint:
        raise DataError(f"its prepared data {data_dir} is not what it was trained on")
    for name in HELD_OUT_SPLIT_NAMES:
        if (data_dir / name).is_dir():
            split_by_name[name] = TokenDataset.open(data_dir / name)
    return split_by_name


def _times_trained(
    train: TokenDataset,
    config: RunConfig,
    num_samples_drawn: int,
    skipped_ranges: list[dict[str, int]],
    rows: np.ndarray,
) -> int:
    """Count how often the run trained on one of the documents in `rows`, among its first `num_samples_drawn` samples.

    The order of the samples is built again: it follows from the data, the settings and the seed. `rows`: row numbers in the
    table of documents. `skipped_ranges`: samples that a rollback left out, such as `{"first": 640, "count": 64}`.
    """
    if not len(rows):
        return 0
    from trainer.data.batches.mixing import build_order
    from trainer.objectives.registry import data_spec_of

    sequences_per_document = data_spec_of(config.objective).sequences_per_document
    # A pack is what the order draws as one sample: one sequence, or several sequences in one row.
    packs, order = build_order(config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed)
    order.set_skipped((skipped["first"], skipped["count"]) for skipped in skipped_ranges)
    is_wanted_sequence = np.isin(train.documents, rows)
    if packs is None:
        wanted_by_pack = is_wanted_sequence.astype(np.int64)
    else:
        # Of a preference pair, both sequences are of the same document, which is drawn once.
        wanted_by_pack = np.array([is_wanted_sequence[pack].sum() // sequences_per_document for pack in packs])
    return int(wanted_by_pack[order.units(0, num_samples_drawn)].sum())


def matching_rows(document_table: DocumentTable, query: DocumentQuery) -> np.ndarray:
    """Find the documents that match the query: increasing row numbers in the table of prepared documents, int64."""
    rows = []
    first_row_of_batch = 0
    for batch in document_table.batches:
        if query.file is not None:
            is_match = _is_from_file_and_line(batch, query)
        else:
            is_match = _contains_text(batch, str(query.text))
        rows.append(first_row_of_batch + np.flatnonzero(is_match))
        first_row_of_batch += batch.num_rows
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)


def _is_from_file_and_line(batch: pa.RecordBatch, query: DocumentQuery) -> np.ndarray:
    """Tell which documents of a batch come from the file and line of the query: a boolean for each row.

    The file matches if it is named as in the run's settings, by the end of its path, or by a path from the current
    directory.
    """
    import pyarrow.compute as pc

    name = str(query.file)
    files = batch.column("file")
    is_file = pc.or_(pc.equal(files, name), pc.ends_with(files, "/" + name.removeprefix("./")))
    is_file = pc.or_(is_file, pc.equal(files, str(Path(name).expanduser().resolve())))
    is_line = pc.equal(batch.column("line"), query.line)
    return np.asarray(pc.fill_null(pc.and_(is_file, is_line), False))


def _contains_text(batch: pa.RecordBatch, text: str) -> np.ndarray:
    """Tell which documents of a batch contain the text, in a column or in a message of a conversation: a boolean for each row."""
    import pyarrow.compute as pc

    from trainer.data.store.documents import TURN_COLUMNS as CONVERSATION_COLUMNS

    def cells_with_text(column: Any) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.match_substring(column, text), False))

    is_match = np.zeros(batch.num_rows, bool)
    for text_column in ("prompt", "completion", "text"):
        is_match |= cells_with_text(batch.column(text_column))
    for conversation_column in CONVERSATION_COLUMNS:
        conversations = batch.column(conversation_column)
        messages = pc.list_flatten(conversations)  # the messages of all rows, one after another
        row_of_message = np.asarray(pc.list_parent_indices(conversations))
        for key in ("content", "reasoning_content", "tool_calls"):
            is_message_match = cells_with_text(pc.struct_field(messages, key))
            is_match[row_of_message[is_message_match]] = True
    return is_match
