"""Loads an export by plain transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from strategies.errors import ConfigError
from strategies.small_files import read_object
from trainer.model.architecture import auto_class
from trainer.model.config import ModelKind
from trainer.model.rope import adapter_config_source

if TYPE_CHECKING:
    from trainer.model.weights import BaseWeights

VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def load_export(
    directory: Path,
    base_path: str | None = None,
    rounded: BaseWeights | None = None,
    *,
    dtype: Any = torch.float32,
    writes: bool = False,
) -> Any:
    """The exported model in eval mode, through nothing but transformers and peft.

    `base_path`: where an adapter's base is; default: where the adapter says. `rounded`: the base as the adapter was trained
    on it, where that was quantised: its values replace those of the plain model. `dtype`: a type, or `auto` for the stored
    one. `writes`: virtual tokens are put before the inputs by our own loader, since peft loses them from the cache of
    `generate`, and the plain model with the adapter inside is returned. Errors: ConfigError where it is no export.
    """
    import transformers

    directory = Path(directory)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, load = _base(directory, base_path, transformers, dtype, writes)
        for name in rounded.quantised if rounded is not None else ():
            model.get_parameter(name).data.copy_(rounded.full_tensor(name))  # type: ignore[union-attr]
        model = load(model, directory).eval()
        return model.get_base_model() if writes and hasattr(model, "get_base_model") else model
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _base(directory: Path, base_path: str | None, transformers: Any, dtype: Any, writes: bool) -> tuple[Any, Any]:
    """(the model below, what puts the adapter of a directory onto it)."""
    from trainer.tuning import bottleneck, virtual
    from trainer.tuning.adapter_files import load_adapter

    settings_file = directory / "adapter_config.json"
    if (directory / bottleneck.CONFIG_FILE).is_file():
        settings_file = directory / bottleneck.CONFIG_FILE
    if not settings_file.is_file():
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"{directory}: holds neither config.json nor adapter_config.json; give an export directory"
            )
        model = _auto_class(directory).from_pretrained(directory, dtype=dtype, local_files_only=True)
        return model, lambda model, directory: model
    settings = read_object(settings_file)
    base = base_path or settings["base_model_name_or_path"]
    # Positions may be those of the training, which the base's own config.json does not know.
    config_source = adapter_config_source(directory, base)
    if settings["task_type"] == "SEQ_CLS":
        from safetensors import safe_open

        labels = settings.get("num_labels") or _head_rows(safe_open, directory)
        auto: Any = transformers.AutoModelForSequenceClassification
        base_config = transformers.AutoConfig.from_pretrained(config_source, local_files_only=True, num_labels=labels)
        model = auto.from_pretrained(base, config=base_config, dtype=dtype, local_files_only=True)
        model.config.pad_token_id = transformers.AutoTokenizer.from_pretrained(directory).pad_token_id
    elif settings["task_type"] == "SEQ_2_SEQ_LM":
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    else:
        base_config = transformers.AutoConfig.from_pretrained(config_source, local_files_only=True)
        auto = auto_class(ModelKind.causal, base_config)
        model = auto.from_pretrained(base, config=base_config, dtype=dtype, local_files_only=True)
    tokens = len(transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    if settings_file.name == bottleneck.CONFIG_FILE:
        return model, bottleneck.load
    return model, virtual.load if writes and settings.get("peft_type") in VIRTUAL else load_adapter


def _head_rows(safe_open: Any, directory: Path) -> int:
    """Number of labels: rows of the last saved matrix that is no adapter, the classification head."""
    with safe_open(str(directory / "adapter_model.safetensors"), framework="pt") as handle:
        heads = [key for key in handle.keys() if ".lora_" not in key and key.endswith(".weight")]  # noqa: SIM118
        return next(handle.get_slice(k).get_shape()[0] for k in heads if k.split(".")[-2] in ("score", "classifier"))


def _auto_class(directory: Path) -> Any:
    import transformers

    settings = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    classifier = "ForSequenceClassification" in settings.architectures[0]
    kind = ModelKind.encoder_decoder if getattr(settings, "is_encoder_decoder", False) else ModelKind.causal
    return auto_class(ModelKind.classifier if classifier else kind, settings)
