"""Facts about base checkpoints: the hub's name of one, and the type that it is stored in."""

from __future__ import annotations

from pathlib import Path

import torch

from strategies.small_files import read_json_object


def hub_id_and_commit(base_path: str) -> tuple[str, str | None]:
    """The hub's name and commit of a base model in the hub's cache, for an adapter's settings in place of this machine's path.

    ("org/name", "abc123") for a snapshot in the hub's cache; else (`base_path` as it is, None).
    """
    path = Path(base_path)
    is_hub_snapshot = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    if is_hub_snapshot:
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return base_path, None


def stored_dtype(directory: Path) -> torch.dtype:
    """The floating-point type in which a checkpoint is stored: that of most tensors in its first file.

    bfloat16 for a quantised checkpoint, whose tensors have other types. float32 for a type that is not known here.
    """
    from safetensors import safe_open

    settings_file = directory / "config.json"
    if settings_file.is_file() and read_json_object(settings_file).get("quantization_config"):
        return torch.bfloat16
    dtype_by_name = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    first_file = min(directory.glob("*.safetensors"))
    with safe_open(str(first_file), framework="pt") as handle:
        dtype_names = [handle.get_slice(key).get_dtype() for key in handle.keys()]  # noqa: SIM118 - no mapping
    # Sorted, so that the same one of two that are equally frequent is taken each time.
    most_frequent_name = max(sorted(set(dtype_names)), key=dtype_names.count)
    return dtype_by_name.get(most_frequent_name, torch.float32)
