"""Makes a tuning method from its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError
from trainer.tuning.base import AdapterConfig, Tuning, TuningConfig
from trainer.tuning.config import AdaLoraConfig, AdaptionPromptConfig, BottleneckConfig, FreezeConfig, VirtualConfig
from trainer.tuning.table import method_of

if TYPE_CHECKING:
    from torch import nn

    from strategies.base import OptimizerStepHooks
    from trainer.tuning.merged_adapters import MergedAdapters


def build_tuning(
    config: TuningConfig,
    *,
    new_tokens: bool = False,
    new_heads: tuple[str, ...] = (),
    tokenizer: Any = None,
) -> Tuning:
    """Make the tuning method (LoRA, freeze and so on) that `config` describes, not yet applied to a model.

    `new_tokens`: the vocabulary grew, so embeddings must train too. `new_heads`: names of modules that the checkpoint does not
    have, which must train. `tokenizer`: needed if a prompt starts at a text (`tuning.init_text`).
    """
    # Each method is imported when it is used: most of them import peft, which takes seconds. AdaLora's settings are a kind of
    # an adapter's, so they are asked for first.
    if isinstance(config, VirtualConfig):
        from trainer.tuning.virtual import Virtual

        return Virtual(config, tokenizer=tokenizer, train_embeddings=new_tokens, new_heads=new_heads)
    if isinstance(config, BottleneckConfig):
        from trainer.tuning.bottleneck import Bottleneck

        return Bottleneck(config, train_embeddings=new_tokens, new_heads=new_heads)
    if isinstance(config, AdaptionPromptConfig):
        from trainer.tuning.adaption_prompt import AdaptionPrompt

        return AdaptionPrompt(config, train_embeddings=new_tokens, new_heads=new_heads)
    if isinstance(config, AdaLoraConfig):
        from trainer.tuning.adalora import AdaLora

        return AdaLora(config, train_embeddings=new_tokens, new_heads=new_heads)
    if isinstance(config, AdapterConfig):
        from trainer.tuning.adapter import Adapter

        return Adapter(config, train_embeddings=new_tokens, new_heads=new_heads)
    if isinstance(config, FreezeConfig):
        from trainer.tuning.freeze import Freeze

        return Freeze(config, train_embeddings=new_tokens, new_heads=new_heads)
    from trainer.tuning.full import Full  # trains all weights, so that new tokens and heads need nothing

    return Full()


def optimizer_hooks(tuning: Tuning) -> OptimizerStepHooks | None:
    """The hooks that an applied method runs around each optimizer step; None for most methods."""
    return getattr(tuning, "allocation", None)


def initial_weights_reader(model: nn.Module, tuning: TuningConfig) -> MergedAdapters | None:
    """Open the weights with which a run with `tuning.from` begins: the base's, with that adapter merged in as they are read.

    None without `tuning.from`. Objectives that compare with the model at the start (by a KL term) build a frozen copy of it
    from these. `model`: the architecture, on meta. Raises ConfigError if the adapter cannot be merged.
    """
    directory = tuning.from_ if isinstance(tuning, AdapterConfig) else None
    if directory is None:
        return None
    from trainer.tuning.merged_adapters import MergedAdapters

    reason = method_of(tuning).merge_refusal
    if reason:
        raise ConfigError(
            f"tuning.from={directory}: the objective compares with the model that this run begins with, and that "
            f"cannot be built: {reason}; set objective.forgetting.kl_weight=0 (sft), or objective.kl.weight=0 (grpo)"
        )
    return MergedAdapters(model, [directory], "tuning.from")


def merged_adapter_reader(model: nn.Module, directories: list[str]) -> MergedAdapters | None:
    """Open the adapters of `model.adapters` (`directories`), to be merged into base weights as they are read; None without any.

    `model`: the architecture, on meta. Raises ConfigError if one does not fit it.
    """
    if not directories:
        return None
    from trainer.tuning.merged_adapters import MergedAdapters

    return MergedAdapters(model, directories)
