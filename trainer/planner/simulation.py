"""Simulates a run's step from its configuration and a model's config.json, without weights, data, tokenizer or GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from strategies.base import Precision, ZeroConfig
from strategies.parameters import element_counts, meta_context, named_parameters
from strategies.runtime import SIMULATED, Runtime
from strategies.simulation import simulated_rank
from strategies.zero_config import MAX_LIVE_PARAMETERS
from trainer.build.parts import attach_frozen, build_step, right_alone
from trainer.build.recomputation import micro_batch_of
from trainer.config.run import RunConfig
from trainer.model.config import ModelConfig
from trainer.model.loading import load_model_config
from trainer.objectives.registry import family_of, reading_of
from trainer.optim.build import build_optimizer
from trainer.planner.cost_model import Form, Size, form_of, sizes_for, take_sizes
from trainer.planner.depth_extrapolation import ENDS, Extended, at_depth, near_an_end
from trainer.planner.memory_tracker import Moment
from trainer.planner.model_blocks import blocks_of, with_blocks
from trainer.planner.simulate import ShapesOnly, Simulated, StepParts, simulate
from trainer.step import Built


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
    device: torch.device = SIMULATED,
    of: tuple[int, int | None] = (0, None),
) -> Simulated:
    """One step of rank `rank` as on a GPU (or on `device` "cpu"), each of its micro-batches of sequences of `lengths` tokens.

    `model.path` needs a config.json alone. `of`: how many blocks the model has that this one stands for, and after how many
    their kinds repeat. Raises ConfigError for what the run itself would refuse, RuntimeError in a process that is part of a job.
    """
    with simulated_rank(rank, world_size, local_world_size=local_world_size, device=device) as runtime:
        return simulate(_standing_for(parts_of(config, lengths, runtime), *of), runtime)


def simulate_depth(
    config: RunConfig,
    lengths: list[int],
    *,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 8,
    exact: bool = False,
    device: torch.device = SIMULATED,
) -> Extended:
    """`simulate_run` of the whole model, from two models of few blocks; with `exact`, from the model itself.

    Encoder-decoder models, and those whose kinds of blocks do not repeat, are simulated as they are.
    """
    found = blocks_of(config.model)
    blocks, period = found.number, found.period
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "local_world_size": local_world_size}

    def take(depth: int) -> Simulated:
        with _at_depth(config, depth, blocks) as shallow:
            return simulate_run(shallow, lengths, device=device, of=(blocks, period), **ranks)

    exact = exact or period is None
    ends = ENDS if exact else ends_of(config)
    return at_depth(take, blocks, period or 1, ends=ends, joined=joined(config), exact=exact)


def simulate_form(
    config: RunConfig,
    length: int,
    *,
    accumulation: int,
    world_size: int = 1,
    local_world_size: int = 8,
    exact: bool = False,
    device: torch.device = SIMULATED,
) -> Form:
    """A rank's step at any size of micro-batch, of sequences of `length` tokens; with `exact`, of the whole model at two sizes.

    `accumulation` micro-batches are simulated, as the rank that holds most. Errors: as `simulate_run`.
    """
    known = blocks_of(config.model)
    blocks, period = known.number, known.period
    rank = world_size - 1 if _by_bucket(config) else 0  # whose part of the gradients comes first: all is live beside it
    ends = ends_of(config) if period and not exact else ENDS
    told: dict[str, Any] = {}
    counts: dict[int, tuple[int, int]] = {}

    def take(depth: int, expected: dict[Moment, int] | None) -> tuple[list[Simulated], list[Size], bool]:
        with (
            simulated_rank(rank, world_size, local_world_size=local_world_size, device=device) as runtime,
            _at_depth(config, depth, blocks) as shallow,
        ):
            parts = _standing_for(parts_of(shallow, [length] * per(shallow), runtime), blocks, period)
            straight = parts.precision is not Precision.fp32  # whose attention keeps its scores
            rows, lengths = sizes_for(parts.built, vocabulary_of(shallow.model), length, straight=straight)
            notes = parts.built.substitutions.items()  # kernels were asked of a machine that is not meant
            told["notes"] = tuple(f"{key}: {value}" for key, value in notes if key != "model.attention")
            told["layout"], told["alone"] = str(parts.built.layout), right_alone(parts.built, config.objective)
            counts[depth] = _parameters(parts.built)
            batches = [[_micro_batch(parts, each, accumulation * world_size)] * accumulation for each in lengths]
            sizes = [Size(len(e) // per(shallow) if rows else sum(e), sum(n * n for n in e)) for e in lengths]
            matters = partial(near_an_end, depth=depth, ends=ends)
            return take_sizes(parts, batches, runtime, expected, matters), sizes, rows

    def per(of: RunConfig) -> int:
        return reading_of(of.objective).sequences_per_document

    found = form_of(
        take,
        blocks,
        period=None if exact else period,
        ends=ends,
        joined=joined(config),
        accumulation=accumulation,
        local_world_size=local_world_size,
    )
    (low, first), (high, second) = min(counts.items()), max(counts.items())
    steps = (blocks - high) / max(1, high - low)
    parameters, trained = (round(b + (b - a) * steps) for a, b in zip(first, second, strict=True))
    return replace(
        found,
        parameters=parameters,
        trained=trained,
        vocabulary=vocabulary_of(config.model),
        **told,
    )


def ends_of(config: RunConfig) -> int:
    """Blocks at either end of a model that differ from those between: more where the first ones are of a kind of their own, and
    under ZeRO-3, which keeps further ones gathered."""
    blocks = blocks_of(config.model)
    ends = ENDS + blocks.first
    if not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 3:
        return ends
    with TemporaryDirectory() as place, simulated_rank(0, 1) as runtime:
        few = replace(config, model=with_blocks(config.model, blocks.first + (blocks.period or 1), Path(place)))
        units = parts_of(few, [1], runtime).built.step_module.shard_units()
    smallest = min((sum(p.numel() for p in unit.parameters()) for unit in units), default=1)
    return max(ends, MAX_LIVE_PARAMETERS // smallest + 1)


def joined(config: RunConfig) -> bool:
    """Whether the ends of a shallow model may have a block in common: not where buckets are filled by several blocks,
    nor where the first ones are of a kind of their own."""
    if blocks_of(config.model).first:
        return False
    return not isinstance(config.strategy, ZeroConfig) or config.strategy.stage < 2


def _by_bucket(config: RunConfig) -> bool:
    return isinstance(config.strategy, ZeroConfig) and config.strategy.stage < 3


def _standing_for(parts: StepParts, blocks: int, period: int | None) -> StepParts:
    """`parts`, which know how much a model of `blocks` blocks trains if they are of fewer; its kinds repeat after `period`."""

    def trained(modules: list[nn.Module]) -> int:
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    module = parts.built.step_module
    units = module.shard_units()
    if period is None or len(units) >= blocks:
        return parts
    return replace(parts, whole=trained([module]) + trained(units[-period:]) * (blocks - len(units)) // period)


def _parameters(built: Built) -> tuple[int, int]:
    """(all, trained)."""
    trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    return sum(element_counts(built.step_module).values()), trained


def vocabulary_of(config: ModelConfig) -> int:
    """Rows of the model's vocabulary, before any is added."""
    return int(load_model_config(config).get_text_config().vocab_size)


