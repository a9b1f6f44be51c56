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
"""Names of readers of the library `datasets`. axolotl writes one of them in place of a data set."""
FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "input_output": "",
}
"""Our formats by the first part of axolotl's `type`; empty: there is none."""
AXOLOTL_COLUMNS = {
    "field": "text",
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_output": "output",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
"""axolotl's settings that name a column, and our name for what the column holds."""
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
    """File `datasets:`, or `test_datasets:` as evaluation data. `base`: the directory that relative paths start from."""
    rows = entries if isinstance(entries, list) else [entries]
    is_held_out = setting == "test_datasets"
    held_out_paths: list[str] = []
    for number, row in enumerate(rows):
        name = f"{setting}[{number}]" if len(rows) > 1 else setting
        entry = row if isinstance(row, dict) else {"path": row}
        path = _axolotl_path(entry, name, conversion, base)
        if is_held_out:
            held_out_paths.append(path)
            _add_held_out_settings(entry, name, conversion)
            continue
        # `data.path` alone takes a whole data set; a subset, split or revision needs a source of its own.
        is_part_of_dataset = entry.get("name") or entry.get("split") not in (None, "train") or "revision" in entry
        needs_source = len(rows) > 1 or is_part_of_dataset
        prefix = f"data.sources.{source_name(path, conversion)}" if needs_source else "data"
        conversion.add(f"{name}.path", entry.get("path"), TranslatedSetting({f"{prefix}.path": path}))
        _add_axolotl_entry(entry, name, prefix, conversion)
    if held_out_paths:
        paths = _one_or_list(held_out_paths)
        conversion.add(f"{setting}.path", paths, TranslatedSetting({"data.eval_path": paths}))


def _axolotl_path(entry: Mapping[str, Any], name: str, conversion: Converted, base: Path) -> str:
    """The path of a data set as `data.path` takes it. axolotl may name a reader in `path` and the file in `data_files`."""
    path = as_typed(entry.get("path"))
    files = entry.get("data_files")
    if files is None:
        return data_path(path, base)
    if path in LOADERS:
        return as_typed(files)
    conversion.add_no_equal(f"{name}.data_files", files, "name the files themselves in data.path")
    return data_path(path, base)


def _one_or_list(paths: list[str]) -> str:
    """One path as it is, several as a list."""
    return paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


def _add_held_out_settings(entry: Mapping[str, Any], name: str, conversion: Converted) -> None:
    """File the settings of a held-out data set beside its path."""
    why = "held-out files are read as the training data's are, and of the hub's data sets by data.eval_path alone"
    for key, value in entry.items():
        if key not in ("path", "data_files", "ds_type"):
            conversion.add(f"{name}.{key}", value, TranslatedSetting(note=why, needless=key == "type"))


def _add_axolotl_entry(entry: Mapping[str, Any], name: str, prefix: str, conversion: Converted) -> None:
    """File the settings of a data set beside its path. `prefix`: `data`, or `data.sources.<name>` for one of several."""
    for key, value in entry.items():
        setting_name = f"{name}.{key}"
        if key in ("path", "data_files"):
            continue
        if value is None:
            conversion.empty.append(setting_name)
        elif key == "type":
            _add_axolotl_type(value, setting_name, prefix, conversion)
        elif key == "split" and "[" in as_typed(value):
            why = "a split is taken whole; data.max_documents reads the first documents alone"
            conversion.add_no_equal(setting_name, value, why)
        else:
            translation = _translate_axolotl_setting(key, as_typed(value), prefix)
            conversion.add(setting_name, value, translation)


def _translate_axolotl_setting(key: str, text: str, prefix: str) -> TranslatedSetting:
    """One setting of a data set of axolotl. `text`: its value as typed."""
    if key in AXOLOTL_COLUMNS:
        column = AXOLOTL_COLUMNS[key]
        return TranslatedSetting({f"{prefix}.columns.{column}": text} if column != text else {})
    if key == "name" and prefix != "data":
        return TranslatedSetting({f"{prefix}.subset": text})
    if key == "revision" and prefix != "data":
        return TranslatedSetting({f"{prefix}.revision": text})
    if key == "split":
        return TranslatedSetting({f"{prefix}.split": text} if prefix != "data" else {})
    if key in ("ds_type", "message_field_role", "message_field_content", "message_property_mappings"):
        return TranslatedSetting(
            note="the ending of a file, and the keys of its turns, say how it is read", needless=True
        )
    if key == "roles_to_train":
        our_names = {"gpt": "assistant", "human": "user"}
        roles = [our_names.get(role, role) for role in list_entries(text)]
        return TranslatedSetting({"data.learn.roles": f"[{','.join(roles)}]"})
    if key == "train_on_eos":
        return TranslatedSetting(note="the end of each learned turn is learned", needless=text in ("turn", "all"))
    return TranslatedSetting(note="data has no such setting; docs/data-preparation.md says how rows are read")


def _add_axolotl_type(value: Any, setting_name: str, prefix: str, conversion: Converted) -> None:
    """File the `type` of a data set, such as `chat_template` or `alpaca.load_no_prompt`, as a format."""
    if isinstance(value, dict):
        why = "a prompt of one's own is written into the rows, as prompt and completion"
        conversion.add_no_equal(setting_name, value, why)
        return
    type_name, dot, _ = str(value).partition(".")
    our_format = FORMATS.get(type_name, "")
    if not our_format:
        why = "how rows are read is recognised by their columns; data.format names one of ours"
        conversion.add_no_equal(setting_name, value, why)
        return
    words = {f"{prefix}.format": our_format}
    if our_format == "text" and prefix == "data":
        words["objective"] = "pretrain"
    note = "the format alone: prompts are those of the chat template" if dot else ""
    conversion.add(setting_name, value, TranslatedSetting(words, note))


def add_factory_datasets(names: str, setting: str, directory: str, conversion: Converted, base: Path) -> None:
    """File `dataset:` or `eval_dataset:`, which name entries of `dataset_info.json` in `directory`."""
    directories = [Path(directory).expanduser(), base / directory]
    info_files = [folder / "dataset_info.json" for folder in directories if exists(folder / "dataset_info.json")]
    info_file = info_files[0] if info_files else None
    entries: dict[str, Any] = {}
    if info_file is not None:
        try:
            entries = json.loads(info_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            conversion.add_no_equal("dataset_dir", directory, f"{info_file} cannot be read ({error})")
    is_held_out = setting == "eval_dataset"
    held_out_paths: list[str] = []
    dataset_names = list_entries(names)
    for name in dataset_names:
        entry = entries.get(name)
        if not isinstance(entry, dict):
            key = "data.eval_path" if is_held_out else "data.path"
            where = f"{info_file} does not name it" if info_file else f"there is no dataset_info.json in {directory}"
            conversion.add_no_equal(setting, name, f"{where}; give its file: {key}=<file>")
            continue
        path = _factory_path(entry, info_file.parent if info_file else Path(directory))
        if is_held_out:
            held_out_paths.append(path)
            continue
        needs_source = len(dataset_names) > 1 or _is_part_of_hub_dataset(entry)
        prefix = f"data.sources.{source_name(name, conversion)}" if needs_source else "data"
        conversion.add(setting, name, TranslatedSetting({f"{prefix}.path": path}))
        _add_factory_entry(entry, f"dataset_info.json: {name}", prefix, conversion)
    if held_out_paths:
        conversion.add(setting, names, TranslatedSetting({"data.eval_path": _one_or_list(held_out_paths)}))


def _is_part_of_hub_dataset(entry: Mapping[str, Any]) -> bool:
    """Whether an entry names a subset or split, which only an entry of `data.sources` can."""
    return bool(entry.get("subset") or entry.get("split"))


def _factory_path(entry: Mapping[str, Any], directory: Path) -> str:
    """The file of an entry of `dataset_info.json`, or its data set of the hub."""
    if "file_name" in entry:
        return str(directory / str(entry["file_name"]))
    return f"hub:{entry.get('hf_hub_url', entry.get('ms_hub_url', ''))}"


def _add_factory_entry(entry: Mapping[str, Any], name: str, prefix: str, conversion: Converted) -> None:
    """File the settings of an entry of `dataset_info.json` beside its path."""
    formatting = str(entry.get("formatting", "alpaca"))
    if conversion.words.get("objective") == "pretrain":
        kind = "pretrain"
    elif entry.get("ranking"):
        kind = "ranking"
    else:
        kind = formatting
    our_format = {"pretrain": "text", "alpaca": "alpaca", "sharegpt": "sharegpt"}.get(kind)
    format_words = {f"{prefix}.format": our_format} if our_format else {}
    conversion.add(f"{name}.formatting", formatting, TranslatedSetting(format_words))
    _add_factory_columns(entry, kind, name, prefix, conversion)
    for key, value in entry.items():
        setting_name = f"{name}.{key}"
        if key in ("file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns"):
            continue
        if key in ("subset", "split") and prefix != "data":
            conversion.add(setting_name, value, TranslatedSetting({f"{prefix}.{key}": as_typed(value)}))
        elif key == "ranking":
            note = "two answers are recognised by their columns"
            conversion.add(setting_name, value, TranslatedSetting(note=note, needless=True))
        else:
            why = "the keys of turns are recognised; data.columns renames columns"
            conversion.add_no_equal(setting_name, value, why)


def _add_factory_columns(entry: Mapping[str, Any], kind: str, name: str, prefix: str, conversion: Converted) -> None:
    """File the `columns` of an entry. `kind`: which of `FACTORY_COLUMNS` it is."""
    columns: dict[str, Any] = {}
    if kind == "ranking" and entry.get("formatting", "alpaca") == "alpaca":
        columns["prompt"] = "instruction"  # LLaMA-Factory's default, which differs from ours
    columns |= entry.get("columns") or {}
    for foreign_column, column in columns.items():
        our_column = FACTORY_COLUMNS.get(kind, {}).get(foreign_column)
        setting_name = f"{name}.columns.{foreign_column}"
        if our_column is None:
            conversion.add_no_equal(setting_name, column, "rows have no such column here")
            continue
        words = {} if our_column == column else {f"{prefix}.columns.{our_column}": str(column)}
        conversion.add(setting_name, column, TranslatedSetting(words))


def source_name(path: str, conversion: Converted) -> str:
    """A name for one of several sources, made from its path, that no other source has yet."""
    stem = re.sub(r"\.(json|jsonl|csv|tsv|parquet|arrow|txt)(\.\w+)?$", "", path.rstrip("/]").rsplit("/", 1)[-1])
    name = re.sub(r"\W+", "_", stem).strip("_").lower() or "source"
    if name[0].isdigit():
        name = f"set_{name}"
    taken_names = {key.split(".")[2] for key in conversion.words if key.startswith("data.sources.")}
    unique = name
    number = 2
    while unique in taken_names:
        unique = f"{name}_{number}"
        number += 1
    return unique
