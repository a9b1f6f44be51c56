"""Generated answers compared with a reference: exact match, F1, summaries, translations."""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from trainer.data.fields import Refusal, is_texts, shown
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.compat import weighted_score
from trainer.evaluation.tasks.model_interface import ModelInterface, last_answer
from trainer.evaluation.tasks.pass_at_k import pass_at_k_metrics, row_of_draws, texts_by_prompt

REFERENCES = "references"
"""Column with further answers that are right too, a list of texts."""


class WrittenTask(Task):
    """Asks each document's last answer, and scores what is written."""

    reads = (
        'a prompt and its answer in any format of data.path, perhaps with "references": a list of other right answers'
    )
    supports_draws = True
    right_or_wrong: ClassVar[bool] = False
    """Whether the first metric's score of an answer is 0 or 1."""

    def __init__(self, name: str, config: TaskConfig) -> None:
        super().__init__(name, config)
        if self.right_or_wrong:
            self.metrics += pass_at_k_metrics(config.write.draws)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.config.write.problems(f"{self.key}.write")

    def read(self, case: Case) -> None:
        assert case.document is not None
        answer = last_answer(case.document)
        if answer is None:
            raise Refusal("no_answer", "the row is a text, or a pair of answers; it must be a prompt and its answer")
        others = case.fields.get(REFERENCES)
        if others is not None and not is_texts(others):
            raise Refusal("bad_references", f'"{REFERENCES}" is {shown(others)}; it must be a list of texts')
        case.fields = {REFERENCES: [answer["content"].strip(), *(others or [])]}

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        questions = model.encode_questions([case.document for case in cases if case.document is not None])
        written = model.answers(questions, self.config.write, self.key)
        return [
            row_of_draws(
                TaskRow(case.where, model.shown_prompt(question.context), "", self.reference(case), {}),
                texts,
                [self.score(case, text) for text in texts],
                self.metrics,
            )
            for case, question, texts in zip(cases, questions, texts_by_prompt(written, len(cases)), strict=True)
        ]

    def reference(self, case: Case) -> str:
        """The right answer, as it is shown."""
        return str(case.fields[REFERENCES][0])

    @abstractmethod
    def score(self, case: Case, text: str) -> dict[str, float]:
        """The scores of one answer."""


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "punctuation": lambda text: "".join(letter for letter in text if letter not in string.punctuation),
    "articles": lambda text: re.sub(r"\b(a|an|the)\b", " ", text),
    "whitespace": lambda text: " ".join(text.split()),
}
"""What may be taken out before texts are compared, in this order."""


class _NormalisedTask(WrittenTask):
    options: ClassVar[dict[str, Any]] = {"normalise": list(NORMALISATIONS)}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        asked = self.option_values["normalise"]
        if not isinstance(asked, list) or not {*asked} <= NORMALISATIONS.keys():
            yield f"{self.key}.options.normalise={asked}: must be a list of {', '.join(NORMALISATIONS)}, or []"

    def normalise(self, text: str) -> str:
        for name, change in NORMALISATIONS.items():
            text = change(text) if name in self.option_values["normalise"] else text
        return text.strip()

    def signatures(self) -> dict[str, str]:
        done = "+".join(name for name in NORMALISATIONS if name in self.option_values["normalise"]) or "none"
        return {metric.name: f"normalise:{done}" for metric in self.metrics}


class ExactMatch(_NormalisedTask):
    """Whether the answer is one of the references."""

    right_or_wrong = True
    kind = "exact_match"
    metrics = (Metric("exact_match", "share of answers that equal a reference, 0 to 1", ratio=("match", None)),)

    def score(self, case: Case, text: str) -> dict[str, float]:
        found = self.normalise(text)
        return {"match": float(any(found == self.normalise(other) for other in case.fields[REFERENCES]))}


class F1(_NormalisedTask):
    """Words that the answer and a reference share (SQuAD, Rajpurkar et al. 2016)."""

    kind = "f1"
    metrics = (
        Metric("f1", "mean F1 of the words of answer and best reference, 0 to 1", ratio=("f1", None)),
        Metric("exact_match", "share of answers that equal a reference, 0 to 1", ratio=("match", None)),
    )

    def score(self, case: Case, text: str) -> dict[str, float]:
        found, others = self.normalise(text), [self.normalise(other) for other in case.fields[REFERENCES]]
        return {"f1": max(word_f1(found, other) for other in others), "match": float(found in others)}


def word_f1(one: str, other: str) -> float:
    """F1 of the words of two texts, as sets in which a word may be more than once; two empty texts are equal."""
    words, wanted = one.split(), other.split()
    if not words or not wanted:
        return float(words == wanted)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted))


class Translation(WrittenTask):
    """BLEU and chrF of the whole set, by sacrebleu."""

    kind = "translation"
    metrics = (
        Metric("bleu", "sacrebleu's corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018)"),
        Metric("chrf", "sacrebleu's corpus chrF, 0 to 100 (Popović 2015)"),
    )
    options: ClassVar[dict[str, Any]] = {"tokenize": "13a", "lowercase": False, "word_order": 0}
    supports_draws = False  # scores of the whole set are made of its answers, not of rows
    reads = "a text and its translation in any format of data.path"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        known = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "char", "none")
        if self.option_values["tokenize"] not in known:
            yield f"{self.key}.options.tokenize={self.option_values['tokenize']}: must be one of {', '.join(known)}"

    @cached_property
    def scorers(self) -> dict[str, Any]:
        """sacrebleu's metrics by our names."""
        from sacrebleu.metrics import BLEU, CHRF

        chosen = self.option_values
        bleu = BLEU(tokenize=chosen["tokenize"], lowercase=bool(chosen["lowercase"]))
        return {"bleu": bleu, "chrf": CHRF(word_order=int(chosen["word_order"]), lowercase=bool(chosen["lowercase"]))}

    def score(self, case: Case, text: str) -> dict[str, float]:
        return {"chrf": float(self.scorers["chrf"].sentence_score(text, case.fields[REFERENCES][:1]).score)}

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        answers = [row.answer for row in rows]
        references = [row.reference for row in rows]
        return {name: weighted_score(judge, answers, references) for name, judge in self.scorers.items()}

    def signatures(self) -> dict[str, str]:
        for judge in self.scorers.values():  # which is known once it has seen references
            judge.corpus_score([""], [[""]])
        return {name: str(judge.get_signature()) for name, judge in self.scorers.items()}


class Summarisation(WrittenTask):
    """ROUGE-1, -2 and -L, by rouge-score."""

    kind = "summarisation"
    metrics = tuple(
        Metric(name, f"mean {what} F-measure, 0 to 1 (Lin 2004)", ratio=(name, None))
        for name, what in (("rougeL", "ROUGE-L"), ("rouge1", "ROUGE-1"), ("rouge2", "ROUGE-2"))
    )
    options: ClassVar[dict[str, Any]] = {"stemmer": True}
    reads = "a text and its summary in any format of data.path"

    @cached_property
    def scorer(self) -> Any:
        """rouge-score's scorer."""
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=bool(self.option_values["stemmer"]))

    def score(self, case: Case, text: str) -> dict[str, float]:
        found = self.scorer.score(case.fields[REFERENCES][0], text)
        return {name: float(found[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        said = f"rouge-score:{version('rouge-score')}|stemmer:{'yes' if self.option_values['stemmer'] else 'no'}"
        return {metric.name: said for metric in self.metrics}
