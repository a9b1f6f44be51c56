"""The rows of a task on its page: the worst ones, those that turned right or wrong, and how much text of them is shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trainer.evaluation.report.comparison import right_or_wrong_score_name
from trainer.evaluation.report.record import TaskComparison
from trainer.evaluation.tasks.base import Task, TaskRow, other_answer_by_row_id, shorten_prompt
from trainer.pages.numbers import format_number

MAX_WORST_ROWS = 20
"""Rows of each task that are shown, the worst first."""
MAX_ROWS_OF_ALL_TASKS = 400
"""Rows of all tasks together. With more tasks, each one shows fewer."""
MIN_ROWS_OF_EACH_KIND = 3
"""Worst, lost and won rows that each task shows however many tasks there are."""
MAX_TEXT_BYTES = 400_000
"""Most bytes of all texts that a click shows. If there are more, each text is cut to the largest of `TEXT_LIMITS` that fits."""
TEXT_LIMITS = (8000, 4000, 2000, 1000, 500, 250, 120, 60)
LINE_CHARACTERS = 120
"""Characters of a question or an answer in the list of rows, before a click."""
WRONG = "wrong"
LOST = "lost"
WON = "won"
DESCRIPTION_BY_FILTER = {LOST: "right before, wrong now", WON: "wrong before, right now", WRONG: "wrong"}
"""Filters of rows, with what they show."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """One row as the page shows it. Texts are cut."""

    where: str
    """`file:line`."""
    filter_names: tuple[str, ...]
    """The filters of the page that show it: `wrong`, `lost`, `won`."""
    score: str
    """Right or wrong, or what it contributes to the first metric."""
    question: str
    """What the user asked last, or the end of the prompt, in one short line."""
    texts: dict[str, str]
    """Prompt, answer, answer of the other model, reference and note, under the names that the page shows."""


class RowFilter(NamedTuple):
    """A filter of the shown rows, which the page offers."""

    name: str
    """`lost`, `won` or `wrong`."""
    description: str
    """What it shows."""
    num_shown: int
    """Rows that it shows."""
    num_total: int
    """Rows of the task that it stands for: the page does not have all of them."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one task that the page shows."""

    rows: list[ShownRow]
    columns: list[str]
    """The texts that rows have beside the prompt, in their order."""
    score: str
    """What `ShownRow.score` is."""
    filters: list[RowFilter]
    left_out: int
    """Rows of the task that are not shown."""


def shown_rows(
    tasks: Sequence[Task],
    rows_by_task: Mapping[str, Sequence[TaskRow]],
    other_rows: Mapping[str, Sequence[TaskRow]],
    comparisons: Mapping[str, TaskComparison],
) -> dict[str, TaskRows]:
    """Choose the rows that the page shows of each task: the worst ones, and those that only one model has right.

    `other_rows`: rows of the other model, by task; tasks whose rows are not known are missing. `comparisons`: by task, its
    part of `evaluation.json` on the other model, which has the changed rows under `changed`.
    """
    # A task shows up to three kinds of rows: the worst, lost and won. The limit holds for each kind.
    limit = MAX_ROWS_OF_ALL_TASKS // (3 * max(len(tasks), 1))
    limit = min(max(limit, MIN_ROWS_OF_EACH_KIND), MAX_WORST_ROWS)
    rows_of_tasks = {}
    for task in tasks:
        comparison = comparisons.get(task.name)
        changed = {} if comparison is None else comparison.get("changed", {})
        rows_of_tasks[task.name] = _rows_to_show(
            task, rows_by_task[task.name], other_rows.get(task.name, ()), changed, limit
        )
    _truncate_texts(rows_of_tasks.values())
    return rows_of_tasks


def _truncate_texts(rows_of_tasks: Collection[TaskRows]) -> None:
    """Cut the texts of all shown rows, in place, so that the page stays small; of a prompt the end is kept."""
    texts: list[str] = []
    for report_rows_of_task in rows_of_tasks:
        for row in report_rows_of_task.rows:
            texts += row.texts.values()
    text_limit = _text_limit(texts)
    for report_rows_of_task in rows_of_tasks:
        for row in report_rows_of_task.rows:
            for name, text in row.texts.items():
                row.texts[name] = _truncate(text, text_limit, keep_end=name == "prompt")


def _text_limit(texts: Sequence[str]) -> int:
    """How long each text may be: the largest of `TEXT_LIMITS` with which all have at most `MAX_TEXT_BYTES`, or the smallest."""
    sizes = [(len(text), len(text.encode())) for text in texts if text]  # (characters, bytes)
    for limit in TEXT_LIMITS:
        expected_bytes = sum(num_bytes * min(1.0, limit / num_characters) for num_characters, num_bytes in sizes)
        if expected_bytes <= MAX_TEXT_BYTES:
            return limit
    return TEXT_LIMITS[-1]


