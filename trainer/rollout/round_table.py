"""Rounds for people: the best and the worst answers of some groups, as a table of trackers and on a run's page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer.reporting.trackers.base import Table
from trainer.rollout.record import EXTRA, rows_of

if TYPE_CHECKING:
    from trainer.rollout.round import Round

NAME = "rounds"
"""Of the table in trackers."""
MOST_GROUPS = 4
"""Groups of a round that a table has."""
MOST_CHARACTERS = 1000
"""Of a prompt or an answer in a table."""
REWARDS = "rewards/"
"""How the columns of single rewards begin in the rows of a round."""


def round_table(rollout_round: Round, step: int) -> Table:
    """A table for the trackers with the answers of a round's first groups, the best answer of each prompt first.

    `step`: the first step that learns from the round.
    """
    rows = rows_of(rollout_round, MOST_GROUPS)
    by_reward = [column for column in rows[0] if column.startswith((REWARDS, EXTRA))]
    columns = ["step", "prompt", "place", "reward", "answer", *by_reward, "advantage", "ended"]
    cells = []
    for group in groups_of_rows(rows):
        for number, row in enumerate(group):
            # Groups are sorted: their first answer is the best. The column `place`, which in recorded rows is the number of the
            # prompt, says this in the table.
            place = {0: "best", len(group) - 1: "worst"}.get(number, "")
            shown = {"step": step, "place": place, "prompt": _cut(row["prompt"]), "answer": _cut(row["answer"])}
            cells.append([{**row, **shown}[column] for column in columns])
    return Table(columns, cells)


def groups_of_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group of a recorded round, the best answer first, unscored ones last."""
    by_place: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_place.setdefault(int(row["place"]), []).append(row)
    for group in by_place.values():
        yield sorted(group, key=_reward_or_least, reverse=True)


def _reward_or_least(row: dict[str, Any]) -> float:
    """The reward of an answer; below all others without one."""
    reward = row.get("reward")
    return float("-inf") if reward is None else float(reward)


def _cut(text: str) -> str:
    """A text of at most `MOST_CHARACTERS` characters, its beginning kept."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
