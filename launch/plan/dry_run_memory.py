"""The answer of a dry run: its facts for scripts, and the memory of the step that it simulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from strategies import exit_codes
from strategies.base import ActivationCheckpointing, Fsdp2Config, StrategyConfig
from strategies.runtime import SIMULATED
from strategies.tensor_inventory import MemoryKind
from trainer.config.parallel import accumulation_steps
from trainer.config.run import RunConfig
from trainer.planner.depth_extrapolation import ExtrapolatedStep
from trainer.planner.fit_check import single_step_config, why_not_simulated
from trainer.planner.simulation import simulate_depth
from trainer.session.rate_text import LearningRate

DEFECT_ERRORS = (LookupError, TypeError, AttributeError, AssertionError, NameError)
"""Errors of a simulated step that are a fault of the code, of ours or of the model's: training would likely meet them too."""


@dataclass(frozen=True, slots=True)
class DryRunResult:
    """What a run would do, computed without training."""

    text: str
    """What `--dry-run` prints."""
    facts: dict[str, Any]
    """What `--dry-run --json` prints: JSON-compatible, sizes in bytes."""
    exit_code: int
    """0, or 70 if a defect keeps the step from being simulated."""


@dataclass(frozen=True, slots=True)
class DryRunNumbers:
    """What a dry run counts. None is what cannot be known without reading the data."""

    ranks: int
    parameters: int
    """Of the tuned model, adapters included."""
    num_trained_parameters: int
    tokens_per_step: float
    steps: int | None
    learning_rate: LearningRate | None
    epochs: float | None = None
    documents: int | None = None


@dataclass(frozen=True, slots=True)
class SimulatedStepMemory:
    """Memory that a rank holds at the peak of the longest micro-batch, or why it is not known."""

    lines: list[str]
    """For the text of the dry run."""
    facts: dict[str, Any]
    """For its JSON: bytes in all and by kind, or the reason."""
    is_defect: bool = False
    """Whether the step could not be simulated because of a fault of the code."""


def dry_run_result(
    lines: list[str],
    config: RunConfig,
    numbers: DryRunNumbers,
    memory: SimulatedStepMemory,
    notes: Mapping[str, object],
) -> DryRunResult:
    """Put together the answer of `train --dry-run`: its text, its facts for `--json`, and its exit code.

    Scripts read the keys of `facts`, so they stay. `lines`: the text. `numbers`: what it has counted; `memory`: that of its
    longest micro-batch, or the defect of the code that was met instead. `notes`: what was chosen beside the configuration's
    own substitutions, by setting, with its reason.
    """
    facts = {
        "strategy": str(config.strategy.name),
        "tuning": str(config.tuning.name),
        "ranks": numbers.ranks,
        "parameters": numbers.parameters,
        "trainable_parameters": numbers.num_trained_parameters,
        "batch": {
            "global": config.batch["global"],
            "micro": config.batch["micro"],
            "accumulation": accumulation_steps(config, numbers.ranks),
        },
        "steps": numbers.steps,
        "learning_rate": None if numbers.learning_rate is None else asdict(numbers.learning_rate),
        "epochs": numbers.epochs,
        "documents": numbers.documents,
        "tokens_per_step": numbers.tokens_per_step,
        "memory_per_rank": memory.facts,
        "substitutions": {key: str(note) for key, note in {**config.substitutions, **notes}.items()},
    }
    return DryRunResult("\n".join(lines), facts, exit_code=exit_codes.FAILED if memory.is_defect else 0)


