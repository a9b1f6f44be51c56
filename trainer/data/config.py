"""Settings of data preparation and batching layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any

from trainer.data.batches.mixing import MixingConfig
from trainer.data.choose.balance import BalanceConfig
from trainer.data.choose.duplicates import DuplicatesConfig
from trainer.data.choose.leakage import LeakageConfig
from trainer.data.report.card import CardConfig
from trainer.data.stages.bias import BiasConfig
from trainer.data.stages.checks import ChecksConfig
from trainer.data.stages.cleaning import CleaningConfig
from trainer.data.stages.decontamination import DecontaminationConfig
from trainer.data.stages.filters import FilterConfig
from trainer.data.stages.privacy.config import PrivacyConfig
from trainer.data.tokens.template import LearnConfig


class DataFormat(StrEnum):
    """How a row is read. `auto` recognises it from the first row's columns."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    pair = "pair"
    text = "text"
    labelled = "labelled"
    preference = "preference"
    thumbs = "thumbs"


class OverLength(Enum):  # no StrEnum: a member `split` would hide the method of strings
    """What happens to a document longer than `data.max_length`."""

    drop = "drop"
    truncate = "truncate"
    truncate_left = "truncate_left"
    split = "split"
    fail = "fail"


class Layout(StrEnum):
    """How the documents of a micro-batch lie in memory."""

    auto = "auto"
    padding_free = "padding_free"
    padded = "padded"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One named source of training data."""

    path: Any = None
    """Its files, as in `data.path`, or `hub:<name>` for a data set of the hub."""
    weight: float | None = None
    """Its share of what is trained on, relative to the other sources' weights; null for all sources mixes nothing."""
    format: DataFormat = DataFormat.auto
    """How its rows are read; `auto` takes `data.format`, or recognises it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames its columns, in place of `data.columns`."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set: a tag or a commit."""
    licence: str | None = None
    """Licence, for the data card."""
    replay: bool = False
    """General text that keeps the model as it is beside what is learned; see `objective.forgetting`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the training data is, what is done to it, and how it becomes tokens."""

    path: Any = None
    """Training files (JSON, JSONL, CSV, TSV, Parquet, Arrow, text; also compressed), a directory, a glob, or a list of
    these; or `hub:<name>`."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several named sources in place of `data.path`, each with its own files, format and weight."""
    eval_path: Any = None
    """Evaluation files, in the same forms as `data.path`."""
    eval_share: float = 0.0
    """Share of the training documents held out for evaluation when `data.eval_path` is not given, 0 to 0.5."""
    test_path: Any = None
    """Test files: prepared and checked for leakage, never trained or selected on."""
    test_share: float = 0.0
    """Share of the training documents held out for testing when `data.test_path` is not given, 0 to 0.5."""
    format: DataFormat = DataFormat.auto
    """How rows are read; `auto` recognises it from the first row."""
    columns: dict[str, str] = field(default_factory=dict)
    """Renames columns before reading, as {expected name: name in the file}; a dot reaches into an object."""
    ignore_columns: list[str] = field(default_factory=list)
    """Columns, or keys of turns, that are knowingly not read: they are neither named nor refused."""
    remote: bool = False
    """Whether paths may be addresses (`s3://`, `gs://`, `hf://`, `https://` and so on), read over the network."""
    max_bad_share: float = 0.0
    """Most rows that may be unreadable or quarantined, as a share of all; the run fails above it."""
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    """What is checked in every document, and what happens then."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """What is mended in texts."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which documents are dropped for their length, language or quality."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Copies and near copies."""
    leakage: LeakageConfig = field(default_factory=LeakageConfig)
    """Training documents that are also in the held-out splits."""
    decontamination: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Training documents that repeat given evaluation files."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Personal data."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Resampling of the training documents to target shares."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    """How the weights of `data.sources` are meant."""
    bias: BiasConfig = field(default_factory=BiasConfig)
    """Counts of what is said about groups of people."""
    languages: bool = False
    """Tell the languages of the training documents in the audit, judged on at most 1,000 of them."""
    learn: LearnConfig = field(default_factory=LearnConfig)
    """Which turns of a conversation are learned."""
    max_length: int = 2048
    """Longest document in tokens."""
    over_length: OverLength = OverLength.truncate
    """What happens to longer documents."""
    packing: bool = False
    """Fill rows of `data.max_length` tokens with whole documents; a pack then counts as one sample of the batch."""
    layout: Layout = Layout.auto
    """`padding_free` concatenates documents; `padded` pads rows; `auto` takes the first where the model allows it."""
    shuffle: bool = True
    """Draw a new order each epoch from the seed; `false` keeps the order of the files."""
    cache_dir: str = "~/.cache/shardtune/data"
    """Directory of prepared data sets, named by fingerprint."""
    workers: int = 0
    """Processes that prepare data; 0 takes the cores this job may use. The result does not depend on it."""
    max_documents: int | None = None
    """Read at most this many training rows (the first of the order of the files)."""
    min_supervised_share: float = 0.001
    """Refuse to train when a smaller share of the tokens is supervised."""
    card: CardConfig = field(default_factory=CardConfig)
    """What only people know about the data, for its data card."""
