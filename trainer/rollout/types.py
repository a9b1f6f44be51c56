"""What the parts of a round hand to each other: prompts, generated answers, their scores, and what scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a round: what the model reads, and what rewards read of its data row."""

    prompt_number: int
    """Number of the prompt among all that the run consumes, from 0. It seeds the samples of its answers."""
    ids: list[int]
    """Tokens, with the generation prefix of the chat template."""
    text: str | list[dict[str, Any]]
    """The prompt as rewards see it: a text, or the messages of a conversation."""
    columns: dict[str, Any]
    """The columns of its data row that rewards read."""
    origin: str
    """Where its row stands, as `file:line`."""
    source: str = ""
    """Name of its data source; empty where there is only one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer that the model wrote to a prompt, with what training on it needs."""

    sample_index: int
    """Index of the answer in its group, from 0."""
    ids: list[int]
    """Token ids, including the end token. Never empty."""
    logprobs: np.ndarray
    """float32 [len(ids)]: log-probability of each token when it was sampled, at the temperature of generation."""
    text: str
    """The answer as text, without special tokens and without the stop string that ended it."""
    has_ended: bool
    """Whether it ended by itself, and not because it reached the longest length."""


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """The answers to one prompt."""

    prompt: Prompt
    answers: list[Answer]


def all_answers(groups: Sequence[AnswerGroup]) -> list[Answer]:
    """The answers of all groups, group by group."""
    answers: list[Answer] = []
    for group in groups:
        answers += group.answers
    return answers


@dataclass(slots=True)
class GroupScores:
    """The rewards of one group: the sum that is learned from, and what it was made of."""

    total: np.ndarray
    """float64 [answers]: the weighted sum that is learned from; nan where no reward applied to an answer (unscored)."""
    scores_by_reward: dict[str, np.ndarray] = field(default_factory=dict)
    """float64 [answers] by the name of the reward, before its weight; nan where it did not apply."""
    num_timed_out: int = 0
    """Answers that a reward had no time to score."""
    logged_numbers: dict[str, list[float]] = field(default_factory=dict)
    """What reward functions logged themselves (`log_metric`), by name."""
    extra_columns: dict[str, list[Any]] = field(default_factory=dict)
    """Further columns of the record (`log_extra`), by `REWARD/NAME`: a JSON value for each answer, or None."""


class RewardScorer(Protocol):
    """Scores the answers of whole rounds."""

    def score(self, groups: Sequence[AnswerGroup], *, step: int) -> list[GroupScores]:
        """The scores of each group, in order, the same on all ranks.

        `step`: optimizer steps taken so far. All ranks must call with the whole round. Raises, on all ranks alike, DataError if
        a reward fails, and Interrupted if the run is asked to stop meanwhile.
        """

    def close(self) -> None:
        """End the worker processes of this rank. Local; may be called twice."""
