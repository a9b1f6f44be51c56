"""Multiple choice by likelihood: which of the given answers the model finds likeliest. Nothing is generated."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.data.document import Document
from trainer.data.fields import RowError, is_list_of_texts, parse_text, show_value
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface
from trainer.evaluation.tasks.texts import split_location

if TYPE_CHECKING:
    from trainer.evaluation.likelihood import Likelihood


class MultipleChoice(Task):
    """Picks the likeliest choice, by three measures: its whole log-probability, the same per token, and the same per byte.

    Longer choices have lower log-probabilities, so the three may differ.
    """

    kind = "multiple_choice"
    metrics: tuple[TaskMetric, ...] = (
        TaskMetric(
            "accuracy", "share of rows whose likeliest choice is right, 0 to 1", ratio_of_sums=RatioOfSums("right")
        ),
        TaskMetric(
            "accuracy_by_token",
            "the same, log-probabilities divided by tokens",
            ratio_of_sums=RatioOfSums("right_by_token"),
        ),
        TaskMetric(
            "accuracy_by_byte",
            "the same, log-probabilities divided by UTF-8 bytes",
            ratio_of_sums=RatioOfSums("right_by_byte"),
        ),
    )
    rows_description = (
        'rows with "question", "choices" (a list of texts) and "answer": the right choice by its text, its letter (A is '
        "the first) or its number (0 is the first); the rows of ARC work as they are"
    )
    options: ClassVar[dict[str, Any]] = {"separator": " "}
    needs_path = True

    def prepare_case(self, case: TaskCase) -> None:
        """Replace the columns of a row by question, choices and the index of the right choice (from 0). Raises RowError."""
        fields = case.fields
        question_column = "question" if "question" in fields else "prompt"
        question = parse_text(fields, question_column)
        choices: Any = fields.get("choices")
        labels: Any = None
        if isinstance(choices, dict):  # ARC: {"text": [...], "label": [...]}
            labels = choices.get("label")
            choices = choices.get("text")
        is_choice_list = is_list_of_texts(choices) and len(choices) >= 2 and all(choice.strip() for choice in choices)
        if not is_choice_list:
            raise RowError("bad_choices", f'"choices" is {show_value(choices)}; it must be a list of two texts or more')
        answer = fields.get("answer", fields.get("answerKey"))  # ARC calls it answerKey
        case.fields = {
            "question": question,
            "choices": list(choices),
            "answer": _right_choice_index(answer, choices, labels),
        }

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Ask the model how likely each choice is after its question, and report which is likeliest. All ranks must call.

        It is likeliest by three measures: the log-probability of the choice, the same by token, and by byte.
        """
        documents = []
        for case in cases:
            file, line = split_location(case.location)
            for choice in case.fields["choices"]:
                document = Document(
                    file, line, prompt=case.fields["question"], completion=choice, separator=self._separator
                )
                documents.append(document)
        likelihoods = model.likelihoods(model.encode_questions(documents))
        # All choices of all cases were asked as one list: a case takes as many likelihoods as it has choices.
        remaining_likelihoods = iter(likelihoods)
        return [_choice_row(case, [*islice(remaining_likelihoods, len(case.fields["choices"]))]) for case in cases]

    @property
    def _separator(self) -> str:
        return str(self.option_values["separator"])

    def signatures(self) -> dict[str, str]:
        return self.signature_of_all(f"separator:{self._separator!r}|first of equals")


def _choice_row(case: TaskCase, likelihoods: Sequence[Likelihood]) -> TaskRow:
    """The report's row of a question: whether the right choice is the likeliest, by each of three measures.

    The measures: the log-probability of the choice, the same divided by its tokens, and divided by its bytes. `likelihoods`:
    of the choices, in their order. Further scores: `logprob_N` and `tokens_N` of choice N, and `margin`, the distance in nats
    between the right choice and the likeliest wrong one (negative if a wrong one is likelier).
    """
    choices = case.fields["choices"]
    right_choice = case.fields["answer"]
    logprobs = [likelihood.logprob for likelihood in likelihoods]
    by_token = [likelihood.logprob / likelihood.num_tokens for likelihood in likelihoods]
    by_byte = []
    wrong_logprobs = []
    for number, (logprob, choice) in enumerate(zip(logprobs, choices, strict=True)):
        by_byte.append(logprob / len(choice.encode()))
        if number != right_choice:
            wrong_logprobs.append(logprob)
    # The first score sorts the rows of the report from bad to good.
    scores = {
        "right": float(_argmax(logprobs) == right_choice),
        "right_by_token": float(_argmax(by_token) == right_choice),
        "right_by_byte": float(_argmax(by_byte) == right_choice),
        "margin": logprobs[right_choice] - max(wrong_logprobs),
    }
    for number, likelihood in enumerate(likelihoods):
        scores[f"logprob_{number}"] = likelihood.logprob
    for number, likelihood in enumerate(likelihoods):
        scores[f"tokens_{number}"] = float(likelihood.num_tokens)
    likeliest = choices[_argmax(logprobs)]
    return TaskRow(
        where=case.location,
        prompt=case.fields["question"],
        answer=likeliest,
        reference=choices[right_choice],
        scores=scores,
    )


def _argmax(scores: Sequence[float]) -> int:
    """The index of the highest score; of equal ones the first."""
    return scores.index(max(scores))


def _right_choice_index(answer: Any, choices: list[str], labels: Any) -> int:
    """Which choice a row calls the right one, in any of the forms that published data sets use, as an index.

    `answer` is read as the first of these that it can be:
    - one of `labels`, which data sets such as ARC have beside their choices (None if there are none),
    - a number: 1,
    - the text of a choice,
    - a letter: "B", "b." or "B)",
    - a number as text: "1".

    Raises RowError if it names none of the choices.
    """
    if isinstance(labels, list) and len(labels) == len(choices) and answer in labels:
        return labels.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str):
        # The text of a choice comes before letters and digits: a choice may itself be "B" or "3".
        if choices.count(answer) == 1:
            return choices.index(answer)
        letter = answer.strip().rstrip(".)").upper()
        if len(letter) == 1 and letter in string.ascii_uppercase[: len(choices)]:
            return string.ascii_uppercase.index(letter)
        if letter.isdecimal() and int(letter) < len(choices):
            return int(letter)
    last_number = len(choices) - 1
    last_letter = string.ascii_uppercase[last_number]
    allowed = f"a number from 0 to {last_number}, a letter up to {last_letter}, or one of the choices"
    raise RowError("bad_answer", f'"answer" is {show_value(answer)}; it must be {allowed}')
