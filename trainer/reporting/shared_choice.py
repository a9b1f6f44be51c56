"""A choice that all points of a comparison share: `<comparison>/run.matmul.json`, written by the first that starts."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from strategies import atomic_io, shared_files
from strategies.errors import StorageError

COMPARISON_FILE = "comparison.json"
"""The record of a comparison, in the directory above those of its points."""


def agree_on_shared_choice(run_dir: Path, setting: str, own_choice: Any) -> Any:
    """Let all points of a comparison have the same choice for a setting that was left open, such as `run.matmul`; returns it.

    Else they would differ in more than what is compared. A point is one of the compared runs.

    - Outside a comparison: `own_choice`; nothing is written.
    - For the first point to start: `own_choice`, which is written into `<comparison>/<setting>.json`.
    - For any later point: the choice in that file (a text or a mapping, whatever the writing version of shardtune recorded).

    `run_dir`: the directory of this point. `own_choice`: what this point would choose by itself, a text or a mapping of JSON
    values. Errors: StorageError.
    """
    comparison_dir = run_dir.absolute().parent
    if not (comparison_dir / COMPARISON_FILE).is_file():
        return own_choice
    path = comparison_dir / f"{setting}.json"
    try:
        # Only the first of all points writes the file, on whatever host: `claim_shared_file` does nothing if it is there.
        shared_files.claim_shared_file(path, json.dumps({setting: own_choice}).encode() + b"\n", uuid.uuid4().hex)
        recorded = json.loads(shared_files.read_shared_file(path))[setting]
        if not isinstance(recorded, str | dict):
            raise TypeError(setting)
        return recorded
    except (ValueError, KeyError, TypeError):
        raise StorageError(
            f"{path}: does not say what the points of this comparison have for {setting}; delete it, and the next point to "
            "start writes it again"
        ) from None
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({atomic_io.error_summary(error)}); let this user write it"
        ) from error
