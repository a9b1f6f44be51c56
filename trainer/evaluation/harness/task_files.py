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
from typing import Any, NamedTuple

from strategies.errors import ConfigError, ShardtuneError
from strategies.small_files import texts_in_parsed
from trainer.data.read.paths import expand_paths
from trainer.evaluation.harness.compat import read_task_file

# Such as "include: _default_yaml", "include: [a.yaml, b.yaml]", or "include:" and lines such as "  - a.yaml".
_INCLUDE_REGEX = re.compile(rb"^include:((?:[ ]*\S.*)?(?:\n[ ]*-[ ]*\S+)*)", re.MULTILINE)
FILE_FORMAT_BUILDERS = ("json", "csv", "parquet", "arrow", "text", "xml", "pandas", "webdataset")
"""Values of `dataset_path` that stand for a format of files rather than for a data set of a hub."""


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """The YAML entries of the harness that a task's name stands for."""

    name: str
    index: dict[str, Any]
    """lm-eval's entries (`lm_eval.tasks._index.Entry`) by name: the named one, and the tasks and groups that belong to it."""
    single_tasks: dict[str, dict[str, Any]]
    """The YAML settings of each single task, by its name; functions are paths."""
    mean_weighted_by_rows: bool
    """Whether the mean over several tasks weighs each by its rows."""


@lru_cache(maxsize=64)
def find_tasks(name: str | None, path: str | None) -> TaskFiles:
    """Find the lm-eval tasks that a name stands for (a task, a group or a tag), with their YAML settings. Reads no data.

    They come from `path` (a YAML, or a directory of YAMLs) or from the harness's own files. If `name` is None and `path` is a
    YAML, the first task in it is taken. Raises ConfigError, whose text begins with the name or the path.
    """
    # The user's YAMLs.
    entry_by_name: dict[str, Any] = {}
    unreadable: list[str] = []  # an error message for each YAML that cannot be read
    if path is not None:
        unreadable = _read_files_into_index(_yaml_files(path), entry_by_name)
        if name is None and Path(path).expanduser().is_file():
            name = next(iter(entry_by_name), None)
    if name is None:
        problem = unreadable[0] if unreadable else "has neither `task` nor `group`; name the task"
        raise ConfigError(f"{path}: {problem}")

    # The harness's own YAMLs that the task needs.
    entry_by_name = _with_built_in_tasks(name, entry_by_name)
    if name not in entry_by_name:
        raise ConfigError(f"{name}: {_unknown_task_message(name, entry_by_name, path, unreadable)}")
    settings_by_task = dict(_single_tasks(name, group_settings={}, index=entry_by_name))

    # A group's YAML may have how it averages over its tasks: {"metric": "acc", "weight_by_size": false}, or a list of these.
    aggregates = (entry_by_name[name].cfg or {}).get("aggregate_metric_list") or []
    if not isinstance(aggregates, list):
        aggregates = [aggregates]
    mean_weighted_by_rows = all(aggregate.get("weight_by_size", True) for aggregate in aggregates)
    return TaskFiles(
        name, index=entry_by_name, single_tasks=settings_by_task, mean_weighted_by_rows=mean_weighted_by_rows
    )


def _with_built_in_tasks(name: str, user_index: dict[str, Any]) -> dict[str, Any]:
    """Add to the user's tasks and groups those of the harness that the task `name` needs; returns lm-eval's entries by name.

    If `name` is a group, its members are needed too, and theirs. Reading all YAMLs of the harness would take ten seconds, so
    only files that mention a missing name are read, again and again until none is missing. The user's entries win over the
    others.

    For "mmlu", the first round reads the files that say mmlu, and finds a group whose members are "mmlu_stem" and others. The
    second round reads the files that say mmlu_stem, and so on down to single tasks.
    """
    index = dict(user_index)
    searched: set[str] = set()
    missing = {name} - user_index.keys()
    while missing:
        searched |= missing
        built_in: dict[str, Any] = {}
        _read_files_into_index(_files_naming(missing), built_in)
        for entry_name, entry in built_in.items():
            is_new = entry_name not in index and entry_name not in user_index
            if entry_name in missing or is_new:
                index[entry_name] = entry
        members: set[str] = set()
        # A file may also declare entries that nobody asked for: only members of those that were searched are needed.
        known_names = ({name} | searched | user_index.keys()) & index.keys()
        for entry_name in known_names:
            members.update(_member_names(index[entry_name]))
        missing = members - user_index.keys() - searched
    if searched - index.keys():
        # Some name is in no file that mentions it: let the harness build its whole index. The user's entries come last and win.
        index = {**_full_index(), **user_index}
    return index


