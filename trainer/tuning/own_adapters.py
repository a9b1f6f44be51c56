"""The base class of methods that add parameters beside a frozen base without peft's tuner layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from strategies.errors import ConfigError
from trainer.tuning.base import TuningConfig
from trainer.tuning.replica import ADAPTER


class AddedParameters:
    """A frozen base and added parameters, which cannot be merged into it.

    A subclass fills `_added_names`, and leaves the added parameters out of its forward pass while `is_active` is false.
    """

    adapter = True
    keeps_base = True

    wrapper_prefix = ""
    """Prefix that the method's wrapper puts before the names of the base."""

    def __init__(
        self, config: TuningConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()
    ) -> None:
        """`train_embeddings`: the vocabulary grew, which these methods refuse (ConfigError), since their files cannot store
        embeddings.

        `new_heads`: names of modules that the base checkpoint does not have.
        """
        if train_embeddings:
            raise ConfigError(
                f"model.add_tokens with tuning={config.name}: the embeddings of new tokens must train, and this method's "
                "files have no place for them; use tuning=lora, or tuning=full"
            )
        self.config = config
        self.new_heads = new_heads
        self.is_active = True
        """Whether the added parameters take part in forward passes; false within `reference`."""
        self._added_names: set[str] = set()
        """Full names of the added parameters."""

    def merge(self, model: nn.Module) -> nn.Module:
        """Never called: composing and exporting refuse to merge, with the reason in the table."""
        raise AssertionError(f"tuning={self.config.name} cannot be merged into the base")

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Switch the added parameters off. Only a flag changes, so that an engine may gather parameters meanwhile."""
        was_active = self.is_active
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = was_active

    def base_name(self, name: str) -> str:
        """The name a wrapped parameter has in the base model's checkpoint."""
        name = name.removeprefix(self.wrapper_prefix)
        for wrapper_name in (".original_module", f".modules_to_save.{ADAPTER}"):
            name = name.replace(wrapper_name, "")
        return name

    def is_added_parameter(self, name: str) -> bool:
        """Whether the method added this parameter."""
        return name in self._added_names

    def rewrites(self, name: str) -> bool:
        """False: every base weight starts at the checkpoint's value."""
        return False

    def lr_factor(self, name: str) -> float:
        """1: every parameter has the run's learning rate."""
        return 1.0


def is_causal(model: nn.Module) -> bool:
    """Whether the attention of a model looks back only, as in a decoder; BERT's kind looks both ways."""
    # transformers' attention modules have this flag.
    flags: list[Any] = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(flags) and all(flags)
