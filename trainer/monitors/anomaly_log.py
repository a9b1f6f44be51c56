"""What is told of a step that stands out: on the screen, and in `events.jsonl` with the documents it was taken on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strategies.errors import StorageError
from trainer.data.batches.loader import StepLoader
from trainer.data.store.documents import DocumentTable, schema
from trainer.monitors.anomalies import Outlier
from trainer.monitors.guard_config import DONE
from trainer.reporting.jsonl import json_text

EVENTS = "events.jsonl"
SHOWN = 4
"""Documents that are named on the screen."""
PLACE = ("source", "file", "line")


class Told:
    """Tells of outliers; for rank 0 only. Errors: StorageError where the file cannot be written."""

    def __init__(self, run_dir: Path, data: Path, loader: StepLoader, say: Callable[[str], None]) -> None:
        self.path, self.data, self.loader, self.say = run_dir / EVENTS, data, loader, say

    def __call__(self, outlier: Outlier) -> None:
        rows = self.loader.documents(outlier.first_sample)
        table = DocumentTable(self.data) if rows else None
        documents = [] if table is None else [_document(table, row) for row in rows]
        places = self.loader.order.places(outlier.first_sample, self.loader.share.global_batch)
        event = {"event": "outlier", "time": time.time(), **asdict(outlier), "places": places, "documents": documents}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error}); free space") from error
        self.say(f"warning: {self._text(outlier, places, documents)}")

    def _text(self, outlier: Outlier, places: list[tuple[int, int]], documents: list[dict[str, Any]]) -> str:
        far = " and ".join(
            f"{name} {value:.4g} ({outlier.scores[name]:.1f} standard deviations above the median)"
            for name, value in outlier.values.items()
        )
        named = ", ".join(f"{each['file']}:{each['line']}" for each in documents[:SHOWN])
        more = f" and {len(documents) - SHOWN} more" if len(documents) > SHOWN else ""
        stands = "stands" if len(outlier.values) == 1 else "stand"
        first, last = places[0][0], sum(places[-1]) - 1
        return (
            f"step {outlier.step}: {far} {stands} out; {DONE[outlier.action]}. Samples {first} to {last} of the "
            f"run's order{f': {named}{more}' if named else ''} ({EVENTS})"
        )


def _document(table: DocumentTable, row: int) -> dict[str, Any]:
    """Where a document came from, and the hash of what it says: of its fields as JSON, keys sorted, without what is empty."""
    document = table.document(row)
    place, said = ({key: getattr(document, key) for key in keys} for keys in (PLACE, set(schema().names) - set(PLACE)))
    text = json.dumps({key: value for key, value in said.items() if value not in (None, "")}, sort_keys=True)
    return {"row": row, **place, "sha256": hashlib.sha256(text.encode()).hexdigest()}
