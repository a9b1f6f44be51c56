"""From a tuning method's name to the object."""

from __future__ import annotations

from trainer.tuning.base import LoraConfig, Tuning, TuningConfig


def build_tuning(config: TuningConfig, *, new_tokens: bool = False, new_heads: tuple[str, ...] = ()) -> Tuning:
    """The method that `config` names.

    `new_tokens`: the vocabulary grew, so embeddings must train too; `new_heads`: modules drawn anew, which must train.
    """
    if isinstance(config, LoraConfig):
        from trainer.tuning.lora import Lora

        return Lora(config, train_embeddings=new_tokens, new_heads=new_heads)
    from trainer.tuning.full import Full

    return Full()
