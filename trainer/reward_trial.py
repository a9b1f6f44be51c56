"""Tries the rewards of a run on answers of the model as it is: the first groups of the run's first round. Nothing is kept.

The answers are learned from once, to know how long that takes; the model that was changed is thrown away.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strategies.base import Engine, Progress
from strategies.build import resolve_precision
from strategies.errors import Interrupted, Preempted
from strategies.runtime import barrier
from trainer.build.parts import build_engine
from trainer.build.reward_models import open_model_scorer
from trainer.build.rounds import RoundInputs, build_round_loader, num_prompts_per_round
from trainer.config.run import RunConfig
from trainer.evaluation.endpoint.judge import Judge
from trainer.model.loading import load_tokenizer
from trainer.objectives.rollouts import RoundsConfig
from trainer.planner.minimal_step import minimal_trainer
from trainer.reporting.status import write_text_atomic
from trainer.rollout.loader import RolloutLoader
from trainer.rollout.rewards.scorer import open_scorer
from trainer.rollout.trial_report import trial_report
from trainer.rollout.types import AnswerGroup, GroupScores
from trainer.run import prepare_data_and_meet_ranks
from trainer.session.attempt import Attempt, open_rank_of_job
from trainer.stopping.preempt import RankStopAgreement
from trainer.stopping.signals import StopRequest

REPORT = "rewards.json"
DEFAULT_NUM_PROMPTS = 8
"""Prompts that are answered if `evaluation.generate.samples` is 0."""


@dataclass(frozen=True, slots=True)
class RewardTrialJob:
    """What is tried beside the configuration. The command writes it to `job.json`; ranks read it by the names of these fields."""

    checkpoint: str | None = None
    """Directory of a run's checkpoint that writes; None: the model as it is."""


def trial_worker(config: RunConfig, job: RewardTrialJob, job_dir: Path, to: Path) -> None:
    """Try the rewards as one rank of the job that the environment describes; rank 0 writes the report into `to`.

    Raises what ended it. `job_dir` has the records of the processes, and the copies of reward files.
    """
    with open_rank_of_job(job_dir, config.run.lease_s) as (request, attempt):
        attempt.set_run_dir(job_dir, int(os.environ.get("RANK", 0)))
        _try_rewards(config, job, to, request, attempt)


def _try_rewards(config: RunConfig, job: RewardTrialJob, to: Path, request: StopRequest, attempt: Attempt) -> None:
    """Let the model as it is answer a few prompts, score the answers, time one step on them, and write the report.

    All ranks must call. `to`: the directory of the report.
    """
    settings = config.objective
    assert isinstance(settings, RoundsConfig)
    tokenizer = load_tokenizer(config.model)
    data, _, staged_copies, runtime = prepare_data_and_meet_ranks(config, tokenizer, request, attempt)
    precision = resolve_precision(config.precision, runtime)
    stop_agreement = RankStopAgreement(request, runtime)
    judge = None
    if config.evaluation.judge.url:
        judge = Judge(config.evaluation.judge, runtime, stop_agreement.new_stop_check())
    scorer = open_scorer(
        settings, runtime, attempt.run_dir, stop_asked=stop_agreement.is_asked_on_this_rank, judge=judge
    )
    attempt.at_end.callback(scorer.close)
    attempt.phase = "building the model"
    engine, built, _ = build_engine(
        staged_copies.with_local_model(config), tokenizer, data, precision, runtime, scores_answers=True
    )
    scorer.model_scorer = open_model_scorer(config, engine, runtime, stop_agreement.new_stop_check())
    if job.checkpoint is not None:
        engine.load(Path(job.checkpoint))
    inputs = RoundInputs(tokenizer, precision, scorer, Progress(), stop_agreement.new_stop_check, attempt.set_phase)
    loader, _ = build_round_loader(config, data, built, engine, runtime, inputs)
    round_builder = loader.round_builder
    prompts_per_round = num_prompts_per_round(config)
    num_tried_prompts = min(config.evaluation.generate.samples or DEFAULT_NUM_PROMPTS, prompts_per_round)
    try:
        began = time.perf_counter()
        groups = round_builder.group_generator.generate_groups(
            engine, round_builder.prompts.read(0, num_tried_prompts), settings.group_size
        )
        written_at = time.perf_counter()
        scores = scorer.score(groups, step=0)
        scored_at = time.perf_counter()
        train_s = _measure_training_s(loader, engine, groups, scores)
    except Interrupted:
        raise Preempted("asked to stop; the same command begins again") from None
    if runtime.is_main:
        report: dict[str, Any] = {
            "model": config.model.path,
            "checkpoint": job.checkpoint,
            "objective": settings.name,
            "group_size": settings.group_size,
            "prompts_per_round": prompts_per_round,
            "max_new_tokens": settings.rollout.max_new_tokens,
            "write_s": written_at - began,
            "reward_s": scored_at - written_at,
            "train_s": train_s,
            "round_s": (scored_at - began + train_s) * prompts_per_round / num_tried_prompts,
            **trial_report(groups, scores),
        }
        write_text_atomic(to / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    barrier(runtime)
    staged_copies.release()


def _measure_training_s(
    loader: RolloutLoader, engine: Engine, groups: list[AnswerGroup], scores: list[GroupScores]
) -> float:
    """Measure how long the steps of a round would take to learn from these groups; takes the first of them. All ranks must call.

    The steps of a round learn from its parts in turn, so seconds of all are estimated from that one.
    """
    loader.round_builder.report_phase("training, to measure it")
    began = time.perf_counter()
    scored_round = loader.round_builder.build_round_from_scores(groups, scores)
    batch = loader.step_batch(scored_round, 0)
    round_built_at = time.perf_counter()
    minimal_trainer(engine).train_step(batch)
    barrier(loader.round_builder.runtime)
    building_s = round_built_at - began
    step_s = time.perf_counter() - round_built_at
    rollout = loader.round_builder.settings.rollout
    # A step learns from a part of the groups, and each part is learned from several times.
    return building_s + step_s * rollout.steps * rollout.iterations
