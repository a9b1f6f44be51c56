"""Resolves `evaluation.every_steps=auto` before the first step of a run. A resumed or extended run keeps the number.

Only a run that was too short to be evaluated on the way gets a new one when it is extended.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Progress
from strategies.runtime import Runtime
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import cut_of
from trainer.data.batches.loader import EvalShare, StepLoader
from trainer.data.prepare import PreparedData
from trainer.evaluation.build import evaluation_parts
from trainer.evaluation.interval import AUTO, EVERY_STEPS, RunSize, automatic_interval, reason_for
from trainer.reporting.resolution import Resolution
from trainer.rollout.loader import RolloutLoader
from trainer.step import Built


@dataclass(frozen=True, slots=True)
class EvaluationInterval:
    """How often a run is evaluated."""

    steps: int
    """Steps between evaluations; 0 evaluates only at the end."""
    loss_alone: bool = False
    """Whether evaluations before the last step compute the held-out loss alone."""


def settle_interval(
    config: RunConfig,
    data: PreparedData,
    built: Built,
    loader: StepLoader | RolloutLoader,
    total_steps: int,
    progress: Progress,
    runtime: Runtime,
) -> EvaluationInterval:
    """How often this run is evaluated (`evaluation.every_steps`), with `auto` computed from the sizes of run and held-out data.

    The number for `auto` is kept in `progress`, so that a resumed run has the same, and stands in `built.substitutions` for
    people. No collective.
    """
    every = config.evaluation.every_steps
    if every != AUTO:
        return EvaluationInterval(int(every))
    held_out = data.evaluation
    if held_out is None or len(held_out) == 0 or isinstance(loader, RolloutLoader):
        # Held-out rewards are of answers that are written: too dear to be computed without being asked for.
        return EvaluationInterval(0, loss_alone=True)
    share = EvalShare(
        config.evaluation.batch,
        runtime.reader,
        runtime.readers,
        config.evaluation.max_documents,
        built.data_spec.sequences_per_document,
        by_source=bool(evaluation_parts(held_out)),  # `max_documents` bounds each source by itself
        cut=cut_of(runtime),
    )
    size = RunSize(
        total_steps=total_steps,
        tokens_per_step=float(loader.unit_tokens.mean()) * config.batch["global"],
        held_out_tokens=int(held_out.lengths[share.sequences(held_out)].sum()),
    )
    # A run that was too short for any evaluation on the way may have been extended. Every other number stays.
    if not progress.evaluate_every:
        progress.evaluate_every = automatic_interval(size)
    interval = progress.evaluate_every
    reason = reason_for(interval, size, config.evaluation.patience)
    built.substitutions[EVERY_STEPS] = str(Resolution(EVERY_STEPS, AUTO, interval, reason))
    return EvaluationInterval(interval, loss_alone=True)
