"""Answers of the model before training beside those after it, to the same prompts, where some were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.compare.run_files import RecordedRun
from trainer.monitors.kept_answers import GENERATED, read_kept_answers
from trainer.reporting.results import EVALUATION, kept_reports

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
    before: str
    after: str
    reference: str = ""
    change: str = ""
    """`right now` or `wrong now`; empty where nobody judged them."""

    @property
    def summary(self) -> str:
        """One line on the pair: the task, what changed, and the end of the prompt."""
        one_line = " ".join(self.prompt.split())
        shorten_prompt = (
            one_line if len(one_line) <= MAX_SUMMARY_CHARACTERS else f"… {one_line[-MAX_SUMMARY_CHARACTERS:]}"
        )
        parts = (self.task.replace(GENERATED, "held-out document"), self.change, shorten_prompt)
        return ": ".join(part for part in parts if part)


def answer_pairs(run: RecordedRun) -> list[AnswerPair]:
    """Answers to the same prompts before and after training; at most `MAX_ANSWERS`, and empty if none were kept.

    They come from the newest evaluation report that compares the run with its base model: answers that changed between right
    and wrong. Without such a report they come from the run's own evaluations: the first prompts.
    """
    for report in kept_reports(run.directory, EVALUATION):
        comparison = report.report.get("against") or {}
        if comparison.get("what") == "base":
            pairs = _changed_answers(comparison.get("tasks") or {})
            if pairs:
                return pairs[:MAX_ANSWERS]
    return _answers_of_run(run)[:MAX_ANSWERS]


def _answers_of_run(run: RecordedRun) -> list[AnswerPair]:
    """Pairs of the answers that the run kept of its first evaluation, before training, and of its newest."""
    kept = read_kept_answers(run.directory)
    first = kept.get("first") or {}
    last = kept.get("last") or {}
    if first.get("step") != 0 or not last.get("step"):
        return []  # evaluated once, or not before the first step: there is no before and after
    pairs: list[AnswerPair] = []
    for task, rows in (last.get("tasks") or {}).items():
        first_rows = (first.get("tasks") or {}).get(task) or []
        before_by_prompt = {row.get("prompt"): row for row in first_rows}
        for row in rows:
            before = before_by_prompt.get(row.get("prompt"))
            if before is not None:
                pairs.append(_pair_of_run(task, before, row))
    return pairs


def _pair_of_run(task: str, before: dict[str, Any], after: dict[str, Any]) -> AnswerPair:
    return AnswerPair(
        task,
        shortened(str(after["prompt"])),
        shortened(str(before.get("answer") or "")),
        shortened(str(after.get("answer") or "")),
        shortened(str(after.get("reference") or "")),
    )


def _changed_answers(tasks: dict[str, Any]) -> list[AnswerPair]:
    """Answers that the base model gave wrong and the trained one right (won), and the other way round (lost), in turn.

    `tasks`: the report's comparison of each task, in which `changed` has the rows under `won` and `lost`.
    """
    won: list[AnswerPair] = []
    lost: list[AnswerPair] = []
    for name, comparison in tasks.items():
        changed = comparison.get("changed") or {}
        for side, change, pairs in (("won", "right now", won), ("lost", "wrong now", lost)):
            pairs += [_judged_pair(name, row, change) for row in changed.get(side) or [] if row.get("answer")]
    return _alternating(won, lost)


def _judged_pair(task: str, row: dict[str, Any], change: str) -> AnswerPair:
    prompt = shortened(str(row.get("prompt") or ""))
    before = shortened(str(row.get("other") or ""))
    return AnswerPair(task, prompt, before, shortened(str(row["answer"])), change=change)


def _alternating(first: Sequence[AnswerPair], second: Sequence[AnswerPair]) -> list[AnswerPair]:
    """Entries of both in turn, then what is left of the longer one."""
    mixed = []
    for index in range(max(len(first), len(second))):
        mixed += [*first[index : index + 1], *second[index : index + 1]]
    return mixed


def shortened(text: str) -> str:
    """A text of at most `MAX_CHARACTERS` characters, its end kept: that of a prompt is the question."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"… {text[-MAX_CHARACTERS:]}"
