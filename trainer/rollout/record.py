"""`rounds/round-000013.parquet`: what was written and what it scored, of each round of a run, by the round's first step.

A row is an answer. Only rank 0 writes. A run that is resumed takes back the rounds that begin after its checkpoint, as it does
with the rows of `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import StorageError

if TYPE_CHECKING:
    from trainer.rollout.round import Round

ROUNDS_DIRECTORY = "rounds"
EXTRA_PREFIX = "extra/"
"""The names of columns that reward functions add (`log_extra`) begin with it."""
_FILE_NAME_REGEX = re.compile(r"round-(\d+)\.parquet")


class RoundRecord:
    """Keeps the rounds of a run in its `rounds/`: one Parquet file each, with a row for each recorded answer."""

    def __init__(self, run_dir: Path, max_groups: int | None = None) -> None:
        """`max_groups`: groups of each round that are recorded, the first ones; None: all, 0: none."""
        self.directory = run_dir / ROUNDS_DIRECTORY
        self.max_groups = max_groups

    def remove_after(self, step: int) -> None:
        """Remove the files of the rounds that begin after `step` steps. Raises StorageError if one cannot be removed."""
        for first_step, file in recorded_rounds(self.directory.parent).items():
            if first_step > step:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{file}: cannot be removed ({error.strerror})") from error

    def write(self, rollout_round: Round, step: int) -> None:
        """Write the answers and scores of a round that begins after `step` steps into its Parquet file. Raises StorageError.

        Nothing is written if the user wants no record.
        """
        if self.max_groups == 0:  # the user wants no record
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.Table.from_pylist(answer_records(rollout_round, self.max_groups))
        file = self.directory / f"round-{step + 1:06d}.parquet"  # named by its first step
        unfinished = file.with_suffix(".unfinished")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, unfinished, compression="zstd")
            unfinished.replace(file)
        except OSError as error:
            raise StorageError(
                f"{file}: cannot be written ({error.strerror or error}); free space, or record fewer groups with "
                "objective.rollout.record"
            ) from error


def answer_records(rollout_round: Round, max_groups: int | None = None) -> list[dict[str, Any]]:
    """Make a row for each answer of a round, for a Parquet file or a table: prompt, answer, rewards, advantage.

    `max_groups`: only the first groups (a group is all answers to one prompt); None: all. "rewards/NAME" are the scores of single
    rewards, "extra/NAME" the values that a reward function adds itself (`log_extra`).
    """
    rows = []
    for group_index, (group, scores) in enumerate(zip(rollout_round.groups, rollout_round.scores, strict=True)):
        if max_groups is not None and group_index >= max_groups:
            break
        for index, answer in enumerate(group.answers):
            # The columns keep their names for those who read the files: `place` is the prompt's number in the run, `draw` the
            # answer's index in its group.
            row: dict[str, Any] = {
                "place": group.prompt.prompt_number,
                "where": group.prompt.origin,
                "source": group.prompt.source,
                "draw": answer.sample_index,
                "prompt": prompt_as_text(group.prompt.text),
                "answer": answer.text,
                "ids": [int(token) for token in answer.ids],
                "ended": answer.has_ended,
                "reward": json_number_or_none(scores.total[index]),
                "advantage": json_number_or_none(rollout_round.advantages[group_index, index]),
                "learned": bool(rollout_round.is_learned[group_index, index]),
            }
            for name, reward_values in scores.scores_by_reward.items():
                row[f"rewards/{name}"] = json_number_or_none(reward_values[index])
            for name, values in scores.extra_columns.items():
                row[f"{EXTRA_PREFIX}{name}"] = values[index]
            rows.append(row)
    _unify_extra_columns(rows)
    return rows


def _unify_extra_columns(rows: list[dict[str, Any]]) -> None:
    """Change rows in place so that all have the same `extra/` columns, with values of one type, as Parquet needs.

    A row that lacks a column gets None in it. A column with numbers only becomes floats, any other one texts: a reward function
    may log 1 for one answer and "none" for another, which become "1" and "none".
    """
    values_by_column: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.items():
            if column.startswith(EXTRA_PREFIX):
                values_by_column.setdefault(column, []).append(value)
    for column, values in values_by_column.items():
        known_values = [value for value in values if value is not None]
        is_numeric = all(isinstance(value, int | float) for value in known_values)
        for row in rows:
            value = row.setdefault(column, None)
            if value is not None:
                row[column] = float(value) if is_numeric else str(value)


def prompt_as_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: itself, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def json_number_or_none(value: Any) -> float | None:
    """A reward or an advantage as a number; None for nan, which stands for an answer without a reward."""
    number = float(value)
    return None if math.isnan(number) else number


def recorded_rounds(run_dir: Path) -> dict[int, Path]:
    """The Parquet files of a run's rounds, {first step of the round: file}, ascending."""
    files = {}
    for file in sorted((run_dir / ROUNDS_DIRECTORY).glob("round-*.parquet")):
        match = _FILE_NAME_REGEX.fullmatch(file.name)
        if match is not None:
            files[int(match[1])] = file
    return dict(sorted(files.items()))