@contextmanager
def _at_depth(config: RunConfig, depth: int, blocks: int) -> Iterator[RunConfig]:
    """The run with a model of `depth` blocks of its `blocks`."""
    if depth == blocks:
        yield config
        return
    with TemporaryDirectory() as place:
        yield replace(config, model=with_blocks(config.model, depth, Path(place)))


def parts_of(config: RunConfig, lengths: list[int], runtime: Runtime, *, source: object = None) -> StepParts:
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
        num_labels=family_of(config.objective).num_outputs or 2,
        context=meta_context(),
        half_on_gpu=runtime.device == SIMULATED and precision is not Precision.fp32,
    )
    built.step_module.plan.ema_decay = config.optim.ema_decay
    attach_frozen(built, config.model, config.objective, config.tuning, source, tokenizer)  # type: ignore[arg-type]
    accumulation = config.batch["global"] // (config.batch["micro"] * runtime.world_size)
    names = [name for name, _ in named_parameters(built.step_module)]
    parts = StepParts(
        built=built,
        strategy=config.strategy,
        precision=precision,
        make_optimizer=partial(build_optimizer, config.optim, model_names=names, rate_of=built.tuning.rate_of),
        max_grad_norm=config.optim.max_grad_norm,
        batches=[],
        source=source,
    )
    return replace(
        parts, batches=[_micro_batch(parts, lengths, accumulation * runtime.world_size)] * max(1, accumulation)
    )


def _micro_batch(parts: StepParts, lengths: list[int], of: int) -> dict[str, Any]:
    """One of `of` alike micro-batches of a step, of sequences of these lengths."""
    batch = micro_batch_of(parts.built, lengths)
    batch["totals"] = dict.fromkeys(batch["totals"], sum(lengths) * of)
    return batch
