"""The directory on this host for files that can be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SHARDTUNE_CACHE"
"""The environment variable that names another directory."""


def cache_directory() -> Path:
    """The directory in `SHARDTUNE_CACHE`, or `~/.cache/shardtune`; it need not be there yet."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/shardtune").expanduser()
