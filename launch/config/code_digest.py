"""One SHA-256 over the Python code in a directory, such as a model's own classes or the functions of a task.

Only files that are executed, or that name such files, are hashed; weights, data and pages are not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from strategies.errors import ConfigError
from strategies.small_files import texts_in
from trainer.model.config import ModelConfig

MOST_FILES = 20_000
"""Most files and folders of a directory. A larger one gets no digest, so its code must be allowed at each start."""
MOST_BYTES = 64 * 2**20
"""Most bytes of one file of code, or of one that names code."""
CODE_OF_MODELS = (".py",)
VERSIONED_CONFIGS = "config.*.json"
"""Configurations for some versions of transformers, which config.json names and which take its place."""
REPOSITORY_MARK = "--"
"""Separates repository and class if `auto_map` names code of another repository: `org/model--modeling.Model`."""


class NoDigest(Exception):
    """A directory is too large, unreadable or names code elsewhere, so its code cannot be identified by a digest."""


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


def digest_of_model(directory: Path, *, download: bool = False) -> str | None:
    """Digest of the code that `trust_remote_code` would run for a model's directory; None if there is no code.

    Code of another repository that `auto_map` names counts too. `download`: whether it would be fetched if it is not here.
    Errors: NoDigest.
    """
    references = sorted({*_references(directory)})
    files = dict(_files(directory, CODE_OF_MODELS))
    if not references and not files:
        return None
    digests_elsewhere: dict[str, str] = {}
    for reference in references:
        repository, mark, name = reference.rpartition(REPOSITORY_MARK)
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise NoDigest(reference)  # a file that may lie anywhere
        if not mark:
            continue
        other_directory = model_directory(ModelConfig(), repository, None)
        if other_directory is None and download:
            raise NoDigest(reference)  # nobody has seen what would be fetched
        if other_directory is None:
            digests_elsewhere[reference] = "absent"
        else:
            digests_elsewhere[reference] = _digest(dict(_files(other_directory, CODE_OF_MODELS)))
    return _digest({**files, "auto_map": json.dumps([references, digests_elsewhere]).encode()})


def digest_of_task(path: Path) -> str:
    """Digest of a task of lm_eval: its YAML (or each YAML in a directory), what they include, and the Python code beside them.

    For a single YAML, only the Python files of its own folder count: it may lie above runs, whose files change all the time.
    Errors: NoDigest.
    """
    top = path.resolve()
    if top.is_dir():
        pending = sorted(top.rglob("*.yaml"))
        files = dict(_files(top, CODE_OF_MODELS))
    else:
        pending = [top]
        top = top.parent
        files = {file.name: _content(file) for file in sorted(top.glob("*.py"))}
    known_files = {*pending}
    while pending:
        file = pending.pop()
        content = _content(file)
        files[os.path.relpath(file, top)] = content
        if file.suffix in CODE_OF_MODELS:
            continue
        try:
            named_files = {named.resolve() for named in _named_by(file, content)}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise NoDigest(str(file)) from error
        pending += sorted(named_files - known_files)
        known_files |= named_files
        if len(known_files) > MOST_FILES:
            raise NoDigest(str(path))
    return _digest(files)


class _Names(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads a YAML of a task as data: functions are collected by name, and nothing is imported."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.functions: list[str] = []


def _note_function(loader: _Names, node: yaml.Node) -> None:
    loader.functions.append(str(node.value))


_Names.add_constructor("!function", _note_function)


def _named_by(file: Path, content: bytes) -> Iterator[Path]:
    """The files that a YAML of a task includes, and those of its functions, as lm_eval looks for them.

    Errors: those of YAML, ValueError, RecursionError.
    """
    loader = _Names(content)
    tree = loader.get_single_data()
    for name in _included(tree):
        yield file.parent / name
    for function in loader.functions:
        module = file.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        if module.exists():  # else it is a module that is installed
            yield module


def _included(tree: Any) -> Iterator[str]:
    """The values of `include` at every level of a YAML.

    A YAML alias is visited once: a few lines of them can stand for a tree without an end.
    """
    pending = [tree]
    visited_ids = set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited_ids:
            continue
        visited_ids.add(id(node))
        if isinstance(node, dict):
            yield from texts_in(node.get("include"))
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _files(directory: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(relative name, content) of each file of code below a directory, in alphabetical order. Errors: NoDigest."""
    looked_at = 0
    for parent, folders, names in os.walk(directory, followlinks=True):  # a linked folder is imported like any other
        folders.sort()
        looked_at += len(folders) + len(names)
        if looked_at > MOST_FILES:
            raise NoDigest(str(directory))
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix in suffixes:
                yield file.relative_to(directory).as_posix(), _content(file)


def _references(directory: Path) -> Iterator[str]:
    """The classes that the settings of a model name in `auto_map`."""
    for file in sorted({*directory.glob("*config.json"), *directory.glob(VERSIONED_CONFIGS)}):
        try:
            settings = json.loads(_content(file))  # not searched as text: JSON can spell `auto_map` with escapes
        except (ValueError, RecursionError) as error:
            raise NoDigest(str(file)) from error
        if isinstance(settings, dict):
            yield from texts_in(settings.get("auto_map"))


def _content(file: Path) -> bytes:
    """The bytes of a file. Errors: NoDigest if it cannot be read or is too large to be code."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise NoDigest(str(file))
        return file.read_bytes()
    except OSError as error:
        raise NoDigest(str(file)) from error


def _digest(files: dict[str, bytes]) -> str:
    """SHA-256 over names and contents. The lengths keep files apart: `ab` + `c` is not `a` + `bc`."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()
