"""Digests of a base model's weight and architecture files, and which of them have changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from strategies.errors import ConfigError
from strategies.file_fingerprints import sampled_digest
from strategies.small_files import read_json_object

UNRELATED_CONFIG_FILES = ("tokenizer_config.json", "generation_config.json")
ARCHITECTURE_FILE = "config.json"
"""The only configuration that decides what the weights of a model directory compute."""


def model_file_digests(directory: Path) -> dict[str, str]:
    """`<bytes>:<sampled SHA-256>` of each weight file and configuration in a directory, by file name. Raises OSError."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*config.json")])
    return {path.name: sampled_digest(path) for path in files if path.name not in UNRELATED_CONFIG_FILES}


def digests_of_loaded_files(digests: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The entries of `digests` ({file name: digest}) whose files are read when the model in `directory` is loaded.

    Those are `config.json` and the weight files: the ones that the index names, or all if there is no index. A directory may
    hold more of a model on one machine than on another: the same weights in another format beside the index, or a
    preprocessor's settings that another program has fetched into the cache of the hub. Raises ConfigError if the index is not
    JSON.
    """
    from trainer.model.files import INDEX_FILE

    index_file = directory / INDEX_FILE
    weight_map = read_json_object(index_file).get("weight_map") if index_file.exists() else None
    indexed_files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else None

    def is_read(name: str) -> bool:
        if name.endswith(".safetensors"):
            return indexed_files is None or name in indexed_files
        return name == ARCHITECTURE_FILE

    return {name: digest for name, digest in digests.items() if is_read(name)}


def changed_file_lines(recorded: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Say how a base model's files differ from those that a run trained on: a line for each missing, new or changed file.

    `recorded`, `present`: digests by file name, as the run recorded them and as they are now. Such a line is `config.json: is
    missing`. Empty if nothing changed.
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
    """How two different digests of a file, `<bytes>:<sampled SHA-256>`, differ, as the end of a line."""
    recorded_bytes, present_bytes = recorded.partition(":")[0], present.partition(":")[0]
    if recorded_bytes != present_bytes:
        return f"has {present_bytes} bytes, and had {recorded_bytes} when the run trained"
    return "has other content than when the run trained"


BASE_RECORD_FILE = "base_files.json"
"""A file in the directory of an adapter: digests of the base that it was trained on. Loaders of adapters do not read it."""
_BASE_PREFIX = "base/"


def write_base_record(directory: Path, input_digests: Mapping[str, str]) -> None:
    """Record beside an adapter which base it was trained on: writes `base_files.json`, the digests of the base's files, into
    `directory`.

    `input_digests`: the digests that `identity.json` has under `base`. Only those whose name begins with `base/` are of the
    base model; others are of adapters and reward models, for instance. Writes nothing if there are none. Raises OSError.
    """
    base_digests = {}
    for name, digest in input_digests.items():
        if name.startswith(_BASE_PREFIX):
            base_digests[name.removeprefix(_BASE_PREFIX)] = digest
    if base_digests:
        (directory / BASE_RECORD_FILE).write_text(json.dumps(base_digests, indent=1) + "\n", encoding="utf-8")


def check_adapter_base(adapter: Path, base: Path, *, accept: bool) -> list[str]:
    """Check that `base` is the model that the adapter in `adapter` was trained on. Returns the accepted differences:

    - the adapter has no readable record of its base, as exports of earlier versions, or the base cannot be read: empty.
    - the files are the same: empty.
    - they differ, and `accept`: a line for each file.

    Raises ConfigError that names each file, if they differ and `accept` is False.
    """
    try:
        recorded = json.loads((adapter / BASE_RECORD_FILE).read_text(encoding="utf-8"))
        recorded_digests = digests_of_loaded_files(recorded, base)
        present_digests = digests_of_loaded_files(model_file_digests(base), base)
        differences = changed_file_lines(recorded_digests, present_digests)
    except (OSError, ValueError, AttributeError, RecursionError, ConfigError):
        # Valid JSON that is no mapping raises AttributeError, JSON nested too deeply RecursionError. If the base cannot be
        # read, loading it says why.
        return []
    if not differences or accept:
        return differences
    refusal = (
        f"{adapter}: was trained on another base than {base}. Give the base of the training, or continue with this one: "
        "accept=[base]"
    )
    raise ConfigError("\n    ".join([refusal, *differences]))
