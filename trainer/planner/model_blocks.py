"""The blocks of a model: their kinds, how they repeat, and the same model with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strategies.parameters import meta_context
from trainer.model.architecture import auto_class
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.kept_layers import KeptLayers, kinds_of
from trainer.model.loading import load_model_config


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a model's blocks follow each other."""

    number: int
    period: int | None
    """After how many their kinds repeat; None where fewer do not say what all take."""
    first: int = 0
    """How many come before the first that repeats, as those of a mixture of experts that have none."""


_KNOWN: dict[str, Blocks] = {}
"""By a model's whole configuration: to build one of hundreds of blocks takes a second."""


def blocks_of(config: ModelConfig) -> Blocks:
    """The blocks of a model, by what transformers builds of its config.json."""
    settings = load_model_config(config)
    text = settings.get_text_config()
    if getattr(settings, "is_encoder_decoder", False):
        return Blocks(text.num_hidden_layers, None)
    key = settings.to_json_string(use_diff=False)
    if key not in _KNOWN:
        auto, own = auto_class(ModelKind.causal, settings), {"trust_remote_code": config.trust_remote_code}
        try:
            with meta_context():
                plain = auto.from_config(copy.deepcopy(settings), attn_implementation="eager", **own)
            _KNOWN[key] = repeating(kinds_of(plain, text.to_dict(), text.num_hidden_layers))
        except Exception:  # noqa: BLE001 - what a class finds wrong is told when the run's own model is built
            _KNOWN[key] = Blocks(text.num_hidden_layers, None)
    return _KNOWN[key]


def repeating(kinds: Sequence[Hashable]) -> Blocks:
    """Blocks of these kinds: the fewest come before those that repeat, twice at least."""
    number = len(kinds)
    for first in range(number):
        rest = kinds[first:]
        for period in range(1, len(rest) // 2 + 1):
            if all(kind == rest[index % period] for index, kind in enumerate(rest)):
                return Blocks(number, period, first)
    return Blocks(number, None)


def with_blocks(config: ModelConfig, depth: int, place: Path) -> ModelConfig:
    """The model with its first `depth` blocks, as a directory with a config.json."""
    settings = copy.deepcopy(load_model_config(config))
    text: Any = settings.get_text_config()
    kept = KeptLayers(tuple(range(depth)), text.num_hidden_layers)
    for name, value in kept.by_layer(text.to_dict()).items():
        setattr(text, name, value)
    settings.save_pretrained(place)
    return replace(config, path=str(place))
