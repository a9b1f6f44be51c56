"""What the model wrote in the first, the middle and the last recorded round of a run that learns from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.compare.run_files import RecordedRun
from launch.compare.run_page.answers import shortened
from trainer.pages.numbers import UNKNOWN, number
from trainer.rollout.record import recorded_rounds
from trainer.rollout.round_table import REWARDS, groups_of_rows

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


def shown_groups(run: RecordedRun) -> list[ShownGroup]:
    """The answers that the page shows of a run that learns from rewards: two groups each of three recorded rounds.

    A group is all answers to one prompt in a round. Shown are the groups with the highest and the lowest mean reward, in the
    first, the middle and the last round. Empty without recorded rounds. A file that cannot be read is left out: the run may
    be writing it.
    """
    files = recorded_rounds(run.directory)
    steps = list(files)
    shown_steps = dict.fromkeys(steps[index] for index in _first_middle_last(len(steps)))  # each once
    groups: list[ShownGroup] = []
    for step in shown_steps:
        groups += _groups_of_round(step, files[step])
    return groups


def _first_middle_last(count: int) -> list[int]:
    return [0, (count - 1) // 2, count - 1] if count else []


def _groups_of_round(step: int, file: Path) -> list[ShownGroup]:
    """The best and the worst group (answers to one prompt) of a round by mean reward; one if the round has only one.

    `file`: a recorded round, a Parquet file with a row for each answer.
    """
    scored_groups = []  # (mean reward, rows)
    for rows in groups_of_rows(_rows(file)):
        rewards = [row["reward"] for row in rows if row.get("reward") is not None]
        if rewards:
            scored_groups.append((sum(rewards) / len(rewards), rows))
    if not scored_groups:
        return []
    scored_groups.sort(key=lambda group: group[0], reverse=True)
    shown = [_shown_group(f"step {step}, best prompt", *scored_groups[0])]
    if len(scored_groups) > 1:
        shown.append(_shown_group(f"step {step}, worst prompt", *scored_groups[-1]))
    return shown


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a recorded round; none if the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    except (OSError, pa.ArrowException):
        return []
    return rows


def _shown_group(title: str, mean_reward: float, rows: Sequence[dict[str, Any]]) -> ShownGroup:
    """A group for the page: one prompt with its answers, of many the best and the worst ones. `rows`: the best answer first.

    `title` is like `step 40, best prompt`.
    """
    shown_rows = list(rows)
    if len(rows) > MAX_ANSWERS:
        half = MAX_ANSWERS // 2
        shown_rows = [*rows[:half], *rows[-half:]]
    prompt = str(rows[0]["prompt"])
    one_line = " ".join(prompt.split())
    shorten_prompt = one_line if len(one_line) <= MAX_SUMMARY_CHARACTERS else f"… {one_line[-MAX_SUMMARY_CHARACTERS:]}"
    return ShownGroup(
        summary=f"{title}, mean reward {number(mean_reward)}: {shorten_prompt}",
        prompt=shortened(prompt),
        answers=[_shown_answer(row) for row in shown_rows],
        left_out=len(rows) - len(shown_rows),
    )


def _shown_answer(row: dict[str, Any]) -> ShownAnswer:
    reward = row.get("reward")
    names = [name for name in row if name.startswith(REWARDS)]
    parts = []
    for name in names if len(names) > 1 else []:
        score = row[name]
        parts.append(f"{name.removeprefix(REWARDS)} {UNKNOWN if score is None else number(score)}")
    return ShownAnswer(
        text=shortened(str(row.get("answer") or "")),
        reward="not scored" if reward is None else number(reward),
        by_reward=", ".join(parts),
        is_cut=row.get("ended") is False,
    )