def simulate_step_memory(config: RunConfig, lengths: list[int], world_size: int) -> SimulatedStepMemory:
    """Tell how much memory a rank of the run needs: simulate a step with one micro-batch of sequences of `lengths` tokens.

    As lines for people (the kinds of memory, largest first) and as facts for scripts. If the step cannot be simulated, both
    say why, and `SimulatedStepMemory.is_defect` says whether that looks like a fault of the code.
    """
    is_on_gpu = str(config.run.device) == "cuda"
    try:
        step = simulate_depth(
            single_step_config(config, world_size, mode_if_auto=ActivationCheckpointing.none),
            lengths,
            world_size=world_size,
            local_world_size=max(1, world_size // config.launcher.nodes),
            device=SIMULATED if is_on_gpu else torch.device("cpu"),
        )
    except Exception as error:  # noqa: BLE001 - an architecture may do what cannot be simulated; that stops no run
        return _memory_not_simulated(error)
    bytes_by_kind = dict(sorted(step.peak_bytes_by_kind.items(), key=lambda kind_and_size: -kind_and_size[1]))
    return SimulatedStepMemory(
        lines=_memory_lines(step, bytes_by_kind, config.strategy.activation_checkpointing),
        facts={"bytes": step.peak_bytes, "peak": str(step.peak_phase), "kinds": bytes_by_kind},
    )


def _memory_not_simulated(error: Exception) -> SimulatedStepMemory:
    """What a dry run says of memory if the step could not be simulated: why, and whether that is a defect of the code.

    `error`: what the simulation raised. A defect makes the dry run end with exit code 70.
    """
    # Training may still work if the step cannot be simulated, but a defect will probably be met there too.
    is_defect = isinstance(error, DEFECT_ERRORS)
    reason = why_not_simulated(error)
    if is_defect:
        reason = (
            f"not known: the simulated step failed with {type(error).__name__}: {error}. This is a fault of shardtune "
            "or of the model's code, and training may fail likewise; exit code 70"
        )
    return SimulatedStepMemory([f"memory per rank: {reason}"], {"unknown": reason}, is_defect=is_defect)


def _memory_lines(
    step: ExtrapolatedStep, bytes_by_kind: dict[MemoryKind, int], mode: ActivationCheckpointing
) -> list[str]:
    """Write where a rank's memory goes at the peak of the simulated step, for a dry run: by kind, largest first, in MiB or GiB.

    `bytes_by_kind`: those of the peak, in the order of the lines. `mode`: with `auto`, the run itself chooses by its free
    memory which activations are recomputed, and the step was simulated without.
    """
    unit_bytes = 2**20
    unit = "MiB"
    if step.peak_bytes >= 2**30:
        unit_bytes = 2**30
        unit = "GiB"
    auto_note = ", with nothing recomputed yet" if mode is ActivationCheckpointing.auto else ""
    lines = [
        f"memory per rank of the longest micro-batch{auto_note}, simulated: most in {step.peak_phase}; libraries and what "
        "the allocator reserves come on top"
    ]
    for kind, size_bytes in bytes_by_kind.items():
        if size_bytes >= 0.005 * unit_bytes:  # smaller ones would be shown as 0.00
            lines.append(f"  {kind:<14}{size_bytes / unit_bytes:8.2f} {unit}")
    lines.append(f"  {'total':<14}{step.peak_bytes / unit_bytes:8.2f} {unit}")
    if step.host_inputs.num_tensors:
        pinned_gib = step.host_inputs.pinned_size() / 2**30
        lines.append(f"  beside it {pinned_gib:.2f} GiB of pinned host memory a rank, for inputs of recomputed blocks")
    return lines


def deferred_gradient_lines(strategy: StrategyConfig, num_trained_parameters: int, *, accumulation: int) -> list[str]:
    """Warn in a dry run of memory that the simulated micro-batch does not show: gradients that wait unsharded for later ones.

    With gradient accumulation, FSDP2 may reduce them only after the last micro-batch of a step. The simulated step has a
    single micro-batch, so its estimate lacks these gradients. `strategy.defer_sync`: False never defers, True always, None if
    the gradients fit.
    """
    never_defers = not isinstance(strategy, Fsdp2Config) or accumulation == 1 or strategy.defer_sync is False
    if never_defers:
        return []
    when = "wait" if strategy.defer_sync else "wait only where they fit"
    gradients_gib = 4 * num_trained_parameters / 2**30  # in fp32
    return [f"  gradients, whole until the last micro-batch: {gradients_gib:.2f} GiB more at most; they {when}"]
