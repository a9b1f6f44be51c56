"""Finds the lm-evaluation-harness tasks that a name stands for, and checks whether their data is on this machine.

The harness has some 14,000 YAML files, and reading them takes ten seconds. Only files that contain a requested name
are read.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError, ShardtuneError
from strategies.small_files import texts_in
from trainer.data.read.paths import expand
from trainer.evaluation.harness.compat import read_task_file

_INCLUDE = re.compile(rb"^include:((?:[ ]*\S.*)?(?:\n[ ]*-[ ]*\S+)*)", re.MULTILINE)
BUILDERS = ("json", "csv", "parquet", "arrow", "text", "xml", "pandas", "webdataset")
"""Values of `dataset_path` that stand for a format of files rather than for a data set of a hub."""


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """The YAML entries of the harness that a task's name stands for."""

    name: str
    index: dict[str, Any]
    """Entries of the harness by name: the named one, and the tasks and groups that belong to it."""
    single_tasks: dict[str, dict[str, Any]]
    """The YAML settings of each single task, by its name; functions are paths."""
    weighted_by_size: bool
    """Whether the mean over several tasks weighs each by its rows."""


@lru_cache(maxsize=64)
def find_tasks(name: str | None, path: str | None) -> TaskFiles:
    """The tasks that a name stands for, from `path` (a YAML or a directory of YAMLs) or the harness's own; reads no data.

    Without a name, the first one in the file. Errors: ConfigError, whose text begins with the value.
    """
    index: dict[str, Any] = {}
    faults: list[str] = []
    if path is not None:
        faults = _read_files(_files(path), index)
        if name is None and Path(path).expanduser().is_file():
            name = next(iter(index), None)
    if name is None:
        raise ConfigError(f"{path}: " + (faults[0] if faults else "has neither `task` nor `group`; name the task"))
    index = _with_built_in_tasks(name, index)
    if name not in index:
        raise ConfigError(f"{name}: {_unknown(name, index, path, faults)}")
    single_tasks = dict(_single_tasks(name, {}, index))
    aggregates = (index[name].cfg or {}).get("aggregate_metric_list") or []
    if not isinstance(aggregates, list):
        aggregates = [aggregates]
    weighted_by_size = all(aggregate.get("weight_by_size", True) for aggregate in aggregates)
    return TaskFiles(name, index, single_tasks, weighted_by_size)


def _with_built_in_tasks(name: str, user_index: dict[str, Any]) -> dict[str, Any]:
    """The user's entries and those of the harness that `name` needs: itself, and the members of groups and tags."""
    index = dict(user_index)
    searched: set[str] = set()
    missing = {name} - user_index.keys()
    while missing:
        searched |= missing
        built_in: dict[str, Any] = {}
        _read_files(_files_naming(missing), built_in)
        for entry_name, entry in built_in.items():
            is_new = entry_name not in index and entry_name not in user_index
            if entry_name in missing or is_new:
                index[entry_name] = entry
        members: set[str] = set()
        for entry_name in ({name} | searched | user_index.keys()) & index.keys():
            members.update(_part_names(index[entry_name]))
        missing = members - user_index.keys() - searched
    if searched - index.keys():
        # Some name is in no file that mentions it: let the harness build its whole index. The user's entries come last and win.
        index = {**_full_index(), **user_index}
    return index


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"{path}: there is no such file or directory")
    files = [root] if root.is_file() else sorted(root.rglob("*.yaml"))
    if not files or files[0].suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: holds no YAML of lm-evaluation-harness; name one, or a directory that has some")
    return files


def _read_files(files: list[Path], index: dict[str, Any]) -> list[str]:
    """Put the entries of files into the index; returns what is wrong with those that cannot be read."""
    faults = []
    for file in files:
        try:
            read_task_file(file, index)
        except Exception as error:  # noqa: BLE001  of a YAML anything may be wrong
            faults.append(f"{file}: cannot be read: {' '.join(str(error).split())[:300]}")
    return faults


@lru_cache(maxsize=1)
def _own_files() -> dict[str, bytes]:
    """The harness's own files, and what they include, by path."""
    import lm_eval

    files = sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*"))
    texts = {}
    for file in files:
        # Files that are included often have no suffix.
        if (not file.suffix or file.suffix.endswith("yaml")) and file.is_file():
            texts[str(file)] = file.read_bytes()
    return texts


