"""Preparation: files in, a prepared data set out, once for every distinct input.

Refuses data that would teach nothing: no documents, no supervised token, a share of them below
`data.min_supervised_share`. Every document dropped or cut is counted, the first few with file and line.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.errors import ConfigError, DataError
from trainer.data.audit import TROUBLES
from trainer.data.cache import DONE, build_once, fingerprint
from trainer.data.dataset import Sample, TokenDataset, write
from trainer.data.formats import Document, documents
from trainer.data.rows import expand, read_rows
from trainer.data.settings import DataConfig, OverLength
from trainer.data.tokenize import Encoder, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""Raised whenever the code would make other tokens or masks out of the same input."""
EXAMPLES = 5
"""How many file:line examples the report keeps of each kind of trouble."""


@dataclass(slots=True)
class Prepared:
    """The result: data sets opened read-only, and what preparation saw."""

    train: TokenDataset
    evaluation: TokenDataset | None
    directory: Path
    report: dict[str, Any]
    label_names: list[str] | None


@dataclass(slots=True)
class _Trouble:
    """How often something happened, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(where)


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    counts: Callable[[Sample], dict[str, int]],
    seed: int,
    label_names: list[str] | None = None,
) -> Prepared:
    """Prepare the data of a run, or open what an earlier call with the same inputs made.

    The entry in `config.cache_dir` is named by a fingerprint over the bytes of the sources, the tokenizer with its chat
    template, the options and the objective's count function (by name). `seed` decides the held-out share. No
    collective; several processes may call at once. Raises ConfigError, DataError, StorageError.
    """
    began = time.perf_counter()
    if config.path is None or config.path == "":
        raise ConfigError(
            "data.path is not set; name the training data: a .json, .jsonl or .csv file, a directory or a glob"
        )
    if config.eval_path is not None and config.eval_share:
        raise ConfigError(f"data.eval_share={config.eval_share} and data.eval_path are both set; keep one of them")
    if not 0 <= config.eval_share <= 0.5:
        raise ConfigError(f"data.eval_share={config.eval_share} must lie between 0 and 0.5")
    files = {"train": expand(config.path, "data.path")}
    if config.eval_path is not None:
        files["eval"] = expand(config.eval_path, "data.eval_path")
    options = {
        "version": VERSION,
        "format": config.format.value,
        "columns": dict(config.columns),
        "max_length": config.max_length,
        "over_length": config.over_length.value,
        "max_documents": config.max_documents,
        "min_supervised_share": config.min_supervised_share,
        "eval_share": config.eval_share,
        "seed": seed if config.eval_share else None,
        "label_names": label_names,
        "counts": f"{counts.__module__}.{counts.__qualname__}",
    }
    name = fingerprint(files, tokenizer, options)
    directory = Path(config.cache_dir).expanduser() / name[:32]

    def build(target: Path) -> None:
        _Preparation(config, tokenizer, counts, seed, label_names, files, options, name).run(target)

    made = build_once(directory, build)
    manifest = json.loads((directory / DONE).read_text())
    report = {**manifest["report"], "cached": not made, "seconds": round(time.perf_counter() - began, 3)}
    evaluation = TokenDataset.open(directory / "eval") if (directory / "eval").is_dir() else None
    return Prepared(TokenDataset.open(directory / "train"), evaluation, directory, report, manifest["label_names"])


@dataclass(slots=True)
class _Preparation:
    """One run through the data, into a directory that is published afterwards."""

    config: DataConfig
    tokenizer: PreTrainedTokenizerFast
    counts: Callable[[Sample], dict[str, int]]
    seed: int
    label_names: list[str] | None
    files: dict[str, list[Path]]
    options: dict[str, Any]
    fingerprint: str

    def run(self, target: Path) -> None:
        held_out = self._scan()
        encoder = Encoder(self.tokenizer, self.label_names)
        report = {"train": self._split(target, "train", self._train_documents(held_out, keep=False), encoder)}
        if "eval" in self.files:
            report["eval"] = self._split(target, "eval", self._documents("eval"), encoder)
        elif held_out is not None:
            report["eval"] = self._split(target, "eval", self._train_documents(held_out, keep=True), encoder)
        manifest = {
            "fingerprint": self.fingerprint,
            "files": {split: [str(path) for path in paths] for split, paths in self.files.items()},
            "options": self.options,
            "label_names": self.label_names,
            "report": report,
        }
        (target / DONE).write_text(json.dumps(manifest, indent=1))

    def _documents(self, split: str) -> Iterator[Document]:
        found = documents(read_rows(self.files[split]), self.config.format, self.config.columns)
        return islice(found, self.config.max_documents) if split == "train" else found

    def _train_documents(self, held_out: np.ndarray | None, *, keep: bool) -> Iterator[Document]:
        """The training files' documents: those held out (`keep`) or the others."""
        for number, document in enumerate(self._documents("train")):
            if held_out is None or bool(held_out[number]) is keep:
                yield document

    def _scan(self) -> np.ndarray | None:
        """A first pass, only where it is needed: which documents are held out (bool [N]), and the label names.

        The draw goes by content: copies of a document fall on the same side, and its place in the files is no matter.
        """
        share = self.config.eval_share
        first = next(self._documents("train"), None)
        learn_labels = self.label_names is None and first is not None and first.label is not None
        if not share and not learn_labels:
            return None
        keys, labels = [], set()
        for document in self._documents("train"):
            content = json.dumps([document.messages, document.texts(), document.label])
            digest = hashlib.blake2b(content.encode(), digest_size=8, key=str(self.seed).encode()[:64]).digest()
            keys.append(int.from_bytes(digest, "big"))
            labels.add(document.label)
        if learn_labels:
            self.label_names = _sorted_labels({label for label in labels if label is not None})
        if not share:
            return None
        draws = np.array(keys, dtype=np.uint64)
        wanted = max(1, round(share * len(draws)))
        held_out: np.ndarray = draws <= np.partition(draws, wanted - 1)[wanted - 1]
        if held_out.all():
            raise DataError(
                f"data.eval_share={share} leaves no training document: {len(draws)} documents, "
                f"{len(np.unique(draws))} of them different; add data or set data.eval_share=0"
            )
        return held_out

    def _split(self, target: Path, split: str, source: Iterable[Document], encoder: Encoder) -> dict[str, Any]:
        """Tokenise and write one split; returns its report."""
        trouble = {name: _Trouble() for name in TROUBLES}
        ended = 0

        def samples() -> Iterator[Sample]:
            nonlocal ended
            for document, raw in encoder.encode(source):
                sample = self._fit(document, raw, encoder.tail(document), trouble)
                if sample is None:
                    continue
                if encoder.has_control_tokens(document):
                    trouble["control_tokens"].add(document.where)
                learned = sample.input_ids[sample.supervised]
                ended += bool(len(learned)) and int(learned[-1]) in encoder.end_ids
                yield sample

        manifest: dict[str, Any] = {"fingerprint": f"{self.fingerprint}/{split}"}
        write(target / split, samples(), self.counts, manifest)
        data = TokenDataset.open(target / split)
        report = _describe(data, trouble, ended, encoder)
        self._check(split, data, report)
        return report

    def _fit(self, document: Document, sample: Sample, tail: int, trouble: dict[str, _Trouble]) -> Sample | None:
        """Apply the length policy; None for a document that is dropped."""
        length, limit = len(sample.input_ids), self.config.max_length
        if length > limit:
            if self.config.over_length is OverLength.fail:
                raise DataError(
                    f"{document.where}: {length} tokens are more than data.max_length={limit}; raise it, or set "
                    "data.over_length to truncate or drop"
                )
            if self.config.over_length is OverLength.drop:
                trouble["dropped_too_long"].add(document.where)
                return None
            sample = truncate(sample, limit, tail)
        if sample.label is None and not sample.supervised.any():
            trouble["dropped_unsupervised"].add(document.where)
            return None
        if length > limit:
            trouble["truncated"].add(document.where)
        return sample

    def _check(self, split: str, data: TokenDataset, report: dict[str, Any]) -> None:
        """Law 5: refuse what would teach nothing."""
        key = "data.eval_path" if split == "eval" and "eval" in self.files else "data.path"
        if not len(data):
            reasons = ", ".join(f"{name} {report[name]['count']}" for name in report if name.startswith("dropped"))
            raise DataError(
                f"{key}: no document of the {split} split has anything to learn ({reasons}); "
                f"raise data.max_length={self.config.max_length} or mend the data"
            )
        if data.labels is None and report["supervised_share"] < self.config.min_supervised_share:
            raise DataError(
                f"{key}: only {report['supervised_share']:.4%} of the {split} tokens are supervised, less than "
                f"data.min_supervised_share={self.config.min_supervised_share}; mend the data or lower the limit"
            )


def _describe(data: TokenDataset, trouble: dict[str, _Trouble], ended: int, encoder: Encoder) -> dict[str, Any]:
    lengths = data.lengths
    tokens, supervised = int(lengths.sum()), int(data.num_supervised.sum())
    doubled = 0
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and len(data):
        starts = data.offsets[:-1][lengths > 1]
        doubled = int(((data.tokens[starts] == bos) & (data.tokens[starts + 1] == bos)).sum())
    quantiles = np.quantile(lengths, (0.5, 0.9)).round().astype(int).tolist() if len(data) else [0, 0]
    return {
        "documents": len(data),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_share": supervised / max(tokens, 1),
        "labelled": data.labels is not None,
        "length_p50": quantiles[0],
        "length_p90": quantiles[1],
        "length_max": int(lengths.max()) if len(data) else 0,
        "ends_supervised": ended,
        "doubled_bos": doubled,
        **{name: {"count": item.count, "examples": item.examples} for name, item in trouble.items()},
    }


def _sorted_labels(labels: set[str]) -> list[str]:
    """By number if all are whole numbers, else by name."""
    numeric = all(label.lstrip("-").isdecimal() for label in labels)
    return sorted(labels, key=int) if numeric else sorted(labels)
