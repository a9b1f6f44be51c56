"""Translates lists of data sets as axolotl and LLaMA-Factory write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers.conversion import Converted, text_of
from launch.config.importers.equivalent import TranslatedSetting, listed

FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".xz", ".bz2")
LOADERS = ("json", "csv", "parquet", "text", "arrow")
"""Names of readers of the library `datasets`, which stand where a data set would."""
FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "input_output": "",
}
"""axolotl's types, by the start of their names."""
FACTORY_COLUMNS = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
    "ranking": {
        "prompt": "prompt",
        "messages": "conversations",
        "chosen": "chosen",
        "rejected": "rejected",
        "system": "system",
    },
    "pretrain": {"prompt": "text"},
}
"""LLaMA-Factory's columns, and ours, by what is read: a format, two answers to compare, or plain text."""


def place(path: str, base: Path) -> str:
    """A path or the name of a data set of the hub, as `data.path` takes it."""
    if exists(Path(path)):
        return path
    if exists(base / path):
        return str(base / path)
    local = path.endswith(FILES) or path.startswith(("/", ".", "~", "hub:")) or "://" in path
    return path if local else f"hub:{path}"


def exists(path: Path) -> bool:
    """Whether there is such a file or directory."""
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no name of a file at all
        return False


def axolotl(entries: Any, setting: str, into: Converted, base: Path) -> None:
    """File `datasets:` or (as evaluation data) `test_datasets:`."""
    rows = entries if isinstance(entries, list) else [entries]
    held_out = setting == "test_datasets"
    several = len(rows) > 1
    paths: list[str] = []
    for number, entry in enumerate(rows):
        name = f"{setting}[{number}]" if several else setting
        entry = entry if isinstance(entry, dict) else {"path": entry}
        path = text_of(entry.get("path"))
        files = entry.get("data_files")
        if path in LOADERS and files is not None:
            path = text_of(files)
        else:
            path = place(path, base)
            if files is not None:
                into.lack(f"{name}.data_files", files, "name the files themselves in data.path")
        if held_out:
            paths.append(path)
            _rest_of_held_out(entry, name, into)
            continue
        needs_source = several or entry.get("name") or entry.get("split") not in (None, "train") or "revision" in entry
        prefix = f"data.sources.{source_name(path, into)}" if needs_source else "data"
        into.take(f"{name}.path", entry.get("path"), TranslatedSetting({f"{prefix}.path": path}))
        _axolotl_entry(entry, name, prefix, into)
    if paths:
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        into.take(f"{setting}.path", value, TranslatedSetting({"data.eval_path": value}))


def _rest_of_held_out(entry: Mapping[str, Any], name: str, into: Converted) -> None:
    for key, value in entry.items():
        if key in ("path", "data_files", "ds_type"):
            continue
        why = "held-out files are read as the training data's are, and of the hub's data sets by data.eval_path alone"
        into.take(f"{name}.{key}", value, TranslatedSetting(said=why, needless=key == "type"))


def _axolotl_entry(entry: Mapping[str, Any], name: str, prefix: str, into: Converted) -> None:
    columns = {
        "field": "text",
        "field_messages": "messages",
        "field_instruction": "instruction",
        "field_output": "output",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    }
    for key, value in entry.items():
        said, text = f"{name}.{key}", text_of(value)
        if key in ("path", "data_files"):
            continue
        if value is None:
            into.empty.append(said)
        elif key == "type":
            _axolotl_type(value, said, prefix, into)
        elif key in columns:
            column = columns[key]
            into.take(said, value, TranslatedSetting({f"{prefix}.columns.{column}": text} if column != text else {}))
        elif key in ("name", "revision") and prefix != "data":
            into.take(said, value, TranslatedSetting({f"{prefix}.{'subset' if key == 'name' else key}": text}))
        elif key == "split" and "[" in text:
            into.lack(said, value, "a split is taken whole; data.max_documents reads the first documents alone")
        elif key == "split":
            into.take(said, value, TranslatedSetting({f"{prefix}.split": text} if prefix != "data" else {}))
        elif key in ("ds_type", "message_field_role", "message_field_content", "message_property_mappings"):
            why = "the ending of a file, and the keys of its turns, say how it is read"
            into.take(said, value, TranslatedSetting(said=why, needless=True))
        elif key == "roles_to_train":
            roles = {"gpt": "assistant", "human": "user"}
            names = [roles.get(each, each) for each in listed(text)]
            into.take(said, value, TranslatedSetting({"data.learn.roles": f"[{','.join(names)}]"}))
        elif key == "train_on_eos":
            into.take(
                said,
                value,
                TranslatedSetting(said="the end of each learned turn is learned", needless=text in ("turn", "all")),
            )
        else:
            into.lack(said, value, "data has no such setting; docs/data-preparation.md says how rows are read")


