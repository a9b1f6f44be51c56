"""Reports steps whose loss or gradient norm stands out: on the screen, and in `events.jsonl` with their documents."""

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
MAX_DOCUMENTS = 4
"""Documents that are named on the screen."""
PLACE = ("source", "file", "line")


class AnomalyLog:
    """Called with each outlier, on rank 0 only. Errors: StorageError if the file cannot be written."""

    def __init__(self, run_dir: Path, data: Path, loader: StepLoader, print_line: Callable[[str], None]) -> None:
        """`data`: directory of the prepared data set; `print_line`: prints a line on the screen."""
        self.path = run_dir / EVENTS
        self.data = data
        self.loader = loader
        self.print_line = print_line

    def __call__(self, outlier: Outlier) -> None:
        """Append the outlier to `events.jsonl`, with the documents of its step, and print a warning that names some of them."""
        rows = self.loader.documents(outlier.first_sample)
        table = DocumentTable(self.data) if rows else None
        documents: list[dict[str, Any]] = []
        if table is not None:
            documents = [_document(table, row) for row in rows]
        places = self.loader.order.places(outlier.first_sample, self.loader.share.global_batch)
        event = {"event": "outlier", "time": time.time(), **asdict(outlier), "places": places, "documents": documents}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error}); free space") from error
        self.print_line(f"warning: {self._text(outlier, places, documents)}")

    def _text(self, outlier: Outlier, places: list[tuple[int, int]], documents: list[dict[str, Any]]) -> str:
        """The warning. `places`: where the step's samples stand in the run's order, as (first, count)."""
        clauses = []
        for name, number in outlier.values.items():
            clauses.append(f"{name} {number:.4g} ({outlier.scores[name]:.1f} standard deviations above the median)")
        scores = f"{' and '.join(clauses)} {'stands' if len(clauses) == 1 else 'stand'}"
        first_place = places[0][0]
        last_place = sum(places[-1]) - 1  # the last run of places is (first, count)
        documents_text = ""
        if documents:
            names = [f"{document['file']}:{document['line']}" for document in documents[:MAX_DOCUMENTS]]
            more = f" and {len(documents) - MAX_DOCUMENTS} more" if len(documents) > MAX_DOCUMENTS else ""
            documents_text = f": {', '.join(names)}{more}"
        return (
            f"step {outlier.step}: {scores} out; {DONE[outlier.action]}. Samples {first_place} to {last_place} of the "
            f"run's order{documents_text} ({EVENTS})"
        )


def _document(table: DocumentTable, row: int) -> dict[str, Any]:
    """Where a document came from, and the SHA-256 of its content: its fields as JSON, keys sorted, empty ones left out."""
    document = table.document(row)
    place = {key: getattr(document, key) for key in PLACE}
    content = {}
    for key in set(schema().names) - set(PLACE):
        field_value = getattr(document, key)
        if field_value not in (None, ""):
            content[key] = field_value
    text = json.dumps(content, sort_keys=True)
    return {"row": row, **place, "sha256": hashlib.sha256(text.encode()).hexdigest()}
