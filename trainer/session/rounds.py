"""The rounds of a run that writes what it learns from: its scorer, its loader, its record, and its tables in trackers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from strategies import runtime as processes
from strategies.base import Engine, Progress
from trainer.build.inputs import RunInputs
from trainer.build.reward_models import open_model_scorer
from trainer.build.rounds import RoundInputs, build_round_loader
from trainer.config.run import RunConfig
from trainer.data.batches.loader import StepLoader
from trainer.objectives.rollouts import RoundsConfig
from trainer.reporting.tracking import Trackers
from trainer.rollout.loader import RolloutLoader
from trainer.session.context import RunContext
from trainer.step import BuiltModel

if TYPE_CHECKING:
    from trainer.rollout.rewards.scorer import WorkerScorer
    from trainer.rollout.round import Round
    from trainer.rollout.round_builder import RoundBuilder


def open_rounds(
    config: RunConfig,
    inputs: RunInputs,
    built: BuiltModel,
    engine: Engine,
    progress: Progress,
    resumed_from: Path | None,
    context: RunContext,
) -> tuple[RolloutLoader, int]:
    """Set up the data side of a run that learns from rewards: rewards, and the loader that lets the model write answers.

    Such a run works in rounds: the model answers prompts, rewards score the answers, and a few optimizer steps learn from them.
    All ranks must call.

    `inputs`: data, tokenizer and precision of the run.
    `built`: the model with its objective.
    `engine`: that model distributed over the ranks; it also holds reward models.
    `progress`: steps taken so far.
    `resumed_from`: the checkpoint that was loaded, from which the loader continues; None for a new run.
    `context`: what the run shares: ranks, run directory, agreement on stopping.

    Returns (the loader of this rank, the optimizer steps of the run). Errors: those of rewards, StorageError.
    """
    scorer = _open_rewards(config, engine, context)
    # Makes functions by which long generations ask, on all ranks alike, whether the run must stop.
    new_stop_check = context.stop_agreement.new_stop_check
    round_inputs = RoundInputs(
        inputs.tokenizer, inputs.precision, scorer, progress, new_stop_check, context.attempt.set_phase
    )
    loader, steps = build_round_loader(config, inputs.data, built, engine, context.runtime, round_inputs)
    _record_rounds(config, loader.round_builder, progress.step, context)
    if resumed_from is not None:
        loader.restore(resumed_from)
    return loader, steps


def _open_rewards(config: RunConfig, engine: Engine, context: RunContext) -> WorkerScorer:
    """Open the rewards of a run: worker processes for functions, a judge model, and reward models. They close with the attempt.

    `engine`: holds the reward models beside the trained one. All ranks must call. Raises the errors of rewards that cannot be
    opened.
    """
    from trainer.evaluation.endpoint.judge import Judge
    from trainer.rollout.rewards.scorer import open_scorer

    assert isinstance(config.objective, RoundsConfig), "the settings of every family with rollouts"
    new_stop_check = context.stop_agreement.new_stop_check
    judge = None
    if config.evaluation.judge.url:
        judge = Judge(config.evaluation.judge, context.runtime, new_stop_check())
    scorer = open_scorer(
        config.objective,
        context.runtime,
        context.run_dir,
        stop_asked=context.stop_agreement.is_asked_on_this_rank,
        judge=judge,
    )
    context.attempt.at_end.callback(scorer.close)
    scorer.model_scorer = open_model_scorer(config, engine, context.runtime, new_stop_check())
    return scorer


def _record_rounds(config: RunConfig, round_builder: RoundBuilder, first_step: int, context: RunContext) -> None:
    """Let rank 0 record the answers and scores of each round in the run directory, and warn of rewards that took too long.

    `round_builder`: calls what is appended here with each new round. `first_step`: of the checkpoint that the run continues from;
    rounds after it are forgotten. All ranks must call.
    """
    from trainer.rollout.record import RoundRecord

    assert isinstance(config.objective, RoundsConfig), "the settings of every family with rollouts"
    record = RoundRecord(context.run_dir, config.objective.rollout.record)
    processes.call_on_main(lambda: record.remove_after(first_step), context.runtime)
    round_builder.on_round.append(
        lambda rollout_round, step: processes.call_on_main(lambda: record.write(rollout_round, step), context.runtime)
    )
    round_builder.on_round.append(lambda rollout_round, step: _warn_of_reward_timeouts(rollout_round, step, context))


def _warn_of_reward_timeouts(rollout_round: Round, step: int, context: RunContext) -> None:
    """Print a warning if rewards had no time for some answers of a round: a resumed run might not leave out the same ones."""
    timed_out = int(rollout_round.metrics.get("answers/timed_out", 0))
    if timed_out and context.runtime.is_main:
        context.console.print_line(
            f"warning: the round of step {step + 1} is not reproducible: scores that a reward did not give within its "
            f"timeout_s: {timed_out} (answers/timed_out)"
        )


def show_answers_of_rounds(
    config: RunConfig, loader: StepLoader | RolloutLoader, trackers: Trackers, context: RunContext
) -> None:
    """Let trackers show the answers of each round as a table, if `logging.tables` asks for it. On rank 0 alone."""
    if not isinstance(loader, RolloutLoader) or not config.logging.tables or not context.runtime.is_main:
        return
    from trainer.rollout.round_table import TABLE_NAME, round_table

    # `step` steps were taken before the round: the row of its first step, which has its rewards, is that of `step + 1`.
    loader.round_builder.on_round.append(
        lambda rollout_round, step: trackers.log_table_with_row(
            TABLE_NAME, round_table(rollout_round, step + 1), step=step + 1
        )
    )
