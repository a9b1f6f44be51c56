"""Writes tensors into safetensors files as transformers lays them out, and reads facts about base checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

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


def write_tensors(
    tensors: Iterator[tuple[str, Tensor]], directory: Path, *, dtype: torch.dtype, max_bytes: int
) -> None:
    """Stream tensors to `model.safetensors`, or to numbered files of at most `max_bytes` (or one tensor) and an index.

    Floating-point tensors are stored as `dtype`. Holds one file's worth. Errors: OSError, SafetensorError.
    """
    from safetensors.torch import save_file

    files: list[list[str]] = []
    """Names of the tensors of each file that is written."""
    pending: dict[str, Tensor] = {}
    """Tensors of the file that is not written yet."""
    pending_bytes = 0
    total_bytes = 0

    def write_pending() -> None:
        files.append(list(pending))
        save_file(pending, directory / f"part-{len(files)}", {"format": "pt"})
        pending.clear()

    for name, tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if pending and pending_bytes + tensor.nbytes > max_bytes:
            write_pending()
            pending_bytes = 0
        tensor = tensor.contiguous()
        # A view into a larger buffer would be refused, or written whole.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write_pending()
    if len(files) == 1:
        (directory / "part-1").rename(directory / "model.safetensors")
        return
    # How many files there are is known only now, and every name says it.
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
