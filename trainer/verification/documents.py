"""Draws the documents of a verification: uneven, of the objective's kind, the same for a seed on every rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.data.objective_spec import DataSpec
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import LABEL, REPLAY, Sample, Sequences, StoreWriter, TokenDataset
from trainer.objectives.kto import DESIRABLE
from trainer.objectives.pairs import REJECTED

SEED = 0
FIRST_TOKEN = 4
"""Below it lie the tokens that a small copy keeps for itself: padding, begin and end."""
LONGEST_PROMPT = LONGEST_ANSWER = 20
MAX_LENGTH = 64
"""Tokens of a pack."""
LABELS = ("first", "second", "third")
"""Labels of drawn texts, if the settings name none."""


def write_documents(
    directory: Path,
    data_spec: DataSpec,
    number: int,
    *,
    vocabulary: int,
    labels: int,
    multi_label: bool,
    must_learn: bool,
) -> None:
    """Write `number` drawn documents as a store into `directory`, which must not exist.

    `must_learn`: every document has a target. `labels`: how many there are. Errors: OSError.
    """
    samples: list[Sample] = []
    generator = np.random.default_rng(SEED)
    for index in range(number):
        samples += _document(
            generator, data_spec, index, vocabulary, labels if not multi_label else 1 << labels, must_learn
        )
    sequences = Sequences.of(samples, data_spec.counts)
    none = np.zeros(len(samples), np.int64)
    sequences.columns |= {"document": np.arange(len(samples)), "source": none, "ended": none}
    directory.mkdir(parents=True)
    store = StoreWriter(directory)
    store.append(sequences)
    store.finish()
    manifest = {"sources": ["drawn"], "fingerprint": "drawn", "documents": number}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def open_documents(directory: Path, label_names: list[str] | None) -> PreparedData:
    """The drawn documents, opened anew: what one comparison attaches to them, another does not see."""
    train = TokenDataset.open(directory)
    return PreparedData(train=train, evaluation=None, directory=directory, report={}, label_names=label_names)


def _document(
    generator: np.random.Generator, data_spec: DataSpec, index: int, vocabulary: int, labels: int, must_learn: bool
) -> Iterator[Sample]:
    """The sequences of one document: a prompt with one answer, or with two of which the second was rejected.

    Some documents are learned whole, and one in five not at all.
    """
    prompt = generator.integers(FIRST_TOKEN, vocabulary, generator.integers(1, LONGEST_PROMPT + 1))
    for number in range(data_spec.sequences_per_document):
        answer = generator.integers(FIRST_TOKEN, vocabulary, generator.integers(1, LONGEST_ANSWER + 1))
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        supervised = np.arange(len(ids)) >= len(prompt)
        if not must_learn and index % 5 == 2:
            supervised[:] = False
        elif not must_learn and index % 5 == 4:
            supervised[1:] = True
        marks: dict[str, float] = {}
        if REJECTED in data_spec.marks:
            marks[REJECTED] = number
        if DESIRABLE in data_spec.marks:
            marks[DESIRABLE] = int(index % 3 != 0)
        if LABEL in data_spec.marks:
            marks[LABEL] = int(generator.integers(labels))
        if REPLAY in data_spec.marks:
            marks[REPLAY] = int(index % 4 == 0)
        yield Sample(ids, supervised, marks)
