"""What an export's directory contains, read without torch: whether the model can chat, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.small_files import check_files_read_by_libraries, read_json_object
from trainer.tuning.adapter_fields import wrong_type_message

ADAPTER_FILE = "adapter_config.json"
BOTTLENECK_FILE = "bottleneck_config.json"
MODEL_CONFIG_FILE = "config.json"
REASON_BY_UNSERVABLE_TASK = {
    "SEQ_CLS": "a classifier, which writes nothing",
    "SEQ_2_SEQ_LM": "an encoder-decoder model, which no server here takes",
}


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """An exported model that generates text: a whole model, or an adapter with its base."""

    path: Path
    """The directory of the export."""
    name: str
    """The name by which clients ask for it: the run's, or the directory's."""
    base: str | None
    """The base model of an adapter, a directory or a hub id; None for a whole model."""
    settings: dict[str, Any]
    """The adapter's settings, or the model's."""

    @property
    def is_plain_lora(self) -> bool:
        """Whether it is a LoRA adapter of the kind that vLLM and SGLang can load: without DoRA."""
        return self.base is not None and self.settings.get("peft_type") == "LORA" and not self.settings.get("use_dora")


def check_base_of_export(exported: ExportedModel, *, accept: bool) -> list[str]:
    """Make sure that an adapter is served on the base model that it was trained on; returns accepted differences, one line each.

    Empty for a whole model, and for a base that is not on this machine: loading it will fail with a message of its own.
    Raises ConfigError that names the files, if the base differs and `accept` is False.
    """
    from trainer.model.base_files import check_adapter_base

    if exported.base is None:
        return []
    base_dir = Path(exported.base).expanduser()
    if not base_dir.is_dir():
        from huggingface_hub import snapshot_download

        try:
            revision = exported.settings.get("revision")
            base_dir = Path(snapshot_download(exported.base, revision=revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - whatever the hub's client says of it, it is not here
            return []
    return check_adapter_base(exported.path, base_dir, accept=accept)


def stored_type_name(exported: ExportedModel) -> str | None:
    """The number format of the stored weights, such as "float32": of a whole model, or of an adapter's base.

    None if its config.json does not say, or the base is not a directory here.
    """
    directory = exported.path if exported.base is None else Path(exported.base)
    if not (directory / MODEL_CONFIG_FILE).is_file():
        return None
    settings = read_json_object(directory / MODEL_CONFIG_FILE)
    text_settings = settings.get("text_config") or {}  # a model for more than text has it there
    for section in (settings, text_settings):
        for key in ("dtype", "torch_dtype"):  # of transformers 5, and of earlier versions
            if section.get(key):
                return str(section[key])
    return None


def find_export(argument: str) -> ExportedModel:
    """Find the exported model that a command-line argument names: a run directory, or the directory of an export.

    "runs/first" and "runs/first/export" are both the export of that run, called "first".
    Raises ConfigError if there is none, or if it generates no text.
    """
    path = Path(argument).expanduser()
    export_name = path.resolve().name
    holds_model = any((path / file).is_file() for file in (MODEL_CONFIG_FILE, ADAPTER_FILE))
    is_run_dir = (path / "config.yaml").is_file() and not holds_model
    if is_run_dir:
        path = path / "export"
        if not path.is_dir():
            raise ConfigError(f"{argument}: this run has no export; write it first: shardtune export {argument}")
    elif export_name == "export" and (path.parent / "config.yaml").is_file():
        export_name = path.resolve().parent.name
    if not path.is_dir():
        raise ConfigError(
            f"{argument}: there is no such directory; name a run or an export, as runs/x or runs/x/export"
        )
    # Adapters first: their directory may hold a config.json too.
    for settings_file in (ADAPTER_FILE, BOTTLENECK_FILE, MODEL_CONFIG_FILE):
        if (path / settings_file).is_file():
            return _read_export(path, settings_file, export_name)
    raise ConfigError(f"{path}: holds neither {MODEL_CONFIG_FILE} nor {ADAPTER_FILE}; name a run or an export")


def _read_export(path: Path, settings_file: str, name: str) -> ExportedModel:
    """Read what an export is, from the settings in its directory: a whole model or an adapter, and on what base.

    `name`: what the export is called. `settings_file`: its name, which tells the kind of the export: `MODEL_CONFIG_FILE` for
    a whole model, else an adapter, which has a base model. Raises ConfigError if the export cannot be served, or has small
    files that libraries could not read.
    """
    check_files_read_by_libraries(path)
    settings = read_json_object(path / settings_file)
    if settings_file == MODEL_CONFIG_FILE:
        base = None
        task_type = _task_type(settings)
    else:
        if settings_file == ADAPTER_FILE and (wrong := wrong_type_message(settings)) is not None:
            raise ConfigError(f"{path / settings_file}: has {wrong}; write the adapter again")
        base = _base_of_adapter(settings, path / settings_file)
        task_type = settings.get("task_type")
    if task_type in REASON_BY_UNSERVABLE_TASK:
        raise ConfigError(f"{path}: is {REASON_BY_UNSERVABLE_TASK[task_type]}; shardtune evaluate asks such models")
    return ExportedModel(path=path, name=name, base=base, settings=settings)


def _base_of_adapter(settings: dict[str, Any], settings_path: Path) -> str:
    """Find out which base model an adapter needs: a directory or a hub id, by its `settings`, read from `settings_path`.

    Raises ConfigError if it names none, or if the base's directory has small files that libraries could not read.
    """
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{settings_path}: names no base model (base_model_name_or_path); export with merge=true")
    if not isinstance(base, str) or base.startswith("-"):  # a server would take that for one of its own options
        raise ConfigError(
            f"{settings_path}: base_model_name_or_path={str(base)[:80]!r} is no directory and no hub id; "
            "write the adapter again"
        )
    if Path(base).is_dir():
        check_files_read_by_libraries(Path(base))
    return base


def _task_type(settings: dict[str, Any]) -> str | None:
    """The task of a whole model by its config.json, by peft's name: "SEQ_2_SEQ_LM", "SEQ_CLS"; None for a causal model."""
    if settings.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    architectures = [str(architecture) for architecture in settings.get("architectures") or []]
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return "SEQ_CLS"
    return None
