"""Finds the runs that trained on a document that must be deleted, from their prepared data and their progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.runs.metrics_tail import finite_number, last_rows
from strategies.errors import ConfigError, DataError
from trainer.reporting.run_record import RunRecord, readable_run_record
from trainer.reporting.status import read_status

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.config.run import RunConfig

SPLITS = ("train", "eval", "test")
SHOWN_PLACES = 5
"""Places that are named of one run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentQuery:
    """A document by its place, or all that have a piece of text in them, as it was prepared."""

    file: str | None = None
    line: int = 0
    text: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file is not None else f'"{self.text}"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """What one run has of it."""

    run: Path
    documents: dict[str, int] = field(default_factory=dict)
    """By split, how many documents."""
    where: tuple[str, ...] = ()
    """The first of them, as file:line."""
    times: int = 0
    """How often training took one of them; of an epoch that was not finished, those whose turn had come."""
    step: int = 0
    through: Path | None = None
    """The run whose weights it began with, which was trained on it."""
    unknown: str | None = None
    """Why it cannot be told."""

    @property
    def trained(self) -> bool:
        """Whether its weights come from the document."""
        return self.times > 0 or self.through is not None


def sightings(runs: Iterable[tuple[Path, RunConfig | str]], query: DocumentQuery) -> list[Sighting]:
    """What each run has of the document; `runs`: with the frozen configuration, or why it cannot be read.

    A run that began with the weights of another one has seen what that one saw.
    """
    configs = dict(runs)
    sighting_by_run = {run: _sighting(run, config, query) for run, config in configs.items()}
    predecessors = {run: _predecessors(run, config, configs) for run, config in configs.items()}
    for run in configs:
        # Breadth first, so that the nearest predecessor is named.
        visited = {run}
        to_visit = list(predecessors[run])
        while to_visit:
            predecessor = to_visit.pop(0)
            if predecessor in visited:
                continue
            if sighting_by_run[predecessor].times:
                sighting_by_run[run] = replace(sighting_by_run[run], through=predecessor)
                break
            visited.add(predecessor)
            to_visit += predecessors[predecessor]
    return list(sighting_by_run.values())


def _predecessors(run: Path, config: RunConfig | str, runs: Iterable[Path]) -> list[Path]:
    """The runs whose exports this one loaded: as its base, as an adapter merged into the base, or as its first adapter."""
    record = readable_run_record(run)
    loaded = [record.tuning_from.path if record.tuning_from else None, record.base_model]
    if not isinstance(config, str):
        loaded += config.model.adapters
    predecessors = []
    for path in filter(None, loaded):
        place = Path(str(path)).expanduser().resolve()
        # An export lies in the directory of its run; among runs within runs the innermost one made it.
        enclosing = [other for other in runs if other != run and place.is_relative_to(other.resolve())]
        if enclosing:
            predecessors.append(max(enclosing, key=lambda other: len(other.parts)))
    return predecessors


def _sighting(run: Path, config: RunConfig | str, query: DocumentQuery) -> Sighting:
    """What a run has of the document; `unknown` says why, if that cannot be found out."""
    record = readable_run_record(run)
    if isinstance(config, str):
        return Sighting(run=run, unknown=config)
    if not record.data_fingerprint or not record.data_directory:
        return Sighting(run=run, unknown="has no run.json: it never began to train, or was copied without it")
    try:
        return _read_sighting(run, config, record, query)
    except (ConfigError, DataError, OSError) as error:
        return Sighting(run=run, unknown=" ".join(str(error).split()))


