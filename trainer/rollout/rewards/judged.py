"""The reward `judge`: the grade of a model behind an address, as the evaluation task of that name asks it.

It is asked by rank 0 of the run and not in worker processes: verdicts are cached, and the budget is that of the whole command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from trainer.evaluation.tasks.judged import grading_prompt, parse_grade
from trainer.rollout.rewards.functions import BadScore
from trainer.rollout.rewards.kinds import JudgeReward
from trainer.rollout.types import AnswerGroup, Prompt


class VerdictSource(Protocol):
    """What gives verdicts: `trainer.evaluation.endpoint.judge.Judge`."""

    def collect_verdicts(self, questions: Sequence[str]) -> list[str]:
        """The verdict on each question, the same on every rank. All ranks must call."""


def judge_answers(judge: VerdictSource, options: Mapping[str, Any], groups: Sequence[AnswerGroup]) -> list[np.ndarray]:
    """Let the judge model grade answers: float64 [answers] of each group, its grade from 1 to 10 as a score from 0 to 1.

    nan for a verdict without a grade. A group is all answers to one prompt. `options`: the reward's, such as its rubric. All
    ranks must call, with the same groups. Errors: those of the judge.
    """
    reward = JudgeReward(options)
    questions = []
    for group in groups:
        # The right answer in the row, if it has one: a judge does without.
        reference = _reference_answer(reward, group.prompt)
        request = _request_text(group.prompt)
        for answer in group.answers:
            questions.append(grading_prompt(reward.option_values["rubric"], request, reference, answer.text.strip()))
    verdicts = iter(judge.collect_verdicts(questions))
    scores = []
    for group in groups:
        grades = [parse_grade(next(verdicts)) for _ in group.answers]
        grades_or_nan = np.array([np.nan if grade is None else grade for grade in grades], np.float64)
        scores.append((grades_or_nan - 1) / 9)  # 1 to 10 -> 0 to 1
    return scores


def _reference_answer(reward: JudgeReward, prompt: Prompt) -> str | None:
    """The right answer in the row of a prompt, which the judge sees; None if the row has none."""
    try:
        return reward.reference_answers(prompt.columns)[0]
    except BadScore:
        return None


def _request_text(prompt: Prompt) -> str:
    """The prompt as the judge sees it: its text, or each turn as `role: content`."""
    if isinstance(prompt.text, str):
        return prompt.text
    if len(prompt.text) == 1:
        return str(prompt.text[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.text)
