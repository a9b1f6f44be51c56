"""Reports steps whose loss or gradient norm stands out: on the screen, and in `events.jsonl` with their documents."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from strategies.errors import StorageError
from trainer.data.batches.loader import BatchShare
from trainer.data.batches.order import Order
from trainer.data.store.documents import DocumentTable, document_schema
from trainer.monitors.anomalies import Outlier
from trainer.monitors.guard_config import OUTCOME_TEXT_BY_ACTION, outlier_text
from trainer.reporting.jsonl import json_text

EVENTS_FILE = "events.jsonl"
MAX_DOCUMENTS = 4
"""Documents that are named on the screen."""
ORIGIN_FIELDS = ("source", "file", "line")
"""Fields of a document that say where it came from."""


class SampledDocuments(Protocol):
    """Knows which documents a step consumes."""

    @property
    def order(self) -> Order: ...

    @property
    def share(self) -> BatchShare: ...

    def documents(self, first_sample: int) -> list[int]:
        """Rows of `documents.arrow` of what begins after `first_sample` consumed samples: a global batch, or a round."""


class AnomalyLog:
    """Called with each outlier, on rank 0 only. Raises StorageError if the file cannot be written."""

    def __init__(
        self, run_dir: Path, data_directory: Path, loader: SampledDocuments, print_line: Callable[[str], None]
    ) -> None:
        """`data_directory`: of the prepared data set; `print_line`: prints a line on the screen."""
        self.path = run_dir / EVENTS_FILE
        self.data_directory = data_directory
        self.loader = loader
        self.print_line = print_line

    def __call__(self, outlier: Outlier) -> None:
        """Tell the user of a step that stands out, and which documents it had: a line in `events.jsonl`, and a warning.

        The guards, which judge each step, call it on rank 0 (`on_outlier`). Raises StorageError if the file cannot be written.
        """
        document_numbers = self.loader.documents(outlier.first_sample)
        documents: list[dict[str, Any]] = []
        if document_numbers:
            table = DocumentTable(self.data_directory)
            documents = [_document_record(table, number) for number in document_numbers]
        num_samples = outlier.num_steps * self.loader.share.global_batch
        sample_ranges = self.loader.order.position_ranges(outlier.first_sample, num_samples)
        event = {
            "event": "outlier",
            "time": time.time(),
            **asdict(outlier),
            "places": sample_ranges,
            "documents": documents,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(event) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error}); free space") from error
        self.print_line(f"warning: {self._warning_text(outlier, sample_ranges, documents)}")

    def _warning_text(
        self, outlier: Outlier, sample_ranges: list[tuple[int, int]], documents: list[dict[str, Any]]
    ) -> str:
        """The warning about a step that stands out: what and how far, what was done about it, and which samples it had.

        `sample_ranges`: ranges (first, count) of its samples in the run's order, such as [(640, 32)]. `documents`: records with
        `file` and `line` of each, of which the first few are named; empty if unknown.
        """
        # A level has risen and stayed: the text then says since when, and not that a single step stands out.
        level_began = outlier.began if outlier.is_level else None
        finding_text = outlier_text(outlier.values, outlier.scores, level_began)
        if not outlier.is_level:  # a single step
            finding_text += " stands out" if len(outlier.values) == 1 else " stand out"
        first_sample, _ = sample_ranges[0]
        last_range_first, last_range_count = sample_ranges[-1]
        last_sample = last_range_first + last_range_count - 1
        named_documents = ""
        if documents:
            names = [f"{document['file']}:{document['line']}" for document in documents[:MAX_DOCUMENTS]]
            named_documents = f": {', '.join(names)}"
            if len(documents) > MAX_DOCUMENTS:
                named_documents += f" and {len(documents) - MAX_DOCUMENTS} more"
        return (
            f"step {outlier.step}: {finding_text}; {OUTCOME_TEXT_BY_ACTION[outlier.action]}. Samples {first_sample} to "
            f"{last_sample} of the run's order{named_documents} ({EVENTS_FILE})"
        )


def _document_record(table: DocumentTable, number: int) -> dict[str, Any]:
    """What `events.jsonl` says of a document, so that it is found again: its row, file and line, and the SHA-256 of its content.

    `number`: its row in documents.arrow, the prepared data. The content is its other fields as JSON, with sorted keys and
    without empty ones: the hash is the same wherever the document lies.
    """
    document = table.document(number)
    origin = {key: getattr(document, key) for key in ORIGIN_FIELDS}
    content_fields = {}
    for key in set(document_schema().names) - set(ORIGIN_FIELDS):
        field_value = getattr(document, key)
        if field_value not in (None, ""):
            content_fields[key] = field_value
    content_json = json.dumps(content_fields, sort_keys=True)
    return {"row": number, **origin, "sha256": hashlib.sha256(content_json.encode()).hexdigest()}
