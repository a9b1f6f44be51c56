"""What a run would do, without doing it: sizes, batch arithmetic, steps and memory, from the meta device."""

from __future__ import annotations

import numpy as np

from strategies.base import Fsdp2Config, Precision, StrategyConfig, StrategyName
from strategies.hardware import advice
from strategies.memory import Pass, estimate
from strategies.parameters import element_counts, meta_context, named_parameters
from trainer.build import build_model, prepare_data, workload
from trainer.config.run import RunConfig
from trainer.data.batches.mixing import build_order
from trainer.data.prepare import Prepared
from trainer.data.report.preview import preview, summary
from trainer.loop import steps_from_budget
from trainer.model.loading import load_tokenizer
from trainer.planning.activations import expected
from trainer.step import Built


def describe(config: RunConfig) -> str:
    """The text of `--dry-run`. Prepares the data (cached for the run itself) and reads headers of the weights."""
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    half_on_gpu = str(config.run.device) == "cuda" and config.precision is not Precision.fp32
    built, _ = build_model(config, tokenizer, data, meta_context(), half_on_gpu=half_on_gpu)
    per, lengths = built.reading.sequences_per_document, data.train.lengths
    units, order = build_order(config.data, data.train, sequences_per_document=per, seed=config.run.seed)
    unit_tokens = lengths if units is None else np.array([lengths[unit].sum() for unit in units])
    size, micro = config.batch["global"], config.batch["micro"]
    world = max(1, (config.launcher.processes or 1) * config.launcher.nodes)
    steps = steps_from_budget(config.budget, order, unit_tokens, size)
    mean_tokens = float(unit_tokens[order.epoch(0)].mean())
    total = sum(element_counts(built.step_module).values())
    trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    lines = [
        summary(data.report),
        preview(data.train, tokenizer, built.reading, data.label_names, width=100),
        f"strategy {config.strategy.name}, tuning {config.tuning.name}, {world} process(es), layout {built.layout}, "
        f"attention {built.attention}",
        f"parameters: {total:,}, trainable {trained:,} ({trained / total:.2%})",
        f"batch: {size} = {micro} micro x {size // (micro * world)} accumulation x {world} ranks",
        f"tokens per step: about {mean_tokens * size:,.0f}; steps: {steps:,}; documents: {len(data.train) // per:,}",
        "memory per rank, estimated (model state by arithmetic, activations counted for the longest micro-batch):",
        *_memory(config, built, data, world, round(mean_tokens * micro)),
        *_waiting(config.strategy, trained, world, accumulation=size // (micro * world)),
        *([f"advice: {said}"] if (said := advice(config.precision, str(config.run.device))) else []),
        *(f"substituted: {key}: {value}" for key, value in built.substitutions.items()),
        "nothing was trained (--dry-run)",
    ]
    return "\n".join(lines)


def _waiting(strategy: StrategyConfig, trained: int, world: int, *, accumulation: int) -> list[str]:
    """What gradients that wait for the last micro-batch would add to the estimate."""
    if not isinstance(strategy, Fsdp2Config) or accumulation == 1 or strategy.defer_sync is False:
        return []
    when = "wait" if strategy.defer_sync else "wait only where they fit"
    return [f"  gradients, whole until the last micro-batch: {4 * trained / 2**30:.2f} GiB more at most; they {when}"]


def _memory(config: RunConfig, built: Built, data: Prepared, world: int, micro_tokens: int) -> list[str]:
    replicate = 1
    if isinstance(config.strategy, Fsdp2Config) and (
        config.strategy.name is StrategyName.hsdp or config.strategy.replicate != 1
    ):
        hosts = config.launcher.nodes
        replicate = config.strategy.replicate if config.strategy.replicate > 1 else (hosts if hosts > 1 else 2)
    precision = Precision.fp32 if config.precision is Precision.auto else config.precision
    text = built.config.get_text_config()
    activations = expected(built, workload(config, data), config.strategy.activation_checkpointing, precision)
    return estimate(
        built.step_module,
        config.strategy,
        precision,
        world_size=world,
        replicate=replicate,
        load=Pass(micro_tokens, text.hidden_size, text.num_hidden_layers, activations),
    ).lines()
