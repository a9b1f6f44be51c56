"""Adapters as files: peft's own directory format, out of gathered values, and back onto a plain base model.

Nothing here communicates: values arrive gathered, on one rank. peft folds an adapter into its base one layer at a time, so
that the model is never held twice.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import persistent_buffers
from strategies.errors import ConfigError
from trainer.tuning.adapter import PREFIX, Adapter
from trainer.tuning.base import BaseReader
from trainer.tuning.expert_lora import settle_names
from trainer.tuning.key_mapping import keys_in_file
from trainer.tuning.replica import ADAPTER

_BASE_WEIGHT = ".base_layer.weight"


def write_adapter(
    model: nn.Module,
    trained: dict[str, Tensor],
    directory: Path,
    base_name: str,
    revision: str | None,
    *,
    double_rank: bool = False,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into the existing `directory`.

    `trained` holds the full trainable tensors under the model's plain names; `base_name` is the directory or hub id (with
    `revision`) that loaders will look for; `double_rank` says that
    `trained` is what `as_plain_lora` made. Errors: OSError, SafetensorError.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = {**trained, **_tied_copies(model, trained), **_added_buffers(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    settings: Any = copy.deepcopy(model.peft_config[ADAPTER])  # type: ignore[index,union-attr]
    other = keys_in_file(model, settings, state)
    stored = {other.get(key) or key: value.contiguous() for key, value in state.items()}
    save_file(stored, directory / "adapter_model.safetensors", {"format": "pt"})
    if double_rank:
        _double_rank(settings)
    settings.base_model_name_or_path, settings.revision, settings.inference_mode = base_name, revision, True
    settle_names(settings, model)
    settings.save_pretrained(str(directory))


def as_plain_lora(tuning: Adapter, trained: dict[str, Tensor], base: BaseReader) -> dict[str, Tensor]:
    """Adapters of PiSSA and OLoRA as LoRA of twice the rank on the unchanged base: B A - B0 A0 = [B, -B0] [A; A0]."""
    start = tuning.starts(trained, base)
    converted = dict(trained)
    for name, value in trained.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([value.float(), start[name]], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([value.float(), -start[name]], dim=1)
    return converted


def _double_rank(settings: Any) -> None:
    """Twice the rank at the same scale."""
    settings.r *= 2
    factor = 2**0.5 if settings.use_rslora else 2
    settings.lora_alpha *= factor
    settings.rank_pattern = {key: 2 * value for key, value in settings.rank_pattern.items()}
    settings.alpha_pattern = {key: factor * value for key, value in settings.alpha_pattern.items()}


def _added_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What peft stores beside parameters; its own selection drops what is the base's."""
    buffers = persistent_buffers(model, remove_duplicate=False)
    return {name: buffer.detach().cpu() for name, buffer in buffers}


def _tied_copies(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gathered parameter comes once; a tied one is stored under each of its names."""
    first: dict[int, str] = {}
    copies = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name and original in trained:
            copies[name] = trained[original].clone()
    return copies


class Folding:
    """Frozen parameters of a tuned model as they are in the merged one, layer by layer."""

    def __init__(self, tuning: Adapter, model: nn.Module, trained: dict[str, Tensor], base: BaseReader) -> None:
        self.tuning, self.model, self.trained, self.base = tuning, model, trained, base
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, name: str, value: Tensor) -> Tensor | None:
        """The merged tensor, float32 where the adapter changes it; None for one that a module trained in full replaced.

        `name` is the parameter's plain name, `value` the base's.
        """
        if ".original_module." in name:
            return None
        layer, wrapped, key = name.removeprefix(PREFIX).rpartition(".base_layer.")
        if (base := self.tuning.base_name(name)) in self.tuning.replicas.bases:  # a parameter adapted by itself
            layer = base
        if not wrapped or layer not in self.tuning.replicas.bases:
            return value
        if self._last[0] != layer:
            self._last = layer, self.tuning.merged(layer, self.base, self.trained, self.model)
        return self._last[1][key]


def check_mergeable(model: nn.Module, trained_names: set[str]) -> None:
    """Refuse a fold that would change more than the adapted layer. Errors: ConfigError."""
    names = {name for name, _ in model.named_parameters()}
    for name in trained_names:
        layer = name.split(".lora_")[0]
        if ".lora_" not in name or hasattr(model.get_submodule(layer), "parameter_name"):  # of experts or a router
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
        # peft 0.21 takes AdaLoRA's pattern for one of LoRA, and warns before it follows it.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        return PeftModel.from_pretrained(model, str(directory))  # type: ignore[arg-type]
