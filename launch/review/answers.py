"""Reads what reviewers sent back: JSON from the page, or the filled-in CSV. All problems are reported together."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.review.sheet import CHOICES, VERSION
from strategies.errors import DataError
from trainer.config.review import OVERALL

CHOICE_BY_SPELLING = {"a": "a", "b": "b", "tie": "tie", "equal": "tie", "same": "tie", "": None}
"""What people write in a table, in lower case."""


@dataclass(slots=True)
class ReviewerAnswer:
    """One reviewer's judgement of one item."""

    answers: dict[str, str] = field(default_factory=dict)
    """a, b or tie, by question."""
    comment: str = ""
    seconds: float | None = None


@dataclass(slots=True)
class Reviewer:
    """One reviewer's answers, by item."""

    name: str
    path: Path
    items: dict[str, ReviewerAnswer]


def read_reviewers(paths: list[Path], review: str, key: dict[str, Any]) -> list[Reviewer]:
    """Everybody's answers. Errors: DataError with every file that cannot be used, and why."""
    item_ids = {item["id"] for item in key["items"]}
    questions = {OVERALL, *key["rubric"]}
    reviewer_by_name: dict[str, Reviewer] = {}
    problems = []
    for path in paths:
        try:
            reviewer = _read_reviewer(path, review)
            _check_answers(reviewer, item_ids, questions)
        except (DataError, OSError, UnicodeDecodeError) as error:
            problems.append(str(error) if isinstance(error, DataError) else f"{path}: cannot be read ({error})")
            continue
        earlier = reviewer_by_name.setdefault(reviewer.name.casefold(), reviewer)
        if earlier is not reviewer:
            problems.append(
                f"{path}: is by {reviewer.name}, as {earlier.path} is; one file counts for each reviewer: leave one out, or "
                "let the other one give another name"
            )
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} of {len(paths)} files of answers cannot be used", *problems]))
    return [*reviewer_by_name.values()]


def _read_reviewer(path: Path, review: str) -> Reviewer:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path}: is empty; ask for the file again")
    return _parse_csv(path, text, review) if path.suffix.lower() == ".csv" else _parse_page_file(path, text, review)


def _parse_page_file(path: Path, text: str, review: str) -> Reviewer:
    """The file that the page saved."""
    try:
        content = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: is no whole JSON ({error}); it was cut on its way: ask for it again") from None
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, dict) or not content.get("reviewer"):
        raise DataError(f"{path}: is no file of answers; it must be the one that the page saved")
    _check_review_id(path, content.get("review"), review)
    if content.get("version") != VERSION:
        raise DataError(f"{path}: is of version {content.get('version')} of reviews, and this one reads {VERSION}")
    answers = {}
    for item_id, item in items.items():
        if not isinstance(item, dict) or not isinstance(item.get("answers"), dict):
            raise DataError(f"{path}: item {item_id} has no answers; it must be the file that the page saved")
        comment = str(item.get("comment") or "")
        answers[item_id] = ReviewerAnswer(dict(item["answers"]), comment, _seconds(item.get("seconds")))
    return Reviewer(str(content["reviewer"]).strip(), path, answers)


def _seconds(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and value >= 0 else None


def _parse_csv(path: Path, text: str, review: str) -> Reviewer:
    """The filled-in CSV, with the separator that its spreadsheet uses."""
    header = text.splitlines()[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count))
    columns = [*(rows.fieldnames or ())]
    if missing := {"review", "reviewer", "item", OVERALL} - {*columns}:
        raise DataError(
            f"{path}:1: has no column {', '.join(sorted(missing))}; keep the columns of the table that was sent"
        )
    questions = columns[columns.index(OVERALL) : -1]  # the last column is the comment
    names = set()
    answers: dict[str, ReviewerAnswer] = {}
    for row in rows:
        where = f"{path}:{rows.line_num}"
        _check_review_id(Path(where), row["review"], review)
        if name := (row["reviewer"] or "").strip():
            names.add(name)
        choices = _choices(row, questions, where)
        if row["item"] in answers:
            raise DataError(f"{where}: item {row['item']} is there twice; keep one row of it")
        answers[row["item"]] = ReviewerAnswer(choices, (row.get("comment") or "").strip())
    if len(names) != 1:
        named = " and ".join(sorted(names)) or "nobody"
        raise DataError(f"{path}: the column reviewer names {named}; write one name in it, once at least")
    return Reviewer(names.pop(), path, answers)


def _choices(row: dict[str, Any], questions: list[str], where: str) -> dict[str, str]:
    """a, b or tie by question; a question whose cell is empty is not answered."""
    choices = {}
    for question in questions:
        spelling = (row[question] or "").strip().lower()
        if spelling not in CHOICE_BY_SPELLING:
            raise DataError(
                f"{where}: {question} is {row[question]!r}; it must be one of {', '.join(CHOICES)}, or empty"
            )
        choice = CHOICE_BY_SPELLING[spelling]
        if choice is not None:
            choices[question] = choice
    return choices


def _check_review_id(path: Path, named_review: Any, review: str) -> None:
    if named_review != review:
        other = f"of the review {str(named_review)[:12]}" if named_review else "of no review that it names"
        raise DataError(f"{path}: is {other}, and this one is {review[:12]}; give the answers of this review")


def _check_answers(reviewer: Reviewer, item_ids: set[str], questions: set[str]) -> None:
    """Raises DataError for an item, question or choice that this review does not have, and if nothing was judged."""
    for item_id, answer in reviewer.items.items():
        if item_id not in item_ids:
            raise DataError(f"{reviewer.path}: item {item_id} is none of this review; was the file changed?")
        for question, choice in answer.answers.items():
            if question not in questions or choice not in CHOICES:
                raise DataError(
                    f"{reviewer.path}: item {item_id}: {question}={choice}: must be one of {', '.join(CHOICES)} to one of "
                    f"{', '.join(sorted(questions))}"
                )
    if not any(answer.answers for answer in reviewer.items.values()):
        raise DataError(
            f"{reviewer.path}: {reviewer.name} has judged nothing yet; ask for the file once it is filled in"
        )
