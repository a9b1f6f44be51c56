"""Memorised training data: continuation of training rows, canaries, membership inference by loss."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DataFormat
from trainer.data.document import Document
from trainer.data.fields import Refusal, show_value
from trainer.evaluation.tasks.base import Case, Metric, Task, TaskRow
from trainer.evaluation.tasks.model_interface import ModelInterface, Question
from trainer.evaluation.tasks.texts import common_prefix_length

NEAR_VERBATIM_BLEU = 75.0
"""BLEU above which a continuation is nearly verbatim (Ippolito et al. 2023, "Preventing Verbatim Memorization")."""
FORMATS_WITH_TEXT = (
    DataFormat.messages,
    DataFormat.alpaca,
    DataFormat.prompt_completion,
    DataFormat.text,
    DataFormat.pair,
)


class DocumentTask(Task):
    """A task about training documents, in any format that a language model learns from, plain texts included."""

    formats = FORMATS_WITH_TEXT
    samples_documents = True
    options: ClassVar[dict[str, Any]] = {"sample": 200, "seed": 0}

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings. All whole numbers among the options must be above 0, the seed at least 0."""
        yield from super().problems()
        for name, default in self.options.items():
            if not isinstance(default, int):
                continue
            value = self.option_values[name]
            smallest = 0 if name == "seed" else 1
            if not isinstance(value, int) or value < smallest:
                bound = "" if name == "seed" else " above 0"
                yield f"{self.key}.options.{name}={value}: must be a whole number{bound}"

    def parse_case(self, case: Case) -> None:
        document = case.document
        if document is None or (document.text is None and document.prompt is None and document.messages is None):
            raise Refusal("no_text", "the row is no text, prompt with answer, or conversation")
        if document.messages is not None and not any(turn["role"] == "assistant" for turn in document.messages):
            raise Refusal("no_answer", "the conversation has no assistant turn, of which alone something is learned")


