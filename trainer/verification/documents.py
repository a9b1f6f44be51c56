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
"""Ids below it are a small copy's special tokens: padding, begin and end."""
LONGEST_PROMPT = LONGEST_ANSWER = 20
MAX_LENGTH = 64
"""Tokens of a pack."""
LABELS = ("first", "second", "third")
"""Labels of drawn texts, if the settings name none."""


def write_documents(
    directory: Path,
    data_spec: DataSpec,
    num_documents: int,
    *,
    vocabulary_size: int,
    num_labels: int,
    multi_label: bool,
    must_learn: bool,
) -> None:
    """Write random documents of the objective's kind as a store into the new `directory`, for the compared steps to train on.

    `data_spec`: how many sequences a document of the objective has, and with which marks (numbers such as its label).
    `multi_label`: a document may have several labels. `must_learn`: every document has a target. Raises OSError if that fails.
    """
    # A label is drawn as one number; with several labels a document, it is a bit mask of them.
    num_label_values = 1 << num_labels if multi_label else num_labels
    samples: list[Sample] = []
    generator = np.random.default_rng(SEED)
    for index in range(num_documents):
        samples += _random_document_sequences(
            generator, data_spec, index, vocabulary_size, num_label_values, must_learn
        )
    sequences = Sequences.from_samples(samples, data_spec.counts)
    zeros = np.zeros(len(samples), np.int64)
    sequences.columns |= {"document": np.arange(len(samples)), "source": zeros, "ended": zeros}
    directory.mkdir(parents=True)
    store = StoreWriter(directory)
    store.append(sequences)
    store.finish()
    manifest = {"sources": ["drawn"], "fingerprint": "drawn", "documents": num_documents}
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def open_documents(directory: Path, label_names: list[str] | None) -> PreparedData:
    """The random documents, opened once more for each step: what one step attaches to them is not seen by another."""
    train = TokenDataset.open(directory)
    return PreparedData(train=train, evaluation=None, directory=directory, report={}, label_names=label_names)


def _random_document_sequences(
    generator: np.random.Generator,
    data_spec: DataSpec,
    index: int,
    vocabulary_size: int,
    num_label_values: int,
    must_learn: bool,
) -> Iterator[Sample]:
    """Draw the sequences of one random document: a prompt with one answer, or with two of which the second is the rejected one.

    Answers are supervised. Unless `must_learn`, one document in five has no target at all, and in one in five the prompt is
    supervised as well: both occur in training data. `index`: number of the document, which decides that, and whether it is
    desirable or a replay.
    """
    prompt = generator.integers(FIRST_TOKEN, vocabulary_size, generator.integers(1, LONGEST_PROMPT + 1))
    for answer_index in range(data_spec.sequences_per_document):
        answer = generator.integers(FIRST_TOKEN, vocabulary_size, generator.integers(1, LONGEST_ANSWER + 1))
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        supervised = np.arange(len(ids)) >= len(prompt)
        if not must_learn and index % 5 == 2:
            supervised[:] = False
        elif not must_learn and index % 5 == 4:
            supervised[1:] = True
        marks: dict[str, float] = {}
        if REJECTED in data_spec.marks:
            marks[REJECTED] = answer_index
        if DESIRABLE in data_spec.marks:
            marks[DESIRABLE] = int(index % 3 != 0)
        if LABEL in data_spec.marks:
            marks[LABEL] = int(generator.integers(num_label_values))
        if REPLAY in data_spec.marks:
            marks[REPLAY] = int(index % 4 == 0)
        yield Sample(ids, supervised, marks)
