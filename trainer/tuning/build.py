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
    """The method that `config` names.

    `new_tokens`: the vocabulary grew, so embeddings must train too; `new_heads`: modules drawn anew, which must train;
    `tokenizer`: for a prompt that starts at a text.
    """
    # Each method is imported when it is used: most of them import peft, which takes seconds.
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
    from trainer.tuning.full import Full

    return Full()


def optimizer_hooks(tuning: Tuning) -> OptimizerStepHooks | None:
    """The hooks that an applied method runs around each optimizer step; None for most methods."""
    return getattr(tuning, "allocation", None)


def merge_initial_adapter(model: nn.Module, tuning: TuningConfig) -> MergedAdapters | None:
    """The model that a run with `tuning.from` begins with: base weights with that adapter merged in. None without one.

    Objectives that compare with it (by a KL term) read it. `model`: the architecture, on meta. Raises ConfigError for an
    adapter that cannot be merged.
    """
    directory = tuning.from_ if isinstance(tuning, AdapterConfig) else None
    if directory is None:
        return None
    from trainer.tuning.merged_adapters import MergedAdapters

    reason = method_of(tuning).no_merge
    if reason:
        raise ConfigError(
            f"tuning.from={directory}: the objective compares with the model that this run begins with, and that "
            f"cannot be built: {reason}; set objective.forgetting.kl_weight=0 (sft), or objective.kl.weight=0 (grpo)"
        )
    return MergedAdapters(model, [directory], "tuning.from")


def merge_adapters(model: nn.Module, directories: list[str]) -> MergedAdapters | None:
    """The base weights with the adapters of `directories` merged in as they are read, for this architecture on meta.

    None without directories.
    """
    if not directories:
        return None
    from trainer.tuning.merged_adapters import MergedAdapters

    return MergedAdapters(model, directories)
