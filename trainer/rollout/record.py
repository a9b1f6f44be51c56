"""`rounds/round-000013.parquet`: what was written and what it scored, of each round of a run, by the round's first step.

A row is an answer. Only rank 0 writes. A run that is resumed takes back the rounds that begin after its checkpoint, as it does
with the rows of `metrics.jsonl`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import StorageError

if TYPE_CHECKING:
    from trainer.rollout.round import Round

DIRECTORY = "rounds"
EXTRA = "extra/"
"""How the names of columns begin that reward functions gave themselves (`log_extra`)."""
_NAME = re.compile(r"round-(\d+)\.parquet")


class RoundRecord:
    """The rounds of a run as Parquet files."""

    def __init__(self, run_dir: Path, most_groups: int | None = None) -> None:
        """`most_groups`: groups of each round that are recorded, the first ones; None: all, 0: none."""
        self.directory = run_dir / DIRECTORY
        self.most_groups = most_groups

    def take_back(self, step: int) -> None:
        """Remove the rounds that begin after `step` steps. Errors: StorageError."""
        for number, file in recorded_rounds(self.directory.parent).items():
            if number > step:
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{file}: cannot be removed ({error.strerror})") from error

    def write(self, rollout_round: Round, step: int) -> None:
        """Write a round that begins after `step` steps. Errors: StorageError."""
        if self.most_groups == 0:
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        rows = rows_of(rollout_round, self.most_groups)
        table = pa.Table.from_pylist(rows)
        file = self.directory / f"round-{step + 1:06d}.parquet"
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


def rows_of(rollout_round: Round, most_groups: int | None = None) -> list[dict[str, Any]]:
    """The answers of a round as rows for a Parquet file or a table: prompt, answer, rewards, advantage.

    Only the first `most_groups` groups (all answers to one prompt); None: all.
    """
    rows = []
    for number, (group, scores) in enumerate(zip(rollout_round.groups, rollout_round.scores, strict=True)):
        if most_groups is not None and number >= most_groups:
            break
        for place, answer in enumerate(group.answers):
            row: dict[str, Any] = {
                "place": group.prompt.prompt_number,
                "where": group.prompt.origin,
                "source": group.prompt.source,
                "draw": answer.sample_index,
                "prompt": prompt_text(group.prompt.text),
                "answer": answer.text,
                "ids": [int(token) for token in answer.ids],
                "ended": answer.has_ended,
                "reward": _number(scores.total[place]),
                "advantage": _number(rollout_round.advantages[number, place]),
                "learned": bool(rollout_round.is_learned[number, place]),
            }
            for name, reward_values in scores.by_reward.items():
                row[f"rewards/{name}"] = _number(reward_values[place])
            for name, values in scores.extra.items():
                row[f"{EXTRA}{name}"] = values[place]
            rows.append(row)
    return _with_alike_columns(rows)


def _with_alike_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, changed in place so that each has the same `extra/` columns, with values of one type, as Parquet needs.

    A row that lacks a column gets None in it. A column with numbers only becomes floats, any other one texts: a reward function
    may log 1 for one answer and "none" for another, which become "1" and "none".
    """
    values_by_column: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.items():
            if column.startswith(EXTRA):
                values_by_column.setdefault(column, []).append(value)
    for column, values in values_by_column.items():
        known = [value for value in values if value is not None]
        is_numeric = all(isinstance(value, int | float) for value in known)
        for row in rows:
            value = row.setdefault(column, None)
            if value is not None:
                row[column] = float(value) if is_numeric else str(value)
    return rows


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: itself, or its messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _number(value: Any) -> float | None:
    """A reward as a number; None where it did not apply."""
    number = float(value)
    return None if number != number else number  # nan alone differs from itself


def recorded_rounds(run_dir: Path) -> dict[int, Path]:
    """The files of a run's rounds by the number of their first step, ascending."""
    files = {}
    for file in sorted((run_dir / DIRECTORY).glob("round-*.parquet")):
        match = _NAME.fullmatch(file.name)
        if match is not None:
            files[int(match[1])] = file
    return dict(sorted(files.items()))
