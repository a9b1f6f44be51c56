"""The version of the files of a run directory that are written and read back.

`run.json`, the first row of `metrics.jsonl`, `comparison.json` and `compare.json` have it as one whole number under one key;
`evaluation.json` has a number of its own there, since reports change by themselves. A file without it is of version 0: it was
written before files had one. A new key in a file is no new version; a key that means something else, or is gone, is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERSION_KEY = "version"
FILE_VERSION = 1
"""What is written now, and the latest that can be read."""


def readable_file_version(tree: Mapping[str, Any]) -> int:
    """Make sure that this code can read a file of a run directory: returns its version, {"version": 1} -> 1, or 0 without one.

    `tree`: the keys of the file. Raises ValueError, with a sentence for people, if this code does not know the version.
    """
    version = tree.get(VERSION_KEY, 0)
    if type(version) is not int or version < 0:
        raise ValueError(f"its {VERSION_KEY} is {version!r}, which is none")
    if version > FILE_VERSION:
        raise ValueError(
            f"it has version {version}, and this shardtune reads versions up to {FILE_VERSION}: use a later shardtune"
        )
    return version
