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
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.guard_config import GuardsConfig
from trainer.monitors.stragglers import Stragglers
from trainer.optim.schedule import ScheduleConfig


def build_step_batch(batches: list[dict[str, Any]], device: torch.device) -> StepBatch:
    """Wrap one rank's micro-batches as the training loop takes them from a data loader, for a step without a data set.

    `batches`: on the CPU; they are copied to `device`. The counts for reports (samples, supervised tokens) are placeholders that
    nobody reads: losses are divided by the micro-batches' own "totals".
    """
    micro_batches = [to_device(batch, device) for batch in batches]
    tokens = sum(int(batch["input_ids"].numel()) for batch in batches)
    # Some losses need a mean over the step first (KTO over mismatched answers): the loop takes a pass without gradients (a look
    # ahead) before the step. Its inputs are as long as those of the step, so the step's own stand for them.
    look_ahead_batches = [{**batch, "is_look_ahead": True} for batch in micro_batches if batch.get("step_means")]
    return StepBatch(
        micro_batches=micro_batches,
        look_ahead_batches=look_ahead_batches,
        totals=batches[0]["totals"],
        tokens=tokens,
        local_tokens=tokens,
        supervised_tokens=tokens,
        samples=1,
    )


def minimal_trainer(engine: Any) -> Trainer:
    """Make a `Trainer` that can only `train_step`, so that simulated and trial steps do exactly what a step of a run does.

    `engine`: the sharded model with its optimizer, or what has its methods. What `train_step` calls beside it is real: guards
    and stragglers and detectors, which watch each step. What it does not call is None.
    """
    # `train_step` reads the schedule; the learning rate does not matter.
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
    # `train_step` divides by the number of samples to report the share of the epoch, which nobody reads here.
    loader = SimpleNamespace(order=SimpleNamespace(num_units=1))
    return Trainer(
        settings,
        engine=cast(Engine, engine),
        loader=cast(StepLoader, loader),
        progress=Progress(),
        evaluators=[],
        sinks=Sinks(meter=unused, metrics=unused, display=unused, checkpoints=unused),
        monitors=Monitors(
            stop_agreement=unused,
            guards=Guards(GuardsConfig(), 1, engine.runtime),
            stragglers=Stragglers(0, engine.runtime),
            evaluations=ChallengeDetectors(ChallengesConfig(), planned_evaluations=1, judged_loss_term="loss"),
        ),
    )
