"""A choice that all points of a comparison share: `<comparison>/run.matmul.json`, written by the first that starts."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from strategies import atomic_io, shared_files
from strategies.errors import StorageError

COMPARISON = "comparison.json"
"""The record of a comparison, in the directory above those of its points."""


def shared_choice(run_dir: Path, setting: str, choice: Any) -> Any:
    """What the comparison that `run_dir` is a point of chose for `setting`; `choice` where this point is the first.

    Outside a comparison that is `choice`, and nothing is written. `choice` is a text or a mapping of JSON values; another
    version of shardtune may have written the other of the two. Errors: StorageError.
    """
    comparison = run_dir.absolute().parent
    if not (comparison / COMPARISON).is_file():
        return choice
    path = comparison / f"{setting}.json"
    try:
        shared_files.claim(path, json.dumps({setting: choice}).encode() + b"\n", uuid.uuid4().hex)
        recorded = json.loads(shared_files.read(path))[setting]
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
