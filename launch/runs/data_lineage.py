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
    """Of each run, with its frozen configuration or why that cannot be read. A run that began with another's weights has seen
    what that one saw."""
    configs = dict(runs)
    sighting_by_run = {run: _sighting(run, config, query) for run, config in configs.items()}
    predecessors = {run: _predecessors(run, config, sighting_by_run) for run, config in configs.items()}
    for run in sighting_by_run:
        visited, to_visit = {run}, list(predecessors[run])
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
    """The runs that lie above what this one loaded: its base, adapters folded into that, and the adapter it went on with."""
    record = readable_run_record(run)
    loaded = [record.tuning_from.path if record.tuning_from else None, record.base_model]
    loaded += [] if isinstance(config, str) else config.model.adapters
    predecessors = []
    for path in filter(None, loaded):
        place = Path(str(path)).expanduser().resolve()
        enclosing = [other for other in runs if other != run and place.is_relative_to(other.resolve())]
        predecessors += [max(enclosing, key=lambda other: len(other.parts))] if enclosing else []
    return predecessors


def _sighting(run: Path, config: RunConfig | str, query: DocumentQuery) -> Sighting:
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
    from trainer.data.store.documents import DocumentTable
    from trainer.data.store.sequences import TokenDataset

    directory = Path(record.data_directory)
    if not (directory / "train").is_dir():
        raise DataError(f"its prepared data {directory} is not there; the same command prepares it again")
    train = TokenDataset.open(directory / "train")
    if train.fingerprint != record.data_fingerprint:
        raise DataError(f"its prepared data {directory} is not what it was trained on")
    table = DocumentTable(directory)
    rows = rows_of(table, query)
    held_out = {name: TokenDataset.open(directory / name) for name in SPLITS[1:] if (directory / name).is_dir()}
    rows_by_split = {name: _rows_of_split(split, rows) for name, split in {"train": train, **held_out}.items()}
    all_rows = np.unique(np.concatenate(list(rows_by_split.values())))
    places = [table.row(int(row)) for row in all_rows[:SHOWN_PLACES]]
    progress = record.outcome.progress if record.outcome else {}
    # A run that was killed says how far it was in its rows alone.
    steps_logged = (int(finite_number(row, "step") or 0) for row in last_rows(run / "metrics.jsonl"))
    step = int(progress.get("step") or max([int(read_status(run).get("step") or 0), *steps_logged]))
    samples = int(progress.get("samples") or step * int(config.batch["global"]))
    return Sighting(
        run=run,
        documents={name: len(split_rows) for name, split_rows in rows_by_split.items() if len(split_rows)},
        where=tuple(f"{row['file']}:{row['line']}" for row in places),
        times=_times(train, config, samples, progress.get("passed") or [], rows_by_split["train"])
        if len(rows_by_split["train"])
        else 0,
        step=step,
    )


def _rows_of_split(split: Any, rows: np.ndarray) -> np.ndarray:
    return np.intersect1d(split.documents, rows)


def _times(train: Any, config: RunConfig, samples: int, passed: list[dict[str, int]], rows: np.ndarray) -> int:
    """How many of the first `samples` that the run drew are of these documents."""
    from trainer.data.batches.mixing import build_order
    from trainer.objectives.registry import reading_of

    sequences_per_document = reading_of(config.objective).sequences_per_document
    units, order = build_order(config.data, train, sequences_per_document=sequences_per_document, seed=config.run.seed)
    order.set_skipped((skipped["first"], skipped["count"]) for skipped in passed)
    is_wanted = np.isin(train.documents, rows)
    wanted_in_unit = (
        is_wanted.astype(np.int64)
        if units is None
        else np.array([is_wanted[unit].sum() // sequences_per_document for unit in units])
    )
    return int(wanted_in_unit[order.units(0, samples)].sum())


def rows_of(table: Any, query: DocumentQuery) -> np.ndarray:
    """Rows of the prepared documents that are wanted, int64, in order."""
    rows, first_row = [], 0
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
    import pyarrow.compute as pc

    from trainer.data.store.documents import TURNS

    matches = np.zeros(batch.num_rows, bool)
    for name in ("prompt", "completion", "text"):
        matches |= np.asarray(pc.fill_null(pc.match_substring(batch.column(name), text), False))
    for name in TURNS:
        turns = batch.column(name)
        messages, row_of_message = pc.list_flatten(turns), np.asarray(pc.list_parent_indices(turns))
        for part in ("content", "reasoning_content", "tool_calls"):
            has_text = np.asarray(pc.fill_null(pc.match_substring(pc.struct_field(messages, part), text), False))
            matches[row_of_message[has_text]] = True
    return matches
