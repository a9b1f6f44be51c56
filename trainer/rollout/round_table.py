"""Rounds for people: the best and the worst answers of some groups, as a table of trackers and on a run's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer.reporting.trackers.base import LoggedTable
from trainer.rollout.record import EXTRA_PREFIX, answer_records

if TYPE_CHECKING:
    from trainer.rollout.round import Round

TABLE_NAME = "rounds"
"""The name of the table in trackers."""
MAX_GROUPS = 4
"""Groups of a round that a table has."""
MAX_CHARACTERS = 1000
"""Longer prompts and answers are cut to so many characters in a table."""
REWARD_PREFIX = "rewards/"
"""The names of the columns of single rewards begin with it in the rows of a round."""


def round_table(rollout_round: Round, step: int) -> LoggedTable:
    """Make a table for the trackers with the answers of a round's first groups, the best answer of each prompt first.

    `step`: the first step that learns from the round.
    """
    rows = answer_records(rollout_round, MAX_GROUPS)
    reward_columns = [column for column in rows[0] if column.startswith((REWARD_PREFIX, EXTRA_PREFIX))]
    columns = ["step", "prompt", "place", "reward", "answer", *reward_columns, "advantage", "ended"]
    cells = []
    for group in groups_of_rows(rows):
        for index, row in enumerate(group):
            # Groups are sorted: their first answer is the best. The column `place` says so in the table, while in recorded rows
            # it is the number of the prompt.
            place = {len(group) - 1: "worst", 0: "best"}.get(index, "")  # a group of one answer has only a best one
            shown = {
                "step": step,
                "place": place,
                "prompt": _truncate(row["prompt"]),
                "answer": _truncate(row["answer"]),
            }
            shown_row = row | shown
            cells.append([shown_row[column] for column in columns])
    return LoggedTable(columns, cells)


def groups_of_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group of a recorded round, the best answer first, unscored ones last."""
    rows_by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        rows_by_prompt.setdefault(int(row["place"]), []).append(row)
    for group in rows_by_prompt.values():
        yield sorted(group, key=_reward_or_minus_infinity, reverse=True)


def _reward_or_minus_infinity(row: dict[str, Any]) -> float:
    """The reward of an answer; minus infinity for an unscored one, so that it sorts below all others."""
    reward = row.get("reward")
    return float("-inf") if reward is None else float(reward)


def _truncate(text: str) -> str:
    """The first `MAX_CHARACTERS` characters of a text, with "…" if it is longer."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
