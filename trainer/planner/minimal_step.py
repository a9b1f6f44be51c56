"""A step of the training loop alone: no data set, no records, no checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from strategies.base import Engine, Progress
from trainer.data.batches.collate import to_device
from trainer.data.batches.loader import StepBatch, StepLoader
from trainer.evaluation.base import EvaluationConfig
from trainer.loop import Trainer
from trainer.loop_types import LoopSettings, Monitors, Sinks
from trainer.monitors.anomalies import Guards
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import Challenges
from trainer.monitors.guard_config import GuardsConfig
from trainer.monitors.stragglers import Stragglers
from trainer.optim.schedule import ScheduleConfig


def step_batch(batches: list[dict[str, Any]], device: torch.device) -> StepBatch:
    """One rank's micro-batches, which are on the CPU, as the `StepBatch` on `device` that the training loop takes."""
    micro_batches = [to_device(batch, device) for batch in batches]
    tokens = sum(int(batch["input_ids"].numel()) for batch in batches)
    # If the loss needs a mean over the step first, as KTO's does over mismatched answers, the loop takes a pass without gradients
    # ahead of the step. Those answers are as long as these.
    ahead = [{**batch, "ahead_of": True} for batch in micro_batches if batch.get("ahead")]
    return StepBatch(
        micro_batches=micro_batches,
        ahead=ahead,
        totals=batches[0]["totals"],
        tokens=tokens,
        local_tokens=tokens,
        supervised_tokens=tokens,
        samples=1,
    )


def minimal_trainer(engine: Any) -> Trainer:
    """A `Trainer` with an engine, and nothing else that a training run has: only `train_step` may be called.

    Simulated steps and steps on trial run through it, so that they do what a training run's own step does.
    """
    settings = LoopSettings(
        total_steps=3,
        seed=0,
        lr=1.0,
        schedule=ScheduleConfig(),
        evaluation=EvaluationConfig(),
        log_every=1,
        save_final=False,
    )
    unused = cast(Any, None)
    # A step says how much of an epoch is over; of samples that nobody counts, any number will do.
    loader = SimpleNamespace(order=SimpleNamespace(num_units=1))
    return Trainer(
        settings,
        engine=cast(Engine, engine),
        loader=cast(StepLoader, loader),
        progress=Progress(),
        evaluators=[],
        sinks=Sinks(meter=unused, metrics=unused, display=unused, checkpoints=unused),
        monitors=Monitors(
            agreement=unused,
            guards=Guards(GuardsConfig(), 1, engine.runtime),
            stragglers=Stragglers(0, engine.runtime),
            evaluations=Challenges(ChallengesConfig(), planned_evaluations=1, compared_term="loss"),
        ),
    )
