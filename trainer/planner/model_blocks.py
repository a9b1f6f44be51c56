"""The blocks of a model: their kinds, how they repeat, and the same model with fewer of them."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from strategies.parameters import meta_context
from trainer.model.architecture import transformers_class
from trainer.model.config import ModelConfig, ModelKind
from trainer.model.kept_layers import KeptLayers, layer_kinds_with_settings
from trainer.model.loading import load_model_config
from trainer.step import TrainStep


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """How the kinds of a model's blocks repeat: 32 blocks that alternate between full and local attention have period 2."""

    num_blocks: int
    period: int | None
    """After how many blocks their kinds repeat; None if they do not, and a model of fewer blocks does not say what all take."""
    num_leading_blocks: int = 0
    """How many blocks come before the first that repeats, as the dense first layers of a mixture of experts."""


_PATTERN_BY_CONFIG: dict[str, BlockPattern] = {}
"""By the model's configuration as JSON: building a model of hundreds of blocks on meta takes a second."""


def block_pattern(config: ModelConfig) -> BlockPattern:
    """Find how the kinds of a model's blocks (its layers) repeat, so that the planner may simulate a model with fewer of them.

    Two blocks of one kind cost the same. The kinds are seen in the model that transformers builds of its config.json.
    """
    settings = load_model_config(config)
    text = settings.get_text_config()
    if getattr(settings, "is_encoder_decoder", False):  # two stacks of blocks: such a model is simulated as a whole
        return BlockPattern(text.num_hidden_layers, period=None)
    key = settings.to_json_string(use_diff=False)
    if key not in _PATTERN_BY_CONFIG:
        _PATTERN_BY_CONFIG[key] = _pattern_of_built_model(config, settings, text)
    return _PATTERN_BY_CONFIG[key]


def _pattern_of_built_model(config: ModelConfig, settings: Any, text: Any) -> BlockPattern:
    """Build the model on meta, where weights take no memory, and find how the kinds of its blocks repeat.

    `settings`: the model's config.json as transformers has it. `text`: those of the part that reads tokens, which are `settings`
    themselves unless the model also reads images. The pattern has no period if the model's class cannot be built so: the planner
    then simulates the whole model.
    """
    model_class = transformers_class(ModelKind.causal, settings)
    try:
        with meta_context():
            model = model_class.from_config(
                copy.deepcopy(settings),  # a copy, since building writes into the settings
                attn_implementation="eager",
                trust_remote_code=config.trust_remote_code,
            )
        return repeating_pattern(layer_kinds_with_settings(model, text.to_dict(), text.num_hidden_layers))
    except Exception:  # noqa: BLE001 - what a class finds wrong is told when the run's own model is built
        return BlockPattern(text.num_hidden_layers, period=None)


def repeating_pattern(kinds: Sequence[Hashable]) -> BlockPattern:
    """Find the pattern in the kinds of a model's blocks, first to last: after some leading blocks, kinds repeat by a period.

    ["dense", "moe", "moe"] -> BlockPattern(num_blocks=3, period=1, num_leading_blocks=1). Of several patterns, it is the one with
    the fewest leading blocks, then the shortest period: a shallow model has these blocks and a few periods, and so fewest
    blocks. A period must occur twice at least; `period` is None if none does.
    """
    num_blocks = len(kinds)
    for num_leading in range(num_blocks):
        repeating = kinds[num_leading:]
        for period in range(1, len(repeating) // 2 + 1):
            if all(kind == repeating[index % period] for index, kind in enumerate(repeating)):
                return BlockPattern(num_blocks, period=period, num_leading_blocks=num_leading)
    return BlockPattern(num_blocks, period=None)


def repeated_blocks(step_module: TrainStep) -> list[nn.Module]:
    """The blocks of the tuned model through which text goes, in forward order: a shallow model has only the first of them.

    A step shards more blocks than these: those of a teacher, and those that read images or sound, which no text reaches.
    Call it before an engine shards the module, since sharding may give the blocks other classes.
    """
    from transformers import PreTrainedModel

    ids_of_text_modules = {id(part) for part in step_module.model.modules()}
    for part in step_module.model.modules():
        if isinstance(part, PreTrainedModel) and "text" not in part.input_modalities:
            ids_of_text_modules.difference_update(id(inner) for inner in part.modules())
    # Shard units are what FSDP2 and ZeRO-3 gather at once, usually blocks.
    return [block for block in step_module.shard_units() if id(block) in ids_of_text_modules]


def teacher_blocks(step_module: TrainStep) -> list[nn.Module]:
    """The blocks of the teacher that a step compares with, in forward order; none without a teacher."""
    if step_module.teacher is None:
        return []
    parts = {id(part) for part in step_module.teacher.modules()}
    return [block for block in step_module.shard_units() if id(block) in parts]


def truncated_model(config: ModelConfig, depth: int, directory: Path) -> ModelConfig:
    """Make the settings of a model with only the first `depth` blocks of `config`'s, to simulate in place of the whole.

    Its config.json is written to `directory`, which the returned settings have as their path.
    """
    settings = copy.deepcopy(load_model_config(config))
    text: Any = settings.get_text_config()
    # The number of layers, and settings that are lists with an entry for each layer (its kind of attention, for example).
    kept_layers = KeptLayers(tuple(range(depth)), text.num_hidden_layers)
    for name, value in kept_layers.settings_of_kept_layers(text.to_dict()).items():
        setattr(text, name, value)
    settings.save_pretrained(directory)
    return replace(config, path=str(directory))
