"""Resolves `evaluation.every_steps=auto` before the first step of a run. A resumed or extended run keeps the number.

Only a run that was too short to be evaluated on the way gets a new one when it is extended.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.base import Progress
from strategies.runtime import Runtime
from trainer.config.run import RunConfig
from trainer.data.batches.cutting import sequence_cut
from trainer.data.batches.loader import EvalShare, StepLoader
from trainer.data.prepare import PreparedData
from trainer.data.store.sequences import TokenDataset
from trainer.evaluation.base import EvaluationConfig
from trainer.evaluation.build import source_metric_names
from trainer.evaluation.interval import AUTO, EVERY_STEPS, RunSize, auto_interval_reason, automatic_evaluation_interval
from trainer.reporting.resolution import ResolvedSetting
from trainer.rollout.loader import RolloutLoader
from trainer.step import BuiltModel


@dataclass(frozen=True, slots=True)
class EvaluationInterval:
    """How often a run is evaluated."""

    steps: int
    """Steps between evaluations; 0 evaluates only at the end."""
    intermediate_loss_only: bool = False
    """Whether evaluations before the last step compute the held-out loss alone."""


def resolve_evaluation_interval(
    config: RunConfig,
    data: PreparedData,
    built: BuiltModel,
    loader: StepLoader | RolloutLoader,
    total_steps: int,
    progress: Progress,
    runtime: Runtime,
) -> EvaluationInterval:
    """Settle how often this run is evaluated (`evaluation.every_steps`): `auto` goes by the sizes of run and held-out data.

    With `auto`, evaluations before the last step compute the held-out loss alone, which is cheap.

    `loader`: tells how many tokens a step takes.
    `progress`: of the run; if a number is computed, its `evaluate_every` is set, so that a resumed run has the same one.
    `built`: its `substitutions`, which the start screen shows, get the number and its reason.

    No collective.
    """
    configured_steps = config.evaluation.every_steps
    if configured_steps != AUTO:
        return EvaluationInterval(int(configured_steps))
    held_out = data.evaluation
    if held_out is None or len(held_out) == 0 or isinstance(loader, RolloutLoader):
        # Held-out rewards need written answers, which is too expensive unless the user sets an interval.
        return EvaluationInterval(0, intermediate_loss_only=True)
    size = RunSize(
        total_steps=total_steps,
        # A unit is what a batch counts: a document, a pack, or a pair of answers.
        tokens_per_step=float(loader.unit_tokens.mean()) * config.batch["global"],
        held_out_tokens=_num_evaluated_tokens(
            config.evaluation, held_out, built.data_spec.sequences_per_document, runtime
        ),
    )
    # A run that was too short for any evaluation on the way may have been extended. Every other number stays.
    if not progress.evaluate_every:
        progress.evaluate_every = automatic_evaluation_interval(size)
    interval = progress.evaluate_every
    reason = auto_interval_reason(interval, size, config.evaluation.patience)
    built.substitutions[EVERY_STEPS] = str(ResolvedSetting(EVERY_STEPS, AUTO, interval, reason))
    return EvaluationInterval(interval, intermediate_loss_only=True)


def _num_evaluated_tokens(
    settings: EvaluationConfig, held_out: TokenDataset, sequences_per_document: int, runtime: Runtime
) -> int:
    """Count the tokens that one evaluation of the held-out loss reads, all ranks together.

    It reads at most `evaluation.max_documents` documents; of each source, if the loss is measured by source.
    """
    eval_share = EvalShare(
        settings.batch,
        runtime.dp_rank,
        runtime.dp_size,
        settings.max_documents,
        sequences_per_document,
        by_source=bool(source_metric_names(held_out)),  # `max_documents` bounds each source by itself
        cut=sequence_cut(runtime),
    )
    return int(held_out.lengths[eval_share.covered_sequences(held_out)].sum())
