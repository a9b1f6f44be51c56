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
    """Reads documents of any format that a language model learns from, whole texts too."""

    formats = FORMATS_WITH_TEXT
    samples_documents = True
    options: ClassVar[dict[str, Any]] = {"sample": 200, "seed": 0}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        for name, default in self.options.items():
            value = self.option_values[name]
            if isinstance(default, int) and (not isinstance(value, int) or value < (0 if name == "seed" else 1)):
                yield f"{self.key}.options.{name}={value}: must be a whole number{'' if name == 'seed' else ' above 0'}"

    def read(self, case: Case) -> None:
        document = case.document
        if document is None or (document.text is None and document.prompt is None and document.messages is None):
            raise Refusal("no_text", "the row is no text, prompt with answer, or conversation")
        if document.messages is not None and not any(turn["role"] == "assistant" for turn in document.messages):
            raise Refusal("no_answer", "the conversation has no assistant turn, of which alone something is learned")


class Memorisation(DocumentTask):
    """Whether the model goes on as the row does (Carlini et al. 2023, "Quantifying memorization")."""

    kind = "memorisation"
    metrics = (
        Metric(
            "verbatim", "share of rows continued token by token, 0 to 1", False, ratio=("verbatim", None), min_cases=20
        ),
        Metric(
            "near_verbatim",
            f"share of rows continued with BLEU of {NEAR_VERBATIM_BLEU:g} or more",
            False,
            ratio=("near", None),
            min_cases=20,
        ),
        Metric(
            "leading",
            "mean share of the continuation that comes out from its first token on",
            False,
            ("leading", None),
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
        """Raises DataError where every row is too short."""
        asked = []
        for question in model.encode_questions([case.document for case in cases if case.document is not None]):
            given = min(int(self.option_values["prefix_tokens"]), len(question.answer) // 2)
            wanted = question.answer[given : given + int(self.option_values["continuation_tokens"])]
            context = [*question.context, *question.answer[:given]]
            fits = model.max_positions is None or len(context) + len(wanted) <= model.max_positions
            if len(wanted) >= int(self.option_values["least_tokens"]) and fits:
                asked.append(Question(question.where, context, wanted))
        self.skipped = len(cases) - len(asked)
        if not asked:
            least = self.option_values["least_tokens"]
            raise DataError(
                f"none of {len(cases)} rows leaves {least} tokens to continue after its beginning; lower "
                f"{self.key}.options.least_tokens, or give longer rows"
            )
        how = replace(self.config.write, max_new_tokens=max(len(question.answer) for question in asked))
        return [
            self._row(question, one.ids, model)
            for question, one in zip(asked, model.answers(asked, how, self.key), strict=True)
        ]

    skipped = 0
    """Rows that were too short, or too long for the model."""

    def _row(self, question: Question, ids: list[int], model: ModelInterface) -> TaskRow:
        from sacrebleu import sentence_bleu

        wanted, size = question.answer, len(question.answer)
        said = ids[:size]
        same = next((place for place in range(size) if place >= len(said) or said[place] != wanted[place]), size)
        decode = model.writer.tokenizer.decode
        text, reference = decode(said, skip_special_tokens=True), decode(wanted, skip_special_tokens=True)
        near = same == size or (
            bool(reference.strip()) and sentence_bleu(text, [reference]).score >= NEAR_VERBATIM_BLEU
        )
        scores = {"verbatim": float(same == size), "near": float(near), "leading": same / size}
        return TaskRow(question.where, model.shown_prompt(question.context), text, reference, scores)

    def notes(self, rows: Sequence[TaskRow], spans: dict[str, tuple[float, float]]) -> Iterator[str]:
        count = int(sum(row.scores["verbatim"] for row in rows))
        yield f"{count} of {len(rows)} rows come out word for word after their beginning"
        if self.skipped:
            yield f"{self.skipped} rows were not asked: shorter than options.least_tokens after their beginning, or too long"


class Canary(DocumentTask):
    """How much likelier the model holds a secret than others of its form (Carlini et al. 2019, "The Secret Sharer")."""

    kind = "canary"
    metrics = (
        Metric(
            "exposure",
            "mean bits by which the rank among candidates is better than last; 1.44 by chance",
            False,
            ("bits", None),
            min_cases=5,
        ),
        Metric(
            "first",
            "share of secrets that are likelier than every candidate, 0 to 1",
            False,
            ("first", None),
            min_cases=5,
        ),
    )
    reads = 'rows that were put into the training data, with "secret": a text that stands once in what is learned of the row'
    needs_path = True
    reads_documents = True
    samples_documents = False
    options: ClassVar[dict[str, Any]] = {"candidates": 100, "seed": 0}

    def read(self, case: Case) -> None:
        super().read(case)
        secret = case.fields.get("secret")
        document = case.document
        assert document is not None
        learned_text = document.text if document.text is not None else document.completion
        if document.messages is not None:
            said = next(turn["content"] for turn in reversed(document.messages) if turn["role"] == "assistant")
        if not isinstance(secret, str) or len({*_character_kinds(secret)} & {*"dul"}) == 0:
            raise Refusal("bad_secret", f'"secret" is {show_value(secret)}; it must be a text with letters or digits')
        if (said or "").count(secret) != 1:
            raise Refusal(
                "bad_secret",
                f'"secret" {show_value(secret)} stands {(said or "").count(secret)} times in what is learned, not once',
            )
        case.fields = {"secret": secret, "others": list(self._candidates(case.where, secret))}

    def _candidates(self, where: str, secret: str) -> Iterator[str]:
        drawn, seen = random.Random(f"{self.option_values['seed']}/{where}"), {secret}
        for _ in range(20 * int(self.option_values["candidates"])):
            other = "".join(
                _random_character(kind, letter, drawn)
                for kind, letter in zip(_character_kinds(secret), secret, strict=True)
            )
            if other not in seen:
                seen.add(other)
                yield other
            if len(seen) > int(self.option_values["candidates"]):
                return

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        documents, sizes = list[Document](), list[int]()
        for case in cases:
            secret, others = case.fields["secret"], case.fields["others"]
            documents += [_replace_secret(case.document, secret, each) for each in [secret, *others]]
            sizes.append(1 + len(others))
        held = iter(model.likelihoods(model.encode_questions(documents)))
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
            rows.append(TaskRow(case.where, f"rank {rank} of {size}", "", case.fields["secret"], scores))
        return rows

    def notes(self, rows: Sequence[TaskRow], spans: dict[str, tuple[float, float]]) -> Iterator[str]:
        most = max(row.scores["candidates"] for row in rows)
        yield f"exposure is at most {math.log2(most):.2f} bits with {most - 1:.0f} candidates; more of them in options.candidates"


def _character_kinds(text: str) -> str:
    """d, u, l for a digit, a capital, a small letter; - for what stays."""
    return "".join(
        "d" if c in "0123456789" else "u" if "A" <= c <= "Z" else "l" if "a" <= c <= "z" else "-" for c in text
    )


def _random_character(kind: str, letter: str, drawn: random.Random) -> str:
    letters = {"d": "0123456789", "u": "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "l": "abcdefghijklmnopqrstuvwxyz"}
    return drawn.choice(letters[kind]) if kind in letters else letter


def _replace_secret(document: Document | None, secret: str, other: str) -> Document:
    """The document with another secret, up to its last answer."""
    assert document is not None
    copied_turns = None
    if document.messages is not None:
        copied_turns = [dict(turn) for turn in document.messages]
    copied = replace(document, messages=copied_turns)
    copied.map_texts(lambda text: text.replace(secret, candidate))
    return copied


class Membership(DocumentTask):
    """Whether the loss tells training rows from others (Yeom et al. 2018): an attacker's first way, of which 0.5 is none."""

    kind = "membership"
    metrics = (
        Metric(
            "auc",
            "chance that a training row has a lower loss than another one, 0 to 1; 0.5 tells nothing",
            False,
            min_cases=40,
        ),
        Metric(
            "found_at_5", "share of training rows told while 5 % of the others are taken for some", False, min_cases=40
        ),
    )
    reads = "training rows (the run's, or a path) and others (the run's evaluation documents, or options.others)"
    split = "both"
    options: ClassVar[dict[str, Any]] = {**DocumentTask.options, "others": None}
    file_options = ("others",)

    def run(self, cases: Sequence[Case], model: ModelInterface) -> list[TaskRow]:
        """Raises DataError where there are only training rows, or only others."""
        questions = model.encode_questions([case.document for case in cases if case.document is not None])
        if model.max_positions is not None:  # as training cuts them
            questions = [replace(q, answer=q.answer[: max(1, model.max_positions - len(q.context))]) for q in questions]
        rows = []
        for case, question, held in zip(cases, questions, model.likelihoods(questions), strict=True):
            scores = {"loss": -held.logprob / held.tokens, "member": float(case.fields["member"])}
            source = "trained on" if case.fields["member"] else "not trained on"
            rows.append(TaskRow(case.where, model.shown_prompt(question.context), "", source, scores, source))
        return rows

    @cached_property
    def outside(self) -> Task:
        """What reads the rows that were not trained on."""
        return Membership(self.name, replace(self.config, path=self.option_values["others"]))

    def weighted_metrics(self, rows: Sequence[TaskRow]) -> dict[str, Callable[[np.ndarray], float]]:
        loss = np.array([row.scores["loss"] for row in rows])
        member = np.array([row.scores["member"] for row in rows]) > 0
        order = np.argsort(loss, kind="stable")
        ties = np.searchsorted(loss[order], loss[order], "left"), np.searchsorted(loss[order], loss[order], "right")

        def split_weights(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """(weights of members, weights of the other rows), in sorted order."""
            member_weights = np.where(is_member, weights, 0.0)[order]
            return member_weights, weights[order] - member_weights

        def auc(weights: np.ndarray) -> float:
            member_weights, other_weights = split_weights(weights)
            pairs = member_weights.sum() * other_weights.sum()
            if pairs == 0:
                return math.nan
            # A member wins against every other row with a higher loss. A tie counts as half a win.
            cumulative = np.concatenate([[0.0], np.cumsum(other_weights)])
            others_above = cumulative[-1] - (cumulative[tie_start] + cumulative[tie_stop]) / 2
            return float((member_weights * others_above).sum() / pairs)

        def recall_at_5_percent(weights: np.ndarray) -> float:
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
