"""`metrics.jsonl`: the rows of a run, always written, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from strategies import atomic_io
from strategies.errors import StorageError
from trainer.reporting.earlier_rows import EarlierResults, earlier_results
from trainer.reporting.file_version import FILE_VERSION, VERSION_KEY
from trainer.reporting.metric_rows import UnreadableLine, read_rows

UNREADABLE_LINES_FILE = "metrics.unreadable.jsonl"
"""Beside the file of rows: lines of it that were no rows when a start read it, each with its number and what is wrong."""
MAX_LINES_IN_WARNING = 3


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line, full precision, flushed a row at a time; see `non_finite_metrics`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open the file for the rows of this start. A resumed run keeps the rows up to its checkpoint.

        `resume_step`: the step of that checkpoint; 0 for a new run, which keeps no row. Raises StorageError.
        """
        self.path = path
        self.earlier = EarlierResults()
        self._has_warned = False
        try:
            if path.exists():  # rows after the checkpoint belong to a future that is now done again
                self._rewrite_up_to(resume_step or -1)  # a new start keeps no row, not even that of step 0
            self._file = self._open_for_appending()
            atomic_io.sync_directory(path.parent)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({atomic_io.error_summary(error)}); free space, or set run.dir"
            ) from error

    def _rewrite_up_to(self, step: int) -> None:
        """Drop the rows after a step, durably, because training continues from there; sets `earlier` to what the others measured.

        Lines that are no rows are moved to `metrics.unreadable.jsonl`, with a warning. Raises OSError with all rows still there.
        """
        recorded = read_rows(self.path)
        if recorded.unreadable:  # they are in that file before they disappear from this one
            self._save_unreadable_lines(recorded.unreadable)
        kept_rows = []
        kept_lines = []
        for row, line in zip(recorded.rows, recorded.lines, strict=True):
            if row["step"] <= step:
                kept_rows.append(row)
                kept_lines.append(line + b"\n")
        # The new file is complete and on the disk before it takes the name of the old one.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept_lines))
        atomic_io.sync_file(temporary)
        atomic_io.disk.rename(temporary, self.path)
        self.earlier = earlier_results(kept_rows)

    def _save_unreadable_lines(self, unreadable: list[UnreadableLine]) -> None:
        """Keep lines that are no rows in `metrics.unreadable.jsonl`, durably, and print which they are. Raises OSError.

        The caller then removes them from `metrics.jsonl`.
        """
        unreadable_file = self.path.with_name(UNREADABLE_LINES_FILE)
        with unreadable_file.open("a", encoding="utf-8") as file:
            for line in unreadable:
                # Bytes that are not UTF-8 stand as lone surrogates, which Python turns back into the same bytes.
                text = line.line_bytes.decode(errors="surrogateescape")
                file.write(json.dumps({"line": line.number, "reason": line.reason, "text": text}) + "\n")
        atomic_io.sync_file(unreadable_file)
        # Such as `line 3 is not JSON, line 7 has NUL bytes, as a power cut leaves them`.
        line_problems = ", ".join(str(line) for line in unreadable[:MAX_LINES_IN_WARNING])
        if len(unreadable) > MAX_LINES_IN_WARNING:
            line_problems += f" and {len(unreadable) - MAX_LINES_IN_WARNING} more"
        print(
            f"warning: {self.path}: {line_problems}; what cannot be read was moved to {unreadable_file.name}, and the run "
            "continues without it",
            flush=True,
        )

    def rewind(self, step: int) -> None:
        """Remove the rows after `step` from the file, because training continues from there."""
        self._file.close()
        self._rewrite_up_to(step)
        self._file = self._open_for_appending()

    def _open_for_appending(self) -> TextIO:
        """Open the file for appending, and for reading it back if somebody deletes its name while the run goes on."""
        return self.path.open("a+", encoding="utf-8")

    def _restore_if_deleted(self) -> None:
        """Save the rows if somebody deleted the file while the run goes on: writes it again, durably. Raises OSError."""
        try:
            # Not if the directory is missing too: it was renamed or deleted, which the lease of the run finds out.
            is_deleted = not self.path.exists() and self.path.parent.is_dir()
        except OSError:  # a network mount that fails for a moment; the file is open, and takes the row
            return
        if not is_deleted:
            return
        # The open file still has its content, although no directory lists it any more.
        self._file.seek(0)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(self._file.read(), encoding="utf-8")
        atomic_io.sync_file(temporary)
        atomic_io.disk.rename(temporary, self.path)
        self._file.close()
        self._file = self._open_for_appending()
        print(f"{self.path}: was deleted while the run was under way; its rows are written again", flush=True)

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Append a row for `step`, and flush it, so that readers see it at once. Raises OSError.

        JSON has no NaN: such a metric is null, and its name is in the row's list `not_finite`.
        """
        self._restore_if_deleted()
        row = {"step": step, **metrics, **non_finite_metrics(metrics)}
        is_first_row = os.fstat(self._file.fileno()).st_size == 0
        if is_first_row:
            # The version is one more key of the first row: a row of its own would not be a row of metrics.
            row[VERSION_KEY] = FILE_VERSION
        self._file.write(json_text(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make sure that the rows outlive a power cut, before a checkpoint that counts on them; a failure gives one warning."""
        try:
            atomic_io.disk.sync(self._file.fileno())
        except OSError as error:
            if not self._has_warned:
                print(
                    f"warning: {self.path} could not be synced ({atomic_io.error_summary(error)}): a power cut may lose rows "
                    "that the checkpoints count on; the checkpoints themselves are synced separately",
                    flush=True,
                )
            self._has_warned = True

    def close(self) -> None:
        """Close the file. Each row was flushed when it was logged, so a failure was reported then and not here."""
        with suppress(OSError):
            self._restore_if_deleted()
        with suppress(OSError):
            self._file.close()


def non_finite_metrics(metrics: dict[str, Any]) -> dict[str, list[str]]:
    """{"not_finite": ["grad_norm"]} if that metric is NaN or infinite, which becomes null in JSON; empty if all are finite."""
    names = []
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            names.append(name)
    return {"not_finite": names} if names else {}


def json_text(content: Any, **dumps_arguments: Any) -> str:
    """The content as standard JSON, with null for numbers that are NaN or infinite. `dumps_arguments`: for `json.dumps`."""
    return json.dumps(_replace_non_finite(content), allow_nan=False, **dumps_arguments)


def _replace_non_finite(value: Any) -> Any:
    """A copy of nested values that standard JSON can write, with None for NaN and infinite numbers: [1.0, nan] -> [1.0, None]."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(inner) for inner in value]
    return value
