"""Digests of the files that a base model's weights and architecture lie in, and what has changed of them since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainer.records.sampled import sampled_digest

NO_WEIGHT_DEPENDS = ("tokenizer_config.json", "generation_config.json")


def digests_of(directory: Path) -> dict[str, str]:
    """`<bytes>:<sampled SHA-256>` of each weight file and configuration in a directory, by file name. Errors: OSError."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")])
    return {path.name: sampled_digest(path) for path in files if path.name not in NO_WEIGHT_DEPENDS}


def changes(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """One line for each file that is missing, new or different. Both arguments are digests by file name."""
    lines = []
    for name in sorted(recorded.keys() | present.keys()):
        if name not in present:
            lines.append(f"{name}: is missing")
        elif name not in recorded:
            lines.append(f"{name}: was not there when the run trained")
        elif recorded[name] != present[name]:
            lines.append(f"{name}: {_difference(recorded[name], present[name])}")
    return lines


def _difference(recorded: str, present: str) -> str:
    recorded_bytes, present_bytes = recorded.partition(":")[0], present.partition(":")[0]
    if recorded_bytes != present_bytes:
        return f"has {present_bytes} bytes, and had {recorded_bytes} when the run trained"
    return "has other content than when the run trained"
