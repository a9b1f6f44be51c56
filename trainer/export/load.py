"""Loads an export by plain transformers and peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from strategies.errors import ConfigError
from strategies.small_files import read_json_object
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelKind
from trainer.model.rope import adapter_config_source

if TYPE_CHECKING:
    from trainer.model.weights import BaseWeights

VIRTUAL_TOKEN_METHODS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
"""peft's names of the methods that put trained virtual tokens before the inputs."""


def load_export(
    directory: Path,
    base_path: str | None = None,
    quantised_base: BaseWeights | None = None,
    *,
    dtype: Any = torch.float32,
    for_generation: bool = False,
) -> Any:
    """Load an exported model as users would, through transformers and peft; in eval mode.

    `base_path`: where an adapter's base is; None: where the adapter says. `quantised_base`: the base that the adapter was
    trained on, if that was quantised: its values replace those of the plain model. `dtype`: a torch type, or `auto` for the
    stored one. `for_generation`: returns the plain model with the adapter inside, and virtual tokens are put before the inputs
    by our own loader, since peft loses them from the KV cache of `generate`.

    Bottleneck adapters have a loader of ours, too. Raises ConfigError if the directory holds no export.
    """
    import transformers

    directory = Path(directory)
    shows_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        settings_file = _adapter_settings_file(directory)
        if settings_file is None:
            model = _load_whole_model(directory, dtype)
        else:
            model = _load_base(directory, read_json_object(settings_file), base_path, dtype)
        if quantised_base is not None:
            for name in quantised_base.quantised_shapes:
                model.get_parameter(name).data.copy_(quantised_base.full_tensor(name))
        if settings_file is not None:
            add_adapter = _adapter_loading_function(settings_file, for_generation=for_generation)
            model = add_adapter(model, directory)
        model = model.eval()
        # Models with virtual tokens, loaded for generation, and those with a bottleneck are none of peft's.
        is_peft_model = hasattr(model, "get_base_model")
        if for_generation and is_peft_model:
            return model.get_base_model()
        return model
    finally:
        if shows_bars:
            transformers.utils.logging.enable_progress_bar()


def _adapter_settings_file(directory: Path) -> Path | None:
    """The file with the settings of the adapter in a directory: peft's or a bottleneck's; None if it holds no adapter."""
    from trainer.tuning import bottleneck

    # A bottleneck has both files.
    for name in (bottleneck.CONFIG_FILE, "adapter_config.json"):
        if (directory / name).is_file():
            return directory / name
    return None


def _load_whole_model(directory: Path, dtype: Any) -> Any:
    """Load the whole model in a directory, in `dtype`. Raises ConfigError if there is none."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: holds neither config.json nor adapter_config.json; give an export directory")
    return _transformers_class_of_export(directory).from_pretrained(directory, dtype=dtype, local_files_only=True)


def _load_base(directory: Path, settings: dict[str, Any], base_path: str | None, dtype: Any) -> Any:
    """Load the base of an adapter for its task: as a classifier, an encoder-decoder or a causal model, in `dtype`.

    It has the positions of the training, the labels of a classifier, and rows for all tokens of the adapter's tokenizer.
    `directory`: the adapter's. `settings`: peft's, or those of a bottleneck. `base_path`: where the base is; None: where the
    settings say.
    """
    import transformers

    base = base_path or settings["base_model_name_or_path"]
    # Positions may be those of the training, which the base's own config.json does not know.
    config_source = adapter_config_source(directory, base)
    if settings["task_type"] == "SEQ_CLS":
        num_labels = settings.get("num_labels") or _num_labels_of_adapter(directory)
        auto: Any = transformers.AutoModelForSequenceClassification
        base_config = transformers.AutoConfig.from_pretrained(
            config_source, local_files_only=True, num_labels=num_labels
        )
        model = auto.from_pretrained(base, config=base_config, dtype=dtype, local_files_only=True)
        model.config.pad_token_id = transformers.AutoTokenizer.from_pretrained(directory).pad_token_id
    elif settings["task_type"] == "SEQ_2_SEQ_LM":
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(base, dtype=dtype, local_files_only=True)
    else:
        base_config = transformers.AutoConfig.from_pretrained(config_source, local_files_only=True)
        auto = transformers_class(ModelKind.causal, base_config)
        model = auto.from_pretrained(base, config=base_config, dtype=dtype, local_files_only=True)
    num_tokens = len(transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True))
    if num_tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return model


def _adapter_loading_function(settings_file: Path, *, for_generation: bool) -> Callable[[Any, Path], Any]:
    """Choose how an adapter is put on its base: returns a function of (base model, the adapter's directory) for that.

    - a bottleneck adapter: our own loader;
    - virtual tokens, for generation: our own loader, since peft loses them from the KV cache;
    - any other adapter: peft's loader.
    """
    from trainer.tuning import bottleneck, virtual
    from trainer.tuning.adapter_files import load_adapter

    if settings_file.name == bottleneck.CONFIG_FILE:
        return bottleneck.load
    if for_generation and read_json_object(settings_file).get("peft_type") in VIRTUAL_TOKEN_METHODS:
        return virtual.load
    return load_adapter


def _num_labels_of_adapter(directory: Path) -> int:
    """How many labels a classifier's adapter has, if its settings do not say: the rows of its head (`score` or `classifier`).

    Raises ConfigError if it has no such head.
    """
    from safetensors import safe_open

    with safe_open(str(directory / "adapter_model.safetensors"), framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - no mapping
            if ".lora_" in key or not key.endswith(".weight"):
                continue
            module_name = key.split(".")[-2]
            if module_name in ("score", "classifier"):
                num_rows, *_ = handle.get_slice(key).get_shape()
                return int(num_rows)
    raise ConfigError(f"{directory}: adapter_model.safetensors holds no classification head; export the adapter again")


def _transformers_class_of_export(directory: Path) -> Any:
    """Which class of transformers loads the whole model in `directory`: for a classifier, encoder-decoder or causal model."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    kind = ModelKind.causal
    if "ForSequenceClassification" in settings.architectures[0]:  # which every export names
        kind = ModelKind.classifier
    elif getattr(settings, "is_encoder_decoder", False):
        kind = ModelKind.encoder_decoder
    return transformers_class(kind, settings)