def _read_sighting(run: Path, config: RunConfig, record: RunRecord, query: DocumentQuery) -> Sighting:
    """What a run has of the document, by its prepared data. Errors: DataError, ConfigError, OSError."""
    from trainer.data.store.documents import DocumentTable
    from trainer.data.store.sequences import TokenDataset

    directory = Path(record.data_directory)
    if not (directory / "train").is_dir():
        raise DataError(f"its prepared data {directory} is not there; the same command prepares it again")
    train = TokenDataset.open(directory / "train")
    if train.fingerprint != record.data_fingerprint:
        raise DataError(f"its prepared data {directory} is not what it was trained on")
    splits = {"train": train}
    for name in SPLITS[1:]:
        if (directory / name).is_dir():
            splits[name] = TokenDataset.open(directory / name)
    table = DocumentTable(directory)
    wanted_rows = rows_of(table, query)
    rows_by_split = {name: np.intersect1d(split.documents, wanted_rows) for name, split in splits.items()}
    all_rows = np.unique(np.concatenate(list(rows_by_split.values())))
    places = [table.row(int(row)) for row in all_rows[:SHOWN_PLACES]]

    progress = record.outcome.progress if record.outcome else {}
    step = int(progress.get("step") or _last_step(run))
    samples = int(progress.get("samples") or step * int(config.batch["global"]))
    times = 0
    if len(rows_by_split["train"]):
        times = _times(train, config, samples, progress.get("passed") or [], rows_by_split["train"])
    return Sighting(
        run=run,
        documents={name: len(rows) for name, rows in rows_by_split.items() if len(rows)},
        where=tuple(f"{row['file']}:{row['line']}" for row in places),
        times=times,
        step=step,
    )


def _last_step(run: Path) -> int:
    """The step that a run had reached which recorded no outcome, as one that was killed."""
    steps = [int(read_status(run).get("step") or 0)]
    for row in last_rows(run / "metrics.jsonl"):
        steps.append(int(finite_number(row, "step") or 0))
    return max(steps)


def _times(train: Any, config: RunConfig, samples: int, passed: list[dict[str, int]], rows: np.ndarray) -> int:
    """How many of the first `samples` that the run drew are of the documents in `rows`; `passed`: ranges that it skipped."""
    from trainer.data.batches.mixing import build_order
    from trainer.objectives.registry import data_spec_of

    sequences_per_document = data_spec_of(config.objective).sequences_per_document
    units, order = build_order(config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed)
    order.set_skipped((skipped["first"], skipped["count"]) for skipped in passed)
    is_wanted = np.isin(train.documents, rows)  # of each sequence
    # Wanted documents of each unit that the order draws: a sequence, or several that are packed together.
    if units is None:
        wanted_in_unit = is_wanted.astype(np.int64)
    else:
        wanted_in_unit = np.array([is_wanted[unit].sum() // sequences_per_document for unit in units])
    return int(wanted_in_unit[order.units(0, samples)].sum())


def rows_of(table: Any, query: DocumentQuery) -> np.ndarray:
    """Rows of the prepared documents that match, int64, in order."""
    rows = []
    first_row = 0
    for batch in table.batches:
        matches = _by_place(batch, query) if query.file is not None else _by_text(batch, str(query.text))
        rows.append(first_row + np.flatnonzero(matches))
        first_row += batch.num_rows
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)


def _by_place(batch: pa.RecordBatch, query: DocumentQuery) -> np.ndarray:
    import pyarrow.compute as pc

    name = str(query.file)
    files = batch.column("file")
    matches = pc.or_(pc.equal(files, name), pc.ends_with(files, "/" + name.removeprefix("./")))
    matches = pc.or_(matches, pc.equal(files, str(Path(name).expanduser().resolve())))
    return np.asarray(pc.fill_null(pc.and_(matches, pc.equal(batch.column("line"), query.line)), False))


def _by_text(batch: pa.RecordBatch, text: str) -> np.ndarray:
    """Which rows have the text in one of their columns, or in a turn of a conversation."""
    import pyarrow.compute as pc

    from trainer.data.store.documents import TURNS

    def has_text(column: Any) -> np.ndarray:
        return np.asarray(pc.fill_null(pc.match_substring(column, text), False))

    matches = np.zeros(batch.num_rows, bool)
    for name in ("prompt", "completion", "text"):
        matches |= has_text(batch.column(name))
    for name in TURNS:
        turns = batch.column(name)
        messages = pc.list_flatten(turns)
        row_of_message = np.asarray(pc.list_parent_indices(turns))
        for part in ("content", "reasoning_content", "tool_calls"):
            matches[row_of_message[has_text(pc.struct_field(messages, part))]] = True
    return matches
