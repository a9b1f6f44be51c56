"""Writes gathered adapter values in peft's own directory format, merges them into a base, and loads them onto one.

Nothing here communicates: values arrive gathered, on one rank. An adapter is merged one layer at a time, so that the model
is never held twice.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.compat.modules import persistent_buffers
from strategies.errors import ConfigError
from trainer.tuning.adapter import PEFT_PREFIX, Adapter
from trainer.tuning.base import BaseWeightsReader
from trainer.tuning.expert_lora import name_targets_for_peft
from trainer.tuning.key_mapping import replacement_keys
from trainer.tuning.replica import ADAPTER


def write_adapter(
    model: nn.Module,
    trained: dict[str, Tensor],
    directory: Path,
    base_name: str,
    revision: str | None,
    *,
    double_rank: bool = False,
) -> None:
    """Write a trained adapter into the existing `directory`, in peft's format: `adapter_config.json` and
    `adapter_model.safetensors`.

    `trained`: the full trainable tensors by the model's plain names. `base_name`: the directory or hub id (with `revision`)
    that loaders will look for. `double_rank`: `as_plain_lora` made `trained`, so its matrices have twice the rank in the
    settings.

    Raises OSError or SafetensorError if a file cannot be written.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    buffers = persistent_buffers(model, remove_duplicate=False)  # peft's own selection drops those of the base
    state = {**trained, **_tied_copies(model, trained)}
    state |= {name: buffer.detach().cpu() for name, buffer in buffers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    settings: Any = copy.deepcopy(model.peft_config[ADAPTER])  # type: ignore[index,union-attr]
    # The checkpoint's key of a layer replaces peft's own if plain peft would not load that one back.
    replacement_by_key = replacement_keys(model, settings, state)
    stored = {}
    for key, tensor in state.items():
        stored[replacement_by_key.get(key) or key] = tensor.contiguous()
    save_file(stored, directory / "adapter_model.safetensors", {"format": "pt"})
    if double_rank:
        _double_rank(settings)
    settings.base_model_name_or_path = base_name
    settings.revision = revision
    settings.inference_mode = True
    name_targets_for_peft(settings, model)
    settings.save_pretrained(str(directory))


def as_plain_lora(tuning: Adapter, trained: dict[str, Tensor], base: BaseWeightsReader) -> dict[str, Tensor]:
    """Rewrite adapters that started by PiSSA or OLoRA as LoRA of twice the rank, for users of the unchanged base model.

    These starts take a part B0 A0 off each base weight. Against the unchanged base an adapter is B A - B0 A0 = [B, -B0] [A;
    A0]. `trained`: full tensors by plain name. `base` reads the unchanged weights.
    """
    initial = tuning.initial_values(trained, base)  # A0 and B0, by the names of A and B
    converted = dict(trained)
    for name, value in trained.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([value.float(), initial[name]], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([value.float(), -initial[name]], dim=1)
    return converted


def _double_rank(settings: Any) -> None:
    """Double the rank in peft's `settings`, and keep the update's scale: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA."""
    settings.r *= 2
    alpha_factor = 2**0.5 if settings.use_rslora else 2
    settings.lora_alpha *= alpha_factor
    settings.rank_pattern = {module: 2 * rank for module, rank in settings.rank_pattern.items()}
    settings.alpha_pattern = {module: alpha_factor * alpha for module, alpha in settings.alpha_pattern.items()}


def _tied_copies(model: nn.Module, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tied parameters under their other names: peft's files have each name, `trained` has each tensor once."""
    first_names: dict[int, str] = {}
    copies = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first_names.setdefault(id(parameter), name)
        if original != name and original in trained:
            copies[name] = trained[original].clone()
    return copies


class AdapterMerger:
    """Gives the base parameters of a tuned model with its adapter merged in, one by one.

    Keeps the layer that it merged last.
    """

    def __init__(
        self, tuning: Adapter, model: nn.Module, trained: Mapping[str, Tensor], base: BaseWeightsReader
    ) -> None:
        """`tuning`, `model`: the adapter's method and the tuned model.

        `trained`: full tensors of adapters. `base` reads base weights.
        """
        self.tuning = tuning
        self.model = model
        self.trained = trained
        self.base = base
        self._cached_layer = ""
        self._cached_parameters: dict[str, Tensor] = {}
        """The merged parameters of `_cached_layer`, the layer that was merged last: they are asked for one by one."""

    def merged_tensor(self, name: str, base_tensor: Tensor) -> Tensor | None:
        """One parameter of the model as it is after merging the adapter, for a merged export.

        - the original of a module that trained in full, such as `base_model.model.score.original_module.weight`: None, since
          the trained copy replaces it.
        - not in an adapted layer, such as `base_model.model.wte.weight`: `base_tensor`, its value in the base.
        - else, such as `base_model.model.h.0.attn.base_layer.weight`: the merged value, float32.

        `name`: the parameter's plain name in the tuned model.
        """
        if ".original_module." in name:
            return None
        adapted_layers = self.tuning.layer_builder.base_layers
        layer, base_layer_separator, key = name.removeprefix(PEFT_PREFIX).rpartition(".base_layer.")
        base_name = self.tuning.base_name(name)
        if base_name in adapted_layers:  # a parameter adapted by itself
            layer = base_name
        if not base_layer_separator or layer not in adapted_layers:
            return base_tensor
        if self._cached_layer != layer:
            self._cached_parameters = self.tuning.merged_parameters(layer, self.base, self.trained, self.model)
            self._cached_layer = layer
        return self._cached_parameters[key]


def check_adapters_mergeable(model: nn.Module, trained_names: set[str]) -> None:
    """Raise ConfigError if merging the LoRA adapters of a tuned model would change other layers too, or is not supported.

    - an adapted layer shares its weight with the embeddings: merging would change both.
    - an embedding has DoRA: not supported.

    Adapters of experts and routers are always mergeable: they share no weights. `trained_names`: plain names of the parameters
    that train, such as `h.0.attn.lora_A.default.weight`.
    """
    # Without duplicates: a weight that two modules share has its first name alone.
    first_names = {name for name, _ in model.named_parameters()}
    for name in trained_names:
        if ".lora_" not in name:
            continue
        layer_name = name.split(".lora_")[0]
        # Only peft's ParamWrapper, which adapts one parameter (of experts or a router), has this attribute.
        if hasattr(model.get_submodule(layer_name), "parameter_name"):
            continue
        shares_weight = f"{layer_name}.base_layer.weight" not in first_names
        if shares_weight:
            raise ConfigError(
                f"export.merge=true: {layer_name} shares its weight with the embeddings, and folding the adapter into one would "
                "change the other; leave the head out of tuning.targets, or use export.merge=false"
            )
        if ".lora_embedding_" in name and _has_dora(layer_name, trained_names):
            raise ConfigError(
                "export.merge=true: DoRA on an embedding cannot be merged here; leave the embeddings out of "
                "tuning.targets, or use export.merge=false"
            )


def _has_dora(layer_name: str, trained_names: set[str]) -> bool:
    """Whether the adapter of a layer is DoRA, by the names of the parameters that train."""
    return any(name.startswith(f"{layer_name}.lora_magnitude_vector") for name in trained_names)


def load_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """Load the adapter of `directory` onto a plain base model with plain peft, for inference."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's own calls
        # peft 0.21 takes AdaLoRA's pattern for one of LoRA, and warns before it follows it.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        return PeftModel.from_pretrained(model, str(directory))  # type: ignore[arg-type]
