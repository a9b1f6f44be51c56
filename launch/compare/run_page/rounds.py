"""What the model wrote in the first, the middle and the last recorded round of a run that learns from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare.run_files import RecordedRun
from launch.compare.run_page.answers import shorten_at_start
from trainer.pages.numbers import UNKNOWN, format_number
from trainer.rollout.record import recorded_rounds
from trainer.rollout.round_table import REWARD_PREFIX, groups_of_rows

MAX_ANSWERS = 4
"""Answers of a group that are shown: the best ones and the worst ones."""
MAX_SUMMARY_CHARACTERS = 60
"""Characters of a prompt in the line that summarises a group."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """One answer to a prompt."""

    text: str
    reward: str
    by_reward: str
    """Each reward with its name; empty where there is only one."""
    is_cut: bool
    """Whether it was cut off at the longest length."""


@dataclass(frozen=True, slots=True)
class ShownGroup:
    """A prompt with some of its answers, the best first."""

    summary: str
    """One line: the step, which group it is, and its mean reward."""
    prompt: str
    answers: list[ShownAnswer]
    left_out: int
    """Answers between the best and the worst ones."""


def shown_round_groups(run: RecordedRun) -> list[ShownGroup]:
    """Choose the answers that the page of a run with rewards shows: those to two prompts in each of three recorded rounds.

    In a round the model writes answers to prompts, from which one or several optimizer steps learn; a group is all answers
    to one prompt in it. Shown are the groups with the highest and the lowest mean reward, in the first, the middle and the
    last round.

    Empty without recorded rounds. A file that cannot be read is left out: the run may be writing it.
    """
    # In the order of the steps.
    file_by_step = recorded_rounds(run.directory)
    steps = list(file_by_step)
    if not steps:
        return []
    shown_steps = dict.fromkeys((steps[0], steps[(len(steps) - 1) // 2], steps[-1]))  # each once
    groups: list[ShownGroup] = []
    for step in shown_steps:
        groups += _best_and_worst_group(step, file_by_step[step])
    return groups


def _best_and_worst_group(step: int, round_file: Path) -> list[ShownGroup]:
    """The groups of a round with the highest and the lowest mean reward; a group is all answers to one prompt.

    One group if the round has only one with rewards; empty if it has none, or the file cannot be read. `step`: the
    optimizer step of the round. `round_file`: a Parquet file with a row for each answer.
    """
    groups_by_reward = []  # (mean reward, rows of the group)
    for rows in groups_of_rows(_read_recorded_answers(round_file)):
        rewards = [row["reward"] for row in rows if row.get("reward") is not None]
        if rewards:
            groups_by_reward.append((sum(rewards) / len(rewards), rows))
    if not groups_by_reward:
        return []
    groups_by_reward.sort(key=lambda group: group[0], reverse=True)
    best_reward, best_rows = groups_by_reward[0]
    shown = [_shown_group(f"step {step}, best prompt", best_reward, best_rows)]
    if len(groups_by_reward) > 1:
        worst_reward, worst_rows = groups_by_reward[-1]
        shown.append(_shown_group(f"step {step}, worst prompt", worst_reward, worst_rows))
    return shown


def _read_recorded_answers(round_file: Path) -> list[dict[str, Any]]:
    """Read a round's file, a row for each answer: {"prompt": ..., "answer": ..., "reward": 0.5, ...}.

    Empty if it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(round_file).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    return rows


def _shown_group(title: str, mean_reward: float, rows: Sequence[dict[str, Any]]) -> ShownGroup:
    """Prepare one prompt with its answers for the page: at most the best and the worst `MAX_ANSWERS / 2` answers.

    `title`: such as `step 40, best prompt`. `rows`: one for each answer, the best first.
    """
    shown_rows = list(rows)
    if len(rows) > MAX_ANSWERS:
        half = MAX_ANSWERS // 2
        shown_rows = [*rows[:half], *rows[-half:]]
    prompt = str(rows[0]["prompt"])
    one_line = " ".join(prompt.split())
    # The end of a prompt is kept, since that is where the question stands.
    prompt_end = one_line if len(one_line) <= MAX_SUMMARY_CHARACTERS else f"… {one_line[-MAX_SUMMARY_CHARACTERS:]}"
    return ShownGroup(
        summary=f"{title}, mean reward {format_number(mean_reward)}: {prompt_end}",
        prompt=shorten_at_start(prompt),
        answers=[_shown_answer(row) for row in shown_rows],
        left_out=len(rows) - len(shown_rows),
    )


def _shown_answer(row: dict[str, Any]) -> ShownAnswer:
    """Prepare one answer for the page, from its row of a recorded round. With several rewards, each is named with its score.

    A row is like {"prompt": "...", "answer": "...", "reward": 0.5, "reward/maths": 1.0, "ended": False}; `ended` is False
    for an answer that was cut off at the longest length.
    """
    total_reward = row.get("reward")
    reward_columns = [column for column in row if column.startswith(REWARD_PREFIX)]
    named_scores = []
    if len(reward_columns) > 1:
        for column in reward_columns:
            score = row[column]
            named_scores.append(
                f"{column.removeprefix(REWARD_PREFIX)} {UNKNOWN if score is None else format_number(score)}"
            )
    return ShownAnswer(
        text=shorten_at_start(str(row.get("answer") or "")),
        reward="not scored" if total_reward is None else format_number(total_reward),
        by_reward=", ".join(named_scores),
        is_cut=row.get("ended") is False,
    )
