"""`train --dry-run`: sizes, batch arithmetic, steps and memory of a run, computed on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from strategies.base import ActivationCheckpointing, Fsdp2Config, Precision, StrategyConfig
from strategies.hardware import advice
from strategies.parameters import element_counts, meta_context, named_parameters
from strategies.runtime import SIMULATED
from trainer.build.parts import build_model, prepare_data, workload
from trainer.build.recomputation import longest_lengths
from trainer.config.run import MICRO, STRATEGY, RunConfig
from trainer.data.batches.order import steps_from_budget
from trainer.data.prepare import Prepared
from trainer.data.report.preview import preview, summary
from trainer.model.loading import load_tokenizer
from trainer.planner.fit_check import one_step, unsimulated
from trainer.planner.lengths import drawn
from trainer.planner.micro_batch import would_choose
from trainer.planner.simulation import simulate_depth
from trainer.planner.strategy_choice import would_choose_strategy
from trainer.session.run_facts import repetition_warning
from trainer.step import Built

DEFECTS = (LookupError, TypeError, AttributeError, AssertionError, NameError)
"""Errors of a simulated step that are a fault of the code, of ours or of the model's: training would likely meet them too."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a run would do."""

    text: str
    """For a person."""
    facts: dict[str, Any]
    """For a script: JSON-compatible, sizes in bytes."""
    exit_code: int
    """0, or 70 if a defect keeps the step from being simulated."""


@dataclass(frozen=True, slots=True)
class SimulatedMemory:
    """Bytes that a rank holds at the peak of the longest micro-batch, or why they are not known."""

    lines: list[str]
    facts: dict[str, Any]
    defect: bool = False


def describe(config: RunConfig) -> DryRun:
    """What `--dry-run` answers. Prepares the data (cached for the run itself) and reads headers of the weights."""
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    half_on_gpu = str(config.run.device) == "cuda" and config.precision is not Precision.fp32
    config = would_choose(would_choose_strategy(config, data), data)
    built, _ = build_model(config, tokenizer, data, meta_context(), half_on_gpu=half_on_gpu)
    per = built.reading.sequences_per_document
    read = drawn(config, data.train, per)
    size, micro = config.batch["global"], config.batch["micro"]
    world = config.launcher.per_node * config.launcher.nodes
    steps = steps_from_budget(config.budget, read.order, read.tokens, size)
    total = sum(element_counts(built.step_module).values())
    trained = sum(p.numel() for _, p in named_parameters(built.step_module) if p.requires_grad)
    memory = _memory(config, built, data, world)
    epochs = steps * size / read.order.num_units
    lines = [
        summary(data.report),
        preview(data.train, tokenizer, built.reading, data.label_names, width=100),
        f"strategy {config.strategy.name}, tuning {config.tuning.name}, {world} process(es), layout {built.layout}, "
        f"attention {built.attention}",
        f"parameters: {total:,}, trainable {trained:,} ({trained / total:.2%})",
        f"batch: {size} = {micro} micro x {size // (micro * world)} accumulation x {world} ranks",
        f"tokens per step: about {read.mean * size:,.0f}; steps: {steps:,}; epochs: "
        f"{epochs:,.2f} of {len(data.train) // per:,} documents",
        *repetition_warning(size, epochs, steps),
        *memory.lines,
        *_waiting(config.strategy, trained, world, accumulation=size // (micro * world)),
        *([f"advice: {said}"] if (said := advice(config.precision, str(config.run.device))) else []),
        *(f"resolved: {key}: {config.substitutions[key]}" for key in (STRATEGY, MICRO) if key in config.substitutions),
        *(f"resolved: {key}: {value}" for key, value in built.substitutions.items()),
        "nothing was trained (--dry-run)",
    ]
    facts = {
        "strategy": str(config.strategy.name),
        "tuning": str(config.tuning.name),
        "ranks": world,
        "parameters": total,
        "trainable_parameters": trained,
        "batch": {"global": size, "micro": micro, "accumulation": size // (micro * world)},
        "steps": steps,
        "epochs": epochs,
        "documents": len(data.train) // per,
        "tokens_per_step": read.mean * size,
        "memory_per_rank": memory.facts,
        "substitutions": {key: str(note) for key, note in (config.substitutions | built.substitutions).items()},
    }
    return DryRun("\n".join(lines), facts, exit_code=70 if memory.defect else 0)


def _waiting(strategy: StrategyConfig, trained: int, world: int, *, accumulation: int) -> list[str]:
    """What gradients that wait for the last micro-batch would add to the estimate."""
    if not isinstance(strategy, Fsdp2Config) or accumulation == 1 or strategy.defer_sync is False:
        return []
    when = "wait" if strategy.defer_sync else "wait only where they fit"
    return [f"  gradients, whole until the last micro-batch: {4 * trained / 2**30:.2f} GiB more at most; they {when}"]


def _memory(config: RunConfig, built: Built, data: Prepared, world: int) -> SimulatedMemory:
    """The run's own step, simulated with its longest micro-batch; or why that cannot be told."""
    auto = config.strategy.activation_checkpointing is ActivationCheckpointing.auto
    noted = ", with nothing recomputed yet" if auto else ""
    on_gpu = str(config.run.device) == "cuda"
    try:
        found = simulate_depth(
            one_step(config, world, auto=ActivationCheckpointing.none),
            longest_lengths(built.reading, workload(config, data)),
            world_size=world,
            local_world_size=max(1, world // config.launcher.nodes),
            device=SIMULATED if on_gpu else torch.device("cpu"),
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that stops no run
        reason = unsimulated(error)
        if isinstance(error, DEFECTS):
            reason = (
                f"not known: the simulated step failed with {type(error).__name__}: {error}. This is a fault of shardtune "
                "or of the model's code, and training may fail likewise; exit code 70"
            )
        return SimulatedMemory([f"memory per rank: {reason}"], {"unknown": reason}, defect=isinstance(error, DEFECTS))
    unit, name = (2**30, "GiB") if found.total >= 2**30 else (2**20, "MiB")
    kinds = sorted(found.kinds.items(), key=lambda item: -item[1])
    lines = [
        f"memory per rank of the longest micro-batch{noted}, simulated: most in {found.peak}; libraries and what the allocator "
        "reserves come on top",
        *(f"  {kind:<14}{size / unit:8.2f} {name}" for kind, size in kinds if size >= 0.005 * unit),
        f"  {'total':<14}{found.total / unit:8.2f} {name}",
    ]
    return SimulatedMemory(lines, {"bytes": found.total, "peak": str(found.peak), "kinds": dict(kinds)})
