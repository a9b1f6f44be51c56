"""Reads what reviewers sent back: JSON from the page, or the filled-in CSV. All problems are reported together."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.review.sheet import REVIEW_FORMAT_VERSION, VOTE_CHOICES, ReviewKey
from strategies.errors import DataError
from trainer.config.review import OVERALL_QUESTION

COMMENT_COLUMN = "comment"
"""The column of the table for what a reviewer has to say beside the choices."""
CHOICE_BY_SPELLING = {"a": "a", "b": "b", "tie": "tie", "equal": "tie", "same": "tie"}
"""The choice that a cell of the table means, by what people write, in lower case. An empty cell is no answer."""


@dataclass(slots=True)
class ItemJudgement:
    """One reviewer's judgement of one item."""

    choice_by_question: dict[str, str] = field(default_factory=dict)
    """`a`, `b` or `tie`, by question, such as {"overall": "a"}."""
    comment: str = ""
    seconds: float | None = None
    """Seconds until the choice; None in a table, which does not measure them."""


@dataclass(slots=True)
class Reviewer:
    """One reviewer, and the file of answers that they sent back."""

    name: str
    path: Path
    judgement_by_item: dict[str, ItemJudgement]
    """The judgements by item id."""


def read_reviewers(paths: list[Path], review_id: str, review_key: ReviewKey) -> list[Reviewer]:
    """Read the files that reviewers sent back, one for each reviewer, and check that they answer this review.

    `review_key`: which model wrote which answer; read for the items and questions of the review. Raises DataError with
    every file that cannot be used, and why.
    """
    item_ids = {item["id"] for item in review_key["items"]}
    questions = {OVERALL_QUESTION, *review_key["rubric"]}
    reviewer_by_name: dict[str, Reviewer] = {}
    problems = []
    for path in paths:
        try:
            reviewer = _read_reviewer(path, review_id)
            _raise_if_unknown_choices(reviewer, item_ids, questions)
        except DataError as error:
            problems.append(str(error))
            continue
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{path}: cannot be read ({error})")
            continue
        # Upper and lower case do not tell reviewers apart: people write their names in both ways.
        first_of_name = reviewer_by_name.setdefault(reviewer.name.casefold(), reviewer)
        if first_of_name is not reviewer:
            problems.append(
                f"{path}: is by {reviewer.name}, as {first_of_name.path} is; one file counts for each reviewer: leave one "
                "out, or let the other one give another name"
            )
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} of {len(paths)} files of answers cannot be used", *problems]))
    return list(reviewer_by_name.values())


def _read_reviewer(path: Path, review_id: str) -> Reviewer:
    """Read one file of answers: a filled-in CSV, or else the JSON that the page saved. Raises DataError or OSError."""
    contents = path.read_text(encoding="utf-8-sig")  # a spreadsheet may write a byte order mark first
    if not contents.strip():
        raise DataError(f"{path}: is empty; ask for the file again")
    if path.suffix.lower() == ".csv":
        return _parse_csv(path, contents, review_id)
    return _parse_page_file(path, contents, review_id)


def _parse_page_file(path: Path, contents: str, review_id: str) -> Reviewer:
    """Read a reviewer's answers from the JSON that the page saved; `path` is for messages. Raises DataError.

    The JSON is like `{"version": 1, "review": id, "reviewer": name, "items": {id: {"answers": {"overall": "a"}, "seconds":
    9}}}`.
    """
    try:
        saved = json.loads(contents)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: is no whole JSON ({error}); it was cut on its way: ask for it again") from None
    items = saved.get("items") if isinstance(saved, dict) else None
    if not isinstance(items, dict) or not saved.get("reviewer"):
        raise DataError(f"{path}: is no file of answers; it must be the one that the page saved")
    _raise_if_of_another_review(str(path), saved.get("review"), review_id)
    if saved.get("version") != REVIEW_FORMAT_VERSION:
        raise DataError(
            f"{path}: is of version {saved.get('version')} of reviews, and this one reads {REVIEW_FORMAT_VERSION}"
        )
    judgements = {}
    for item_id, item in items.items():
        if not isinstance(item, dict) or not isinstance(item.get("answers"), dict):
            raise DataError(f"{path}: item {item_id} has no answers; it must be the file that the page saved")
        comment = str(item.get("comment") or "")
        judgements[item_id] = ItemJudgement(
            choice_by_question=dict(item["answers"]), comment=comment, seconds=_seconds_or_none(item.get("seconds"))
        )
    return Reviewer(str(saved["reviewer"]).strip(), path, judgements)


