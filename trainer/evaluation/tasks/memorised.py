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
from trainer.data.fields import RowError, show_value
from trainer.evaluation.tasks.base import RatioOfSums, Task, TaskCase, TaskMetric, TaskRow, documents_of, score_array
from trainer.evaluation.tasks.model_interface import ModelInterface, Question
from trainer.evaluation.tasks.texts import common_prefix_length

NEAR_VERBATIM_BLEU = 75.0
"""BLEU above which a continuation is nearly verbatim (Ippolito et al. 2023, "Preventing Verbatim Memorization")."""
ATTEMPTS_PER_CANDIDATE = 20
"""How many random texts are tried for each candidate of a secret, in case the form allows too few different ones."""
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
        """Yield an error message for each invalid setting.

        Options that are whole numbers must be above 0, the seed at least 0.
        """
        yield from super().problems()
        for name, default in self.options.items():
            if not isinstance(default, int):  # the option is no number
                continue
            setting = self.option_values[name]
            if name == "seed":
                if not isinstance(setting, int) or setting < 0:
                    yield f"{self.config_key}.options.{name}={setting}: must be a whole number"
            elif not isinstance(setting, int) or setting < 1:
                yield f"{self.config_key}.options.{name}={setting}: must be a whole number above 0"

    def prepare_case(self, case: TaskCase) -> None:
        """Refuse a row of which a language model would learn nothing; every other row stays as it is.

        Text that is empty is found later, when it is encoded. Raises RowError for a row without text, or a conversation
        without an answer.
        """
        document = case.document
        if document is None or (document.text is None and document.prompt is None and document.messages is None):
            raise RowError("no_text", "the row is no text, prompt with answer, or conversation")
        if document.messages is None:
            return
        has_answer = any(turn["role"] == "assistant" for turn in document.messages)
        if not has_answer:
            raise RowError("no_answer", "the conversation has no assistant turn, of which alone something is learned")


