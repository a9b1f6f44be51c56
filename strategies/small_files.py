"""Reads the small files of a model's or an adapter's directory, which somebody else may have written. No other module does.

A file must be a regular file (or a link to one, as in the hub's cache), of a sensible size, in UTF-8, and JSON of a reasonable
depth. Otherwise a pipe would block, a device would never end, and a library that reads a torn file would end in a traceback
that does not name the file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError

LFS_POINTER_START = b"version https://git-lfs"
"""Beginning of the small text file that git leaves in the place of a large one."""
MAX_BYTES = 16 << 20
MAX_BYTES_BY_FILE = {
    "tokenizer.json": 256 << 20,
    "model.safetensors.index.json": 256 << 20,
    "tokenizer.model": 256 << 20,
}
"""Files that grow with the vocabulary or the number of tensors; the largest known are near 40 MB."""
JSON_OBJECT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "adapter_config.json",
    "bottleneck_config.json",
)
"""Files that libraries read as one JSON object. They are small enough to be checked first."""
FILE_PATTERNS_BESIDE_JSON_OBJECTS = (
    *("model.safetensors.index.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json", "*.jinja", "*.model"),
    "additional_chat_templates/*.jinja",
)
"""Other files that libraries read; names or patterns."""


def check_small_regular_file(path: Path, *, max_bytes: int | None = None) -> None:
    """Raise ConfigError if a file of a model's directory is a pipe, a device or a directory, or is larger than `max_bytes`.

    Also if it cannot be looked at. Reading such a file would wait forever, or fill the memory. A link to a regular file will do.
    `max_bytes`: None for no limit.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable_file_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is a pipe, a device or a directory, not a regular file; download it again")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ConfigError(
            f"{path}: has {status.st_size:,} bytes, and such a file has at most {max_bytes:,}; download it again"
        )


def check_no_lfs_pointer(path: Path) -> None:
    """Raise ConfigError if a file is a pointer, the small text that git-lfs leaves in the place of a file it has not fetched.

    Some pointers would load without an error: a chat template is any text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER_START))
    except OSError as error:
        raise _unreadable_file_error(path, error) from error
    if head == LFS_POINTER_START:
        raise ConfigError(
            f"{path}: is a pointer that git-lfs left in the place of the file; run `git lfs pull` in its directory, or "
            "download the file again"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a model's directory that must hold an object, such as config.json.

    Anybody may have written it: raises ConfigError, which names the file and what to do, for anything else.
    """
    check_small_regular_file(path, max_bytes=MAX_BYTES_BY_FILE.get(path.name, MAX_BYTES))
    check_no_lfs_pointer(path)
    try:
        json_value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable_file_error(path, error) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deep to be read; download it again") from error
    except ValueError as error:  # not UTF-8, or not JSON: perhaps an interrupted copy
        raise ConfigError(
            f"{path}: is not valid JSON ({error}); it was cut off or changed: download it again"
        ) from error
    if not isinstance(json_value, dict):
        raise ConfigError(f"{path}: holds a JSON {type(json_value).__name__}, not an object; download it again")
    return json_value


def texts_in_parsed(parsed: Any) -> Iterator[str]:
    """Every text among the values of parsed JSON or YAML, in order, however deep."""
    if isinstance(parsed, str):
        yield parsed
    elif isinstance(parsed, dict):
        for inner in parsed.values():
            yield from texts_in_parsed(inner)
    elif isinstance(parsed, list):
        for inner in parsed:
            yield from texts_in_parsed(inner)


def check_files_read_by_libraries(directory: Path) -> None:
    """Raise ConfigError if a library could not read one of the small files in a model's or an adapter's directory.

    Called before a library reads them. A missing file is no error.
    """
    for name in JSON_OBJECT_FILES:
        path = directory / name
        if path.exists() or path.is_symlink():  # a link to nothing, as after a download that was cut short, is an error
            read_json_object(path)
    for pattern in FILE_PATTERNS_BESIDE_JSON_OBJECTS:
        for path in directory.glob(pattern):
            check_small_regular_file(path, max_bytes=MAX_BYTES_BY_FILE.get(path.name, MAX_BYTES))
            check_no_lfs_pointer(path)


def _unreadable_file_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be read ({error.strerror or error}); see to its permissions, or download it again"
    )
