"""A run's step, simulated: out of a configuration and a model's config.json, without weights, data, tokenizer or GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from strategies.base import Precision
from strategies.parameters import meta_context, named_parameters
from strategies.runtime import SIMULATED, Runtime
from strategies.simulation import simulated_rank
from trainer.build import attach_frozen, build_step
from trainer.config.run import RunConfig
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.objectives.registry import family_of
from trainer.optim.build import build_optimizer
from trainer.planning.activations import micro_batch_of
from trainer.planning.depth import Extended, at_depth
from trainer.planning.simulate import Parts, ShapesOnly, Simulated, simulate


class NoTokenizer:
    """What building a model asks of a tokenizer: how many tokens there are, those added by the run included."""

    def __init__(self, config: ModelConfig) -> None:
        rows = load_model_config(config).get_text_config().vocab_size
        self._size = rows + len(config.add_tokens)
        self.pad_token_id = 0

    def __len__(self) -> int:
        return self._size


def simulate_run(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 8,
) -> Simulated:
    """One step of rank `rank` as on a GPU, each of its micro-batches of sequences of `lengths` tokens.

    `model.path` needs a config.json alone. Raises ConfigError for what the run itself would refuse, RuntimeError in a
    process that is part of a job.
    """
    with simulated_rank(rank, world_size, local_world_size=local_world_size) as runtime:
        return simulate(parts_of(config, lengths, runtime), runtime)


def simulate_depth(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 8,
    exact: bool = False,
) -> Extended:
    """`simulate_run` of the whole model, from two models of few blocks; with `exact`, from the model itself.

    Encoder-decoder models, and those whose kinds of blocks do not repeat, are simulated as they are.
    """
    settings = load_model_config(config.model)
    text = settings.get_text_config()
    blocks, period = text.num_hidden_layers, _period(text)

    def take(depth: int) -> Simulated:
        with TemporaryDirectory() as place:
            shallow = (
                config if depth == blocks else replace(config, model=_with_blocks(config.model, depth, Path(place)))
            )
            return simulate_run(shallow, lengths, rank=rank, world_size=world_size, local_world_size=local_world_size)

    exact = exact or period is None or getattr(settings, "is_encoder_decoder", False)
    return at_depth(take, blocks, period or 1, exact=exact)


def _period(text: Any) -> int | None:
    """After how many blocks their kinds repeat; None where they do not."""
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        return 1
    fits = (n for n in range(1, len(kinds) // 2 + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return next(fits, None)


def _with_blocks(config: ModelConfig, depth: int, place: Path) -> ModelConfig:
    """The model with `depth` blocks, as a directory with a config.json."""
    settings = copy.deepcopy(load_model_config(config))
    text = settings.get_text_config()
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    settings.save_pretrained(place)
    return replace(config, path=str(place))


def parts_of(config: RunConfig, lengths: list[int], runtime: Runtime, *, source: object = None) -> Parts:
    """The parts of a rank's step, each of its micro-batches of sequences of `lengths` tokens; the model on meta."""
    precision = config.precision
    if precision is Precision.auto:
        precision = Precision.bf16 if runtime.kind == "cuda" else Precision.fp32
    tokenizer, source = NoTokenizer(config.model), source or ShapesOnly()
    built = build_step(
        config.model,
        objective_config=config.objective,
        tuning_config=config.tuning,
        layout=config.data.layout,
        tokenizer=tokenizer,
        num_labels=family_of(config.objective).outputs or 2,
        context=meta_context(),
        half_on_gpu=runtime.device == SIMULATED and precision is not Precision.fp32,
    )
    attach_frozen(built, config.model, config.objective, source, tokenizer)  # type: ignore[arg-type]
    accumulation = config.batch["global"] // (config.batch["micro"] * runtime.world_size)
    batch = micro_batch_of(built, lengths)
    tokens = sum(lengths) * accumulation * runtime.world_size
    batch["totals"] = dict.fromkeys(batch["totals"], tokens)
    names = [name for name, _ in named_parameters(built.step_module)]
    return Parts(
        built=built,
        strategy=config.strategy,
        precision=precision,
        make_optimizer=partial(build_optimizer, config.optim, model_names=names, rate_of=built.tuning.rate_of),
        max_grad_norm=config.optim.max_grad_norm,
        batches=[batch] * max(1, accumulation),
        source=source,
    )
