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

UNREADABLE = "metrics.unreadable.jsonl"
"""Beside the file of rows: lines of it that were no rows when a start read it, each with its number and what is wrong."""
MAX_NAMED = 3
"""Lines that are named in a warning."""


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line, full precision, flushed a row at a time; see `not_finite`."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        self.earlier = EarlierResults()
        self._warned = False
        try:
            if path.exists():  # rows after the checkpoint belong to a future that is now done again
                self._keep_up_to(resume_step or -1)
            self._file = self._open()
            atomic_io.sync_directory(path.parent)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({atomic_io.error_summary(error)}); free space, or set run.dir"
            ) from error

    def _keep_up_to(self, step: int) -> None:
        """Leave only the rows up to this step, durably: the checkpoint counts on them. Errors: OSError, with all rows there.

        Lines that are no rows are moved to `metrics.unreadable.jsonl`, which is said.
        """
        content = read_rows(self.path)
        if content.unreadable:
            self._set_aside(content.unreadable)
        kept = [number for number, row in enumerate(content.rows) if row["step"] <= step]
        aside = self.path.with_suffix(".tmp")
        aside.write_bytes(b"".join(content.lines[number] + b"\n" for number in kept))
        atomic_io.sync_file(aside)
        atomic_io.disk.rename(aside, self.path)
        self.earlier = earlier_results(content.rows[number] for number in kept)

    def _set_aside(self, unreadable: list[UnreadableLine]) -> None:
        """Append lines that are no rows to `metrics.unreadable.jsonl`, durably, and print which they are. Errors: OSError."""
        aside = self.path.with_name(UNREADABLE)
        with aside.open("a", encoding="utf-8") as file:
            for broken in unreadable:
                # Bytes that are not UTF-8 stand as lone surrogates, which Python turns back into the same bytes.
                text = broken.line.decode(errors="surrogateescape")
                file.write(json.dumps({"line": broken.number, "reason": broken.reason, "text": text}) + "\n")
        atomic_io.sync_file(aside)
        more = f" and {len(unreadable) - MAX_NAMED} more" if len(unreadable) > MAX_NAMED else ""
        lines = f"{', '.join(map(str, unreadable[:MAX_NAMED]))}{more}"
        print(
            f"warning: {self.path}: {lines}; what cannot be read was moved to {aside.name}, and the run continues without it",
            flush=True,
        )

    def rewind(self, step: int) -> None:
        """Forget the rows after a step."""
        self._file.close()
        self._keep_up_to(step)
        self._file = self._open()

    def _open(self) -> TextIO:
        """For appending, and for reading back what is in a file that somebody deletes."""
        return self.path.open("a+", encoding="utf-8")

    def _write_again_if_deleted(self) -> None:
        """Put all rows back under their name, durably, if somebody deleted the file. Errors: OSError."""
        try:
            # A whole directory that is gone was renamed or deleted, which its owner finds out.
            is_deleted = not self.path.exists() and self.path.parent.is_dir()
        except OSError:  # a network mount that fails for a moment; the file is open, and takes the row
            return
        if not is_deleted:
            return
        self._file.seek(0)
        aside = self.path.with_suffix(".tmp")
        aside.write_text(self._file.read(), encoding="utf-8")
        atomic_io.sync_file(aside)
        atomic_io.disk.rename(aside, self.path)
        self._file.close()
        self._file = self._open()
        print(f"{self.path}: was deleted while the run was under way; its rows are written again", flush=True)

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        self._write_again_if_deleted()
        # The first row has the file's version, as one more key: a row of its own would be no row to those who read the file.
        version = {VERSION_KEY: FILE_VERSION} if os.fstat(self._file.fileno()).st_size == 0 else {}
        self._file.write(json_text({"step": step, **metrics, **not_finite(metrics), **version}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the rows on the disk, as the checkpoint will be that they lead to; one warning where that is not possible."""
        try:
            atomic_io.disk.sync(self._file.fileno())
        except OSError as error:
            if not self._warned:
                print(
                    f"warning: {self.path} could not be synced ({atomic_io.error_summary(error)}): a power cut may lose rows "
                    "that the checkpoints count on; the checkpoints themselves are synced separately",
                    flush=True,
                )
            self._warned = True

    def close(self) -> None:
        """Close the file. Each row was flushed when it was logged, so a failure was reported then and not here."""
        with suppress(OSError):
            self._write_again_if_deleted()
        with suppress(OSError):
            self._file.close()


def not_finite(metrics: dict[str, Any]) -> dict[str, list[str]]:
    """`{"not_finite": [names]}` if numbers are NaN or infinite, which JSON cannot hold: they become null. Else empty."""
    names = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    return {"not_finite": names} if names else {}


def json_text(value: Any, **how: Any) -> str:
    """JSON that every reader takes: null where a number is not finite. `how` are arguments of `json.dumps`."""
    return json.dumps(_with_null(value), allow_nan=False, **how)


def _with_null(part: Any) -> Any:
    """The same JSON values, with None for each number that is not finite."""
    if isinstance(part, float):
        return part if math.isfinite(part) else None
    if isinstance(part, dict):
        return {key: _with_null(inner) for key, inner in part.items()}
    if isinstance(part, list | tuple):
        return [_with_null(inner) for inner in part]
    return part
