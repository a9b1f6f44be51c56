"""Translates lists of data sets as axolotl and LLaMA-Factory write them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config.importers.conversion import ConvertedSettings, to_cli_text
from launch.config.importers.equivalent import TranslatedSetting, list_entries

DATA_FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".xz", ".bz2")
LOADER_NAMES = ("json", "csv", "parquet", "text", "arrow")
"""Names of readers of the library `datasets`. axolotl writes one of them in place of a data set."""
FORMAT_BY_AXOLOTL_TYPE = {
    "alpaca": "alpaca",
    "chat_template": "auto",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "input_output": "",
}
"""Our formats by the first part of axolotl's `type`; empty: there is none."""
COLUMN_BY_AXOLOTL_SETTING = {
    "field": "text",
    "field_messages": "messages",
    "field_instruction": "instruction",
    "field_output": "output",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
}
"""axolotl's settings that name a column, and our name for what the column holds."""
SOURCE_SETTING_BY_AXOLOTL_SETTING = {"name": "subset", "revision": "revision", "split": "split"}
"""axolotl's settings of a data set, and our name for each below `data.sources.<name>`."""
COLUMNS_BY_LLAMA_FACTORY_FORMAT = {
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


def shardtune_data_path(path: str, file_dir: Path) -> str:
    """The path of another trainer's data set, as shardtune's setting `data.path` takes it.

    `path`: as the other trainer's settings file has it. `file_dir`: the directory of that file.
    The cases, in order:

    - a file or directory that exists, in the working directory or below `file_dir`: its path;
    - the name of a data file, a local path or an address: as it is;
    - anything else, such as `org/name`: a data set of the Hugging Face hub, `hub:org/name`.
    """
    possible_path = _path_beside_settings_file(path, file_dir)
    if exists(Path(possible_path)):
        return possible_path
    is_file_name = path.endswith(DATA_FILE_SUFFIXES)
    is_local_path = path.startswith(("/", ".", "~"))
    is_address = path.startswith("hub:") or "://" in path
    return path if is_file_name or is_local_path or is_address else f"hub:{path}"


def exists(path: Path) -> bool:
    """Whether there is such a file or directory."""
    try:
        return path.expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no name of a file at all
        return False


def translate_axolotl_datasets(entries: Any, setting: str, conversion: ConvertedSettings, file_dir: Path) -> None:
    """Translate axolotl's `datasets:` as training data, or `test_datasets:` as evaluation data, into `conversion`.

    `entries`: what the file has under `setting`: one data set or a list, each a path or a block such as {"path": "a.jsonl",
    "type": "alpaca"}.
    `setting`: `datasets` or `test_datasets`.
    `file_dir`: the directory of the settings file, where relative paths may start.

    shardtune has short settings `data.*` for a single file, and a table `data.sources` for anything else. Where the settings go:

    - of a whole data set that is the only one: `data.*`;
    - of one of several, or of a subset, split or revision: `data.sources.<name>.*`;
    - of `test_datasets`: the paths together `data.eval_path`.
    """
    datasets = entries if isinstance(entries, list) else [entries]
    is_held_out = setting == "test_datasets"
    held_out_paths: list[str] = []
    for number, dataset in enumerate(datasets):
        dataset_name = f"{setting}[{number}]" if len(datasets) > 1 else setting  # in messages
        entry = dataset if isinstance(dataset, dict) else {"path": dataset}
        path = _axolotl_path(entry, dataset_name, conversion, file_dir)
        if is_held_out:
            held_out_paths.append(path)
            _add_held_out_settings(entry, dataset_name, conversion)
            continue
        # Only a source has settings for subset, split and revision; `train` is what shardtune takes anyway.
        has_other_split = entry.get("split") not in (None, "train")
        is_part_of_dataset = entry.get("name") or has_other_split or "revision" in entry
        needs_source = len(datasets) > 1 or is_part_of_dataset
        our_prefix = f"data.sources.{unused_source_name(path, conversion)}" if needs_source else "data"
        translation = TranslatedSetting({f"{our_prefix}.path": path})
        conversion.add_translation(f"{dataset_name}.path", entry.get("path"), translation)
        _add_axolotl_settings(entry, dataset_name, our_prefix, conversion)
    if held_out_paths:
        paths = _one_or_list(held_out_paths)
        conversion.add_translation(f"{setting}.path", paths, TranslatedSetting({"data.eval_path": paths}))


def _axolotl_path(entry: Mapping[str, Any], dataset_name: str, conversion: ConvertedSettings, file_dir: Path) -> str:
    """The path of an axolotl data set, as shardtune's `data.path` takes it: one path, or a list as text (`[a.jsonl,b.jsonl]`).

    `entry`: the data set's settings, such as {"path": "json", "data_files": "a.jsonl"}. There `path` only names a reader of the
        library `datasets`, and `data_files` has the files. Beside any other `path` they are noted as unsupported in `conversion`.

    `dataset_name`: the data set in messages. `file_dir`: the directory of the settings file, where relative paths may start.
    """
    path = to_cli_text(entry.get("path"))
    data_files = entry.get("data_files")
    if data_files is None:
        return shardtune_data_path(path, file_dir)
    if path in LOADER_NAMES and isinstance(data_files, dict):
        # Files by split, which have no form in `data.path`: passed on as they are, for the run to refuse.
        return to_cli_text(data_files)
    if path in LOADER_NAMES:
        file_names = data_files if isinstance(data_files, list) else [data_files]
        return _one_or_list([_path_beside_settings_file(str(file_name), file_dir) for file_name in file_names])
    conversion.add_unsupported(f"{dataset_name}.data_files", data_files, "name the files themselves in data.path")
    return shardtune_data_path(path, file_dir)


def _path_beside_settings_file(path: str, file_dir: Path) -> str:
    """A local path: below `file_dir` if it exists there and not in the working directory; otherwise as it is."""
    if not exists(Path(path)) and exists(file_dir / path):
        return str(file_dir / path)
    return path


def _one_or_list(paths: list[str]) -> str:
    """One path as it is, several as a list."""
    return paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


def _add_held_out_settings(entry: Mapping[str, Any], dataset_name: str, conversion: ConvertedSettings) -> None:
    """Note the settings of an axolotl data set for evaluation, other than its path: they have no equivalent.

    shardtune reads held-out files as it reads the training data.
    `entry`: the settings, of which `type` is not needed and others are unsupported.
    `dataset_name`: the data set in messages, such as `test_datasets[0]`.
    """
    why = "held-out files are read as the training data's are, and of the hub's data sets by data.eval_path alone"
    for key, value in entry.items():
        if key not in ("path", "data_files", "ds_type"):
            translation = TranslatedSetting(note=why, not_needed=key == "type")
            conversion.add_translation(f"{dataset_name}.{key}", value, translation)


def _add_axolotl_settings(
    entry: Mapping[str, Any], dataset_name: str, our_prefix: str, conversion: ConvertedSettings
) -> None:
    """Translate the settings of one axolotl data set, other than its path, into `conversion`.

    `entry`: such as {"path": "a.jsonl", "type": "alpaca", "split": "train"}.
    `dataset_name`: the data set in messages, such as `datasets[0]`.
    `our_prefix`: what shardtune's settings of it begin with, `data` or `data.sources.<name>`.
    """
    for key, value in entry.items():
        axolotl_key = f"{dataset_name}.{key}"
        if key in ("path", "data_files"):
            continue  # translated by the caller
        if value is None:
            conversion.names_without_value.append(axolotl_key)
        elif key == "type":
            _add_axolotl_type(value, axolotl_key, our_prefix, conversion)
        elif key == "split" and "[" in to_cli_text(value):  # a slice, as in `train[:10%]`
            why = "a split is taken whole; data.max_documents reads the first documents alone"
            conversion.add_unsupported(axolotl_key, value, why)
        else:
            translation = _translate_axolotl_setting(key, to_cli_text(value), our_prefix)
            conversion.add_translation(axolotl_key, value, translation)


def _translate_axolotl_setting(key: str, text: str, our_prefix: str) -> TranslatedSetting:
    """Translate one setting of an axolotl data set: `revision: v2` -> {"data.sources.<name>.revision": "v2"}.

    `text`: its value as typed.
    `our_prefix`: what shardtune's settings of the data set begin with, `data` or `data.sources.<name>`.
    Without an equivalent the translation has a note that says why. An empty translation means that shardtune does the same
    anyway.
    """
    is_named_source = our_prefix != "data"
    if key in COLUMN_BY_AXOLOTL_SETTING:
        column = COLUMN_BY_AXOLOTL_SETTING[key]
        if column == text:  # the column has our name already
            return TranslatedSetting()
        return TranslatedSetting({f"{our_prefix}.columns.{column}": text})
    if key in SOURCE_SETTING_BY_AXOLOTL_SETTING and is_named_source:
        return TranslatedSetting({f"{our_prefix}.{SOURCE_SETTING_BY_AXOLOTL_SETTING[key]}": text})
    if key == "split":
        # Without a source of its own the split is `train`, which `data.path` takes without a setting.
        return TranslatedSetting()
    if key in ("ds_type", "message_field_role", "message_field_content", "message_property_mappings"):
        return TranslatedSetting(
            note="the ending of a file, and the keys of its turns, say how it is read", not_needed=True
        )
    if key == "roles_to_train":
        # `data.learn` has no prefix, because it holds for all sources together.
        our_role_names = {"gpt": "assistant", "human": "user"}
        roles = [our_role_names.get(role, role) for role in list_entries(text)]
        return TranslatedSetting({"data.learn.roles": f"[{','.join(roles)}]"})
    if key == "train_on_eos":
        return TranslatedSetting(note="the end of each learned turn is learned", not_needed=text in ("turn", "all"))
    return TranslatedSetting(note="data has no such setting; docs/reference/data-formats.md says how rows are read")


def _add_axolotl_type(value: Any, setting_name: str, our_prefix: str, conversion: ConvertedSettings) -> None:
    """Translate the `type` of an axolotl data set, which says how rows are read, to shardtune's `data.format`, in `conversion`.

    `value`: such as `chat_template`, `alpaca.load_no_prompt` (a format, and how its prompt is written), or a block that describes
        a prompt.
    `setting_name`: the setting in messages, such as `datasets[0].type`.
    `our_prefix`: what shardtune's settings of the data set begin with, `data` or `data.sources.<name>`.
    A type without a format is noted as unsupported.
    """
    if isinstance(value, dict):
        why = "a prompt of one's own is written into the rows, as prompt and completion"
        conversion.add_unsupported(setting_name, value, why)
        return
    type_name, dot, _ = str(value).partition(".")
    our_format = FORMAT_BY_AXOLOTL_TYPE.get(type_name, "")
    if not our_format:
        why = "how rows are read is recognised by their columns; data.format names one of ours"
        conversion.add_unsupported(setting_name, value, why)
        return
    overrides = {f"{our_prefix}.format": our_format}
    # The objective holds for all sources, so it follows from the format only if there is one source.
    if our_format == "text" and our_prefix == "data":
        overrides["objective"] = "pretrain"
    note = "the format alone: prompts are those of the chat template" if dot else ""
    conversion.add_translation(setting_name, value, TranslatedSetting(overrides, note))


def translate_llama_factory_datasets(
    names: str, setting: str, directory: str, conversion: ConvertedSettings, file_dir: Path
) -> None:
    """Translate LLaMA-Factory's `dataset:` or `eval_dataset:` into `conversion`: names of entries of its `dataset_info.json`.

    `names`: the entries' names, separated by commas.
    `setting`: `dataset` (training data) or `eval_dataset`.
    `directory`: where `dataset_info.json` is; if it is relative and not in the working directory, it starts at `file_dir`, the
        directory of the settings file.

    An entry looks like {"file_name": "alpaca.json", "split": "train", "columns": {...}}. A name that the file lacks is noted as
    unsupported.
    """
    info_file = _find_dataset_info(directory, file_dir)
    entries: dict[str, Any] = {}
    if info_file is not None:
        try:
            entries = json.loads(info_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            conversion.add_unsupported("dataset_dir", directory, f"{info_file} cannot be read ({error})")

    # Each entry of training data becomes `data`, or one of `data.sources`; held-out ones together become `data.eval_path`.
    is_held_out = setting == "eval_dataset"
    held_out_paths: list[str] = []
    dataset_names = list_entries(names)
    for name in dataset_names:
        entry = entries.get(name)
        if info_file is None or not isinstance(entry, dict):
            key = "data.eval_path" if is_held_out else "data.path"
            reason = f"{info_file} does not name it" if info_file else f"there is no dataset_info.json in {directory}"
            conversion.add_unsupported(setting, name, f"{reason}; give its file: {key}=<file>")
            continue
        path = _llama_factory_path(entry, info_file.parent)
        if is_held_out:
            held_out_paths.append(path)
        else:
            _add_llama_factory_training_data(
                entry, name, setting, path, conversion, is_only_dataset=len(dataset_names) == 1
            )
    if held_out_paths:
        paths = _one_or_list(held_out_paths)
        conversion.add_translation(setting, names, TranslatedSetting({"data.eval_path": paths}))


def _add_llama_factory_training_data(
    entry: Mapping[str, Any],
    name: str,
    setting: str,
    path: str,
    conversion: ConvertedSettings,
    *,
    is_only_dataset: bool,
) -> None:
    """Translate one entry of LLaMA-Factory's `dataset_info.json` that is training data into `conversion`.

    It becomes `data`; or `data.sources.<name>`, if it is not the only one, or a subset or split of a data set, which only a
    source can name.

    `entry`: its settings, and `name`: its name there.
    `setting`: the setting of the settings file that names the entry, for messages.
    `path`: its file or hub name, as `data.path` takes it.
    """
    is_part_of_dataset = bool(entry.get("subset") or entry.get("split"))
    needs_source = not is_only_dataset or is_part_of_dataset
    our_prefix = f"data.sources.{unused_source_name(name, conversion)}" if needs_source else "data"
    conversion.add_translation(setting, name, TranslatedSetting({f"{our_prefix}.path": path}))
    _add_llama_factory_entry(entry, f"dataset_info.json: {name}", our_prefix, conversion)


def _find_dataset_info(directory: str, file_dir: Path) -> Path | None:
    """The `dataset_info.json` in `directory`, from the working directory or else from `file_dir`; None if there is none."""
    for folder in (Path(directory).expanduser(), file_dir / directory):
        if exists(folder / "dataset_info.json"):
            return folder / "dataset_info.json"
    return None


def _llama_factory_path(entry: Mapping[str, Any], directory: Path) -> str:
    """Where the data of an entry of `dataset_info.json` lies: a file in `directory`, beside that file, or `hub:<name>`."""
    if "file_name" in entry:
        return str(directory / str(entry["file_name"]))
    hub_name = entry.get("hf_hub_url", entry.get("ms_hub_url", ""))
    return f"hub:{hub_name}"


def _add_llama_factory_entry(
    entry: Mapping[str, Any], entry_name: str, our_prefix: str, conversion: ConvertedSettings
) -> None:
    """Translate the settings of one entry of LLaMA-Factory's `dataset_info.json`, other than its path, into `conversion`.

    `entry`: such as {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "turns"}}.
    `entry_name`: the entry in messages, such as `dataset_info.json: alpaca`.
    `our_prefix`: what shardtune's settings of it begin with, `data` or `data.sources.<name>`.

    Names of columns depend on how rows are read: as plain text if `conversion` has objective=pretrain, as a ranking of two
    answers if the entry says so, else by `formatting`.
    """
    formatting = str(entry.get("formatting", "alpaca"))
    if conversion.overrides.get("objective") == "pretrain":
        row_format = "pretrain"
    elif entry.get("ranking"):
        row_format = "ranking"
    else:
        row_format = formatting
    # None for a ranking, because pairs of answers are recognised by their columns.
    our_format = {"pretrain": "text", "alpaca": "alpaca", "sharegpt": "sharegpt"}.get(row_format)
    format_overrides = {f"{our_prefix}.format": our_format} if our_format else {}
    conversion.add_translation(f"{entry_name}.formatting", formatting, TranslatedSetting(format_overrides))
    _add_llama_factory_columns(entry, row_format, entry_name, our_prefix, conversion)

    for key, value in entry.items():
        setting_name = f"{entry_name}.{key}"
        if key in ("file_name", "hf_hub_url", "ms_hub_url", "formatting", "columns"):
            continue  # translated above, or by the caller
        if key in ("subset", "split") and our_prefix != "data":
            translation = TranslatedSetting({f"{our_prefix}.{key}": to_cli_text(value)})
            conversion.add_translation(setting_name, value, translation)
        elif key == "ranking":
            note = "two answers are recognised by their columns"
            conversion.add_translation(setting_name, value, TranslatedSetting(note=note, not_needed=True))
        else:
            why = "the keys of turns are recognised; data.columns renames columns"
            conversion.add_unsupported(setting_name, value, why)


def _add_llama_factory_columns(
    entry: Mapping[str, Any], row_format: str, entry_name: str, our_prefix: str, conversion: ConvertedSettings
) -> None:
    """Translate the `columns` of an entry of LLaMA-Factory's `dataset_info.json` into `conversion`: which column has which role.

    {"prompt": "question"} becomes {"data.columns.instruction": "question"}: LLaMA-Factory's role `prompt` is `instruction` here.

    `row_format`: a key of `COLUMNS_BY_LLAMA_FACTORY_FORMAT`, which has our roles by theirs.
    `entry_name`: the entry in messages.
    `our_prefix`: what shardtune's settings of it begin with, `data` or `data.sources.<name>`.

    A role without an equivalent is noted as unsupported.
    """
    column_by_role: dict[str, Any] = {}
    if row_format == "ranking" and entry.get("formatting", "alpaca") == "alpaca":
        column_by_role["prompt"] = "instruction"  # LLaMA-Factory's default, which differs from ours
    column_by_role |= entry.get("columns") or {}
    our_role_by_role = COLUMNS_BY_LLAMA_FACTORY_FORMAT.get(row_format, {})
    for role, column in column_by_role.items():
        our_role = our_role_by_role.get(role)
        setting_name = f"{entry_name}.columns.{role}"
        if our_role is None:
            conversion.add_unsupported(setting_name, column, "rows have no such column here")
            continue
        # A column that has our name already needs no setting.
        overrides = {} if our_role == column else {f"{our_prefix}.columns.{our_role}": str(column)}
        conversion.add_translation(setting_name, column, TranslatedSetting(overrides))


def unused_source_name(path: str, conversion: ConvertedSettings) -> str:
    """A name for a data set in shardtune's table `data.sources`, from its path: `data/My chat.jsonl` -> `my_chat`.

    Names are lower case, with `_` for other characters, since they are typed as part of a key. A name that `conversion` uses
    already gets a number: `my_chat_2`.
    """
    file_name = path.rstrip("/]").rsplit("/", 1)[-1]  # of a list `[a/b.json,a/c.json]` the last file
    stem = re.sub(r"\.(json|jsonl|csv|tsv|parquet|arrow|txt)(\.\w+)?$", "", file_name)
    name = re.sub(r"\W+", "_", stem).strip("_").lower() or "source"
    if name[0].isdigit():
        name = f"set_{name}"
    taken_names = {key.split(".")[2] for key in conversion.overrides if key.startswith("data.sources.")}
    unique_name = name
    number = 2
    while unique_name in taken_names:
        unique_name = f"{name}_{number}"
        number += 1
    return unique_name
