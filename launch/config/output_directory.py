"""Refuses a path for results that cannot be a directory, before a command has worked for nothing."""

from __future__ import annotations

from pathlib import Path

from strategies.errors import ConfigError


def require_output_directory(directory: Path) -> None:
    """Raise ConfigError if `to=` names a file, or a directory below one. A directory that is not there yet is fine."""
    for path in (directory, *directory.parents):
        if path.is_dir():
            return
        if path.exists():
            below = "" if path == directory else f"{path} "
            raise ConfigError(f"to={directory}: {below}is a file; name a directory")
