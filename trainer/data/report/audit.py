"""The audit of a prepared data set: made by `describe`, written to `audit.json`, and read back by the page and the card.

One form for the writer and the readers: a file with a key too many, a key too few or a value of another type is refused,
so that no page can say 0 of something that stands elsewhere in the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from strategies.errors import DataError
from trainer.data.store.sequences import LABEL, exact_sum
from trainer.data.transforms.privacy.rule import NEEDS_PRESIDIO, NOT_ASKED

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from trainer.data.store.sequences import TokenDataset

SCHEMA = 4
AUDIT = "audit.json"
DOCUMENT_LEAK_KINDS = ("exact", "normalized", "near")
"""Kinds of leakage that are a document seen in training; a shared prompt with another answer is none by itself."""
_REPORTED_FIELDS = ("conserved", "flow", "duplicates", "leakage", "groups", "privacy", "unread_columns", "samples")
"""Fields of an audit that a run records, if they are not empty. Its settings and files are recorded elsewhere."""


class _StrictRecord:
    """Part of the audit; pydantic checks what is read."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass(kw_only=True, slots=True)
class StageReport(_StrictRecord):
    """One stage of preparation: documents that it took out and that it noted (and kept), by reason, with first places."""

    stage: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    noted: dict[str, int]
    examples: dict[str, list[str]]


@dataclass(kw_only=True, slots=True)
class SourceFile(_StrictRecord):
    """One input file; size and digest are not known of a data set of the hub."""

    path: str
    rows: int | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(kw_only=True, slots=True)
class Source(_StrictRecord):
    """One source, or a held-out split's files. `kept` became documents, of which the choice of splits may drop some yet."""

    name: str
    split: str
    format: str
    files: list[SourceFile]
    rows: int
    kept: int
    tokens: int
    supervised_tokens: int
    weight: float | None
    licence: str | None


@dataclass(kw_only=True, slots=True)
class Histogram(_StrictRecord):
    """`counts[i]` values lie from `edges[i]` to `edges[i + 1]`."""

    edges: list[float]
    counts: list[int]


@dataclass(kw_only=True, slots=True)
class Split(_StrictRecord):
    """One split, lengths in tokens; `ends_supervised` counts the sequences whose end of turn is learned. `weighted_tokens` is
    the sum of the supervised tokens' weights; null where each weighs 1."""

    documents: int
    sequences: int
    tokens: int
    supervised_tokens: int
    supervised_share: float
    labelled: bool
    length_p50: int
    length_p90: int
    length_max: int
    ends_supervised: int
    doubled_bos: int
    length_histogram: Histogram
    supervised_histogram: Histogram
    turns_histogram: Histogram | None
    weighted_tokens: float | None = None


@dataclass(kw_only=True, slots=True)
class Copies(_StrictRecord):
    """Training documents that copy another, of one kind; `examples` are {"a": place, "b": place of its copy}."""

    policy: str
    documents: int
    groups: int
    examples: list[dict[str, str]]
    threshold: float | None = None
    search: dict[str, int] | None = None


@dataclass(kw_only=True, slots=True)
class Leaks(_StrictRecord):
    """Training documents that a held-out split has too, by the strictest kind; the near search of `incomplete` was cut."""

    policy: str
    train: dict[str, int]
    held_out: dict[str, int]
    examples: dict[str, list[str]]
    incomplete: int

    @property
    def num_leaked(self) -> int:
        """Number of training documents that are in the held-out split."""
        return sum(self.train[kind] for kind in DOCUMENT_LEAK_KINDS)


@dataclass(kw_only=True, slots=True)
class Groups(_StrictRecord):
    """Groups (`data.group_by`) of a split; `in_training` documents of the training data were of groups of this held-out split."""

    documents: int
    groups: int
    in_training: int


@dataclass(kw_only=True, slots=True)
class PersonalType(_StrictRecord):
    """Findings of one type of personal data, with place and mask of the first few."""

    findings: int
    documents: int
    examples: list[str]


@dataclass(kw_only=True, slots=True)
class PersonalData(_StrictRecord):
    """The search for personal data; documents by source."""

    mode: str
    preset: str
    engine: str
    looked_for: list[str]
    """Types."""
    not_looked_for: dict[str, str]
    """Every other known type, with the reason."""
    documents_scanned: dict[str, int]
    documents_with_findings: dict[str, int]
    types: dict[str, PersonalType]

    @property
    def looked_for_names(self) -> bool:
        """Whether names of people, places or organisations were looked for."""
        return bool(NEEDS_PRESIDIO & {*self.looked_for})

    @property
    def missed_types(self) -> dict[str, str]:
        """Types that were asked for and could not be looked for, with the reason."""
        return {type_: reason for type_, reason in self.not_looked_for.items() if reason != NOT_ASKED}

    @property
    def num_scanned(self) -> int:
        """Number of documents looked into, of all sources."""
        return sum(self.documents_scanned.values())

    @property
    def num_with_findings(self) -> int:
        """Number of documents with at least one finding, of all sources."""
        return sum(self.documents_with_findings.values())