def _axolotl_type(value: Any, said: str, prefix: str, into: Converted) -> None:
    if isinstance(value, dict):
        into.lack(said, value, "a prompt of one's own is written into the rows, as prompt and completion")
        return
    ours = next((ours for start, ours in FORMATS.items() if str(value).split(".")[0] == start), "")
    if not ours:
        into.lack(said, value, "how rows are read is recognised by their columns; data.format names one of ours")
        return
    remark = "" if "." not in str(value) else "the format alone: prompts are those of the chat template"
    words = {f"{prefix}.format": ours}
    if ours == "text" and prefix == "data":
        words["objective"] = "pretrain"
    into.take(said, value, TranslatedSetting(words, remark))


def factory(names: str, setting: str, directory: str, into: Converted, base: Path) -> None:
    """File `dataset:` or `eval_dataset:`, which name entries of `dataset_info.json` in `directory`."""
    places = [Path(directory).expanduser(), base / directory]
    info = next((where / "dataset_info.json" for where in places if exists(where / "dataset_info.json")), None)
    known: dict[str, Any] = {}
    if info is not None:
        try:
            known = json.loads(info.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            into.lack("dataset_dir", directory, f"{info} cannot be read ({error})")
    chosen, held_out, paths = listed(names), setting == "eval_dataset", []
    for name in chosen:
        entry = known.get(name)
        if not isinstance(entry, dict):
            key = "data.eval_path" if held_out else "data.path"
            where = f"{info} does not name it" if info else f"there is no dataset_info.json in {directory}"
            into.lack(setting, name, f"{where}; give its file: {key}=<file>")
            continue
        path = _factory_path(entry, info.parent if info else Path(directory))
        if held_out:
            paths.append(path)
            continue
        prefix = f"data.sources.{source_name(name, into)}" if len(chosen) > 1 or _of_hub(entry) else "data"
        into.take(setting, name, TranslatedSetting({f"{prefix}.path": path}))
        _factory_entry(entry, f"dataset_info.json: {name}", prefix, into)
    if paths:
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        into.take(setting, names, TranslatedSetting({"data.eval_path": value}))


def _of_hub(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("subset") or entry.get("split"))


def _factory_path(entry: Mapping[str, Any], directory: Path) -> str:
    if "file_name" in entry:
        return str(directory / str(entry["file_name"]))
    return f"hub:{entry.get('hf_hub_url', entry.get('ms_hub_url', ''))}"


def _factory_entry(entry: Mapping[str, Any], name: str, prefix: str, into: Converted) -> None:
    formatting = str(entry.get("formatting", "alpaca"))
    kind = (
        "pretrain" if into.words.get("objective") == "pretrain" else "ranking" if entry.get("ranking") else formatting
    )
    form = {"pretrain": "text", "alpaca": "alpaca", "sharegpt": "sharegpt"}.get(kind)
    into.take(f"{name}.formatting", formatting, TranslatedSetting({f"{prefix}.format": form} if form else {}))
    given = entry.get("columns") or {}
    columns = {**({"prompt": "instruction"} if kind == "ranking" and formatting == "alpaca" else {}), **given}
    for theirs, column in columns.items():
        ours = FACTORY_COLUMNS.get(kind, {}).get(theirs)
        said = f"{name}.columns.{theirs}"
        if ours is None:
            into.lack(said, column, "rows have no such column here")
        else:
            into.take(
                said, column, TranslatedSetting({} if ours == column else {f"{prefix}.columns.{ours}": str(column)})
            )
    for key, value in entry.items():
        said = f"{name}.{key}"
        if key in ("file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns"):
            continue
        if key in ("subset", "split") and prefix != "data":
            into.take(said, value, TranslatedSetting({f"{prefix}.{key}": text_of(value)}))
        elif key == "ranking":
            into.take(said, value, TranslatedSetting(said="two answers are recognised by their columns", needless=True))
        else:
            into.lack(said, value, "the keys of turns are recognised; data.columns renames columns")


def source_name(path: str, into: Converted) -> str:
    """A name for one of several sources, out of its path, that none has yet."""
    stem = re.sub(r"\.(json|jsonl|csv|tsv|parquet|arrow|txt)(\.\w+)?$", "", path.rstrip("/]").rsplit("/", 1)[-1])
    name = re.sub(r"\W+", "_", stem).strip("_").lower() or "source"
    if name[0].isdigit():
        name = f"set_{name}"
    taken, number = {key.split(".")[2] for key in into.words if key.startswith("data.sources.")}, 2
    unique = name
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    return unique
