"""Rounds of answers without a run directory: the product's own loader and engine, with rewards that are a plain function."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from strategies import runtime as processes
from strategies.base import Precision, Progress
from tests.helpers.building import run_config
from tests.helpers.tokenizers import WORDS, write_jsonl
from trainer.build.parts import build_engine, prepare_data
from trainer.build.rounds import RoundInputs, build_round_loader
from trainer.config.run import RunConfig
from trainer.data.config import DataConfig
from trainer.data.prepare import PreparedData
from trainer.loop import Trainer
from trainer.loop_types import Monitors, Sinks
from trainer.model.loading import load_tokenizer
from trainer.monitors.anomalies import Guards
from trainer.monitors.config import ChallengesConfig
from trainer.monitors.detectors import ChallengeDetectors
from trainer.monitors.stragglers import Stragglers
from trainer.objectives.grpo_config import GrpoConfig
from trainer.objectives.rollouts import RolloutConfig
from trainer.reporting.console import Console
from trainer.reporting.metrics import Meter
from trainer.reporting.tracking import Trackers
from trainer.rollout.types import AnswerGroup, GroupScores
from trainer.run import loop_settings
from trainer.stopping.preempt import RankStopAgreement
from trainer.stopping.signals import StopRequest

Reward = Callable[[AnswerGroup], list[float]]


def share_of_even_ids(group: AnswerGroup) -> list[float]:
    """The share of an answer's tokens with an even id: spread in every group, and nothing of it depends on texts."""
    return [float(np.mean(np.array(answer.ids) % 2 == 0)) for answer in group.answers]


class FunctionScorer:
    """A `RewardScorer` that calls a function for each group, in this process on every rank."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.scored: list[list[AnswerGroup]] = []
        """The groups of each call."""

    def score(self, groups: Sequence[AnswerGroup], *, step: int) -> list[GroupScores]:
        self.scored.append(list(groups))
        made = []
        for group in groups:
            rewards = np.array(self.reward(group), np.float64)
            made.append(GroupScores(rewards, {"reward": rewards}))
        return made

    def close(self) -> None:
        pass


def round_config(
    root: Path, model: Path, strategy: str, tuning: str = "full", *, micro: int = 4, **changes
) -> RunConfig:
    """A run of four prompts with four answers of at most eight tokens a step; `changes` are fields of the objective."""
    rollout = RolloutConfig(max_new_tokens=8, **changes.pop("rollout", {}))
    config = run_config(
        model, strategy, tuning, micro=micro, objective=GrpoConfig(group_size=4, rollout=rollout, **changes)
    )
    path = root / "prompts.jsonl"
    if not path.exists():
        rows = [{"prompt": " ".join(WORDS.split()[: 1 + number % 7]), "completion": "x"} for number in range(14)]
        write_jsonl(path, rows)
    return replace(config, data=DataConfig(path=str(path), cache_dir=str(root / "cache"), workers=1))


def prompts_of(config: RunConfig) -> PreparedData:
    """The prompts of a run, prepared. Not for several ranks at a time."""
    return prepare_data(config, load_tokenizer(config.model), print_line=lambda line: None)


def round_trainer(
    config: RunConfig,
    data: PreparedData,
    runtime: processes.Runtime,
    *,
    reward: Reward = share_of_even_ids,
    progress: Progress | None = None,
    stop_now: Callable[[], bool] = lambda: False,
) -> Trainer:
    """The product's trainer with rounds, and nothing that writes. All ranks must call."""
    tokenizer = load_tokenizer(config.model)
    engine, built, _ = build_engine(config, tokenizer, data, config.precision, runtime)
    progress = progress or Progress()
    inputs = RoundInputs(tokenizer, Precision.fp32, FunctionScorer(reward), progress, lambda: stop_now)
    loader, total = build_round_loader(config, data, built, engine, runtime, inputs)
    return Trainer(
        loop_settings(config, total),
        engine=engine,
        loader=loader,
        progress=progress,
        evaluators=[],
        sinks=Sinks(
            Meter(runtime, 1.0, None, built.step_module.objective.metrics), Trackers(), Console(enabled=False), None
        ),  # type: ignore[arg-type]
        monitors=Monitors(
            RankStopAgreement(StopRequest(), runtime),
            Guards(config.guards, config.optim.max_skipped_steps, runtime),
            Stragglers(0, runtime),
            ChallengeDetectors(ChallengesConfig(), planned_evaluations=1, judged_loss_term="loss"),
        ),
    )


def texts_of(trainer: Trainer) -> list[list[list[int]]]:
    """Token ids of every answer that was scored so far, by group."""
    scorer = trainer.loader.round_builder.scorer  # type: ignore[attr-defined]
    return [[answer.ids for answer in group.answers] for groups in scorer.scored for group in groups]