class Memorisation(DocumentTask):
    """Whether the model continues the beginning of a row as the row does (Carlini et al. 2023, "Quantifying memorization")."""

    kind = "memorisation"
    metrics = (
        TaskMetric(
            "verbatim",
            "share of rows continued token by token, 0 to 1",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("verbatim"),
            min_cases=20,
        ),
        TaskMetric(
            "near_verbatim",
            f"share of rows continued with BLEU of {NEAR_VERBATIM_BLEU:g} or more",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("near"),
            min_cases=20,
        ),
        TaskMetric(
            "leading",
            "mean share of the continuation that comes out from its first token on",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("leading"),
            min_cases=20,
        ),
    )
    rows_description = (
        "training rows in any format for language models; without a path, a random sample of the run's training rows"
    )
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
        if self.decoding.temperature or self.decoding.beams > 1 or self.decoding.stop:
            yield f"{self.config_key}.write: rows are continued greedily; leave temperature, beams and stop out"

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Let the model continue the beginning of each training row, and report how far it reproduces the row's own text.

        It continues greedily, token by token. Rows that are too short, or too long for the model, are left out; sets
        `num_skipped` to their number. All ranks must call. Raises DataError if no row is left.
        """
        documents = documents_of(cases)
        least_tokens = int(self.option_values["least_tokens"])
        questions = []
        for document_question in model.encode_questions(documents):
            question = self._continuation_question(document_question)
            tokens = len(question.context) + len(question.answer)
            fits = model.max_positions is None or tokens <= model.max_positions
            if len(question.answer) >= least_tokens and fits:
                questions.append(question)
        self.num_skipped = len(cases) - len(questions)
        if not questions:
            raise DataError(
                f"none of {len(cases)} rows leaves {least_tokens} tokens to continue after its beginning; lower "
                f"{self.config_key}.options.least_tokens, or give longer rows"
            )

        # All rows are asked together, so each gets as many tokens as the longest continuation needs.
        longest_continuation = max(len(question.answer) for question in questions)
        decoding = replace(self.decoding, max_new_tokens=longest_continuation)
        answers = model.generate_answers(questions, decoding, self.config_key)
        return [
            self._memorisation_row(question, answer.ids, model)
            for question, answer in zip(questions, answers, strict=True)
        ]

    num_skipped = 0
    """Rows that were too short, or too long for the model, in the last call of `score_cases`."""

    def _continuation_question(self, question: Question) -> Question:
        """Split what is learned of a row: its beginning joins the context, and what follows is the answer to be compared.

        A question is token ids in two parts: the model reads `context`, and `answer` is how the row goes on. The beginning is
        `options.prefix_tokens` long, at most half of the learned text; the answer are the next `options.continuation_tokens`.
        """
        num_prefix_tokens = min(int(self.option_values["prefix_tokens"]), len(question.answer) // 2)
        stop = num_prefix_tokens + int(self.option_values["continuation_tokens"])
        context = [*question.context, *question.answer[:num_prefix_tokens]]
        return Question(where=question.where, context=context, answer=question.answer[num_prefix_tokens:stop])

    def _memorisation_row(self, question: Question, answer_ids: list[int], model: ModelInterface) -> TaskRow:
        """The report's row of one continuation: whether it is the row's own text, nearly so, and how far from its start.

        `question`: the beginning of the training row as `context`, and how it goes on as `answer`, both as token ids.
        `answer_ids`: how the model went on.
        """
        from sacrebleu import sentence_bleu

        reference_ids = question.answer
        # All rows were given as many new tokens as the longest continuation needs.
        answer_ids = answer_ids[: len(reference_ids)]
        num_equal_tokens = common_prefix_length(answer_ids, reference_ids)
        is_verbatim = num_equal_tokens == len(reference_ids)
        decode = model.answer_generator.tokenizer.decode  # without special tokens, which are not text of the row
        answer = decode(answer_ids, skip_special_tokens=True)
        reference = decode(reference_ids, skip_special_tokens=True)
        is_near = is_verbatim
        if not is_verbatim and reference.strip():  # BLEU is not defined against a blank reference
            is_near = sentence_bleu(answer, [reference]).score >= NEAR_VERBATIM_BLEU
        scores = {
            "verbatim": float(is_verbatim),
            "near": float(is_near),
            "leading": num_equal_tokens / len(reference_ids),
        }
        return TaskRow(
            where=question.where,
            prompt=model.decode_prompt_end(question.context),
            answer=answer,
            reference=reference,
            scores=scores,
        )

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        """Sentences for the report: how many rows come out word for word, and how many were not asked. `intervals`: not used."""
        num_verbatim = int(score_array(rows, "verbatim").sum())
        yield f"{num_verbatim} of {len(rows)} rows come out word for word after their beginning"
        if self.num_skipped:
            yield f"{self.num_skipped} rows were not asked: shorter than options.least_tokens after their beginning, or too long"


class Canary(DocumentTask):
    """How likely a secret is compared with random texts of the same form (Carlini et al. 2019, "The Secret Sharer")."""

    kind = "canary"
    metrics = (
        TaskMetric(
            "exposure",
            "mean bits by which the rank among candidates is better than last; 1.44 by chance",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("bits"),
            min_cases=5,
        ),
        TaskMetric(
            "first",
            "share of secrets that are likelier than every candidate, 0 to 1",
            greater_is_better=False,
            ratio_of_sums=RatioOfSums("first"),
            min_cases=5,
        ),
    )
    rows_description = (
        'rows that were planted in the training data, each with a "secret": a text that occurs exactly once in the part '
        "that the model learns"
    )
    needs_path = True
    reads_documents = True
    samples_documents = False
    options: ClassVar[dict[str, Any]] = {"candidates": 100, "seed": 0}

    def prepare_case(self, case: TaskCase) -> None:
        """Prepare the test of one secret: replace the row's columns by the secret and random texts that it is compared with.

        A secret was planted in the training data on purpose. {"secret": "A7-x", "others": ["Q2-d", "K0-m", ...]}: the others
        have the same form. Raises RowError if the secret has no letters or digits, or does not stand exactly once in what is
        learned of the row.
        """
        super().prepare_case(case)
        secret = case.fields.get("secret")
        document = case.document
        assert document is not None
        learned_text = document.text if document.text is not None else document.completion
        if document.messages is not None:
            learned_text = next(turn["content"] for turn in reversed(document.messages) if turn["role"] == "assistant")
        # Other texts of its form differ in digits, capitals ("u") and small letters ("l"); it needs one of these.
        has_variable_characters = isinstance(secret, str) and bool(
            {*_character_kinds(secret)} & VARIABLE_CHARACTER_KINDS
        )
        if not isinstance(secret, str) or not has_variable_characters:
            raise RowError("bad_secret", f'"secret" is {show_value(secret)}; it must be a text with letters or digits')
        occurrences = (learned_text or "").count(secret)
        if occurrences != 1:
            raise RowError(
                "bad_secret",
                f'"secret" {show_value(secret)} stands {occurrences} times in what is learned, not once',
            )
        case.fields = {"secret": secret, "others": list(self._random_candidates(case.location, secret))}

    def _random_candidates(self, location: str, secret: str) -> Iterator[str]:
        """Make `options.candidates` different random texts of the secret's form, with which its likelihood is compared.

        "A7-x" may become "Q2-d". A short form has few texts, so the number of attempts is limited, and there may be fewer
        candidates. `location`: `file:line` of the row, which seeds the random numbers, so that a row gets the same candidates
        in every evaluation.
        """
        rng = random.Random(f"{self.option_values['seed']}/{location}")
        kinds = _character_kinds(secret)
        wanted = int(self.option_values["candidates"])
        known_texts = {secret}
        for _ in range(ATTEMPTS_PER_CANDIDATE * wanted):
            candidate = ""
            for kind, character in zip(kinds, secret, strict=True):
                candidate += _random_character(kind, character, rng)
            if candidate not in known_texts:
                known_texts.add(candidate)
                yield candidate
            if len(known_texts) > wanted:
                return

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Rank each secret among random texts of its form by how likely the model finds them. All ranks must call.

        A model that has memorised a secret finds it likelier than the others. Rank 1 is the likeliest. The exposure in bits is
        log2(number of texts / rank): 6.66 for rank 1 of 101 texts. Returns a report row for each secret.
        """
        documents: list[Document] = []
        for case in cases:
            secret = case.fields["secret"]
            for text in (secret, *case.fields["others"]):
                documents.append(_replace_secret(case.document, secret, text))
        likelihoods = iter(model.likelihoods(model.encode_questions(documents)))

        rows = []
        for case in cases:
            secret_logprob = next(likelihoods).logprob
            candidate_logprobs = [next(likelihoods).logprob for _ in case.fields["others"]]
            num_texts = 1 + len(candidate_logprobs)
            # Of equal likelihoods the secret ranks last, so that a model that finds everything alike exposes nothing.
            rank = 1 + sum(logprob >= secret_logprob for logprob in candidate_logprobs)
            exposure_bits = math.log2(num_texts / rank)
            scores = {
                "bits": exposure_bits,
                "first": float(rank == 1),
                "rank": float(rank),
                "candidates": float(num_texts),
            }
            rows.append(
                TaskRow(
                    where=case.location,
                    prompt=f"rank {rank} of {num_texts}",
                    answer="",
                    reference=case.fields["secret"],
                    scores=scores,
                )
            )
        return rows

    def notes(self, rows: Sequence[TaskRow], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
        """A sentence for the report: the largest exposure that so many candidates can show. `intervals`: not used."""
        most = max(row.scores["candidates"] for row in rows)
        yield f"exposure is at most {math.log2(most):.2f} bits with {most - 1:.0f} candidates; more of them in options.candidates"


VARIABLE_CHARACTER_KINDS = {"d", "u", "l"}
"""Kinds of characters that other texts of a secret's form may have another one of; see `_character_kinds`."""


def _character_kinds(text: str) -> str:
    """The form of a secret, a letter for each character: digit "d", capital "u", small letter "l", any other "-".

    "A7-x" -> "ud-l".
    """
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
    """A copy of a document in which a random text stands in place of the secret, to compare their likelihoods."""
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
        TaskMetric(
            "auc",
            "chance that a training row has a lower loss than another one, 0 to 1; 0.5 tells nothing",
            greater_is_better=False,
            min_cases=40,
        ),
        TaskMetric(
            "found_at_5",
            "share of training rows told while 5 % of the others are taken for some",
            greater_is_better=False,
            min_cases=40,
        ),
    )
    rows_description = (
        "rows that were trained on (the path, or the run's training data) and rows that were not (options.others, or the "
        "run's evaluation documents)"
    )
    split = "both"
    options: ClassVar[dict[str, Any]] = {**DocumentTask.options, "others": None}
    file_options = ("others",)

    def score_cases(self, cases: Sequence[TaskCase], model: ModelInterface) -> list[TaskRow]:
        """Measure the loss of each document, so that the metrics can say how well it tells training rows from others.

        All ranks must call. Returns a report row for each document, with the mean loss of a target token and whether it was
        trained on (`member`).
        """
        questions = model.encode_questions(documents_of(cases))
        if model.max_positions is not None:
            questions = [_cut_to_positions(question, model.max_positions) for question in questions]
        rows = []
        for case, question, likelihood in zip(cases, questions, model.likelihoods(questions), strict=True):
            is_member = case.fields["member"]
            scores = {"loss": -likelihood.logprob / likelihood.num_tokens, "member": float(is_member)}
            group = "trained on" if is_member else "not trained on"
            prompt = model.decode_prompt_end(question.context)
            rows.append(
                TaskRow(where=case.location, prompt=prompt, answer="", reference=group, scores=scores, source=group)
            )
        return rows

    @cached_property
    def untrained_task(self) -> Task:
        """The task that reads the rows that were not trained on."""
        return Membership(self.name, replace(self.config, path=self.option_values["others"]))

    def weighted_metric_functions(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        """The metrics of the attack as functions that the bootstrap calls for each resample of the rows.

        "auc" and "found_at_5" (recall at 5 % false positives). Each takes row weights, float64 [rows]: how often a row counts.
        """
        ranking = _LossRanking(score_array(rows, "loss"), score_array(rows, "member") > 0)
        return {"auc": ranking.auc, "found_at_5": ranking.recall_at_5_percent_false_positives}


class _LossRanking:
    """Rows in the order of their loss. Its metrics are functions of row weights: how often each row counts, float64 [rows]."""

    def __init__(self, losses: np.ndarray, is_member: np.ndarray) -> None:
        """Sort the rows once, so that each resample is a few sums. `losses`: float64 [rows].

        `is_member`: was trained on, bool [rows].
        """
        self._is_member = is_member
        self._order = np.argsort(losses, kind="stable")
        sorted_losses = losses[self._order]
        # Rows of equal loss are one group: positions [tie_start, tie_stop) in sorted order.
        self._tie_start = np.searchsorted(sorted_losses, sorted_losses, "left")
        self._tie_stop = np.searchsorted(sorted_losses, sorted_losses, "right")

    def _sorted_weights(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(weights of members, weights of the other rows), the lowest loss first; 0 for rows of the other kind."""
        member_weights = np.where(self._is_member, weights, 0.0)[self._order]
        return member_weights, weights[self._order] - member_weights

    def auc(self, weights: np.ndarray) -> float:
        """How well losses tell members from other rows: how often a random member has the lower loss; 0.5 says nothing.

        A member is a row that was trained on. `weights`: how often each row counts, float64 [rows]. NaN if no member or no
        other row has a weight.
        """
        member_weights, other_weights = self._sorted_weights(weights)
        pairs = member_weights.sum() * other_weights.sum()
        if pairs == 0:
            return math.nan
        # A member wins against every other row with a higher loss. A tie counts as half a win.
        cumulative = np.concatenate([[0.0], np.cumsum(other_weights)])
        others_above = cumulative[-1] - (cumulative[self._tie_start] + cumulative[self._tie_stop]) / 2
        return float((member_weights * others_above).sum() / pairs)

    def recall_at_5_percent_false_positives(self, weights: np.ndarray) -> float:
        """The share of members that an attacker finds who takes every row with a loss below a threshold for a member.

        The threshold is the highest at which at most 5 % of the other rows are taken for members too. `weights`: how often
        each row counts, float64 [rows]. NaN if no member or no other row has a weight.
        """
        member_weights, other_weights = self._sorted_weights(weights)
        if member_weights.sum() * other_weights.sum() == 0:
            return math.nan
        # Taking every row up to this loss for a member, ties included, must not take more than 5 % of the others.
        false_positives = np.cumsum(other_weights)[self._tie_stop - 1]
        is_taken = false_positives <= 0.05 * other_weights.sum()
        return float(member_weights[is_taken].sum() / member_weights.sum())


def _cut_to_positions(question: Question, max_positions: int) -> Question:
    """The question with its answer cut to what the model can see, as training cuts documents."""
    return replace(question, answer=question.answer[: max(1, max_positions - len(question.context))])
