"""What the Python code in a directory is, as one SHA-256: a model's own classes, or the functions of a task.

Weights, rows and pages in the directory do not count: only files that are run, and what names them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from trainer.model.config import ModelConfig

MOST_FILES = 20_000
"""Names below a directory that are looked at. A larger directory has no digest, so that its code is asked for each time."""
MOST_BYTES = 64 * 2**20
"""Bytes of one file of code, or of one that names code."""
CODE_OF_MODELS = (".py",)
CODE_OF_TASKS = (".py", ".yaml", ".yml", "")
"""A YAML of lm-evaluation-harness names functions; what it includes often has no suffix."""
ELSEWHERE = "--"
"""Between a repository and a class, where `auto_map` names code of another repository."""

_NAMED_BY_TASK = re.compile(rb"!function[^\n]*|^include\s*:[^\n]*(?:\n\s*-[^\n]*)*", re.MULTILINE)
"""Where a YAML of a task names a function, or files that it includes."""
_OUTSIDE = re.compile(rb"(?:^|[\s\"',\[])(?:/|~|\.\.)")
"""A name that leads out of the directory."""


class NoDigest(Exception):
    """The code in a directory cannot be told apart from other code."""


def model_directory(config: ModelConfig, path: str | None, revision: str | None) -> Path | None:
    """Where the files of a model or tokenizer are on this machine, `path` being a directory or a hub id; None if they are not.

    Looks into the cache of the hub and never at the network.
    """
    from dataclasses import replace

    from trainer.model.loading import weights_directory

    if path is None:
        return None
    try:
        return weights_directory(replace(config, path=path, revision=revision, download=False))
    except ConfigError:
        return None


def digest_of_model(directory: Path) -> str | None:
    """Digest of the code that `trust_remote_code` would run for a model's directory; None if there is no code.

    Code of another repository that `auto_map` names counts too. Errors: NoDigest.
    """
    references = sorted({*_references(directory)})
    files = dict(_files(directory, CODE_OF_MODELS))
    if not references and not files:
        return None
    others: dict[str, str] = {}
    for reference in references:
        repository, elsewhere, name = reference.rpartition(ELSEWHERE)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise NoDigest(reference)  # a file that may lie anywhere
        if elsewhere:
            other = model_directory(ModelConfig(), repository, None)
            others[reference] = "absent" if other is None else _digest(dict(_files(other, CODE_OF_MODELS)))
    return _digest({**files, "auto_map": json.dumps([references, others]).encode()})


def digest_of_task(path: Path) -> str:
    """Digest of the YAML files of a task of lm_eval, or of a directory of such, with the Python files beside them.

    Errors: NoDigest, also if a YAML names a function or an included file outside of its directory.
    """
    files = dict(_files(path if path.is_dir() else path.parent, CODE_OF_TASKS))
    for name, content in files.items():
        for named in _NAMED_BY_TASK.findall(content):
            if _OUTSIDE.search(named):
                raise NoDigest(name)
    return _digest(files)


def _files(directory: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of each file of code below a directory."""
    looked_at = 0
    for parent, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted(names):
            looked_at += 1
            if looked_at > MOST_FILES:
                raise NoDigest(str(directory))
            file = Path(parent, name)
            if file.suffix in suffixes:
                yield file.relative_to(directory).as_posix(), _content(file)


def _references(directory: Path) -> Iterator[str]:
    """The classes that the settings of a model name in `auto_map`."""
    for file in sorted(directory.glob("*config.json")):
        content = _content(file)
        if b"auto_map" not in content:
            continue
        try:
            settings = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise NoDigest(str(file)) from error
        if isinstance(settings, dict):
            yield from _texts(settings.get("auto_map"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _content(file: Path) -> bytes:
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise NoDigest(str(file))
        return file.read_bytes()
    except OSError as error:
        raise NoDigest(str(file)) from error


def _digest(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()
