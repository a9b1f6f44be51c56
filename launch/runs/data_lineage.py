"""Finds the runs that trained on a document that must be deleted, from their prepared data and their progress."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.runs.metrics_tail import newest, number
from strategies.errors import ConfigError, DataError
from trainer.reporting.run_record import RunRecord, readable_run_record
from trainer.reporting.status import read_status

if TYPE_CHECKING:
    import pyarrow as pa

    from trainer.config.run import RunConfig

SPLITS = ("train", "eval", "test")
SHOWN = 5
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


def sightings(runs: Iterable[tuple[Path, RunConfig | str]], wanted: DocumentQuery) -> list[Sighting]:
    """Of each run, with its frozen configuration or why that cannot be read. A run that began with another's weights has seen
    what that one saw."""
    configs = dict(runs)
    found = {run: _of(run, config, wanted) for run, config in configs.items()}
    begun = {run: _begun_with(run, config, found) for run, config in configs.items()}
    for run in found:
        looked, ahead = {run}, list(begun[run])
        while ahead:
            before = ahead.pop(0)
            if before in looked:
                continue
            if found[before].times:
                found[run] = replace(found[run], through=before)
                break
            looked.add(before)
            ahead += begun[before]
    return list(found.values())


def _begun_with(run: Path, config: RunConfig | str, runs: Iterable[Path]) -> list[Path]:
    """The runs that lie above what this one loaded: its base, adapters folded into that, and the adapter it went on with."""
    record = readable_run_record(run)
    loaded = [record.tuning_from.path if record.tuning_from else None, record.base_model]
    loaded += [] if isinstance(config, str) else config.model.adapters
    found = []
    for each in filter(None, loaded):
        place = Path(str(each)).expanduser().resolve()
        inner = [other for other in runs if other != run and place.is_relative_to(other.resolve())]
        found += [max(inner, key=lambda other: len(other.parts))] if inner else []
    return found


def _of(run: Path, config: RunConfig | str, wanted: DocumentQuery) -> Sighting:
    record = readable_run_record(run)
    if isinstance(config, str):
        return Sighting(run=run, unknown=config)
    if not record.data_fingerprint or not record.data_directory:
        return Sighting(run=run, unknown="has no run.json: it never began to train, or was copied without it")
    try:
        return _read(run, config, record, wanted)
    except (ConfigError, DataError, OSError) as error:
        return Sighting(run=run, unknown=" ".join(str(error).split()))


def _read(run: Path, config: RunConfig, record: RunRecord, wanted: DocumentQuery) -> Sighting:
    from trainer.data.store.documents import DocumentTable
    from trainer.data.store.sequences import TokenDataset

    directory = Path(record.data_directory)
    if not (directory / "train").is_dir():
        raise DataError(f"its prepared data {directory} is not there; the same command prepares it again")
    train = TokenDataset.open(directory / "train")
    if train.fingerprint != record.data_fingerprint:
        raise DataError(f"its prepared data {directory} is not what it was trained on")
    table = DocumentTable(directory)
    rows = rows_of(table, wanted)
    sets = {name: TokenDataset.open(directory / name) for name in SPLITS[1:] if (directory / name).is_dir()}
    mine = {name: _among(split, rows) for name, split in {"train": train, **sets}.items()}
    seen = np.unique(np.concatenate(list(mine.values())))
    places = [table.row(int(row)) for row in seen[:SHOWN]]
    progress = record.outcome.progress if record.outcome else {}
    # A run that was killed says how far it was in its rows alone.
    rows_told = (int(number(row, "step") or 0) for row in newest(run / "metrics.jsonl"))
    step = int(progress.get("step") or max([int(read_status(run).get("step") or 0), *rows_told]))
    samples = int(progress.get("samples") or step * int(config.batch["global"]))
    return Sighting(
        run=run,
        documents={name: len(each) for name, each in mine.items() if len(each)},
        where=tuple(f"{row['file']}:{row['line']}" for row in places),
        times=_times(train, config, samples, progress.get("passed") or [], mine["train"]) if len(mine["train"]) else 0,
        step=step,
    )


def _among(split: Any, rows: np.ndarray) -> np.ndarray:
    return np.intersect1d(split.documents, rows)


def _times(train: Any, config: RunConfig, samples: int, passed: list[dict[str, int]], rows: np.ndarray) -> int:
    """How many of the first `samples` that the run drew are of these documents."""
    from trainer.data.batches.mixing import build_order
    from trainer.objectives.registry import reading_of

    per = reading_of(config.objective).sequences_per_document
    units, order = build_order(config.data, train, sequences_per_document=per, seed=config.run.seed)
    order.set_skipped((each["first"], each["count"]) for each in passed)
    named = np.isin(train.documents, rows)
    holds = named.astype(np.int64) if units is None else np.array([named[unit].sum() // per for unit in units])
    return int(holds[order.units(0, samples)].sum())


def rows_of(table: Any, wanted: DocumentQuery) -> np.ndarray:
    """Rows of the prepared documents that are wanted, int64, in order."""
    found, begin = [], 0
    for batch in table.batches:
        there = _by_place(batch, wanted) if wanted.file is not None else _by_text(batch, str(wanted.text))
        found.append(begin + np.flatnonzero(there))
        begin += batch.num_rows
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _by_place(batch: pa.RecordBatch, wanted: DocumentQuery) -> np.ndarray:
    import pyarrow.compute as pc

    name = str(wanted.file)
    files = batch.column("file")
    same = pc.or_(pc.equal(files, name), pc.ends_with(files, "/" + name.removeprefix("./")))
    same = pc.or_(same, pc.equal(files, str(Path(name).expanduser().resolve())))
    return np.asarray(pc.fill_null(pc.and_(same, pc.equal(batch.column("line"), wanted.line)), False))


def _by_text(batch: pa.RecordBatch, text: str) -> np.ndarray:
    import pyarrow.compute as pc

    from trainer.data.store.documents import TURNS

    found = np.zeros(batch.num_rows, bool)
    for name in ("prompt", "completion", "text"):
        found |= np.asarray(pc.fill_null(pc.match_substring(batch.column(name), text), False))
    for name in TURNS:
        turns = batch.column(name)
        said, whose = pc.list_flatten(turns), np.asarray(pc.list_parent_indices(turns))
        for part in ("content", "reasoning_content", "tool_calls"):
            there = np.asarray(pc.fill_null(pc.match_substring(pc.struct_field(said, part), text), False))
            found[whose[there]] = True
    return found