def _yaml_files(path: str) -> list[Path]:
    """The YAML at `path`, or those in the directory `path`. Raises ConfigError if there are none."""
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"{path}: there is no such file or directory")
    files = [root] if root.is_file() else sorted(root.rglob("*.yaml"))
    if not files or files[0].suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: holds no YAML of lm-evaluation-harness; name one, or a directory that has some")
    return files


def _read_files_into_index(files: list[Path], index: dict[str, Any]) -> list[str]:
    """Put what YAML files declare into `index`, by name; returns an error message for each file that cannot be read."""
    unreadable = []
    for file in files:
        try:
            read_task_file(file, index)
        except Exception as error:  # noqa: BLE001  of a YAML anything may be wrong
            one_line = " ".join(str(error).split())[:300]
            unreadable.append(f"{file}: cannot be read: {one_line}")
    return unreadable


@lru_cache(maxsize=1)
def _built_in_files() -> dict[str, bytes]:
    """The contents of the harness's own YAMLs, and of files that they include, by path; kept to be searched for names."""
    import lm_eval

    files = sorted((Path(lm_eval.__file__).parent / "tasks").rglob("*"))
    content_by_path = {}
    for file in files:
        may_be_yaml = not file.suffix or file.suffix.endswith("yaml")  # files that are included often have no suffix
        if may_be_yaml and file.is_file():
            content_by_path[str(file)] = file.read_bytes()
    return content_by_path


@lru_cache(maxsize=1)
def _including_files_by_file() -> dict[str, list[str]]:
    """Which of the harness's files include a file, by that file: a YAML belongs to the tags of files that it includes.

    All are paths. `include:` in a YAML has one name, a list in brackets, or a list of lines that begin with a dash.
    """
    including_files: dict[str, list[str]] = {}
    for file, text in _built_in_files().items():
        for names in _INCLUDE_REGEX.findall(text):
            for name in re.split(r"[\s,\[\]'\"]+|- ", names.decode()):
                if not name:
                    continue
                included = os.path.normpath(f"{Path(file).parent}/{name}")
                including_files.setdefault(included, []).append(file)
    return including_files


@lru_cache(maxsize=1)
def _full_index() -> dict[str, Any]:
    """All entries of the harness. Takes ten seconds, so it is only for names that were not found otherwise."""
    from lm_eval.tasks import TaskManager

    from trainer.evaluation.harness.isolation import collect_warnings

    with collect_warnings():
        return TaskManager().task_index


def _files_naming(names: set[str]) -> list[Path]:
    """The harness's own YAMLs that may declare one of these names: those that contain it, or include such a file.

    A YAML inherits the tags of the files that it includes, so it may belong to a tag that it does not mention.
    """
    any_name = b"|".join(re.escape(name.encode()) for name in names)
    pattern = re.compile(rb"(?<![\w.+-])(?:" + any_name + rb")(?![\w.+-])")
    files = {file for file, text in _built_in_files().items() if pattern.search(text)}
    to_visit = list(files)
    while to_visit:
        for including in _including_files_by_file().get(to_visit.pop(), ()):
            if including not in files:
                files.add(including)
                to_visit.append(including)
    return [Path(file) for file in sorted(files) if file.endswith(".yaml")]


def _member_names(entry: Any) -> Iterator[str]:
    """Names of the tasks and groups that an entry of the index consists of; none if it is a single task."""
    if entry.kind.name == "TAG":
        yield from entry.tags
    elif entry.kind.name == "GROUP":
        for name, _ in _members_of_group((entry.cfg or {}).get("task")):
            yield name


