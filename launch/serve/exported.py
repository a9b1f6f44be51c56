"""What an export's directory contains, read without torch: whether the model can chat, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.errors import ConfigError
from strategies.small_files import check_small_files, read_object
from trainer.tuning.adapter_fields import wrong_field

ADAPTER = "adapter_config.json"
BOTTLENECK = "bottleneck_config.json"
MODEL = "config.json"
UNFIT = {
    "SEQ_CLS": "a classifier, which writes nothing",
    "SEQ_2_SEQ_LM": "an encoder-decoder model, which no server here takes",
}


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that writes text."""

    path: Path
    name: str
    """What it is called where it is asked for: the run's name, or the directory's."""
    base: str | None
    """Where the base of an adapter is; None of a whole model."""
    settings: dict[str, Any]
    """The adapter's settings, or the model's."""

    @property
    def plain_lora(self) -> bool:
        """Whether it is an adapter that other engines take as it is."""
        return self.base is not None and self.settings.get("peft_type") == "LORA" and not self.settings.get("use_dora")


def compare_base(exported: Exported, *, accept: bool) -> list[str]:
    """How the base of an adapter differs from that of its training, if `accept` takes it. Errors: ConfigError that names files.

    Empty for a whole model, and for a base that is not on this machine, of which its loading tells.
    """
    from trainer.model.base_files import refuse_another_base

    if exported.base is None:
        return []
    base = Path(exported.base).expanduser()
    if not base.is_dir():
        from huggingface_hub import snapshot_download

        try:
            revision = exported.settings.get("revision")
            base = Path(snapshot_download(exported.base, revision=revision, local_files_only=True))
        except Exception:  # noqa: BLE001 - whatever the hub's client says of it, it is not here
            return []
    return refuse_another_base(exported.path, base, accept=accept)


def find_export(word: str) -> Exported:
    """The export of a run, or in a directory. Raises ConfigError if there is none, or it generates no text."""
    path = Path(word).expanduser()
    name = path.resolve().name
    if (path / "config.yaml").is_file() and not any((path / file).is_file() for file in (MODEL, ADAPTER)):
        path = path / "export"
        if not path.is_dir():
            raise ConfigError(f"{word}: this run has no export; write it first: shardtune export {word}")
    elif name == "export" and (path.parent / "config.yaml").is_file():
        name = path.resolve().parent.name
    if not path.is_dir():
        raise ConfigError(f"{word}: there is no such directory; name a run or an export, as runs/x or runs/x/export")
    for file in (ADAPTER, BOTTLENECK, MODEL):
        if (path / file).is_file():
            return _read_export(path, file, name)
    raise ConfigError(f"{path}: holds neither {MODEL} nor {ADAPTER}; name a run or an export")


def _read_export(path: Path, file: str, name: str) -> Exported:
    """The export in a directory; `file`: the one of its settings. Raises ConfigError if it cannot be served."""
    check_small_files(path)
    settings = read_object(path / file)
    if file == ADAPTER and (wrong := wrong_field(settings)) is not None:
        raise ConfigError(f"{path / file}: has {wrong}; write the adapter again")
    if file == MODEL:
        base = None
        task_type = _task_type(settings)
    else:
        base = settings.get("base_model_name_or_path")
        task_type = settings.get("task_type")
        if not base:
            raise ConfigError(f"{path / file}: names no base model (base_model_name_or_path); export with merge=true")
        if not isinstance(base, str) or base.startswith("-"):  # a server would take that for one of its own options
            raise ConfigError(
                f"{path / file}: base_model_name_or_path={str(base)[:80]!r} is no directory and no hub id; "
                "write the adapter again"
            )
        if Path(base).is_dir():
            check_small_files(Path(base))
    if task_type in UNFIT:
        raise ConfigError(f"{path}: is {UNFIT[task_type]}; shardtune evaluate asks such models")
    return Exported(path, name, base, settings)


def _task_type(settings: dict[str, Any]) -> str | None:
    if settings.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    architectures = [str(architecture) for architecture in settings.get("architectures") or []]
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return "SEQ_CLS"
    return None
