"""Data sets of the Hugging Face hub, through the `datasets` library: from the hub, or from its cache when offline."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import DataError
from trainer.data.document import Rejected
from trainer.data.read.columnar import BATCH, table_rows
from trainer.data.read.row import Row

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hub:"
"""What a data path begins with that names a data set of the hub."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_name(value: str, key: str) -> str:
    """The name after `hub:`. Raises DataError where it cannot be one."""
    name = value.removeprefix(PREFIX)
    if not _NAME.fullmatch(name):
        raise DataError(f"{key}={value!r} is no name of a hub data set; write hub:NAME or hub:ORGANISATION/NAME")
    return name


def open_hub(
    name: str,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    wanted: Collection[str] | None = None,
) -> Iterator[Row | Rejected]:
    """Rows of one split of a hub data set, numbered from 1, with the columns `wanted`; values as in `columnar`.

    `split` may be left out where there is only one. Raises DataError that says what to do: offline, missing, gated,
    several configs or splits.
    """
    dataset = load(name, config, split, revision)
    place = "/".join(part for part in (f"{PREFIX}{name}", config, str(dataset.split or split or "")) if part)
    taken = [name for name in dataset.column_names if wanted is None or name in wanted] or dataset.column_names
    others = tuple(name for name in dataset.column_names if name not in taken)
    tables = dataset.select_columns(taken).with_format("arrow").iter(BATCH)
    batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
    return table_rows(batches, place, others=others)


def identity(name: str, config: str | None, split: str | None, revision: str | None) -> str:
    """What the fingerprint of prepared data must hold instead of bytes: the name, the version loaded and its size."""
    dataset = load(name, config, split, revision)
    version = dataset.version if dataset.version is not None else ""
    parts = (name, config, dataset.split or split, revision, version, dataset._fingerprint, dataset.num_rows)
    return ":".join("" if part is None else str(part) for part in parts)


def load(name: str, config: str | None, split: str | None, revision: str | None) -> Dataset:
    """The data set as `datasets` loads it, one split. Raises DataError."""
    import datasets

    where = f"{PREFIX}{name}"
    if Path(name).exists():
        raise DataError(
            f"{where}: a local {name} exists here and would be read instead; to read it, write ./{name} as the path, "
            "otherwise start in another directory"
        )
    quiet = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(name, config, split=split, revision=revision, streaming=False)
    except Exception as error:
        raise _failed(where, config, split, revision, error) from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) != 1:
        raise DataError(f"{where} has the splits {', '.join(loaded)}; name one of them")
    return next(iter(loaded.values()))


def _failed(where: str, config: str | None, split: str | None, revision: str | None, error: Exception) -> DataError:
    """The cause in a line, and what to do about it."""
    text = str(error).strip()
    cause = text.splitlines()[0][:300] if text else type(error).__name__
    kinds = {kind.__name__ for kind in type(error).__mro__}
    asked = ", ".join(
        f"{word} {value!r}" for word, value in (("config", config), ("split", split), ("revision", revision)) if value
    )
    offline = any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in _OFFLINE)
    if "DatasetNotFoundError" in kinds and not offline:
        remedy = "check the name; for a private or gated data set, log in with a token that has access (HF_TOKEN)"
    elif "onfig" in cause and "ValueError" in kinds and "ConnectionError" not in kinds:
        remedy = f"name one of its configs; the message says which there are: {' '.join(text.split())[:600]}"
    elif "split" in cause.lower():
        remedy = "name a split that it has"
    elif "scripts are no longer supported" in text:
        remedy = (
            "it needs code from the hub, which is not run; use a copy converted to Parquet (often refs/convert/parquet)"
        )
    elif offline or kinds & {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException", "Timeout"}:
        remedy = (
            "no hub was reached and the data set is not in the local cache; load it once on a machine with internet "
            "(the cache is HF_HOME), or download its files and give their path"
        )
    else:
        remedy = "download its files and give their path if this goes on"
    return DataError(f"{where}{f' ({asked})' if asked else ''} cannot be loaded: {cause}; {remedy}")


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