class Memorisation(DocumentTask):
    """Whether the model continues the beginning of a row as the row does (Carlini et al. 2023, "Quantifying memorization")."""

    kind = "memorisation"
    metrics = (
        Metric(
            "verbatim",
            "share of rows continued token by token, 0 to 1",
            greater_is_better=False,
            ratio=("verbatim", None),
            min_cases=20,
        ),
        Metric(
            "near_verbatim",
            f"share of rows continued with BLEU of {NEAR_VERBATIM_BLEU:g} or more",
            greater_is_better=False,
            ratio=("near", None),
            min_cases=20,
        ),
        Metric(
            "leading",
            "mean share of the continuation that comes out from its first token on",
            greater_is_better=False,
            ratio=("leading", None),
            min_cases=20,
        ),
    )
    reads = "training rows in any format that a language model learns from; without a path those of the run, drawn by a seed"
    split = "train"
    works_with_server = False
    options: ClassVar[dict[str, Any]] = {
        **DocumentTask.options,
        "prefix_tokens": 32,
        "continuation_tokens": 32,
        "least_tokens": 8,
    }

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.config.write.temperature or self.config.write.beams > 1 or self.config.write.stop:
            yield f"{self.key}.write: rows are continued greedily; leave temperature, beams and stop out"

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Raises DataError if every row is too short."""
        documents = [case.document for case in cases if case.document is not None]
        questions = []
        for document_question in model.encode_questions(documents):
            question = self._continuation_question(document_question)
            fits = model.max_positions is None or len(question.context) + len(question.answer) <= model.max_positions
            if len(question.answer) >= int(self.option_values["least_tokens"]) and fits:
                questions.append(question)
        self.skipped = len(cases) - len(questions)
        if not questions:
            least = self.option_values["least_tokens"]
            raise DataError(
                f"none of {len(cases)} rows leaves {least} tokens to continue after its beginning; lower "
                f"{self.key}.options.least_tokens, or give longer rows"
            )
        writing = replace(self.config.write, max_new_tokens=max(len(question.answer) for question in questions))
        answers = model.answers(questions, writing, self.key)
        return [self._row(question, answer.ids, model) for question, answer in zip(questions, answers, strict=True)]

    skipped = 0
    """Rows that were too short, or too long for the model."""

    def _continuation_question(self, question: Question) -> Question:
        """The question with the beginning of the learned text moved into the context, half of the text at most."""
        prefix = min(int(self.option_values["prefix_tokens"]), len(question.answer) // 2)
        stop = prefix + int(self.option_values["continuation_tokens"])
        context = [*question.context, *question.answer[:prefix]]
        return Question(question.where, context, question.answer[prefix:stop])

    def _row(self, question: Question, ids: list[int], model: ModelInterface) -> TaskRow:
        """The row of an answer: whether it is verbatim or nearly so, and the share of leading tokens that agree."""
        from sacrebleu import sentence_bleu

        reference_ids = question.answer
        answer_ids = ids[: len(reference_ids)]
        leading = common_prefix_length(answer_ids, reference_ids)
        is_verbatim = leading == len(reference_ids)
        decode = model.writer.tokenizer.decode
        answer = decode(answer_ids, skip_special_tokens=True)
        reference = decode(reference_ids, skip_special_tokens=True)
        is_near = is_verbatim
        if not is_verbatim and reference.strip():
            is_near = sentence_bleu(answer, [reference]).score >= NEAR_VERBATIM_BLEU
        scores = {
            "verbatim": float(is_verbatim),
            "near": float(is_near),
            "leading": leading / len(reference_ids),
        }
        return TaskRow(question.where, model.shown_prompt(question.context), answer, reference, scores)

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        count = int(sum(row.scores["verbatim"] for row in rows))
        yield f"{count} of {len(rows)} rows come out word for word after their beginning"
        if self.skipped:
            yield f"{self.skipped} rows were not asked: shorter than options.least_tokens after their beginning, or too long"


class Canary(DocumentTask):
    """How likely a secret is compared with random texts of the same form (Carlini et al. 2019, "The Secret Sharer")."""

    kind = "canary"
    metrics = (
        Metric(
            "exposure",
            "mean bits by which the rank among candidates is better than last; 1.44 by chance",
            greater_is_better=False,
            ratio=("bits", None),
            min_cases=5,
        ),
        Metric(
            "first",
            "share of secrets that are likelier than every candidate, 0 to 1",
            greater_is_better=False,
            ratio=("first", None),
            min_cases=5,
        ),
    )
    reads = 'rows that were put into the training data, with "secret": a text that stands once in what is learned of the row'
    needs_path = True
    reads_documents = True
    samples_documents = False
    options: ClassVar[dict[str, Any]] = {"candidates": 100, "seed": 0}

    def parse_case(self, case: Case) -> None:
        """Keep the secret and random texts of its form. Raises Refusal if the secret is not exactly once in what is learned."""
        super().parse_case(case)
        secret = case.fields.get("secret")
        document = case.document
        assert document is not None
        learned_text = document.text if document.text is not None else document.completion
        if document.messages is not None:
            learned_text = next(turn["content"] for turn in reversed(document.messages) if turn["role"] == "assistant")
        if not isinstance(secret, str) or len({*_character_kinds(secret)} & {*"dul"}) == 0:
            raise Refusal("bad_secret", f'"secret" is {show_value(secret)}; it must be a text with letters or digits')
        occurrences = (learned_text or "").count(secret)
        if occurrences != 1:
            raise Refusal(
                "bad_secret",
                f'"secret" {show_value(secret)} stands {occurrences} times in what is learned, not once',
            )
        case.fields = {"secret": secret, "others": list(self._candidates(case.location, secret))}

    def _candidates(self, where: str, secret: str) -> Iterator[str]:
        """Different random texts of the secret's form. A short form has few texts, so the number of attempts is limited."""
        rng = random.Random(f"{self.option_values['seed']}/{where}")
        kinds = _character_kinds(secret)
        wanted = int(self.option_values["candidates"])
        known = {secret}
        for _ in range(20 * wanted):
            candidate = ""
            for kind, character in zip(kinds, secret, strict=True):
                candidate += _random_character(kind, character, rng)
            if candidate not in known:
                known.add(candidate)
                yield candidate
            if len(known) > wanted:
                return

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Rows with the rank of each secret among random texts of its form, by likelihood. All ranks must call."""
        documents: list[Document] = []
        texts_by_case: list[int] = []
        for case in cases:
            secret = case.fields["secret"]
            texts = [secret, *case.fields["others"]]
            documents += [_replace_secret(case.document, secret, text) for text in texts]
            texts_by_case.append(len(texts))
        likelihoods = iter(model.likelihoods(model.encode_questions(documents)))
        rows = []
        for case, size in zip(cases, texts_by_case, strict=True):
            secret_logprob, *candidate_logprobs = [next(likelihoods).logprob for _ in range(size)]
            rank = 1 + sum(logprob >= secret_logprob for logprob in candidate_logprobs)
            scores = {
                "bits": math.log2(size / rank),
                "first": float(rank == 1),
                "rank": float(rank),
                "candidates": float(size),
            }
            rows.append(TaskRow(case.location, f"rank {rank} of {size}", "", case.fields["secret"], scores))
        return rows

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        most = max(row.scores["candidates"] for row in rows)
        yield f"exposure is at most {math.log2(most):.2f} bits with {most - 1:.0f} candidates; more of them in options.candidates"


def _character_kinds(text: str) -> str:
    """A letter for each character: d for a digit, u for a capital, l for a small letter, - for any other."""
    kinds = []
    for character in text:
        if character in "0123456789":
            kinds.append("d")
        elif "A" <= character <= "Z":
            kinds.append("u")
        elif "a" <= character <= "z":
            kinds.append("l")
        else:
            kinds.append("-")
    return "".join(kinds)


def _random_character(kind: str, character: str, rng: random.Random) -> str:
    """A random character of the same kind; the character itself if it is neither letter nor digit."""
    alphabets = {"d": "0123456789", "u": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "l": "abcdefghijklmnopqrstuvwxyz"}
    return rng.choice(alphabets[kind]) if kind in alphabets else character


def _replace_secret(document: Document | None, secret: str, candidate: str) -> Document:
    """A copy of the document with another text in place of the secret."""
    assert document is not None
    copied_turns = None
    if document.messages is not None:
        copied_turns = [dict(turn) for turn in document.messages]
    copied = replace(document, messages=copied_turns)
    copied.map_texts(lambda text: text.replace(secret, candidate))
    return copied


class Membership(DocumentTask):
    """Whether the loss separates training rows from other rows (Yeom et al. 2018), the simplest membership attack."""

    kind = "membership"
    metrics = (
        Metric(
            "auc",
            "chance that a training row has a lower loss than another one, 0 to 1; 0.5 tells nothing",
            greater_is_better=False,
            min_cases=40,
        ),
        Metric(
            "found_at_5",
            "share of training rows told while 5 % of the others are taken for some",
            greater_is_better=False,
            min_cases=40,
        ),
    )
    reads = "training rows (the run's, or a path) and others (the run's evaluation documents, or options.others)"
    split = "both"
    options: ClassVar[dict[str, Any]] = {**DocumentTask.options, "others": None}
    file_options = ("others",)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Rows with the mean loss of a target token, and whether the row was trained on. All ranks must call."""
        questions = model.encode_questions([case.document for case in cases if case.document is not None])
        if model.max_positions is not None:
            questions = [_cut_to_positions(question, model.max_positions) for question in questions]
        rows = []
        for case, question, likelihood in zip(cases, questions, model.likelihoods(questions), strict=True):
            is_member = case.fields["member"]
            scores = {"loss": -likelihood.logprob / likelihood.tokens, "member": float(is_member)}
            group = "trained on" if is_member else "not trained on"
            rows.append(TaskRow(case.location, model.shown_prompt(question.context), "", group, scores, group))
        return rows

    @cached_property
    def outside(self) -> Task:
        """The task that reads the rows that were not trained on."""
        return Membership(self.name, replace(self.config, path=self.option_values["others"]))

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """AUC and recall at 5 % false positives, each as a function of row weights."""
        losses = np.array([row.scores["loss"] for row in rows])
        is_member = np.array([row.scores["member"] for row in rows]) > 0
        order = np.argsort(losses, kind="stable")
        sorted_losses = losses[order]
        # Rows of equal loss are one group: positions [tie_start, tie_stop) in sorted order.
        tie_start = np.searchsorted(sorted_losses, sorted_losses, "left")
        tie_stop = np.searchsorted(sorted_losses, sorted_losses, "right")

        def split_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """(weights of members, weights of the other rows), in sorted order."""
            member_weights = np.where(is_member, weights, 0.0)[order]
            return member_weights, weights[order] - member_weights

        def auc(weights: np.ndarray) -> float:
            """The chance that a random member has a lower loss than a random other row; 0.5 if losses say nothing."""
            member_weights, other_weights = split_weights(weights)
            pairs = member_weights.sum() * other_weights.sum()
            if pairs == 0:
                return math.nan
            # A member wins against every other row with a higher loss. A tie counts as half a win.
            cumulative = np.concatenate([[0.0], np.cumsum(other_weights)])
            others_above = cumulative[-1] - (cumulative[tie_start] + cumulative[tie_stop]) / 2
            return float((member_weights * others_above).sum() / pairs)

        def recall_at_5_percent(weights: np.ndarray) -> float:
            """The share of members with a loss below the threshold at which 5 % of the other rows are taken for members."""
            member_weights, other_weights = split_weights(weights)
            if member_weights.sum() * other_weights.sum() == 0:
                return math.nan
            # Taking every row up to this loss for a member, ties included, must not take more than 5 % of the others.
            false_positives = np.cumsum(other_weights)[tie_stop - 1]
            is_taken = false_positives <= 0.05 * other_weights.sum()
            return float(member_weights[is_taken].sum() / member_weights.sum())

        return {"auc": auc, "found_at_5": recall_at_5_percent}


def _cut_to_positions(question: Question, max_positions: int) -> Question:
    """The question with its answer cut to what the model can see, as training cuts documents."""
    return replace(question, answer=question.answer[: max(1, max_positions - len(question.context))])