def _members_of_group(task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Which tasks and groups a group of lm-eval consists of, each as (name, the settings that the group has for it).

    `task`: what the group's YAML has under `task`, a list or one member, such as ["arc_easy", {"task": "boolq", "num_fewshot":
    3}, {"group": "mmlu"}] -> ("arc_easy", {}), ("boolq", {"task": ...}), ("mmlu", {"group": ...}).
    """
    if not task:
        return
    members = task if isinstance(task, list) else [task]
    for member in members:
        if isinstance(member, str):
            yield member, {}
        elif isinstance(member.get("task"), list):  # a group that is defined within the group
            yield from _members_of_group(member["task"])
        elif member.get("task") or member.get("group"):
            yield member.get("task") or member.get("group"), member


def _single_tasks(
    name: str, group_settings: dict[str, Any], index: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Expand a name (a task, a group or a tag) into its single tasks, each as (name, YAML settings).

    `group_settings`: what the groups above say of it, which wins over the task's own YAML. `index`: lm-eval's entries by name.
    """
    entry = index.get(name)
    if entry is None:  # a task that is defined within its group
        yield name, group_settings
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _single_tasks(member, group_settings, index)
    elif entry.kind.name == "GROUP":
        for member, member_settings in _members_of_group((entry.cfg or {}).get("task")):
            yield from _single_tasks(member, {**group_settings, **member_settings}, index)
    else:
        yield name, {**(entry.cfg or {}), **group_settings}


def _unknown_task_message(name: str, index: dict[str, Any], path: str | None, unreadable: list[str]) -> str:
    """Say why a task was not found, with similar names if there are any.

    `index`: lm-eval's entries by name. `path`: the user's YAML or directory of YAMLs. `unreadable`: messages for those of them
    that could not be read.
    """
    if unreadable:
        return f"is not in {path}; {unreadable[0]}"
    searched = "lm-evaluation-harness has no such task"
    if path:
        searched += f", nor has {path}"
    similar = difflib.get_close_matches(name, index, n=3)
    if similar:
        return f"{searched}; did you mean {' or '.join(similar)}?"
    return f"{searched}; `lm-eval ls tasks` lists them; a YAML of yours is named by path"


class DataOrigin(NamedTuple):
    """Where an lm-eval task finds its data. At most one of the fields is set; neither is if the data is on this machine."""

    problem: str | None = None
    """The error message if a file is missing, or no file is named: "dataset_kwargs.data_files ...: no such file"."""
    hub_data_set: str | None = None
    """A data set of a hub, such as "cais/mmlu (law)", or a file at a URL. It may be in the cache of `datasets`."""


def data_origin(settings: dict[str, Any]) -> DataOrigin:
    """Find out whether the data of an lm-eval task is on this machine, from the settings of its YAML; nothing is fetched.

    It is if it is in local files, or if a function or class of the task makes it.
    """
    path = settings.get("dataset_path")
    is_made_by_code = settings.get("custom_dataset") or settings.get("class")
    if is_made_by_code or path is None:
        return DataOrigin()
    if path in FILE_FORMAT_BUILDERS:
        return _origin_of_named_files(path, settings.get("dataset_kwargs") or {})
    # `dataset_path` is the directory of a data set, or its name on a hub.
    if Path(path).expanduser().exists():
        return DataOrigin()
    hub_data_set = str(path)
    if settings.get("dataset_name"):  # one configuration of the data set
        hub_data_set += f" ({settings['dataset_name']})"
    return DataOrigin(hub_data_set=hub_data_set)


def _origin_of_named_files(file_format: str, dataset_kwargs: dict[str, Any]) -> DataOrigin:
    """Find out whether the files that a YAML names under `dataset_kwargs` are on this machine. `file_format`: such as "json".

    They are those of `data_files`, below `data_dir` if that is set too; without `data_files`, all files of `data_dir`. An
    empty DataOrigin says that all of them are here.
    """
    data_files = dataset_kwargs.get("data_files")
    data_dir = dataset_kwargs.get("data_dir")
    parent_directory = data_dir or "" if data_files else ""
    files = [*texts_in_parsed(data_files)] or [*texts_in_parsed(data_dir)]
    if not files:
        return DataOrigin(
            problem=f"dataset_path: {file_format} without files; give dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}"
        )
    for file in files:
        if "://" in file:
            return DataOrigin(hub_data_set=file)
        try:
            expand_paths(str(Path(parent_directory) / file), "dataset_kwargs.data_files", allow_remote=False)
        except ShardtuneError as error:
            return DataOrigin(problem=str(error))
    return DataOrigin()
