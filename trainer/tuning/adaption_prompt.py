"""LLaMA-Adapter through peft: trained tokens that every position attends to beside its own attention, behind a gate.

The gate starts at zero, so that the model starts as the base. A position attends to the trained tokens for itself alone,
whatever row it stands in: padding-free rows and packing need nothing special.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.runtime import derived_seed
from trainer.tuning.adapter import PEFT_PREFIX
from trainer.tuning.adapter_files import write_adapter
from trainer.tuning.base import BaseWeightsReader
from trainer.tuning.compat.peft import is_adapted_attention
from trainer.tuning.config import AdaptionPromptConfig
from trainer.tuning.own_adapters import AddedParameters

ADAPTABLE_MODEL_TYPES = ("llama", "mistral", "gpt2")
"""Architectures whose attention peft knows how to adapt."""


class AdaptionPrompt(AddedParameters):
    """peft's AdaptedAttention around attention modules; with the adapter off the module inside is called alone."""

    config: AdaptionPromptConfig
    wrapper_prefix = PEFT_PREFIX

    def apply(self, model: nn.Module) -> nn.Module:
        """Add an adaption prompt (LLaMA-Adapter) to the last layers: learned tokens that their attention reads as well.

        `model`: on meta. Raises ConfigError for architectures that peft cannot adapt, and for more layers than there are.
        """
        self._refuse_unsuitable_model(model.config)
        peft_model = self._wrap_in_peft(model)
        for name in self.new_heads:  # they train beside the prompts
            model.get_submodule(name).requires_grad_(True)
        # The wrapped attention modules get our forward pass, which can leave the prompt out (`is_active`).
        for name, module in peft_model.named_modules():
            if is_adapted_attention(module):
                module.forward = partial(_adapted_forward, self, module, module.forward)  # type: ignore[method-assign]
                self._added_names |= {f"{name}.adaption_prompt", f"{name}.adaption_gate"}
        for name, parameter in peft_model.named_parameters():
            assert name not in self._added_names or parameter.is_meta, "values are drawn when the run asks for them"
        return peft_model

    def _refuse_unsuitable_model(self, hf_config: Any) -> None:
        """Raise ConfigError if peft cannot adapt this architecture's attention, or if it has fewer layers than
        `tuning.adapter_layers`.
        """
        model_type = hf_config.model_type
        num_layers = hf_config.num_hidden_layers
        num_heads = hf_config.num_attention_heads
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads
        if model_type not in ADAPTABLE_MODEL_TYPES or head_dim * num_heads != hf_config.hidden_size:
            raise ConfigError(
                f"tuning=adaption_prompt: peft adapts the attention of {', '.join(ADAPTABLE_MODEL_TYPES)} with heads that divide "
                f"the model's width, not of this {model_type}; use tuning=prefix"
            )
        if self.config.adapter_layers > num_layers:
            raise ConfigError(
                f"tuning.adapter_layers={self.config.adapter_layers}: this model has {num_layers} layers; use at most "
                f"{num_layers}, or 0 for all"
            )

    def _wrap_in_peft(self, model: Any) -> nn.Module:
        """Let peft wrap the model and the attention of its last layers (`tuning.adapter_layers`; 0: all)."""
        from peft import AdaptionPromptConfig as PeftSettings
        from peft import get_peft_model

        is_classifier = "SequenceClass" in type(model).__name__  # as in LlamaForSequenceClassification
        peft_settings = PeftSettings(
            adapter_len=self.config.adapter_len,
            adapter_layers=self.config.adapter_layers or model.config.num_hidden_layers,
            task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, peft_settings)

    def base_name(self, name: str) -> str:
        """The name of a parameter in the base model's checkpoint: without the wrappers of model and attention."""
        # peft keeps the wrapped attention as `<attention>.model`.
        for owner in {owned.rpartition(".")[0] for owned in self._added_names}:
            if name.startswith(f"{owner}.model."):
                name = owner + name.removeprefix(f"{owner}.model")
        return name.removeprefix(self.wrapper_prefix)

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseWeightsReader, seed: int) -> Tensor:
        """The full initial value of a gate or of trained tokens: zeros for a gate, else normal with deviation 1, as in peft.

        Drawn from `seed` and the parameter's name, so that every rank draws the same.
        """
        if name.endswith(".adaption_gate"):
            return torch.zeros(shape)
        return torch.randn(shape, generator=torch.Generator().manual_seed(derived_seed(seed, name)))

    def save_adapter(
        self, model: nn.Module, trained: dict[str, Tensor], directory: Path, base_name: str, revision: str | None
    ) -> None:
        """Write the trained prompts into `directory` in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

        `trained`: the full trainable tensors by the model's parameter names. `base_name`, `revision`: of the base model. Raises
        OSError or SafetensorError if a file cannot be written.
        """
        write_adapter(model, trained, directory, base_name, revision)


def _adapted_forward(tuning: AdaptionPrompt, module: Any, peft_forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of an attention that peft wrapped: with the trained tokens, or of the attention inside alone."""
    if tuning.is_active:
        return peft_forward(*args, **kwargs)
    return module.model(*args, **kwargs)
