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
    """`note` it, `stop` as early stopping does, or `off`."""


@dataclass(kw_only=True, slots=True)
class ForgettingWatchConfig:
    """The base against the tuned model on general text and on tasks, before the first step and in each evaluation."""

    data: Any = setting(None, reach=Reach.file)
    """General text: a file, directory, glob or list of these, in the formats of `data.path`; its loss is `eval/general/loss`."""
    tasks: list[str] = setting(default_factory=list, reach=DESCRIBES)
    """Names of `evaluation.tasks` whose first metric is compared with that of the base, too."""
    chat: bool | None = setting(None, reach=DESCRIBES)
    """Ask twenty short questions that come with shardtune: the loss of their answers is `eval/chat/loss`, and at the end base and
    tuned model answer two of them. null: with `data` or `tasks`, if the model is trained to chat."""
    limit: Any = setting(None, reach=DESCRIBES)
    """Largest rise of the loss (fall of a metric) against the base, as `3%` or 0.03; null: it is measured, and noted if clear."""
    action: Reaction = setting(Reaction.stop, reach=DESCRIBES)
    """Beyond the limit `stop` the run with exit code 69, after a checkpoint, or `note` it; `off` measures nothing."""
    max_rows: int | None = number(256, least=1, advice="256 as a rule; null takes all")
    """Documents of `data` that are looked at, the first ones; null for all."""


@dataclass(kw_only=True, slots=True)
class OutputConfig:
    """Answers that the run's tasks and `evaluation.generate` have written."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """`note` degenerate answers, `stop` the run with exit code 69, or `off`."""


@dataclass(kw_only=True, slots=True)
class DivergenceConfig:
    """The run against its own beginning: training and held-out loss, from step 20 and the end of warm-up on."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """`note` a run that is worse than before training, `stop` a diverged one with exit code 69 after a checkpoint, or `off`."""


@dataclass(kw_only=True, slots=True)
class RewardsWatchConfig:
    """Rewards that are cheated, a policy that collapses, groups that teach nothing (`objective=grpo`)."""

    action: Reaction = setting(Reaction.note, reach=DESCRIBES)
    """`note` it, `stop` the run with exit code 69 at the next evaluation, or `off`."""


@dataclass(kw_only=True, slots=True)
class ChallengesConfig:
    """Detectors of what may go wrong beside single steps (docs/challenges.md)."""

    overfitting: OverfittingConfig = field(default_factory=OverfittingConfig)
    """Held-out loss that rises while its gap to the training loss grows."""
    forgetting: ForgettingWatchConfig = field(default_factory=ForgettingWatchConfig)
    """The base against the tuned model on general text and on tasks, before the first step and in each evaluation. Nothing is
    measured without `data` or `tasks`."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Answers that the run's tasks and `evaluation.generate` have written: empty ones, repeated ones, and those in another
    language than the right ones."""
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    """Losses that are worse than before training."""
    rewards: RewardsWatchConfig = field(default_factory=RewardsWatchConfig)
    """Rewards of `objective=grpo` that are cheated, a policy that collapses, and groups that teach nothing."""


GENERAL = "general"
"""Name of the task that measures `challenges.forgetting.data`."""
CHAT = "chat"
"""Name of the task that measures the twenty questions of `challenges.forgetting.chat`."""
CHAT_ANSWERS = "chat_answers"
"""Name of the task in which the model answers the first two of them."""
CHAT_QUESTIONS = Path(__file__).parent / "chat_questions.jsonl"
"""The questions and short right answers, as conversations. They were written for shardtune and have its licence."""
ANSWERED_QUESTIONS = 2
ANSWER_TOKENS = 32
"""Longest answer to one of them."""


def forgetting_limit(config: ForgettingWatchConfig) -> float | None:
    """`challenges.forgetting.limit` as a share: 0.02 for `0.02`, "0.02" and "2%"; None if there is no limit.

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
