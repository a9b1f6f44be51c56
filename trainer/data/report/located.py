"""A prepared data set found on disk: from a path to its splits, its documents and its tokenizer.

Opens memory-mapped files only, so that it answers at once whatever the size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.store.sequences import TokenDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DOCUMENTS = "documents.arrow"
ORDER = {"train": 0, "eval": 1, "test": 2}


@dataclass(slots=True)
class Entry:
    """A prepared data set found on disk."""

    directory: Path
    manifest: dict[str, Any]
    splits: dict[str, Path]
    """Directory of each split, train first."""
    asked: str | None = None
    """The split that the user's path pointed to."""
    opened: dict[str, TokenDataset] = field(default_factory=dict)

    def split(self, name: str) -> TokenDataset:
        """The split, opened once. Raises ConfigError where there is none of the name, DataError for a torn one."""
        if name not in self.splits:
            raise ConfigError(f"--split {name}: there is no such split; one of {', '.join(self.splits)}")
        if name not in self.opened:
            self.opened[name] = TokenDataset.open(self.splits[name])
        return self.opened[name]


def locate(path: Path) -> Entry:
    """The data set at `path`: its directory, one of its splits, or a run directory whose `run.json` names it.

    Raises ConfigError where there is none, DataError where a file of it cannot be read.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such directory; name a prepared data set or a run directory")
    if (path / "run.json").is_file():
        return locate(_of_run(path))
    if not (path / "manifest.json").is_file():
        raise ConfigError(
            f"{path}: holds no manifest.json, so it is no prepared data set, and no run.json, so it is no run; "
            "shardtune prepare prints the directory it made"
        )
    if (path / "index.npy").is_file() and (path.parent / "manifest.json").is_file():
        found = locate(path.parent)
        found.asked = path.name
        return found
    inside = [entry for entry in path.iterdir() if (entry / "manifest.json").is_file()]
    inside.sort(key=lambda entry: (ORDER.get(entry.name, len(ORDER)), entry.name))
    splits = {entry.name: entry for entry in inside} or {path.name: path}
    return Entry(path, _json(path / "manifest.json"), splits)


def _of_run(run: Path) -> Path:
    """The data directory of a run; a relative one counts from the working directory, else from the run."""
    named = _json(run / "run.json").get("data_directory")
    if not named:
        raise ConfigError(f"{run / 'run.json'}: does not say where the data of the run is; name its prepared directory")
    for directory in (Path(named).expanduser(), run / named):
        if (directory / "manifest.json").is_file():
            return directory
    raise ConfigError(
        f"{named}: the prepared data of {run} is no longer there; prepare it again with shardtune prepare"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the data again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: must hold a JSON object; prepare the data again")
    return found


def raw_document(prepared: Entry, split: str, index: int) -> dict[str, Any] | None:
    """The row of `documents.arrow` that sequence `index` was made from; None where the data set keeps no rows."""
    data = prepared.split(split)
    if data.documents is None or not (prepared.directory / DOCUMENTS).is_file():
        return None
    from trainer.data.store.documents import DocumentTable

    return DocumentTable(prepared.directory).row(int(data.documents[index]))


def find(prepared: Entry, split: str, text: str) -> np.ndarray:
    """Sequences of a split whose document holds `text`, whatever its case: int64, in order.

    Searches the texts and labels of `documents.arrow`, batch by batch. Raises DataError where the data set has none.
    """
    path, data = prepared.directory / DOCUMENTS, prepared.split(split)
    if data.documents is None or not path.is_file():
        raise DataError(f"--find: {path} is not there, so texts cannot be searched; prepare the data again")
    import pyarrow as pa
    import pyarrow.compute as pc

    hits, first = [np.zeros(0, np.int64)], 0
    try:
        for batch in pa.ipc.open_stream(pa.memory_map(str(path))):
            found = np.zeros(batch.num_rows, bool)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if name in ("prompt", "completion", "text", "label", "tools"):
                    found |= _holds(pc, column, text)
                elif name in ("messages", "chosen", "rejected"):
                    turns = pc.list_flatten(column)
                    said = ("content", "reasoning_content", "tool_calls")
                    inside = np.logical_or.reduce([_holds(pc, pc.struct_field(turns, key), text) for key in said])
                    found[pc.list_parent_indices(column).to_numpy(zero_copy_only=False)[inside]] = True
            hits.append(np.flatnonzero(found) + first)
            first += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the data again") from error
    return np.flatnonzero(np.isin(data.documents, np.concatenate(hits))).astype(np.int64)


def _holds(pc: Any, column: Any, text: str) -> np.ndarray:
    """bool [n]: whether each text holds `text`; nothing is held by null."""
    return np.asarray(pc.fill_null(pc.match_substring(column, text, ignore_case=True), False))


def load_tokenizer(prepared: Entry, path: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the data set, or the one at `path`. Local files only.

    Raises ConfigError where there is none, or where its vocabulary has another size than the data was prepared with.
    """
    about = prepared.manifest.get("tokenizer") or {}
    where = path or about.get("path") or about.get("name")
    if not where:
        raise ConfigError("--tokenizer: the data set does not name its tokenizer; give the directory of the model")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(str(where), local_files_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"--tokenizer {where}: cannot be loaded ({reason}); give the directory of the model"
        ) from error
    size, wanted = len(tokenizer), about.get("vocab_size")
    if wanted is not None and wanted not in (size, tokenizer.vocab_size):
        raise ConfigError(
            f"--tokenizer {where}: has {size} tokens, the data was prepared with one of {wanted}; give that one"
        )
    return tokenizer
