"""Stores made of samples, without a preparation."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.document import Document
from trainer.data.store.documents import DOCUMENTS_FILE, document_schema, to_record_batch
from trainer.data.store.sequences import Sample, Sequences, StoreWriter


def write(
    directory: Path, samples: Iterable[Sample], counts: Callable[[Sample], dict[str, float]], manifest: dict[str, Any]
) -> None:
    """Write samples as a store of their own into `directory`, which must not exist: a document each, of one source."""
    import pyarrow as pa

    directory.mkdir(parents=True)
    store, sequences = StoreWriter(directory), Sequences.from_samples(list(samples), counts)
    number = len(sequences.lengths)
    none = np.zeros(number, np.int64)
    sequences.columns |= {"document": np.arange(number), "source": none, "ended": none}
    store.append(sequences)
    store.finish()
    with pa.ipc.new_stream(str(directory / DOCUMENTS_FILE), document_schema()) as table:
        table.write_batch(to_record_batch([Document("made", line, text="") for line in range(1, number + 1)]))
    about = {"sources": ["data"], **manifest, "documents": number}
    (directory / "manifest.json").write_text(json.dumps(about, default=str))