def _rows_to_show(
    task: Task, rows: Sequence[TaskRow], other_rows: Sequence[TaskRow], changed: dict[str, Any], limit: int
) -> TaskRows:
    """Choose the rows of one task to show: the `limit` with the worst score, and up to `limit` each of lost and won.

    A lost row was right with the other model and is wrong now; a won row is the reverse. The page filters rows by these names:
    lost, won, wrong.

    `changed`: lost and won rows as `changed_rows` returns them: {"lost": [{"where": "rows.jsonl:3", "other": "the other
    model's answer", ...}], "num_lost": 1, "won": [], "num_won": 0}. Empty without a comparison.
    """
    sorting_score = score_by_first_metric(task, rows)
    other_answers = other_answer_by_row_id(rows, other_rows)
    right_score = right_or_wrong_score_name(task, rows)

    # Which rows were lost or won. Location, prompt and answer tell them apart, since several rows may share a location.
    filters_by_text: dict[tuple[str, str, str], list[str]] = {}
    other_answer_by_text: dict[tuple[str, str, str], str] = {}
    for outcome in (LOST, WON):
        for changed_row in changed.get(outcome, ())[:limit]:
            text = changed_row["where"], changed_row["prompt"], changed_row["answer"]
            other_answer_by_text[text] = changed_row["other"]
            filters_by_text.setdefault(text, []).append(outcome)

    # The rows to show. All shown rows that are wrong pass the filter "wrong".
    ordered = worst_rows_first(task, rows)
    shown = []
    for position, row in enumerate(ordered):
        text = row.where, shorten_prompt(row.prompt), row.answer
        filter_names = filters_by_text.get(text, [])
        if position >= limit and not filter_names:
            continue
        value = format_number(sorting_score.of_row(row))
        if right_score is not None:
            is_right = row.scores[right_score] == 1
            value = "right" if is_right else WRONG
            if not is_right:
                filter_names = [*filter_names, WRONG]
        other_answer = other_answers.get(id(row), other_answer_by_text.get(text, ""))
        shown.append(_shown_row(row, tuple(filter_names), value, other_answer))

    # The filters that show at least one row.
    filters = []
    num_wrong = 0 if right_score is None else sum(row.scores[right_score] != 1 for row in rows)
    totals = {LOST: changed.get("num_lost", 0), WON: changed.get("num_won", 0), WRONG: num_wrong}
    for name, description in DESCRIPTION_BY_FILTER.items():
        num_shown = sum(name in row.filter_names for row in shown)
        if num_shown:
            filters.append(RowFilter(name, description, num_shown, num_total=totals[name]))

    text_names: set[str] = set().union(*(row.texts for row in shown))
    columns: list[str] = [name for name in ("answer", "other", "reference") if name in text_names]
    heading = sorting_score.name if right_score is None else "result"
    return TaskRows(shown, columns, heading, filters, len(rows) - len(shown))


def _shown_row(row: TaskRow, filter_names: tuple[str, ...], score_text: str, compared_answer: str) -> ShownRow:
    """A row as the page shows it, its texts not yet cut.

    `filter_names`: the filters of the page that show the row, such as ("lost", "wrong"). `score_text`: what the page shows as
    its score, such as "right" or "0.35". `compared_answer`: the answer of the model that is compared with; "" if it is not
    known.
    """
    text_by_name = {
        "prompt": row.prompt,
        "answer": row.answer,
        "other": compared_answer,
        "reference": row.reference,
        "note": row.note,
    }
    nonempty_texts = {name: text for name, text in text_by_name.items() if text.strip()}
    if row.question.strip():
        question = _one_line(row.question, keep_end=False)
    else:  # the end of the prompt is the nearest to a question
        question = _one_line(row.prompt, keep_end=True)
    return ShownRow(
        where=row.where, filter_names=filter_names, score=score_text, question=question, texts=nonempty_texts
    )


def shortened_line(text: str) -> str:
    """The first `LINE_CHARACTERS` characters of a text, on one line."""
    return _one_line(text, keep_end=False)


def _one_line(text: str, *, keep_end: bool) -> str:
    """At most `LINE_CHARACTERS` characters of a text, its first or its last ones, without line breaks."""
    return _truncate(" ".join(text.split()), LINE_CHARACTERS, keep_end=keep_end)


def _truncate(text: str, limit: int, *, keep_end: bool) -> str:
    """At most `limit` characters of a text, its first or its last ones."""
    if len(text) <= limit:
        return text
    return f"…{text[-limit:]}" if keep_end else f"{text[:limit]}…"


def worst_rows_first(task: Task, rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Sort the rows of a task from bad to good, by what each contributes to the first metric (`score_by_first_metric`)."""
    metric = task.metrics_for(rows)[0]
    score = score_by_first_metric(task, rows)
    # Of a metric that is no ratio, the row's first score decides, which kinds choose so that low is bad.
    low_is_bad = metric.ratio_of_sums is None or metric.greater_is_better
    sign = 1 if low_is_bad else -1
    return sorted(rows, key=lambda row: sign * score.of_row(row))


class RowScore(NamedTuple):
    """A number by which the rows of a task are sorted and shown."""

    name: str
    of_row: Callable[[TaskRow], float]


def score_by_first_metric(task: Task, rows: Sequence[TaskRow]) -> RowScore:
    """By which number the rows of a task are sorted and shown: what each contributes to the task's first metric.

    - The first metric is no ratio of sums: the row's first score.
    - It is the mean of a score over rows: that score.
    - It divides two summed scores, such as loss by targets: the metric of the row alone.
    """
    metric = task.metrics_for(rows)[0]
    if metric.ratio_of_sums is None:
        first_score = next(iter(rows[0].scores))
        return RowScore(first_score, lambda row: float(next(iter(row.scores.values()))))
    numerator, denominator = metric.ratio_of_sums  # names of scores
    if denominator is None:  # the number of rows
        return RowScore(numerator, lambda row: row.scores[numerator])
    # A row without a denominator counts as 0 of 1.
    return RowScore(
        metric.name, lambda row: float(metric.from_sums(row.scores[numerator], row.scores[denominator] or 1.0))
    )
