"""Which code runs: the clone's revision, or that of a job's copy of it. Needs no torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

CODE_DIRECTORY = Path(__file__).resolve().parents[2]
"""The directory that holds the packages."""
CODE_MANIFEST_FILE = "CODE.json"
"""Beside the packages of a copy: `sha256` of its files, `revision` of the clone they are from, `source`, its path."""


def read_code_manifest(root: Path = CODE_DIRECTORY) -> dict[str, Any]:
    """Read `CODE.json`, which says what a job's copy of the code is a copy of: {"sha256": "ab12", "revision": "cd34", ...}.

    Empty for a clone or an installation, which have no such file, and if it cannot be read.
    """
    try:
        manifest = json.loads((root / CODE_MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def code_revision(root: Path = CODE_DIRECTORY) -> str | None:
    """Which revision of shardtune runs, for the record of a run: "3f2a91c07b1e", or "3f2a91c07b1e-dirty" with changed files.

    - A job's copy of a clone: the revision of that clone when it was copied; `code <hash of the files>` if it had none.
    - A clone: its git revision, with `-dirty` if files were changed.
    - An installed package, or a clone whose git fails: None.
    """
    manifest = read_code_manifest(root)
    if manifest:
        return manifest.get("revision") or f"code {str(manifest.get('sha256'))[:12]}"
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        completed = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip() or None
