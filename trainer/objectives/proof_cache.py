"""Keeps what was proven of architectures in this host's cache, a JSON file for each proof."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from strategies.cache_dir import cache_directory

PROOF_VERSION = 6
"""Part of the cache key. Raise it when what is proven, or how, changes, so that older proofs are not used."""


def proof_file(hf_config: Any, **circumstances: Any) -> Path:
    """The cache file for what a test on a small copy of a model has shown of the architecture `hf_config`, its proof.

    Its name is a hash of all that the result depends on: the configuration, the versions of torch and transformers, and the
    `circumstances`, such as `attention="sdpa"`.
    """
    settings = {name: value for name, value in hf_config.to_dict().items() if name != "_name_or_path"}
    fingerprint = {"config": settings, "edition": PROOF_VERSION, **circumstances}
    fingerprint |= {name: version(name) for name in ("torch", "transformers")}
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_directory() / "proofs" / f"{key}.json"


def read_proof(file: Path) -> dict[str, Any] | None:
    """What a proof found, by name; None if it is not there, or torn."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def keep_proof(file: Path, fields: dict[str, Any]) -> None:
    """Write what a proof found into the cache. If that fails, nothing is raised: the next run proves it again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        temporary.replace(file)
    except OSError:
        pass
