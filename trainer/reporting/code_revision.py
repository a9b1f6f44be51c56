"""Which code runs: the clone's revision, or that of a job's copy of it. Needs no torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The directory that holds the packages."""
MANIFEST = "CODE.json"
"""Beside the packages of a copy: `sha256` of its files, `revision` of the clone they are from, `source`, its place."""


def manifest(root: Path = ROOT) -> dict[str, Any]:
    """The content of a copy's `CODE.json`; empty for a clone or an installation."""
    try:
        manifest_content = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest_content if isinstance(manifest_content, dict) else {}


def revision(root: Path = ROOT) -> str | None:
    """The git revision of the code that runs, with `-dirty` if files were changed; None for an installed package.

    A job may run a copy of a clone: then it is the revision of that clone, or the hash of the files if it had none.
    """
    copied_from = manifest(root)
    if copied_from:
        return copied_from.get("revision") or f"code {str(copied_from.get('sha256'))[:12]}"
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
