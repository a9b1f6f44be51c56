"""Answers of the model before training beside those after it, to the same prompts, where some were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.compare.run_files import RecordedRun
from trainer.monitors.kept_answers import GENERATED, read_kept_answers
from trainer.reporting.results import EVALUATION_REPORT, kept_reports

MAX_ANSWERS = 6
"""Pairs of answers on the page."""
MAX_CHARACTERS = 600
"""Characters of a prompt or answer."""
MAX_SUMMARY_CHARACTERS = 90
"""Characters of a prompt in the line that summarises a pair."""


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """An answer of the model before training and one after it, to the same prompt."""

    task: str
    prompt: str
    answer_before: str
    answer_after: str
    reference_answer: str = ""
    change: str = ""
    """What the training changed: `right now` (it was wrong before) or `wrong now`; empty where nobody judged the answers."""

    @property
    def summary(self) -> str:
        """The pair on one line: task, change, and the end of the prompt, such as `qa: right now: … What is 2 + 2?`."""
        prompt_on_one_line = " ".join(self.prompt.split())
        prompt_end = (
            prompt_on_one_line
            if len(prompt_on_one_line) <= MAX_SUMMARY_CHARACTERS
            else f"… {prompt_on_one_line[-MAX_SUMMARY_CHARACTERS:]}"
        )
        # Answers to held-out documents are kept under a name that readers do not know.
        parts = (self.task.replace(GENERATED, "held-out document"), self.change, prompt_end)
        return ": ".join(part for part in parts if part)


def answer_pairs(run: RecordedRun) -> list[AnswerPair]:
    """Choose answers to the same prompts before and after training, to show what the training changed; at most `MAX_ANSWERS`.

    They come from the newest evaluation report that compares the run with its base model: answers that changed between
    right and wrong. Without such a report they come from the run's own evaluations: the first prompts. Empty if none were
    kept.
    """
    for report in kept_reports(run.directory, EVALUATION_REPORT):
        comparison = report.report.get("against") or {}
        if comparison.get("what") == "base":
            pairs = _changed_answers(comparison.get("tasks") or {})
            if pairs:
                return pairs[:MAX_ANSWERS]
    return _answers_of_run(run)[:MAX_ANSWERS]


def _answers_of_run(run: RecordedRun) -> list[AnswerPair]:
    """Pair the answers that the run kept of its evaluation before training with those of its newest evaluation, by prompt.

    Empty if it kept answers of only one of the two.
    """
    kept_answers = read_kept_answers(run.directory)
    first = kept_answers.get("first") or {}
    last = kept_answers.get("last") or {}
    was_evaluated_before_training = first.get("step") == 0
    was_evaluated_later = bool(last.get("step"))
    if not was_evaluated_before_training or not was_evaluated_later:
        return []
    pairs: list[AnswerPair] = []
    for task, last_rows in (last.get("tasks") or {}).items():
        first_rows = (first.get("tasks") or {}).get(task) or []
        first_row_by_prompt = {row.get("prompt"): row for row in first_rows}
        for last_row in last_rows:
            first_row = first_row_by_prompt.get(last_row.get("prompt"))
            if first_row is not None:
                pairs.append(_pair_of_rows(task, first_row, last_row))
    return pairs


def _pair_of_rows(task: str, first_row: dict[str, Any], last_row: dict[str, Any]) -> AnswerPair:
    """Pair two rows of kept answers with the same prompt: from before training, and from the newest evaluation."""
    return AnswerPair(
        task,
        prompt=shorten_at_start(str(last_row["prompt"])),
        answer_before=shorten_at_start(str(first_row.get("answer") or "")),
        answer_after=shorten_at_start(str(last_row.get("answer") or "")),
        reference_answer=shorten_at_start(str(last_row.get("reference") or "")),
    )


def _changed_answers(comparison_by_task: dict[str, Any]) -> list[AnswerPair]:
    """Take from an evaluation report the answers that became right by training and those that became wrong, in turn.

    `comparison_by_task`: the report's comparison of each task with the base model. Its `changed` has the rows under `won`
    (the base model was wrong and the trained one is right) and `lost` (the other way round).
    """
    right_now: list[AnswerPair] = []
    wrong_now: list[AnswerPair] = []
    for task, comparison in comparison_by_task.items():
        changed = comparison.get("changed") or {}
        right_now += [_judged_pair(task, row, "right now") for row in changed.get("won") or [] if row.get("answer")]
        wrong_now += [_judged_pair(task, row, "wrong now") for row in changed.get("lost") or [] if row.get("answer")]
    return _interleave_pairs(right_now, wrong_now)


def _judged_pair(task: str, row: dict[str, Any], change: str) -> AnswerPair:
    """Pair the answers in a row of an evaluation report: `answer` is that of the trained model, `other` that of the base model.

    `change`: `right now` or `wrong now`, what the training did to the answer.
    """
    return AnswerPair(
        task,
        prompt=shorten_at_start(str(row.get("prompt") or "")),
        answer_before=shorten_at_start(str(row.get("other") or "")),
        answer_after=shorten_at_start(str(row["answer"])),
        change=change,
    )


def _interleave_pairs(first: Sequence[AnswerPair], second: Sequence[AnswerPair]) -> list[AnswerPair]:
    """Pairs of both lists in turn, then what is left of the longer one, so that the page shows both kinds."""
    mixed = []
    for index in range(max(len(first), len(second))):
        mixed += [*first[index : index + 1], *second[index : index + 1]]
    return mixed


def shorten_at_start(text: str) -> str:
    """Cut a long prompt or answer to `MAX_CHARACTERS` characters.

    Its end is kept, because the end of a prompt is the question.
    """
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"… {text[-MAX_CHARACTERS:]}"
