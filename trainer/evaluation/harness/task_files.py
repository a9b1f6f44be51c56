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
    """What a name stands for."""

    name: str
    index: dict[str, Any]
    """The harness's entries by name: the one that is named, and those that it is made of."""
    single_tasks: dict[str, dict[str, Any]]
    """Settings of each single task by its name, as its YAML has them; functions are paths."""
    weighted_by_size: bool
    """Whether a task of several weighs each by its rows."""


@lru_cache(maxsize=64)
def find_tasks(name: str | None, path: str | None) -> TaskFiles:
    """The tasks of a name, in `path` (a YAML, or a directory of these) or of the harness's own; reads no data.

    Without a name the one that the file has. Errors: ConfigError, whose text begins with the value.
    """
    index: dict[str, Any] = {}
    faults: list[str] = []
    if path is not None:
        faults = _read_files(_files(path), index)
        if name is None and Path(path).expanduser().is_file():
            name = next(iter(index), None)
    if name is None:
        raise ConfigError(f"{path}: " + (faults[0] if faults else "has neither `task` nor `group`; name the task"))
    own, seen = {*index}, set[str]()
    missing = {name} - own
    while missing:  # of a group its members too
        seen |= missing
        _read_files(_files_naming(missing), built_in := dict[str, Any]())
        for each, entry in built_in.items():
            if each in missing or (each not in index and each not in own):
                index[each] = entry
        missing = (
            {part for each in ({name} | seen | own) & index.keys() for part in _part_names(index[each])} - own - seen
        )
    if seen - index.keys():
        index = {**_full_index(), **{each: index[each] for each in own}}
    if name not in index:
        raise ConfigError(f"{name}: {_unknown(name, index, path, faults)}")
    leaves = dict(_single_tasks(name, {}, index))
    groups = (index[name].cfg or {}).get("aggregate_metric_list") or []
    sizes = [each.get("weight_by_size", True) for each in (groups if isinstance(groups, list) else [groups])]
    return TaskFiles(name, index, leaves, all(sizes))


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    if not root.exists():
        raise ConfigError(f"{path}: there is no such file or directory")
    found = [root] if root.is_file() else sorted(root.rglob("*.yaml"))
    if not found or found[0].suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: holds no YAML of lm-evaluation-harness; name one, or a directory that has some")
    return found


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
    kept = [file for file in files if (not file.suffix or file.suffix.endswith("yaml")) and file.is_file()]
    return {str(file): file.read_bytes() for file in kept}


@lru_cache(maxsize=1)
def _included_by() -> dict[str, list[str]]:
    """Which of the harness's own files include one of them."""
    found: dict[str, list[str]] = {}
    for file, text in _own_files().items():
        for each in _INCLUDE.findall(text):
            for name in filter(None, re.split(r"[\s,\[\]'\"]+|- ", each.decode())):
                found.setdefault(os.path.normpath(f"{Path(file).parent}/{name}"), []).append(file)
    return found


@lru_cache(maxsize=1)
def _full_index() -> dict[str, Any]:
    """All that the harness has, in ten seconds: where a name was not found otherwise."""
    from lm_eval.tasks import TaskManager

    from trainer.evaluation.harness.isolation import collect_warnings

    with collect_warnings():
        return TaskManager().task_index


def _files_naming(names: set[str]) -> list[Path]:
    """The harness's own files in which one of these names stands, or that include such a one: tags are taken over."""
    sought = re.compile(rb"(?<![\w.+-])(?:" + b"|".join(re.escape(name.encode()) for name in names) + rb")(?![\w.+-])")
    found = [file for file, text in _own_files().items() if sought.search(text)]
    held = {*found}
    for file in found:  # which grows
        more = [each for each in _included_by().get(file, ()) if each not in held]
        held |= {*more}
        found += more
    return [Path(file) for file in sorted(held) if file.endswith(".yaml")]


def _part_names(entry: Any) -> Iterator[str]:
    """Names that an entry is made of."""
    if entry.kind.name == "TAG":
        yield from entry.tags
    elif entry.kind.name == "GROUP":
        yield from (name for name, _ in _members((entry.cfg or {}).get("task")))


def _members(task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of each member of a group."""
    for each in task if isinstance(task, list) else [task] if task else []:
        if isinstance(each, str):
            yield each, {}
        elif isinstance(each.get("task"), list):  # a group that is written within
            yield from _members(each["task"])
        elif name := each.get("task") or each.get("group"):
            yield name, each


def _single_tasks(name: str, settings: dict[str, Any], index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    entry = index.get(name)
    if entry is None:  # a task that is written within its group
        yield name, settings
    elif entry.kind.name == "TAG":
        for each in sorted(entry.tags):
            yield from _single_tasks(each, settings, index)
    elif entry.kind.name == "GROUP":
        for each, own in _members((entry.cfg or {}).get("task")):
            yield from _single_tasks(each, {**settings, **own}, index)
    else:
        yield name, {**(entry.cfg or {}), **settings}


def _unknown(name: str, index: dict[str, Any], path: str | None, faults: list[str]) -> str:
    if faults:
        return f"is not in {path}; {faults[0]}"
    near = difflib.get_close_matches(name, index, n=3)
    where = "lm-evaluation-harness has no such task" + (f", nor has {path}" if path else "")
    return f"{where}; " + (
        f"did you mean {' or '.join(near)}?"
        if near
        else "`lm-eval ls tasks` lists them; a YAML of yours is named by path"
    )


def missing_data(settings: dict[str, Any]) -> tuple[str | None, str | None]:
    """(what is wrong with the files that a task reads, the data set that it reads from a hub), by its settings; else None.

    A data set of a hub may lie in the cache of `datasets`; data that a function makes is not known before it is made.
    """
    path, more = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    if settings.get("custom_dataset") or settings.get("class") or path is None:
        return None, None
    if path not in BUILDERS:
        part = f" ({settings['dataset_name']})" if settings.get("dataset_name") else ""
        return None, None if Path(path).expanduser().exists() else f"{path}{part}"
    files = [*texts_in(more.get("data_files"))] or [*texts_in(more.get("data_dir"))]
    more = more if more.get("data_files") else {}
    if not files:
        return f"dataset_path: {path} without files; give dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}", None
    for file in files:
        if "://" in file:
            return None, file
        try:
            expand(str(Path(more.get("data_dir") or "") / file), "dataset_kwargs.data_files", remote=False)
        except ShardtuneError as error:
            return str(error), None
    return None, None
