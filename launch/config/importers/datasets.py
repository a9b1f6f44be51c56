"""Translates lists of data sets as axolotl and LLaMA-Factory write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers.conversion import Converted, as_typed
from launch.config.importers.equivalent import TranslatedSetting, list_entries

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


def data_path(path: str, base: Path) -> str:
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


def add_axolotl_datasets(entries: Any, setting: str, conversion: Converted, base: Path) -> None:
    """File `datasets:` or (as evaluation data) `test_datasets:`."""
    rows = entries if isinstance(entries, list) else [entries]
    is_held_out = setting == "test_datasets"
    several = len(rows) > 1
    paths: list[str] = []
    for number, entry in enumerate(rows):
        name = f"{setting}[{number}]" if several else setting
        entry = entry if isinstance(entry, dict) else {"path": entry}
        path = as_typed(entry.get("path"))
        files = entry.get("data_files")
        if path in LOADERS and files is not None:
            path = as_typed(files)
        else:
            path = data_path(path, base)
            if files is not None:
                conversion.add_no_equal(f"{name}.data_files", files, "name the files themselves in data.path")
        if is_held_out:
            paths.append(path)
            _add_held_out_settings(entry, name, conversion)
            continue
        needs_source = several or entry.get("name") or entry.get("split") not in (None, "train") or "revision" in entry
        prefix = f"data.sources.{source_name(path, conversion)}" if needs_source else "data"
        conversion.add(f"{name}.path", entry.get("path"), TranslatedSetting({f"{prefix}.path": path}))
        _add_axolotl_entry(entry, name, prefix, conversion)
    if paths:
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        conversion.add(f"{setting}.path", value, TranslatedSetting({"data.eval_path": value}))


def _add_held_out_settings(entry: Mapping[str, Any], name: str, conversion: Converted) -> None:
    for key, value in entry.items():
        if key in ("path", "data_files", "ds_type"):
            continue
        why = "held-out files are read as the training data's are, and of the hub's data sets by data.eval_path alone"
        conversion.add(f"{name}.{key}", value, TranslatedSetting(note=why, needless=key == "type"))


def _add_axolotl_entry(entry: Mapping[str, Any], name: str, prefix: str, conversion: Converted) -> None:
    columns = {
        "field": "text",
        "field_messages": "messages",
        "field_instruction": "instruction",
        "field_output": "output",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
    }
    for key, value in entry.items():
        setting_name, text = f"{name}.{key}", as_typed(value)
        if key in ("path", "data_files"):
            continue
        if value is None:
            conversion.empty.append(setting_name)
        elif key == "type":
            _add_axolotl_type(value, setting_name, prefix, conversion)
        elif key in columns:
            column = columns[key]
            conversion.add(
                setting_name, value, TranslatedSetting({f"{prefix}.columns.{column}": text} if column != text else {})
            )
        elif key in ("name", "revision") and prefix != "data":
            conversion.add(
                setting_name, value, TranslatedSetting({f"{prefix}.{'subset' if key == 'name' else key}": text})
            )
        elif key == "split" and "[" in text:
            conversion.add_no_equal(
                setting_name, value, "a split is taken whole; data.max_documents reads the first documents alone"
            )
        elif key == "split":
            conversion.add(
                setting_name, value, TranslatedSetting({f"{prefix}.split": text} if prefix != "data" else {})
            )
        elif key in ("ds_type", "message_field_role", "message_field_content", "message_property_mappings"):
            why = "the ending of a file, and the keys of its turns, say how it is read"
            conversion.add(setting_name, value, TranslatedSetting(note=why, needless=True))
        elif key == "roles_to_train":
            roles = {"gpt": "assistant", "human": "user"}
            names = [roles.get(role, role) for role in list_entries(text)]
            conversion.add(setting_name, value, TranslatedSetting({"data.learn.roles": f"[{','.join(names)}]"}))
        elif key == "train_on_eos":
            conversion.add(
                setting_name,
                value,
                TranslatedSetting(note="the end of each learned turn is learned", needless=text in ("turn", "all")),
            )
        else:
            conversion.add_no_equal(
                setting_name, value, "data has no such setting; docs/data-preparation.md says how rows are read"
            )


def _add_axolotl_type(value: Any, setting_name: str, prefix: str, conversion: Converted) -> None:
    if isinstance(value, dict):
        conversion.add_no_equal(
            setting_name, value, "a prompt of one's own is written into the rows, as prompt and completion"
        )
        return
    our_format = next((our_format for start, our_format in FORMATS.items() if str(value).split(".")[0] == start), "")
    if not our_format:
        conversion.add_no_equal(
            setting_name, value, "how rows are read is recognised by their columns; data.format names one of ours"
        )
        return
    remark = "" if "." not in str(value) else "the format alone: prompts are those of the chat template"
    words = {f"{prefix}.format": our_format}
    if our_format == "text" and prefix == "data":
        words["objective"] = "pretrain"
    conversion.add(setting_name, value, TranslatedSetting(words, remark))


def add_factory_datasets(names: str, setting: str, directory: str, conversion: Converted, base: Path) -> None:
    """File `dataset:` or `eval_dataset:`, which name entries of `dataset_info.json` in `directory`."""
    places = [Path(directory).expanduser(), base / directory]
    info_file = next(
        (
            directory_path / "dataset_info.json"
            for directory_path in places
            if exists(directory_path / "dataset_info.json")
        ),
        None,
    )
    entries: dict[str, Any] = {}
    if info_file is not None:
        try:
            entries = json.loads(info_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            conversion.add_no_equal("dataset_dir", directory, f"{info_file} cannot be read ({error})")
    dataset_names, is_held_out, paths = list_entries(names), setting == "eval_dataset", []
    for name in dataset_names:
        entry = entries.get(name)
        if not isinstance(entry, dict):
            key = "data.eval_path" if is_held_out else "data.path"
            directory_path = (
                f"{info_file} does not name it" if info_file else f"there is no dataset_info.json in {directory}"
            )
            conversion.add_no_equal(setting, name, f"{directory_path}; give its file: {key}=<file>")
            continue
        path = _factory_path(entry, info_file.parent if info_file else Path(directory))
        if is_held_out:
            paths.append(path)
            continue
        prefix = (
            f"data.sources.{source_name(name, conversion)}"
            if len(dataset_names) > 1 or _is_part_of_hub_dataset(entry)
            else "data"
        )
        conversion.add(setting, name, TranslatedSetting({f"{prefix}.path": path}))
        _add_factory_entry(entry, f"dataset_info.json: {name}", prefix, conversion)
    if paths:
        value = paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"
        conversion.add(setting, names, TranslatedSetting({"data.eval_path": value}))


def _is_part_of_hub_dataset(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("subset") or entry.get("split"))


def _factory_path(entry: Mapping[str, Any], directory: Path) -> str:
    if "file_name" in entry:
        return str(directory / str(entry["file_name"]))
    return f"hub:{entry.get('hf_hub_url', entry.get('ms_hub_url', ''))}"


def _add_factory_entry(entry: Mapping[str, Any], name: str, prefix: str, conversion: Converted) -> None:
    formatting = str(entry.get("formatting", "alpaca"))
    kind = (
        "pretrain"
        if conversion.words.get("objective") == "pretrain"
        else "ranking"
        if entry.get("ranking")
        else formatting
    )
    our_format = {"pretrain": "text", "alpaca": "alpaca", "sharegpt": "sharegpt"}.get(kind)
    conversion.add(
        f"{name}.formatting", formatting, TranslatedSetting({f"{prefix}.format": our_format} if our_format else {})
    )
    typed_columns = entry.get("columns") or {}
    columns = {**({"prompt": "instruction"} if kind == "ranking" and formatting == "alpaca" else {}), **typed_columns}
    for foreign_column, column in columns.items():
        our_column = FACTORY_COLUMNS.get(kind, {}).get(foreign_column)
        setting_name = f"{name}.columns.{foreign_column}"
        if our_column is None:
            conversion.add_no_equal(setting_name, column, "rows have no such column here")
        else:
            conversion.add(
                setting_name,
                column,
                TranslatedSetting({} if our_column == column else {f"{prefix}.columns.{our_column}": str(column)}),
            )
    for key, value in entry.items():
        setting_name = f"{name}.{key}"
        if key in ("file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns"):
            continue
        if key in ("subset", "split") and prefix != "data":
            conversion.add(setting_name, value, TranslatedSetting({f"{prefix}.{key}": as_typed(value)}))
        elif key == "ranking":
            conversion.add(
                setting_name,
                value,
                TranslatedSetting(note="two answers are recognised by their columns", needless=True),
            )
        else:
            conversion.add_no_equal(
                setting_name, value, "the keys of turns are recognised; data.columns renames columns"
            )


def source_name(path: str, conversion: Converted) -> str:
    """A name for one of several sources, out of its path, that none has yet."""
    stem = re.sub(r"\.(json|jsonl|csv|tsv|parquet|arrow|txt)(\.\w+)?$", "", path.rstrip("/]").rsplit("/", 1)[-1])
    name = re.sub(r"\W+", "_", stem).strip("_").lower() or "source"
    if name[0].isdigit():
        name = f"set_{name}"
    taken_names, number = {key.split(".")[2] for key in conversion.words if key.startswith("data.sources.")}, 2
    unique = name
    while unique in taken_names:
        unique, number = f"{name}_{number}", number + 1
    return unique
