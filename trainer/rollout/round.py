"""A round: the answers to some prompts, what they are worth, and the sequences that are learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.objectives.answers import (
    ADVANTAGES,
    LOSS_WEIGHTS,
    OLD_LOGPS,
    REFERENCE_LOGPS,
    SAMPLING_LOGPS,
    AnswerSample,
)
from trainer.objectives.grpo_config import Normalise
from trainer.rollout.groups import answer_weights
from trainer.rollout.types import Answer, AnswerGroup, GroupScores


class StepData(NamedTuple):
    """What one optimizer step learns from, the same on all ranks."""

    samples: list[AnswerSample]
    """A sequence for each answer that counts in the loss."""
    totals: dict[str, float]
    """What sums over all ranks are divided by, such as {"loss": 512.0, "tokens": 512, "answers": 8}."""


@dataclass(slots=True)
class Round:
    """A round, the same on all ranks. Answers are numbered group by group: answer a of group g is `g * group_size + a`."""

    first_sample: int
    """Prompts that the run had consumed before it."""
    num_prompts: int
    """Prompts that it consumed, replaced ones included."""
    groups: list[AnswerGroup]
    scores: list[GroupScores]
    advantages: np.ndarray
    """float64 [groups, answers]."""
    is_learned: np.ndarray
    """bool [groups, answers]: whether an answer counts in the loss."""
    old_logps: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [tokens] by number of the answer: log-probabilities by the weights that generated it; empty without need."""
    reference_logps: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [tokens] by number of the answer: log-probabilities by the reference model; empty without one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of its answers, for the row of each of its steps."""
    cost_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of how long it took to build, for the row of its first step."""

    @property
    def group_size(self) -> int:
        """Answers of a group."""
        return len(self.groups[0].answers)

    def answer(self, answer_number: int) -> tuple[AnswerGroup, Answer]:
        """Find an answer of the round by its number: (its group, the answer). Answers are numbered group by group, from 0."""
        group_index, index_in_group = divmod(answer_number, self.group_size)
        group = self.groups[group_index]
        return group, group.answers[index_in_group]

    def answers_of_step(self, index: int, num_steps: int) -> list[int]:
        """Numbers of the answers of step `index`, if the groups are divided into `num_steps` consecutive blocks.

        6 groups of 2 answers in 3 steps: step 1 has the answers 4, 5, 6, 7.
        """
        first_group = len(self.groups) * index // num_steps
        end_group = len(self.groups) * (index + 1) // num_steps
        return list(range(first_group * self.group_size, end_group * self.group_size))

    def learned_answer_numbers(self, answer_numbers: Sequence[int]) -> list[int]:
        """Those of the answers with these numbers that count in the loss: their numbers."""
        is_learned = self.is_learned.ravel()
        return [number for number in answer_numbers if is_learned[number]]

    def sequence(self, answer_number: int) -> AnswerSample:
        """Make the sequence that is learned of an answer: its prompt's tokens, then its own, which are supervised.

        Without `per_token_entries`, which `step_data` adds.
        """
        group, answer = self.answer(answer_number)
        ids = np.array([*group.prompt.ids, *answer.ids], dtype=np.int32)
        supervised = np.zeros(len(ids), dtype=bool)
        supervised[len(group.prompt.ids) :] = True
        return AnswerSample(ids, supervised, prompt_index=answer_number // self.group_size)

    def step_data(self, answer_numbers: Sequence[int], normalise: Normalise, max_new_tokens: int) -> StepData:
        """Make what one optimizer step learns from: those of the answers with these numbers that count in the loss.

        Each becomes a sequence with `per_token_entries`, a float32 for each token of its answer: advantage, loss weight, and the
        log-probabilities that the loss compares.

        `normalise`: what the loss is divided by.
        `max_new_tokens`: the longest answer, by which it may be divided.
        """
        learned_numbers = self.learned_answer_numbers(answer_numbers)
        answers = [self.answer(number)[1] for number in learned_numbers]
        lengths = np.array([len(answer.ids) for answer in answers], dtype=np.int64)
        weights, loss_denominator = answer_weights(lengths, normalise, max_new_tokens)
        advantages = self.advantages.ravel()
        samples = []
        for number, answer, weight in zip(learned_numbers, answers, weights.tolist(), strict=True):
            sample = self.sequence(number)
            num_tokens = len(answer.ids)
            sample.per_token_entries = {
                ADVANTAGES: np.full(num_tokens, advantages[number], np.float32),
                LOSS_WEIGHTS: np.full(num_tokens, weight, np.float32),
                SAMPLING_LOGPS: answer.logprobs,
            }
            if self.old_logps:
                sample.per_token_entries[OLD_LOGPS] = self.old_logps[number]
            if self.reference_logps:
                sample.per_token_entries[REFERENCE_LOGPS] = self.reference_logps[number]
            samples.append(sample)
        totals = {"loss": loss_denominator, "tokens": int(lengths.sum()), "answers": len(learned_numbers)}
        return StepData(samples, totals)


def stack_rewards(scores: Sequence[GroupScores]) -> np.ndarray:
    """The weighted reward of each answer, float64 [groups, answers]; nan where it is unscored."""
    return np.stack([score.total for score in scores])
