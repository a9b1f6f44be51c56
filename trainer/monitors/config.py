"""Settings of the detectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from strategies.settings import DESCRIBES, Reach, number, setting


class Reaction(StrEnum):
    """What is done about a challenge that is found."""

    off = "off"
    note = "note"
    stop = "stop"


@dataclass(kw_only=True, slots=True)
class OverfittingConfig:
    """The gap between training and held-out loss, looked at after each evaluation."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """What happens on overfitting: `note` it, `stop` as early stopping does, or `off`."""


@dataclass(kw_only=True, slots=True)
class ForgettingWatchConfig:
    """The base against the tuned model on general text and on tasks, before the first step and in each evaluation."""

    data: Any = setting(None, reach=Reach.file)
    """General text: a file, directory, glob pattern or list of these, in the formats of `data.path`. Its loss is
    `eval/general/loss`."""
    tasks: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Names of `evaluation.tasks` whose first metric is also compared with that of the base model."""
    chat: bool | None = setting(None, reach=DESCRIBES)
    """Ask twenty short questions that come with shardtune. The loss of their answers is `eval/chat/loss`, and at the end base
    and tuned model answer two of them. null: if `data` or `tasks` is set, and the model is trained to chat."""
    limit: Any = setting(None, reach=DESCRIBES)
    """Largest rise of the loss (or fall of a metric) against the base model, as `3%` or 0.03. null: no limit; forgetting is
    measured, and noted if it is significant."""
    action: Reaction = setting(Reaction.stop, reach=DESCRIBES)
    """What happens beyond the limit: `stop` the run with exit code 69 after a checkpoint, or `note` it. `off` measures
    nothing."""
    max_rows: int | None = number(256, least=1, advice="256 as a rule; null takes all")
    """Largest number of documents of `data` that are evaluated, from the first. null: all."""


@dataclass(kw_only=True, slots=True)
class OutputConfig:
    """Answers that the run's tasks and `evaluation.generate` have written."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """What happens on degenerate answers: `note` them, `stop` the run with exit code 69, or `off`."""


@dataclass(kw_only=True, slots=True)
class DivergenceConfig:
    """The run against its own beginning: training and held-out loss, from step 20 and the end of warm-up on."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """What happens if the loss is worse than before training: `note` it, `stop` a diverged run with exit code 69 after a
    checkpoint, or `off`."""


@dataclass(kw_only=True, slots=True)
class RewardsWatchConfig:
    """Rewards that are cheated, a policy that collapses, groups that teach nothing (`objective=grpo`)."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """What happens on such a finding: `note` it, `stop` the run with exit code 69 at the next evaluation, or `off`."""


@dataclass(kw_only=True, slots=True)
class ChallengesConfig:
    """Detectors of what may go wrong beside single steps (docs/challenges.md)."""

    overfitting: OverfittingConfig = field(default_factory=OverfittingConfig)
    """Detects overfitting: the held-out loss rises while its gap to the training loss grows."""
    forgetting: ForgettingWatchConfig = field(default_factory=ForgettingWatchConfig)
    """Detects catastrophic forgetting: compares the tuned with the base model on general text and on tasks, before the first
    step and in each evaluation. Needs `data` or `tasks`."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Detects degenerate answers, in the run's tasks and `evaluation.generate`: empty or repeated answers, and answers in
    another language than the reference."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """Detects divergence: losses that are worse than before training."""
    rewards: RewardsWatchConfig = field(default_factory=RewardsWatchConfig)
    """Detects, with `objective=grpo`, cheated rewards, a collapsed policy, and groups of equal rewards, from which nothing can
    be learned."""


GENERAL_TEXT_TASK = "general"
"""Name of the task that measures `challenges.forgetting.data`."""
CHAT_TASK = "chat"
"""Name of the task that measures the twenty questions of `challenges.forgetting.chat`."""
CHAT_ANSWERS_TASK = "chat_answers"
"""Name of the task in which the model answers the first two of them."""
CHAT_QUESTIONS = Path(__file__).parent / "chat_questions.jsonl"
"""The questions and short right answers, as conversations. They were written for shardtune and have its licence."""
ANSWERED_QUESTIONS = 2
ANSWER_TOKENS = 32
"""Longest answer to one of them."""


def forgetting_limit(config: ForgettingWatchConfig) -> float | None:
    """Read `challenges.forgetting.limit` as a share: 0.02 for `0.02`, "0.02" and "2%"; None if there is no limit.

    It is the largest share of a task's metric that may be lost against the base. Raises ValueError for anything else.
    """
    limit = config.limit
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, str | int | float):
        raise ValueError(limit)
    text = str(limit).strip()
    # NaN compares as false, and so does not pass as a limit.
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1e6:
        raise ValueError(limit)
    return value
