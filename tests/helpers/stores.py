"""Stores made of samples, without a preparation."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trainer.data.store.sequences import Sample, Sequences, StoreWriter


def write(
    directory: Path, samples: Iterable[Sample], counts: Callable[[Sample], dict[str, float]], manifest: dict[str, Any]
) -> None:
    """Write samples as a store of their own into `directory`, which must not exist."""
    directory.mkdir(parents=True)
    store = StoreWriter(directory)
    store.append(Sequences.of(list(samples), counts))
    store.finish()
    (directory / "manifest.json").write_text(json.dumps({**manifest, "documents": len(store.lengths)}, default=str))
