"""Multiple choice by likelihood: which of the given answers the model finds likeliest. Nothing is generated."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

from trainer.data.document import Document
from trainer.data.fields import Refusal, is_texts, shown, text_of
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface


class MultipleChoice(Task):
    """Which choice is likeliest: by the whole log-probability, by that of a token, by that of a byte."""

    kind = "multiple_choice"
    metrics: tuple[Metric, ...] = (
        Metric("accuracy", "share of rows whose likeliest choice is right, 0 to 1", ratio=("right", None)),
        Metric("accuracy_by_token", "the same, log-probabilities divided by tokens", ratio=("right_by_token", None)),
        Metric("accuracy_by_byte", "the same, log-probabilities divided by UTF-8 bytes", ratio=("right_by_byte", None)),
    )
    reads = (
        '"question", "choices": a list of texts, and "answer": the right one\'s number from 0, its letter or its text '
        "(or ARC's form of choices, texts with labels)"
    )
    options: ClassVar[dict[str, Any]] = {"separator": " "}
    needs_path = True

    def read(self, case: Case) -> None:
        fields = case.fields
        name = "question" if "question" in fields else "prompt"
        question = text_of(fields, name)
        choices: Any = fields.get("choices")
        labels: Any = None
        if isinstance(choices, dict):  # ARC: {"text": [...], "label": [...]}
            choices, labels = choices.get("text"), choices.get("label")
        if not is_texts(choices) or len(choices) < 2 or not all(choice.strip() for choice in choices):
            raise Refusal("bad_choices", f'"choices" is {shown(choices)}; it must be a list of two texts or more')
        answer = fields.get("answer", fields.get("answerKey"))
        case.fields = {"question": question, "choices": list(choices), "answer": _right_choice(answer, choices, labels)}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        documents = [
            Document(*_place(case.where), prompt=case.fields["question"], completion=choice, separator=self._separator)
            for case in cases
            for choice in case.fields["choices"]
        ]
        questions = model.encode_questions(documents)
        held = model.likelihoods(questions)
        rows = []
        for case, (begin, end) in zip(cases, pairwise(_choice_offsets(cases)), strict=True):
            choices, right = case.fields["choices"], case.fields["answer"]
            whole = [each.logprob for each in held[begin:end]]
            token = [each.logprob / each.tokens for each in held[begin:end]]
            byte = [each.logprob / len(choice.encode()) for each, choice in zip(held[begin:end], choices, strict=True)]
            scores = {"right": whole, "right_by_token": token, "right_by_byte": byte}
            best = whole.index(max(whole))
            margin = whole[right] - max(value for place, value in enumerate(whole) if place != right)
            rows.append(
                TaskRow(
                    case.where,
                    case.fields["question"],
                    choices[best],
                    choices[right],
                    {
                        **{name: float(said.index(max(said)) == right) for name, said in scores.items()},
                        "margin": margin,
                        **{f"logprob_{number}": value for number, value in enumerate(whole)},
                        **{f"tokens_{number}": float(each.tokens) for number, each in enumerate(held[begin:end])},
                    },
                )
            )
        return rows

    @property
    def _separator(self) -> str:
        return str(self.option_values["separator"])

    def signatures(self) -> dict[str, str]:
        return dict.fromkeys((metric.name for metric in self.metrics), f"separator:{self._separator!r}|first of equals")


def _choice_offsets(cases: Sequence[Case]) -> list[int]:
    return [0, *accumulate(len(case.fields["choices"]) for case in cases)]


def _place(where: str) -> tuple[str, int]:
    file, _, line = where.rpartition(":")
    return file, int(line)


def _right_choice(answer: Any, choices: list[str], labels: Any) -> int:
    """The number of the right choice. Raises Refusal."""
    if isinstance(labels, list) and len(labels) == len(choices) and answer in labels:
        return labels.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        if choices.count(answer) == 1:
            return choices.index(answer)
        letter = answer.strip().rstrip(".)").upper()
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
            return string.ascii_uppercase.index(letter)
        if letter.isdecimal() and int(letter) < len(choices):
            return int(letter)
    last = len(choices) - 1
    allowed = f"a number from 0 to {last}, a letter up to {string.ascii_uppercase[last]}, or one of the choices"
    raise Refusal("bad_answer", f'"answer" is {shown(answer)}; it must be {allowed}')
