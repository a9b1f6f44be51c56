"""Settings of data preparation and batching layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class DataFormat(StrEnum):
    """How a row is read. `auto` recognises it from the first row's columns."""

    auto = "auto"
    messages = "messages"
    prompt_completion = "prompt_completion"
    text = "text"
    labelled = "labelled"


class OverLength(StrEnum):
    """What happens to a document longer than `data.max_length`."""

    drop = "drop"
    truncate = "truncate"
    fail = "fail"


class Layout(StrEnum):
    """How the documents of a micro-batch lie in memory."""

    auto = "auto"
    padding_free = "padding_free"
    padded = "padded"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the training data is and how it becomes tokens."""

    path: Any = None
    """Training files: JSON, JSONL or CSV; a file, a directory, a glob, or a list of these."""
    eval_path: Any = None
    """Evaluation files, in the same forms as `data.path`."""
    eval_share: float = 0.0
    """Share of the training documents held out for evaluation when `data.eval_path` is not given, 0 to 0.5."""
    format: DataFormat = DataFormat.auto
    """How rows are read: `messages`, `prompt_completion`, `text`, `labelled`, or `auto`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames columns before reading, as {expected name: name in the file}."""
    max_length: int = 2048
    """Longest document in tokens."""
    over_length: OverLength = OverLength.truncate
    """Longer documents are dropped, truncated at the end, or fail the run."""
    packing: bool = False
    """Fill rows of `data.max_length` tokens with whole documents; a pack then counts as one sample of the batch."""
    layout: Layout = Layout.auto
    """`padding_free` concatenates documents; `padded` pads rows; `auto` takes the first where the model allows it."""
    shuffle: bool = True
    """Draw a new order each epoch from the seed; `false` keeps the order of the files."""
    cache_dir: str = "~/.cache/shardtune/data"
    """Directory of prepared data sets, named by fingerprint."""
    max_documents: int | None = None
    """Keep at most this many training documents (the first of the order of the files)."""
    min_supervised_share: float = 0.001
    """Refuse to train when a smaller share of the tokens is supervised."""