@lru_cache(maxsize=1)
def _included_by() -> dict[str, list[str]]:
    """The harness's own files that include a file, by its path."""
    including: dict[str, list[str]] = {}
    for file, text in _own_files().items():
        for names in _INCLUDE.findall(text):
            for name in filter(None, re.split(r"[\s,\[\]'\"]+|- ", names.decode())):
                included = os.path.normpath(f"{Path(file).parent}/{name}")
                including.setdefault(included, []).append(file)
    return including


@lru_cache(maxsize=1)
def _full_index() -> dict[str, Any]:
    """All entries of the harness. Takes ten seconds, so it is only for names that were not found otherwise."""
    from lm_eval.tasks import TaskManager

    from trainer.evaluation.harness.isolation import collect_warnings

    with collect_warnings():
        return TaskManager().task_index


def _files_naming(names: set[str]) -> list[Path]:
    """The harness's own files that contain one of these names, and files that include such a file, which inherit its tags."""
    any_name = b"|".join(re.escape(name.encode()) for name in names)
    pattern = re.compile(rb"(?<![\w.+-])(?:" + any_name + rb")(?![\w.+-])")
    queue = [file for file, text in _own_files().items() if pattern.search(text)]
    files = {*queue}
    for file in queue:  # grows while it is walked: files that include files that include one
        for including in _included_by().get(file, ()):
            if including not in files:
                files.add(including)
                queue.append(including)
    return [Path(file) for file in sorted(files) if file.endswith(".yaml")]


def _part_names(entry: Any) -> Iterator[str]:
    """Names of the tasks and groups that a tag or a group consists of."""
    if entry.kind.name == "TAG":
        yield from entry.tags
    elif entry.kind.name == "GROUP":
        for name, _ in _members((entry.cfg or {}).get("task")):
            yield name


def _members(task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each member of a group; `task` is the group's `task` in the YAML."""
    if not task:
        return
    for member in task if isinstance(task, list) else [task]:
        if isinstance(member, str):
            yield member, {}
        elif isinstance(member.get("task"), list):  # a group that is defined within the group
            yield from _members(member["task"])
        elif member.get("task") or member.get("group"):
            yield member.get("task") or member.get("group"), member


def _single_tasks(name: str, settings: dict[str, Any], index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each single task below a name. Settings of a group override those of its tasks."""
    entry = index.get(name)
    if entry is None:  # a task that is defined within its group
        yield name, settings
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _single_tasks(member, settings, index)
    elif entry.kind.name == "GROUP":
        for member, member_settings in _members((entry.cfg or {}).get("task")):
            yield from _single_tasks(member, {**settings, **member_settings}, index)
    else:
        yield name, {**(entry.cfg or {}), **settings}


def _unknown(name: str, index: dict[str, Any], path: str | None, faults: list[str]) -> str:
    """Why a name is not known, with a hint."""
    if faults:
        return f"is not in {path}; {faults[0]}"
    searched = "lm-evaluation-harness has no such task" + (f", nor has {path}" if path else "")
    similar = difflib.get_close_matches(name, index, n=3)
    if similar:
        return f"{searched}; did you mean {' or '.join(similar)}?"
    return f"{searched}; `lm-eval ls tasks` lists them; a YAML of yours is named by path"


def missing_data(settings: dict[str, Any]) -> tuple[str | None, str | None]:
    """(what is wrong with the files that a task reads, the data set that it reads from a hub), by its settings; else None.

    A data set of a hub may be in the cache of `datasets`. Data that a function makes is not known before the function runs.
    """
    path = settings.get("dataset_path")
    if settings.get("custom_dataset") or settings.get("class") or path is None:
        return None, None
    if path not in BUILDERS:
        if Path(path).expanduser().exists():
            return None, None
        part = f" ({settings['dataset_name']})" if settings.get("dataset_name") else ""
        return None, f"{path}{part}"
    dataset_kwargs = settings.get("dataset_kwargs") or {}
    files = [*texts_in(dataset_kwargs.get("data_files"))]
    directory = ""
    if dataset_kwargs.get("data_files"):
        directory = dataset_kwargs.get("data_dir") or ""  # the files are below it
    if not files:
        files = [*texts_in(dataset_kwargs.get("data_dir"))]
    if not files:
        return f"dataset_path: {path} without files; give dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}", None
    for file in files:
        if "://" in file:
            return None, file
        try:
            expand(str(Path(directory) / file), "dataset_kwargs.data_files", remote=False)
        except ShardtuneError as error:
            return str(error), None
    return None, None
