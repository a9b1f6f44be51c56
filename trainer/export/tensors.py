"""Facts about base checkpoints: the hub's name of one, and the type that it is stored in."""

from __future__ import annotations

from pathlib import Path

import torch

from strategies.small_files import read_json_object


def hub_name(base_path: str) -> tuple[str, str | None]:
    """(hub id, commit) of a model directory: of a snapshot in the hub's cache, ("org/name", "abc123"); else (the path, None)."""
    path = Path(base_path)
    is_hub_snapshot = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    if is_hub_snapshot:
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return base_path, None


def stored_type(directory: Path) -> torch.dtype:
    """The floating-point type that most tensors of a checkpoint's first file have.

    bfloat16 if they are quantised, float32 for a type that is not known here.
    """
    from safetensors import safe_open

    settings_file = directory / "config.json"
    if settings_file.is_file() and read_json_object(settings_file).get("quantization_config"):
        return torch.bfloat16
    dtype_by_name = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    first_file = min(directory.glob("*.safetensors"))
    with safe_open(str(first_file), framework="pt") as handle:
        type_names = [handle.get_slice(key).get_dtype() for key in handle.keys()]  # noqa: SIM118 - no mapping
    # Sorted, so that the same one of two that are equally frequent is taken each time.
    most_frequent = max(sorted(set(type_names)), key=type_names.count)
    return dtype_by_name.get(most_frequent, torch.float32)
