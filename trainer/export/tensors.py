"""Facts about base checkpoints: the hub's name of one, and the type that it is stored in."""

from __future__ import annotations

from pathlib import Path

import torch

from strategies.small_files import read_object


def hub_name(base_path: str) -> tuple[str, str | None]:
    """(hub id, commit) of a snapshot in the hub's cache, or (the directory itself, None)."""
    path = Path(base_path)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return base_path, None


def stored_type(directory: Path) -> torch.dtype:
    """The floating-point type that most tensors of a checkpoint's first file have; bfloat16 if they are quantised."""
    from safetensors import safe_open

    settings = directory / "config.json"
    if settings.is_file() and read_object(settings).get("quantization_config"):
        return torch.bfloat16
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    first_file = min(directory.glob("*.safetensors"))
    with safe_open(str(first_file), framework="pt") as handle:
        stored = [handle.get_slice(key).get_dtype() for key in handle.keys()]  # noqa: SIM118 - no mapping
    # Sorted, so that the same one of two that are equally frequent is taken each time.
    most_frequent = max(sorted(set(stored)), key=stored.count)
    return dtypes.get(most_frequent, torch.float32)
