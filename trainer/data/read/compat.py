"""What the project uses of datasets beside its public interface. Read in datasets 5.2; see tests/compat/test_small.py."""

from __future__ import annotations

from typing import Any


def content_fingerprint(dataset: Any) -> str:
    """A text that changes with the rows of a data set and with what was done to them, the same in every process.

    Reads `datasets.Dataset._fingerprint`, by which datasets names its own cache files. Nothing public tells it, and to digest
    the rows would read all of a data set of a hub.
    """
    return str(dataset._fingerprint)
