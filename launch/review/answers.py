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

SPELLINGS = {"a": "a", "b": "b", "tie": "tie", "equal": "tie", "same": "tie", "": None}
"""What people write in a table, in lower case."""


@dataclass(slots=True)
class ReviewerAnswer:
    """What one reviewer said of one item."""

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
    known = {item["id"] for item in key["items"]}
    questions = {OVERALL, *key["rubric"]}
    found: dict[str, Reviewer] = {}
    problems = []
    for path in paths:
        try:
            reviewer = _read_one(path, review)
            _check(reviewer, known, questions)
        except (DataError, OSError, UnicodeDecodeError) as error:
            problems.append(str(error) if isinstance(error, DataError) else f"{path}: cannot be read ({error})")
            continue
        same = found.setdefault(reviewer.name.casefold(), reviewer)
        if same is not reviewer:
            problems.append(
                f"{path}: is by {reviewer.name}, as {same.path} is; one file counts for each reviewer: leave one out, or let "
                "the other one give another name"
            )
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} of {len(paths)} files of answers cannot be used", *problems]))
    return [*found.values()]


def _read_one(path: Path, review: str) -> Reviewer:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path}: is empty; ask for the file again")
    return _from_table(path, text, review) if path.suffix.lower() == ".csv" else _from_page(path, text, review)


def _from_page(path: Path, text: str, review: str) -> Reviewer:
    try:
        found = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: is no whole JSON ({error}); it was cut on its way: ask for it again") from None
    if not isinstance(found, dict) or not isinstance(items := found.get("items"), dict) or not found.get("reviewer"):
        raise DataError(f"{path}: is no file of answers; it must be the one that the page saved")
    _of_this_review(path, found.get("review"), review)
    if found.get("version") != VERSION:
        raise DataError(f"{path}: is of version {found.get('version')} of reviews, and this one reads {VERSION}")
    given = {}
    for name, each in items.items():
        if not isinstance(each, dict) or not isinstance(each.get("answers"), dict):
            raise DataError(f"{path}: item {name} has no answers; it must be the file that the page saved")
        seconds = each.get("seconds")
        timed = seconds if isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds >= 0 else None
        given[name] = ReviewerAnswer(dict(each["answers"]), str(each.get("comment") or ""), timed)
    return Reviewer(str(found["reviewer"]).strip(), path, given)


def _from_table(path: Path, text: str, review: str) -> Reviewer:
    first = text.splitlines()[0]
    rows = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    if missing := {"review", "reviewer", "item", OVERALL} - {*(rows.fieldnames or ())}:
        raise DataError(
            f"{path}:1: has no column {', '.join(sorted(missing))}; keep the columns of the table that was sent"
        )
    questions = rows.fieldnames[rows.fieldnames.index(OVERALL) : -1]  # type: ignore[union-attr,index]
    names, given = set(), {}
    for row in rows:
        where = f"{path}:{rows.line_num}"
        _of_this_review(Path(where), row["review"], review)
        names |= {name} if (name := (row["reviewer"] or "").strip()) else set()
        answers = {}
        for question in questions:
            said = (row[question] or "").strip().lower()
            if said not in SPELLINGS:
                raise DataError(
                    f"{where}: {question} is {row[question]!r}; it must be one of {', '.join(CHOICES)}, or empty"
                )
            if (choice := SPELLINGS[said]) is not None:
                answers[question] = choice
        if row["item"] in given:
            raise DataError(f"{where}: item {row['item']} stands twice; keep one row of it")
        given[row["item"]] = ReviewerAnswer(answers, (row.get("comment") or "").strip())
    if len(names) != 1:
        what = "nobody" if not names else " and ".join(sorted(names))
        raise DataError(f"{path}: the column reviewer names {what}; write one name in it, once at least")
    return Reviewer(names.pop(), path, given)


def _of_this_review(path: Path, found: Any, review: str) -> None:
    if found != review:
        other = f"of the review {str(found)[:12]}" if found else "of no review that it names"
        raise DataError(f"{path}: is {other}, and this one is {review[:12]}; give the answers of this review")


def _check(reviewer: Reviewer, known: set[str], questions: set[str]) -> None:
    for name, given in reviewer.items.items():
        if name not in known:
            raise DataError(f"{reviewer.path}: item {name} is none of this review; was the file changed?")
        for question, choice in given.answers.items():
            if question not in questions or choice not in CHOICES:
                raise DataError(
                    f"{reviewer.path}: item {name}: {question}={choice}: must be one of {', '.join(CHOICES)} to one of "
                    f"{', '.join(sorted(questions))}"
                )
    if not any(given.answers for given in reviewer.items.values()):
        raise DataError(
            f"{reviewer.path}: {reviewer.name} has judged nothing yet; ask for the file once it is filled in"
        )
