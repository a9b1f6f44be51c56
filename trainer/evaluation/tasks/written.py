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

from trainer.data.fields import RowError, is_list_of_texts, show_value
from trainer.evaluation.base import TaskConfig
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow, documents_of
from trainer.evaluation.tasks.compat import weighted_score
from trainer.evaluation.tasks.model_interface import ModelInterface, last_answer
from trainer.evaluation.tasks.pass_at_k import pass_at_k_metrics, set_samples_of_row, texts_by_prompt

REFERENCES_COLUMN = "references"
"""Column with further right answers, a list of texts."""


class GenerationTask(Task):
    """Lets the model generate the last answer of each document, and scores it against the reference."""

    rows_description = (
        'rows with a prompt and the right answer, in any format that data.path takes; a column "references" can list '
        "further right answers"
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
        yield from self.decoding.problems(f"{self.config_key}.write")

    def prepare_case(self, case: TaskCase) -> None:
        """Replace the columns of a row by its right answers, with which generated ones are compared: {"references": [...]}.

        The first is the last answer of the row's document; further ones are in the column "references". Raises RowError if the
        row has no answer, or that column is no list of texts.
        """
        assert case.document is not None
        answer = last_answer(case.document)
        if answer is None:
            raise RowError("no_answer", "the row is a text, or a pair of answers; it must be a prompt and its answer")
        more_answers = case.fields.get(REFERENCES_COLUMN)
        if more_answers is not None and not is_list_of_texts(more_answers):
            raise RowError(
                "bad_references", f'"{REFERENCES_COLUMN}" is {show_value(more_answers)}; it must be a list of texts'
            )
        case.fields = {REFERENCES_COLUMN: [answer["content"].strip(), *(more_answers or [])]}

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Let the model answer each prompt, and score the answers against the references. All ranks must call.

        With several answers to a prompt (`write.draws`), the row's scores are means over them.
        """
        questions = model.encode_questions(documents_of(cases))
        answers = texts_by_prompt(model.generate_answers(questions, self.decoding, self.config_key), len(cases))
        rows = []
        for case, question, texts in zip(cases, questions, answers, strict=True):
            row = TaskRow(
                where=case.location,
                prompt=model.decode_prompt_end(question.context),
                answer="",
                reference=self.reference(case),
                scores={},
            )
            scores = [self.score(case, text) for text in texts]
            set_samples_of_row(row, texts, scores, self.metrics)  # sets answer and scores
            rows.append(row)
        return rows

    def reference(self, case: TaskCase) -> str:
        """The right answer, as the report shows it."""
        return str(case.fields[REFERENCES_COLUMN][0])

    @abstractmethod
    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        """The scores of one answer to this case, by name. The first one sorts the rows of the report."""


NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "punctuation": lambda text: "".join(letter for letter in text if letter not in string.punctuation),
    "articles": lambda text: re.sub(r"\b(a|an|the)\b", " ", text),
    "whitespace": lambda text: " ".join(text.split()),
}
"""Normalisations of texts before they are compared, applied in this order."""


class _NormalisedTask(GenerationTask):
    """Compares words of answer and reference after both were normalised."""

    options: ClassVar[dict[str, Any]] = {"normalise": list(NORMALISATIONS)}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        names = self.option_values["normalise"]
        if not isinstance(names, list) or not {*names} <= NORMALISATIONS.keys():
            yield f"{self.config_key}.options.normalise={names}: must be a list of {', '.join(NORMALISATIONS)}, or []"

    def normalise(self, text: str) -> str:
        """The text after the normalisations of `options.normalise`, in the order of `NORMALISATIONS`."""
        for name, normalisation in NORMALISATIONS.items():
            if name in self.option_values["normalise"]:
                text = normalisation(text)
        return text.strip()

    def signatures(self) -> dict[str, str]:
        names = [name for name in NORMALISATIONS if name in self.option_values["normalise"]]
        signature = f"normalise:{'+'.join(names) or 'none'}"
        return self.signature_of_all(signature)


class ExactMatch(_NormalisedTask):
    """Whether the answer is one of the references."""

    right_or_wrong = True
    kind = "exact_match"
    metrics = (
        TaskMetric(
            "exact_match", "share of answers that equal a reference, 0 to 1", ratio_of_sums=RatioOfSums("match")
        ),
    )

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        answer = self.normalise(answer)
        is_match = any(answer == self.normalise(reference) for reference in case.fields[REFERENCES_COLUMN])
        return {"match": float(is_match)}


class F1(_NormalisedTask):
    """F1 of the words that the answer and a reference share (SQuAD, Rajpurkar et al. 2016)."""

    kind = "f1"
    metrics = (
        TaskMetric("f1", "mean F1 of the words of answer and best reference, 0 to 1", ratio_of_sums=RatioOfSums("f1")),
        TaskMetric(
            "exact_match", "share of answers that equal a reference, 0 to 1", ratio_of_sums=RatioOfSums("match")
        ),
    )

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        answer = self.normalise(answer)
        references = [self.normalise(reference) for reference in case.fields[REFERENCES_COLUMN]]
        best_f1 = max(word_f1(answer, reference) for reference in references)
        return {"f1": best_f1, "match": float(answer in references)}


def word_f1(answer: str, reference: str) -> float:
    """How many words an answer and a reference share: F1 of the words, 0 to 1, as in SQuAD.

    Order does not count; a word that occurs twice in both texts is shared twice. Two empty texts have an F1 of 1.
    """
    words = answer.split()
    reference_words = reference.split()
    if not words or not reference_words:
        return float(words == reference_words)
    shared_counts = Counter(words) & Counter(reference_words)
    num_shared = sum(shared_counts.values())
    # The harmonic mean of precision (shared / words) and recall (shared / reference words).
    return 2 * num_shared / (len(words) + len(reference_words))


class Translation(GenerationTask):
    """BLEU and chrF of the whole set, by sacrebleu."""

    kind = "translation"
    metrics = (
        TaskMetric("bleu", "sacrebleu's corpus BLEU, 0 to 100 (Papineni et al. 2002; Post 2018)"),
        TaskMetric("chrf", "sacrebleu's corpus chrF, 0 to 100 (Popović 2015)"),
    )
    options: ClassVar[dict[str, Any]] = {"tokenize": "13a", "lowercase": False, "word_order": 0}
    supports_draws = False  # corpus scores are computed from one answer a row
    rows_description = "rows with a text and its translation, in any format that data.path takes"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        tokenizers = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "char", "none")
        if self.option_values["tokenize"] not in tokenizers:
            yield f"{self.config_key}.options.tokenize={self.option_values['tokenize']}: must be one of {', '.join(tokenizers)}"

    @cached_property
    def scorer_by_metric(self) -> dict[str, Any]:
        """sacrebleu's scorers for BLEU and chrF, by the names of our metrics."""
        from sacrebleu.metrics import BLEU, CHRF

        lowercase = bool(self.option_values["lowercase"])
        return {
            "bleu": BLEU(tokenize=self.option_values["tokenize"], lowercase=lowercase),
            "chrf": CHRF(word_order=int(self.option_values["word_order"]), lowercase=lowercase),
        }

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        """sacrebleu's sentence chrF against the first reference, which sorts the rows; metrics are of the whole corpus."""
        return {
            "chrf": float(
                self.scorer_by_metric["chrf"].sentence_score(answer, case.fields[REFERENCES_COLUMN][:1]).score
            )
        }

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """BLEU and chrF of the corpus as functions that the bootstrap calls; each takes row weights, float64 [rows]."""
        answers = [row.answer for row in rows]
        references = [row.reference for row in rows]
        return {name: weighted_score(scorer, answers, references) for name, scorer in self.scorer_by_metric.items()}

    def signatures(self) -> dict[str, str]:
        # sacrebleu's signature has the number of references, which it knows only after it scored something.
        for scorer in self.scorer_by_metric.values():
            scorer.corpus_score([""], [[""]])
        return {name: str(scorer.get_signature()) for name, scorer in self.scorer_by_metric.items()}


class Summarisation(GenerationTask):
    """ROUGE-1, -2 and -L, by rouge-score."""

    kind = "summarisation"
    metrics = (
        TaskMetric("rougeL", "mean ROUGE-L F-measure, 0 to 1 (Lin 2004)", ratio_of_sums=RatioOfSums("rougeL")),
        TaskMetric("rouge1", "mean ROUGE-1 F-measure, 0 to 1 (Lin 2004)", ratio_of_sums=RatioOfSums("rouge1")),
        TaskMetric("rouge2", "mean ROUGE-2 F-measure, 0 to 1 (Lin 2004)", ratio_of_sums=RatioOfSums("rouge2")),
    )
    options: ClassVar[dict[str, Any]] = {"stemmer": True}
    rows_description = "rows with a text and its summary, in any format that data.path takes"

    @cached_property
    def scorer(self) -> Any:
        """rouge-score's scorer, which computes all three variants."""
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=bool(self.option_values["stemmer"]))

    def score(self, case: TaskCase, answer: str) -> dict[str, float]:
        scores = self.scorer.score(case.fields[REFERENCES_COLUMN][0], answer)
        return {name: float(scores[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}

    def signatures(self) -> dict[str, str]:
        from importlib.metadata import version

        stemmer = "yes" if self.option_values["stemmer"] else "no"
        signature = f"rouge-score:{version('rouge-score')}|stemmer:{stemmer}"
        return self.signature_of_all(signature)