@dataclass(kw_only=True, slots=True)
class DecodedSample(_StrictRecord):
    """A training sequence as text, in pieces {"text": text, "learned": whether it is learned}; with the "weight" of those that
    count for less than 1."""

    where: str
    note: str
    """What its objective says of it (chosen, rejected, a label, a verdict); empty for nothing."""
    pieces: list[dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class Audit(_StrictRecord):
    """All that preparation reports about a data set. A part is empty if no setting asked for it, or nothing was there."""

    schema: int
    created: str
    shardtune: str
    fingerprint: str
    words: dict[str, Any]
    """Settings by dotted name."""
    conserved: dict[str, int]
    """{"rows_in", "kept", "dropped"}: the first is the sum of the others."""
    flow: list[StageReport]
    quarantine: dict[str, Any]
    """{"rows", "file"}: rows that could not be used."""
    splits: dict[str, Split]
    sources: list[Source]
    unread_columns: dict[str, list[str]]
    """Columns of the files that nobody read, by source."""
    mixing: dict[str, dict[str, float | None]]
    """Of each weighted source what `batches.mixing.SourceMix.report_by_source` says."""
    labels: dict[str, dict[str, int]]
    """{"before", "after"}: training documents of each label."""
    balance: dict[str, dict[str, float | str | None]]
    """Of each group what `selection.balance.resample_groups` says."""
    duplicates: dict[str, Copies]
    leakage: dict[str, Leaks]
    """By held-out split."""
    groups: dict[str, Groups]
    """By split; empty without `data.group_by`."""
    privacy: PersonalData | None
    languages: dict[str, int]
    samples: list[DecodedSample]

    @property
    def lost_share(self) -> float:
        """Share of the rows read that is not in the data set, whatever the cause, 0 to 1."""
        return self.conserved["dropped"] / max(self.conserved["rows_in"], 1)

    @property
    def num_truncated(self) -> int:
        """Number of documents of which `data.max_length` cut something off."""
        return sum(stage.noted.get("truncated", 0) for stage in self.flow)

    def write(self, directory: Path) -> None:
        """Write `audit.json`."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)
        (directory / AUDIT).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Audit:
        """Read the audit of a prepared data set from `audit.json`. Raises DataError if the file is not exactly of this form.

        The error names the first key that is wrong: an earlier version may have written the file.
        """
        from pydantic import ValidationError

        try:
            return _audit_adapter().validate_json((directory / AUDIT).read_bytes())
        except ValidationError as error:
            # Without the input: it may be personal data.
            first_error = error.errors(include_input=False)[0]
            key = ".".join(map(str, first_error["loc"]))
            raise DataError(
                f"{directory / AUDIT}: {key}: {first_error['msg']}; it is no audit of schema {SCHEMA}: prepare the data again"
            ) from error

    def report(self) -> dict[str, Any]:
        """Choose what a run records and prints of the audit: splits by name without histograms, and `_REPORTED_FIELDS`.

        Empty fields are left out. Example: {"train": {"documents": 12, ...}, "conserved": {"rows_in": 12, ...}, "flow": [...]}.
        """
        fields = asdict(self)
        report: dict[str, Any] = {}
        for split_name, split_fields in fields["splits"].items():
            report[split_name] = {
                name: value for name, value in split_fields.items() if not name.endswith("_histogram")
            }
        for name in _REPORTED_FIELDS:
            if fields[name]:
                report[name] = fields[name]
        return report


@cache
def _audit_adapter() -> TypeAdapter[Audit]:
    """pydantic's reader of an audit; cached, because it takes longer to make than to use."""
    from pydantic import TypeAdapter

    return TypeAdapter(Audit)


def split_sizes(dataset: TokenDataset) -> dict[str, Any]:
    """Count the sizes of a split and the lengths of its sequences in tokens: the first fields of `Split`, by name.

    "weighted_tokens" is the sum of the loss weights; None if it is the number of supervised tokens, which stands there already.
    """
    lengths = dataset.lengths
    num_tokens = int(lengths.sum())
    num_supervised = int(dataset.num_supervised.sum())
    weight_sum: float = num_supervised
    if dataset.weights is not None:
        weight_sum = exact_sum(dataset.counts["loss"])
    median = percentile_90 = longest = 0
    if len(dataset):
        median, percentile_90 = np.quantile(lengths, (0.5, 0.9)).round().astype(int).tolist()
        longest = int(lengths.max())
    return {
        "documents": len(np.unique(dataset.documents)),
        "sequences": len(dataset),
        "tokens": num_tokens,
        "supervised_tokens": num_supervised,
        "supervised_share": num_supervised / max(num_tokens, 1),
        "weighted_tokens": None if weight_sum == num_supervised else weight_sum,
        "labelled": LABEL in dataset.marks,
        "length_p50": median,
        "length_p90": percentile_90,
        "length_max": longest,
    }


def make_histogram(numbers: np.ndarray, bins: int = 25, *, shares: bool = False) -> Histogram:
    """Count numbers into at most `bins` bins of equal width, and one more for outliers.

    - Whole numbers: the width of a bin is a whole number, so that every bin covers as many values as the others. There are
      outliers if the largest number is more than twice the 98th percentile: a few very long documents would otherwise push all
      others into the first bin.
    - `shares`, numbers from 0 to 1: the bins are the same in every report, so that reports can be compared.
    """
    if shares:
        return _count_into_bins(numbers, np.linspace(0, 1, bins + 1).round(4))
    lowest = percentile_98 = highest = 0
    if len(numbers):
        lowest, percentile_98, highest = map(int, np.quantile(numbers, (0, 0.98, 1)))
    has_outliers = highest > 2 * percentile_98
    end = (percentile_98 if has_outliers else highest) + 1
    width = max(1, math.ceil((end - lowest) / bins))
    edges: np.ndarray = np.arange(lowest, end + width, width)
    if has_outliers:
        edges = np.append(edges, highest + 1)
    return _count_into_bins(numbers, edges)


def _count_into_bins(numbers: np.ndarray, edges: np.ndarray) -> Histogram:
    """How many numbers lie between each edge and the next."""
    counts, _ = np.histogram(numbers, bins=edges)
    return Histogram(edges=edges.astype(float).tolist(), counts=counts.tolist())
