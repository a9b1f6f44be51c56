"""One SHA-256 over the Python code in a directory, such as a model's own classes or the functions of a task.

Only files that are executed, or that name such files, are hashed; weights, data and pages are not.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from strategies.errors import ConfigError
from strategies.small_files import texts_in_parsed
from trainer.model.config import ModelConfig

MAX_FILES_AND_FOLDERS = 20_000
"""Most files and folders of a directory. A larger one gets no digest, so its code must be allowed at each start."""
MAX_CODE_FILE_BYTES = 64 * 2**20
"""Most bytes of one file of code, or of one that names code."""
CODE_SUFFIXES = (".py",)
VERSIONED_CONFIG_PATTERN = "config.*.json"
"""Configurations for some versions of transformers, which config.json names and which take its place."""
REPOSITORY_SEPARATOR = "--"
"""Separates repository and class if `auto_map` names code of another repository: `org/model--modeling.Model`."""


class NoDigest(Exception):
    """A directory is too large, unreadable or names code elsewhere, so its code cannot be identified by a digest."""


def local_model_directory(config: ModelConfig, path: str | None, revision: str | None) -> Path | None:
    """Where the files of a model or tokenizer lie on this machine, with or without weights; None if they are not here.

    `path`: a directory, or a hub id that is looked up in the hub's cache, never over the network.
    `revision`: on the hub; None for its main branch.
    `config`: for the options of looking up; its own path and revision are not used.
    """
    from dataclasses import replace

    from trainer.model.loading import find_weights_directory

    if path is None:
        return None
    try:
        return find_weights_directory(replace(config, path=path, revision=revision, download=False))
    except ConfigError:
        return None


def model_code_digest(directory: Path, *, download: bool = False) -> str | None:
    """SHA-256 of the Python code that `trust_remote_code` would run for a model's directory; None if there is no code.

    A user's consent to run the code is remembered by it. Code of another repository that `auto_map` in config.json names counts
    too.
    `download`: whether such a repository would be fetched if it is not on this machine.
    Raises NoDigest if code may lie anywhere, is not here yet, or cannot be read.
    """
    # Such as `modeling.Net` in this directory, or `owner/name--modeling.Net` in another repository.
    references = sorted({*_auto_map_references(directory)})
    files = dict(_code_content_by_name(directory))
    if not references and not files:
        return None
    digest_by_reference: dict[str, str] = {}  # of code in other repositories
    for reference in references:
        repository, separator, class_name = reference.rpartition(REPOSITORY_SEPARATOR)
        class_path = Path(class_name)
        if class_path.is_absolute() or ".." in class_path.parts:
            raise NoDigest(reference)  # a file that may lie anywhere
        if not separator:
            continue  # code of this directory, which is among `files`
        # With default options of looking up: those of a run are about its own model.
        repository_directory = local_model_directory(ModelConfig(), repository, None)
        if repository_directory is None and download:
            raise NoDigest(reference)  # its code would be fetched later, so it is not known now
        if repository_directory is None:
            digest_by_reference[reference] = "absent"
        else:
            digest_by_reference[reference] = _sha256_of_files(dict(_code_content_by_name(repository_directory)))
    # Also which code is named, since it decides what of the files is run.
    auto_map = json.dumps([references, digest_by_reference]).encode()
    return _sha256_of_files({**files, "auto_map": auto_map})


def task_code_digest(path: Path) -> str:
    """SHA-256 of an lm_eval task: its YAML, or each YAML in a directory, what they include, and the Python code beside them.

    A user's consent to run the code is remembered by it. For a single YAML, only the Python files of its own folder count: it may
    lie above runs, whose files change all the time. Raises NoDigest if a file cannot be read or is no YAML, or if there are more
    than MAX_FILES_AND_FOLDERS files.
    """
    directory = path.resolve()
    if directory.is_dir():
        task_files = sorted(directory.rglob("*.yaml"))
        code_contents = dict(_code_content_by_name(directory))
    else:
        task_files = [directory]
        directory = directory.parent
        code_contents = {file.name: _read_code_file(file) for file in sorted(directory.glob("*.py"))}
    return _sha256_of_files(code_contents | _contents_with_named_files(task_files, directory))


def _contents_with_named_files(task_files: list[Path], directory: Path) -> dict[str, bytes]:
    """The contents of the YAML files of tasks and of all files that they name, directly or through another, for a digest.

    By path relative to `directory`. Each file is read once, because two may include each other. Raises NoDigest as
    `task_code_digest` does.
    """
    contents: dict[str, bytes] = {}
    files_to_read = list(task_files)
    seen_files = {*files_to_read}
    while files_to_read:
        file = files_to_read.pop()
        content = _read_code_file(file)
        contents[os.path.relpath(file, directory)] = content
        # What Python code imports from beside is among the code files that the caller adds.
        if file.suffix in CODE_SUFFIXES:
            continue
        try:
            named_files = {named.resolve() for named in _files_named_by(file, content)}
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise NoDigest(str(file)) from error
        files_to_read += sorted(named_files - seen_files)
        seen_files |= named_files
        if len(seen_files) > MAX_FILES_AND_FOLDERS:
            raise NoDigest(str(directory))
    return contents


class _FunctionNameLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A YAML loader that collects the names of `!function` tags in `function_names`, and imports nothing."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.function_names: list[str] = []
        """Filled while the document is read."""


def _collect_function_name(loader: _FunctionNameLoader, node: yaml.Node) -> None:
    """Called by the loader at each `!function module.name`."""
    loader.function_names.append(str(node.value))


_FunctionNameLoader.add_constructor("!function", _collect_function_name)


def _files_named_by(file: Path, content: bytes) -> Iterator[Path]:
    """The files that one YAML of an lm_eval task names: those under `include`, and the Python modules of `!function`.

    `content`: the bytes of `file`.
    Relative names are looked up as lm_eval does.
    Raises YAMLError, ValueError or RecursionError if the content is no YAML.
    """
    loader = _FunctionNameLoader(content)
    # This fills `function_names` too.
    tree = loader.get_single_data()
    for name in _include_values(tree):
        yield file.parent / name
    for function_name in loader.function_names:  # such as `utils.process_docs`
        module = file.parent / f"{function_name.rpartition('.')[0].replace('.', '/')}.py"
        if module.exists():  # otherwise it is an installed module
            yield module


def _include_values(tree: Any) -> Iterator[str]:
    """The file names under `include` at every level of a YAML document of a task (`tree`)."""
    pending = [tree]
    visited_ids = set[int]()
    while pending:
        node = pending.pop()
        # A YAML alias is visited once: a few lines of them can stand for a tree without an end.
        if id(node) in visited_ids:
            continue
        visited_ids.add(id(node))
        if isinstance(node, dict):
            yield from texts_in_parsed(node.get("include"))
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _code_content_by_name(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Each Python file below a directory, in alphabetical order, as (relative name, content): ("sub/modeling.py", b"...").

    Raises NoDigest if there are more than `MAX_FILES_AND_FOLDERS` files and folders, or a file cannot be read.
    """
    num_seen = 0
    for parent, folders, names in os.walk(directory, followlinks=True):  # a linked folder is imported like any other
        folders.sort()
        num_seen += len(folders) + len(names)
        if num_seen > MAX_FILES_AND_FOLDERS:
            raise NoDigest(str(directory))
        for name in sorted(names):
            file = Path(parent, name)
            if file.suffix in CODE_SUFFIXES:
                yield file.relative_to(directory).as_posix(), _read_code_file(file)


def _auto_map_references(directory: Path) -> Iterator[str]:
    """The Python classes that a model's config files name in `auto_map`, which `trust_remote_code` would import: `modeling.Net`.

    Raises NoDigest for a config file that is no JSON or cannot be read.
    """
    for file in sorted({*directory.glob("*config.json"), *directory.glob(VERSIONED_CONFIG_PATTERN)}):
        try:
            settings = json.loads(_read_code_file(file))  # not searched as text: JSON can spell `auto_map` with escapes
        except (ValueError, RecursionError) as error:
            raise NoDigest(str(file)) from error
        if isinstance(settings, dict):
            yield from texts_in_parsed(settings.get("auto_map"))


def _read_code_file(file: Path) -> bytes:
    """The bytes of a file. Raises NoDigest if it cannot be read or is larger than MAX_CODE_FILE_BYTES."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_CODE_FILE_BYTES:
            raise NoDigest(str(file))
        return file.read_bytes()
    except OSError as error:
        raise NoDigest(str(file)) from error


def _sha256_of_files(files: dict[str, bytes]) -> str:
    """SHA-256 over the names and contents of `files`, independent of their order."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        # The length keeps files apart: `ab` + `c` is not `a` + `bc`.
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()
