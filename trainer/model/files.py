"""The safetensors files of a model directory: their tensors, and rows of them, read on demand."""

from __future__ import annotations

import json
import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.errors import ConfigError
from strategies.small_files import LFS_POINTER_START, check_small_regular_file, read_json_object

INDEX_FILE = "model.safetensors.index.json"
READ_AHEAD_BYTES = 128 << 10
"""Bytes of one request to read ahead; of a longer one the kernel takes what its read-ahead window has room for, often this."""
DTYPE_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Names of types in headers of safetensors files."""


class SafetensorsFiles:
    """The weights files of a model directory: tensors by their stored names. Nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes_read = 0
        """Bytes of tensors read so far, by this process."""
        self._open: dict[Path, Any] = {}
        self._files = self._file_by_stored_name()

    def __contains__(self, stored_name: str) -> bool:
        return stored_name in self._files

    def names(self) -> list[str]:
        """Every stored tensor's name."""
        return list(self._files)

    def read_ahead(self) -> None:
        """Ask the kernel to read all files ahead, if the memory that is free has room for twice as much; returns at once."""
        import psutil

        paths = sorted(set(self._files.values()))
        if sum(path.stat().st_size for path in paths) < psutil.virtual_memory().available // 2:
            threading.Thread(target=_read_ahead, args=(paths,), daemon=True).start()

    def _file_by_stored_name(self) -> dict[str, Path]:
        """Find out which file holds each stored tensor: by the index if there is one, else by the files' headers.

        Raises ConfigError if the directory has no weights that can be read.
        """
        index_file = self.directory / INDEX_FILE
        if index_file.exists():
            return _file_by_tensor_of_index(index_file)
        file_by_tensor: dict[str, Path] = {}
        for file in sorted(self.directory.glob("*.safetensors")):
            file_by_tensor.update(dict.fromkeys(self._handle(file).keys(), file))
        if not file_by_tensor:
            raise ConfigError(
                f"model.path={self.directory}: holds no .safetensors weights; {_missing_weights_remedy(self.directory)}"
            )
        return file_by_tensor

    def _handle(self, file: Path) -> Any:
        """The open safetensors file; opened when it is first asked for."""
        if file not in self._open:
            self._open[file] = _open_safetensors(file)
        return self._open[file]

    def _open_slice(self, stored_name: str) -> Any:
        """A stored tensor, to be read in parts (safetensors' slice object); opens its file if need be.

        Raises ConfigError if the file does not hold it.
        """
        from safetensors import SafetensorError

        file = self._files[stored_name]
        try:
            return self._handle(file).get_slice(stored_name)
        except SafetensorError as error:
            raise ConfigError(
                f"{file}: does not hold {stored_name}, which {INDEX_FILE} places there ({str(error)[:120]}); download the "
                "model again"
            ) from error

    def open_all(self) -> None:
        """Open every file; raises ConfigError for one that is not whole."""
        for file in set(self._files.values()):
            self._handle(file)

    def close(self) -> None:
        """Unmap the files, whose pages count as this process's memory; they are mapped again when something is asked."""
        self._open.clear()

    def shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return tuple(self._open_slice(stored_name).get_shape())

    def on_meta(self, stored_name: str) -> Tensor:
        """A tensor of the same shape and type, without values."""
        view = self._open_slice(stored_name)
        return torch.empty(view.get_shape(), dtype=DTYPE_BY_NAME.get(view.get_dtype(), torch.float32), device="meta")

    def rows(self, stored_name: str, first: int | None = None, last: int | None = None) -> Tensor:
        """Rows `[first, last)` along dimension 0, or the whole tensor."""
        view = self._open_slice(stored_name)
        tensor: Tensor = view[first:last] if view.get_shape() else view[...]
        self.bytes_read += tensor.nbytes
        return tensor

    def read_slice(self, stored_name: str, start: int, stop: int) -> Tensor:
        """Elements `[start, stop)` of a stored tensor, flattened; reads only the rows they lie in."""
        shape = self.shape(stored_name)
        if not shape:
            return self.rows(stored_name).reshape(-1)[start:stop]
        row_size = math.prod(shape[1:])
        first_row = start // row_size
        end_row = (stop + row_size - 1) // row_size  # rounded up
        elements = self.rows(stored_name, first_row, end_row).reshape(-1)
        first_element = first_row * row_size
        return elements[start - first_element : stop - first_element]


def _file_by_tensor_of_index(index_file: Path) -> dict[str, Path]:
    """The file of each tensor, as an index of shards (`model.safetensors.index.json`) has it.

    Raises ConfigError for what is no such index.
    """
    directory = index_file.parent
    weight_map = read_json_object(index_file).get("weight_map")
    remedy = "it was cut off or changed: download it again"
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index_file}: has no weight_map that names a file for each tensor; {remedy}")
    root = directory.resolve()
    file_by_tensor: dict[str, Path] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ConfigError(f"{index_file}: names no file for {name}, but {json.dumps(file)[:80]}; {remedy}")
        file_by_tensor[name] = directory / file
    for path in set(file_by_tensor.values()):
        # An index comes from elsewhere, and must not make us read other files.
        if root not in path.absolute().parents or ".." in path.parts:
            raise ConfigError(f"{index_file}: names a file outside the model directory: {path}")
        if not path.exists():
            raise ConfigError(f"{index_file}: names {path.name}, which is missing; download the model again")
    return file_by_tensor


def _read_ahead(paths: list[Path]) -> None:
    """Ask the kernel to read these files ahead, in requests of `READ_AHEAD_BYTES`; a file that cannot be read is passed over."""
    for path in paths:
        with suppress(OSError), path.open("rb") as file:
            for start in range(0, path.stat().st_size, READ_AHEAD_BYTES):
                os.posix_fadvise(file.fileno(), start, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def _open_safetensors(file: Path) -> Any:
    """Open a weights file for reading; raises a ConfigError that says what is wrong with it and what to do.

    It is closed when nobody refers to the result any more (`SafetensorsFiles.close`).
    """
    from safetensors import safe_open

    check_small_regular_file(file)  # of any size: no bound is given
    try:
        return safe_open(str(file), framework="pt").__enter__()
    except Exception as error:
        try:
            with file.open("rb") as opened:
                first_bytes = opened.read(len(LFS_POINTER_START))
        except OSError as unreadable:
            raise ConfigError(
                f"{file}: cannot be read ({unreadable.strerror or unreadable}); see to its permissions"
            ) from unreadable
        if first_bytes == LFS_POINTER_START:
            raise ConfigError(
                f"{file}: is a pointer that git-lfs left in the place of the weights; run `git lfs pull` in the model's "
                "directory, or download the model again"
            ) from error
        if "mmap" in str(error):  # no room for so large a file among this process's addresses
            return safe_open(str(file), framework="pt", backend="pread").__enter__()
        raise ConfigError(
            f"{file}: is no whole safetensors file ({str(error)[:160]}); it was cut off or changed: download it again"
        ) from error


def _missing_weights_remedy(directory: Path) -> str:
    """What to do about a directory without weights that can be read."""
    if (directory / "adapter_model.safetensors").exists() or (directory / "adapter_config.json").exists():
        return "it is an adapter: give its base as model.path, and this directory as tuning.from or in model.adapters"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        return "its weights are pickles, which are not read; convert them once with transformers' save_pretrained"
    return "download them, or convert them once with transformers' save_pretrained"
