"""Adapters as files: peft's own directory format, out of gathered values, and back onto a plain base model.

Nothing here communicates: values arrive gathered, on one rank. Folding an adapter into its base follows Hu et al. 2021
(LoRA) and Liu et al. 2024 (DoRA) tensor by tensor, so that the model is never held twice.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError

_ADAPTER = "default"
_BASE_WEIGHT = ".base_layer.weight"


def write_adapter(
    model: nn.Module, trained: dict[str, Tensor], directory: Path, base: str, revision: str | None
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into the existing `directory`.

    `trained` holds the full trainable tensors under the model's plain names; `base` is the directory or hub id (with
    `revision`) that loaders will look for. Errors: OSError, SafetensorError.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {**trained, **_tied_copies(model, trained)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file({k: v.contiguous() for k, v in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    settings: Any = copy.deepcopy(model.peft_config[_ADAPTER])  # type: ignore[index,union-attr]
    settings.base_model_name_or_path, settings.revision, settings.inference_mode = base, revision, True
    settings.save_pretrained(str(directory))


def _tied_copies(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered parameter comes once; a tied one is stored under each of its names."""
    first: dict[int, str] = {}
    copies = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name and original in trained:
            copies[name] = trained[original].clone()
    return copies


def merged_tensor(model: nn.Module, name: str, value: Tensor, trained: dict[str, Tensor]) -> Tensor | None:
    """What a frozen parameter of the tuned model becomes in the merged one, float32 where the adapter changes it.

    None for one that a module trained in full has replaced. `name` is the parameter's plain name, `value` the base's.
    """
    if ".original_module." in name:
        return None
    if not name.endswith(_BASE_WEIGHT):
        return value
    layer_name = name.removesuffix(_BASE_WEIGHT)
    layer: Any = model.get_submodule(layer_name)
    scaling = layer.scaling[_ADAPTER]
    if f"{layer_name}.lora_embedding_A.{_ADAPTER}" in trained:
        a, b = (trained[f"{layer_name}.lora_embedding_{side}.{_ADAPTER}"].float() for side in "AB")
        return value.float() + (b @ a).T * scaling
    a, b = (trained[f"{layer_name}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
    transposed = bool(layer.fan_in_fan_out)  # GPT-2 stores [in, out]
    weight = (value.T if transposed else value).float() + (b @ a) * scaling
    magnitude = trained.get(f"{layer_name}.lora_magnitude_vector.{_ADAPTER}.weight")
    if magnitude is not None:
        weight = weight * (magnitude.float().view(-1, 1) / torch.linalg.norm(weight, dim=1, keepdim=True))
    return weight.T if transposed else weight


def check_mergeable(model: nn.Module, trained_names: set[str]) -> None:
    """Refuse a fold that would change more than the adapted layer. Errors: ConfigError."""
    names = {name for name, _ in model.named_parameters()}
    for name in trained_names:
        layer = name.split(".lora_")[0]
        if ".lora_" not in name:
            continue
        if layer + _BASE_WEIGHT not in names:
            raise ConfigError(
                f"export.merge=true: {layer} shares its weight with the embeddings, and folding the adapter into one would "
                "change the other; leave the head out of tuning.targets, or use export.merge=false"
            )
        if ".lora_embedding_" in name and any(n.startswith(f"{layer}.lora_magnitude_vector") for n in trained_names):
            raise ConfigError(
                "export.merge=true: DoRA on an embedding cannot be folded here; leave the embeddings out of "
                "tuning.targets, or use export.merge=false"
            )


def load_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """Plain peft: the adapter of `directory` on a plain base model, for inference."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's own calls
        return PeftModel.from_pretrained(model, str(directory))  # type: ignore[arg-type]
