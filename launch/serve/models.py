"""Loads an export for generation: the tuned model, and its base beside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.serve.exported import ExportedModel
from strategies.errors import ConfigError


@dataclass(slots=True)
class ChatModel:
    """A loaded model with its tokenizer, ready to answer prompts."""

    name: str
    model: Any
    tokenizer: Any
    context_length: int
    """Most tokens of a prompt and its answer together."""
    samples_by_default: bool
    """Whether its own generation settings sample. If not, it answers greedily unless a request has a temperature."""

    @property
    def generation_config(self) -> Any:
        """Its generation settings, with the tokens that end an answer."""
        return self.model.generation_config


def load_chat_model(exported: ExportedModel, *, device: str = "auto", dtype: str = "auto") -> ChatModel:
    """Load an exported model with its tokenizer. Raises ConfigError if its files, its base or the device are missing."""
    return _load_from_directory(
        exported.path, name=exported.name, base=exported.base, device_setting=device, dtype_name=dtype
    )


def load_base_chat_model(exported: ExportedModel, *, device: str = "auto", dtype: str = "auto") -> ChatModel | None:
    """Load the model that an export was tuned from, so that users can compare: an adapter's base, or the base of its run.

    It is called "base". None if it is not known or not on this machine. A base without a chat template gets that of the export,
    so that both answer the same prompt. `device`: "auto" is a GPU if there is one; `dtype`: "auto" is that of the stored weights.
    """
    path = exported.base or _base_path_of_run(exported.path)
    if path is None:
        return None
    if not Path(path).expanduser().is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = snapshot_download(path, local_files_only=True)
        except Exception:  # noqa: BLE001 - whatever the hub's client says of it, it is not here
            return None
    base = _load_from_directory(Path(path), name="base", base=None, device_setting=device, dtype_name=dtype)
    if base.tokenizer.chat_template is None:
        from transformers import AutoTokenizer

        export_tokenizer = AutoTokenizer.from_pretrained(exported.path, local_files_only=True)
        base.tokenizer.chat_template = export_tokenizer.chat_template
        # The template decides which token ends a turn.
        base.generation_config.eos_token_id = _end_token_ids_or_none(base.tokenizer, base.generation_config)
    return base


def _base_path_of_run(export_dir: Path) -> str | None:
    """The base model of a whole exported model: `model.path` of the run in whose directory the export lies.

    None if it lies in no run's directory, or if the run's config.yaml cannot be read.
    """
    import yaml

    config_file = export_dir.parent / "config.yaml"
    if not config_file.is_file():
        return None
    try:
        base = yaml.safe_load(config_file.read_text(encoding="utf-8"))["model"]["path"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return str(base) if base else None


def _load_from_directory(path: Path, *, name: str, base: str | None, device_setting: str, dtype_name: str) -> ChatModel:
    """Load a model and its tokenizer to answer prompts, without the network; sets its generation settings for requests.

    If the export's own settings sample, they stay. Else they become plain sampling (temperature 1, no top_p or top_k), which a
    request can change or turn off. `base`: the base model if `path` is an adapter, for messages.
    Raises ConfigError if the files or the device cannot be used.
    """
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from trainer.export.load import load_export

    logging.set_verbosity_error()  # else lines about settings that do not matter while an answer is shown
    device = usable_torch_device(device_setting)
    dtype = dtype_name if dtype_name == "auto" else getattr(torch, dtype_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = load_export(path, dtype=dtype, for_generation=True).to(device)
    except (OSError, ValueError) as error:
        base_text = f" on the base {base}" if base else ""
        raise ConfigError(f"{path}: cannot be loaded{base_text} ({' '.join(str(error).split())[:300]})") from error
    samples_by_default = bool(model.generation_config.do_sample)
    model.generation_config = _generation_config_for_requests(model.generation_config, tokenizer)
    return ChatModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        context_length=model_context_length(model),
        samples_by_default=samples_by_default,
    )


def _generation_config_for_requests(stored_config: Any, tokenizer: Any) -> Any:
    """Prepare the generation settings of an export for requests: every token id that generation needs, and no length limit.

    `stored_config`: transformers' settings as the export has them; a copy is returned. If they do not sample, they become
    plain sampling: a request's temperature must have an effect, and no other setting.
    """
    generation_config = copy.deepcopy(stored_config)
    generation_config.eos_token_id = _end_token_ids_or_none(tokenizer, generation_config)
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = tokenizer.pad_token_id
    if generation_config.pad_token_id is None and generation_config.eos_token_id is not None:
        generation_config.pad_token_id = generation_config.eos_token_id[0]
    generation_config.max_length = None  # each request has its own limit
    if not generation_config.do_sample:
        generation_config.do_sample = True
        generation_config.temperature = 1.0
        generation_config.top_p = 1.0
        generation_config.top_k = 0
    return generation_config


def _end_token_ids_or_none(tokenizer: Any, generation_config: Any) -> list[int] | None:
    """The ids of the tokens that end an answer; None if there are none."""
    from trainer.export.end_tokens import end_token_ids

    return end_token_ids(tokenizer, generation_config) or None


def usable_torch_device(requested: str) -> Any:
    """The torch device that a user asked for: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:<n>`.

    Raises ConfigError if this machine has none of that kind.
    """
    import torch

    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
        torch.empty(1, device=device)  # fails if the device is missing, of which torch.device knows nothing
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={requested}: cannot be used here ({' '.join(str(error).split())[:120]}); auto, cpu, cuda or cuda:<n>"
        ) from error
    return device


def model_context_length(model: Any) -> int:
    """Most tokens that a prompt and its answer may have together, by the model's positions; 2**31 if its config states none."""
    from trainer.model.architecture import text_model_config

    settings = text_model_config(model.config)
    for key in ("max_position_embeddings", "n_positions"):
        limit = getattr(settings, key, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return 2**31
