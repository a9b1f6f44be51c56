"""LoRA, rsLoRA and DoRA through peft; initial values are drawn here, so that every strategy starts from the same."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from strategies.errors import ConfigError
from strategies.runtime import derive_seed
from trainer.tuning.base import BaseReader, LoraConfig

_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.default(\.weight)?$")


class Lora:
    """Low-rank adapters on frozen weights."""

    adapter = True

    def __init__(self, config: LoraConfig, *, train_embeddings: bool = False, new_heads: tuple[str, ...] = ()) -> None:
        self.config = config
        self.new_heads = new_heads
        """Modules that the base checkpoint does not have: trained in full and saved with the adapter."""
        self.train_embeddings = train_embeddings
        """New vocabulary entries need trained embeddings: they (and an untied head) are then trained in full."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Wrap in a PeftModel; raises ConfigError that lists what exists when a target matches nothing."""
        from peft import LoraConfig as PeftLoraConfig
        from peft import get_peft_model

        self._check_targets(model)
        modules_to_save = list(dict.fromkeys([*self.config.modules_to_save, *self.new_heads]))
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        if self.train_embeddings:
            modules_to_save += [_name_of(model, model.get_input_embeddings())]  # type: ignore[operator]
            if not tied:
                modules_to_save += [_name_of(model, model.get_output_embeddings())]  # type: ignore[operator]
        targets = self.config.targets
        peft_config = PeftLoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            lora_dropout=self.config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=self.config.rslora,
            use_dora=self.config.dora,
            modules_to_save=modules_to_save or None,
            ensure_weight_tying=self.train_embeddings and tied,
            task_type=_task_type(model),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, peft_config)  # type: ignore[arg-type]

    def _check_targets(self, model: nn.Module) -> None:
        targets = self.config.targets
        names = [name for name, _ in model.named_modules() if name]
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
        if isinstance(targets, str):
            if targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
                raise ConfigError(
                    f"tuning.targets={targets!r}: no module name matches this expression; linear layers here are: "
                    f"{', '.join(linear)}; or use tuning.targets=all-linear"
                )
            return
        unmatched = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
        if unmatched or not targets:
            raise ConfigError(
                f"tuning.targets={list(targets)}: {', '.join(unmatched) or 'nothing'} matches no module; linear layers "
                f"here are: {', '.join(linear)}; or use tuning.targets=all-linear"
            )

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold a loaded PeftModel's adapters into its weights; returns the plain model."""
        return model.merge_and_unload()  # type: ignore[operator]

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Switch the adapters off, and modules trained in full back to their originals.

        Only flags change: peft's own `disable_adapter` also toggles `requires_grad`, and a parameter gathered meanwhile
        by a sharding engine would never get a gradient.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, flag in zip(layers, before, strict=True):
                layer._disable_adapters = flag

    def base_name(self, name: str) -> str:
        """The name a wrapped parameter has in the base model's checkpoint."""
        name = name.removeprefix(_PREFIX)
        for wrapper in (".base_layer", ".original_module", ".modules_to_save.default"):
            name = name.replace(wrapper, "")
        return name

    def owns(self, name: str) -> bool:
        """Adapter matrices and DoRA magnitudes; modules trained in full start as copies of the base's."""
        return _ADAPTER.search(name) is not None

    def initial_value(self, name: str, shape: tuple[int, ...], base: BaseReader, seed: int) -> Tensor:
        """The full initial tensor of an adapter parameter, float32, drawn from (seed, name)."""
        match = _ADAPTER.search(name)
        assert match is not None, name
        kind = match.group(1)
        if kind == "magnitude_vector":  # DoRA: the norms of the base weight, of shape [out]
            weight = base.whole(self.base_name(name[: match.start()] + ".weight")).float()
            if weight.shape[0] != math.prod(shape):  # GPT-2 stores [in, out]
                weight = weight.T
            return torch.linalg.norm(weight, dim=1)
        if kind in ("B", "embedding_A"):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        if kind == "embedding_B":
            return torch.randn(shape, generator=generator)
        # Kaiming-uniform with a = sqrt(5), as the LoRA authors' code and peft draw it: U(-1/sqrt(in), 1/sqrt(in)).
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _task_type(model: nn.Module) -> str:
    """How peft calls what the model does; loaders of the adapter go by it."""
    if hasattr(model, "num_labels") and "SequenceClass" in type(model).__name__:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
