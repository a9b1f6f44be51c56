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
    """The choice that all points of a comparison share for a setting that was left open, such as `run.matmul`.

    `run_dir`: the directory of this point. `choice`: what this point would choose, a text or a mapping of JSON values. The first
    point to start writes its choice, and all others get that one (as a text or a mapping, whatever that version of shardtune
    wrote). Outside a comparison it is `choice`, and nothing is written. Errors: StorageError.
    """
    comparison = run_dir.absolute().parent
    if not (comparison / COMPARISON).is_file():
        return choice
    path = comparison / f"{setting}.json"
    try:
        # Only the first of all points writes the file, on whatever host: `claim` does nothing if it is there.
        shared_files.claim_shared_file(path, json.dumps({setting: choice}).encode() + b"\n", uuid.uuid4().hex)
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
