"""Digests of a base model's weight and architecture files, and which of them have changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from strategies.errors import ConfigError
from strategies.file_fingerprints import sampled_digest
from strategies.small_files import read_object

UNRELATED_CONFIG_FILES = ("tokenizer_config.json", "generation_config.json")
ARCHITECTURE_FILE = "config.json"
"""The only configuration that decides what the weights of a model directory compute."""


def model_file_digests(directory: Path) -> dict[str, str]:
    """`<bytes>:<sampled SHA-256>` of each weight file and configuration in a directory, by file name. Errors: OSError."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")])
    return {path.name: sampled_digest(path) for path in files if path.name not in UNRELATED_CONFIG_FILES}


def digests_of_loaded_files(digests: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The entries of `digests` (hash by file name) whose files a loader of the model in `directory` reads.

    A directory may hold more of a model on one machine than on another: the same weights in another format beside the index,
    or a preprocessor's settings that another program has fetched into the cache of the hub. Errors: ConfigError for an index
    that is not JSON.
    """
    from trainer.model.files import INDEX

    listing = directory / INDEX
    weight_map = read_object(listing).get("weight_map") if listing.exists() else None
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else None

    def is_read(name: str) -> bool:
        if name.endswith(".safetensors"):
            return shards is None or name in shards
        return name == ARCHITECTURE_FILE

    return {name: digest for name, digest in digests.items() if is_read(name)}


def changed_file_lines(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Sentences that say how a base model's files differ from those a run trained on: missing, new or changed ones.

    Both arguments are digests by file name: as the run recorded them, and as they are now.
    """
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


BASE_RECORD_FILE = "base_files.json"
"""In the directory of an adapter: the digests of the base that it was trained on. Loaders of adapters do not look at it."""
_BASE_PREFIX = "base/"


def write_record(directory: Path, kind: Mapping[str, str]) -> None:
    """Write the digests of the base among what `identity.json` has of the kind `base` beside an adapter. Errors: OSError."""
    files = {name.removeprefix(_BASE_PREFIX): digest for name, digest in kind.items() if name.startswith(_BASE_PREFIX)}
    if files:
        (directory / BASE_RECORD_FILE).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def check_adapter_base(adapter: Path, base: Path, *, accept: bool) -> list[str]:
    """How a base differs from the one that an adapter was trained on, if `accept` takes it; an old export says nothing of it.

    Errors: ConfigError that names each file, for a difference that is not accepted.
    """
    try:
        recorded = json.loads((adapter / BASE_RECORD_FILE).read_text(encoding="utf-8"))
        changed = changed_file_lines(digests_of_loaded_files(recorded, base), digests_of_loaded_files(model_file_digests(base), base))
    except (OSError, ValueError, AttributeError, RecursionError, ConfigError):
        return []  # an export from before there was this record, or a base whose loading says what is wrong with it
    if not changed or accept:
        return changed
    refusal = (
        f"{adapter}: was trained on another base than {base}. Give the base of the training, or continue with this one: "
        "accept=[base]"
    )
    raise ConfigError("\n    ".join([refusal, *changed]))