def _seconds_or_none(measured: Any) -> float | None:
    """The seconds that a page measured; None for anything that is no duration."""
    is_number = isinstance(measured, int | float) and not isinstance(measured, bool)
    return measured if is_number and measured >= 0 else None


def _parse_csv(path: Path, contents: str, review_id: str) -> Reviewer:
    """Read a reviewer's answers from the filled-in table, whose text `contents` is not empty; `path` is for messages.

    Its columns: review, reviewer, item, prompt, answer_a, answer_b, the questions with the overall one first, comment. A
    reviewer may have taken out the comment. Raises DataError.
    """
    header = contents.splitlines()[0]
    separator = max(",;\t", key=header.count)  # spreadsheets write one of their own, which the header has most often
    rows = csv.DictReader(io.StringIO(contents), delimiter=separator)
    columns = list(rows.fieldnames or ())
    missing_columns = {"review", "reviewer", "item", OVERALL_QUESTION} - set(columns)
    if missing_columns:
        raise DataError(
            f"{path}:1: has no column {', '.join(sorted(missing_columns))}; keep the columns of the table that was sent"
        )
    questions = [column for column in columns[columns.index(OVERALL_QUESTION) :] if column != COMMENT_COLUMN]
    names = set()
    judgements: dict[str, ItemJudgement] = {}
    for row in rows:
        location = f"{path}:{rows.line_num}"
        _raise_if_of_another_review(location, row["review"], review_id)
        name = (row["reviewer"] or "").strip()
        if name:
            names.add(name)
        choices = _parse_choices(row, questions, location)
        if row["item"] in judgements:
            raise DataError(f"{location}: item {row['item']} is there twice; keep one row of it")
        comment = (row.get(COMMENT_COLUMN) or "").strip()
        judgements[row["item"]] = ItemJudgement(choice_by_question=choices, comment=comment)
    if len(names) != 1:
        written_names = " and ".join(sorted(names)) or "nobody"
        raise DataError(f"{path}: the column reviewer names {written_names}; write one name in it, once at least")
    return Reviewer(names.pop(), path, judgements)


def _parse_choices(row: dict[str, Any], questions: list[str], location: str) -> dict[str, str]:
    """Read the choices of one item from its row of the table: {"overall": "a"}; a question with an empty cell is left out.

    Raises DataError, with the `location` of the row, for a cell that is none of the spellings of `a`, `b` or `tie`.
    """
    choice_by_question = {}
    for question in questions:
        spelling = (row[question] or "").strip().lower()
        if not spelling:
            continue
        if spelling not in CHOICE_BY_SPELLING:
            raise DataError(
                f"{location}: {question} is {row[question]!r}; it must be one of {', '.join(VOTE_CHOICES)}, or empty"
            )
        choice_by_question[question] = CHOICE_BY_SPELLING[spelling]
    return choice_by_question


def _raise_if_of_another_review(location: str, answered_review_id: Any, review_id: str) -> None:
    """Raise DataError if answers are of another review, whose items have other ids.

    `location`: where they are, for the message. `answered_review_id`: the id of the review that the file names.
    """
    if answered_review_id != review_id:
        which_review = "of no review that it names"
        if answered_review_id:
            which_review = f"of the review {str(answered_review_id)[:12]}"
        raise DataError(
            f"{location}: is {which_review}, and this one is {review_id[:12]}; give the answers of this review"
        )


def _raise_if_unknown_choices(reviewer: Reviewer, item_ids: set[str], questions: set[str]) -> None:
    """Check a reviewer's answers: raise DataError for an item, question or choice that the review does not have.

    Also if nothing was judged. `item_ids` and `questions` are those of the review.
    """
    for item_id, judgement in reviewer.judgement_by_item.items():
        if item_id not in item_ids:
            raise DataError(f"{reviewer.path}: item {item_id} is none of this review; was the file changed?")
        for question, choice in judgement.choice_by_question.items():
            if question not in questions or choice not in VOTE_CHOICES:
                raise DataError(
                    f"{reviewer.path}: item {item_id}: {question}={choice}: must be one of {', '.join(VOTE_CHOICES)} to one of "
                    f"{', '.join(sorted(questions))}"
                )
    if not any(judgement.choice_by_question for judgement in reviewer.judgement_by_item.values()):
        raise DataError(
            f"{reviewer.path}: {reviewer.name} has judged nothing yet; ask for the file once it is filled in"
        )
