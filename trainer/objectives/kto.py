"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers with a verdict each, no pairs.

An answer gains by being likelier (desirable) or less likely (undesirable) than under the model before training, beside
a reference point: how much likelier the model has made arbitrary answers, estimated on prompts that meet the answers of
others. That estimate is a mean over the whole step, computed before its first backward pass, so that it is the same for
any micro-batch, number of ranks and strategy. TRL takes it over one device's micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from strategies.errors import DataError
from strategies.settings import number
from trainer.data.batches.collate import Collator
from trainer.data.batches.cutting import AXES, Axis
from trainer.data.config import DataConfig, DataFormat, Layout
from trainer.data.document import WRONG_KIND_REASON, Document, Message, Tally
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset
from trainer.data.tokens.encode import DOCUMENTS_PER_BATCH, Encoder
from trainer.data.tokens.supervision import align_learned_answers
from trainer.data.tokens.truncation import fit_answers
from trainer.objectives.base import (
    Objective,
    ObjectiveConfig,
    ObjectiveFamily,
    OtherSettings,
    Reference,
    UnlabelledDataSpec,
    formats_of,
)
from trainer.objectives.causal import counted_here, reference_logps, sequence_logps
from trainer.objectives.pairs import OVER_LENGTH_POLICIES_FOR_ANSWERS, weight_refusal
from trainer.objectives.reference import MISMATCHED_REFERENCE

DESIRABLE = "desirable"
UNDESIRABLE = "undesirable"
"""Names of the counts of answers by their verdict. `DESIRABLE` is also a mark of each sequence: 1 or 0."""
MAX_PARTNER_DISTANCE = 64
"""How many sequences back a partner with another prompt is looked for."""


@dataclass(kw_only=True, slots=True)
class KtoConfig(ObjectiveConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers with a verdict each, no pairs."""

    name: str = "kto"
    beta: float = number(0.1, above=0, advice="0.1 for dpo, kto and orpo, 2 for simpo")
    """How closely the model stays to the reference model. Larger is closer."""
    desirable_weight: float = number(1.0, above=0, advice="1 as a rule; raise that of the rarer verdict")
    """Weight of desirable answers. The loss is still divided by the number of answers."""
    undesirable_weight: float = number(1.0, above=0, advice="1 as a rule; raise that of the rarer verdict")
    """Weight of undesirable answers. Keep weight times count of desirable to undesirable answers between 1:1 and 4:3."""


def kto_problems(config: KtoConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the data settings for KTO, which learns from answers rated desirable or not, one line each.

    `other_settings`: the rest of the run's configuration.
    """
    data = other_settings.data
    if data.packing:
        yield "data.packing=true: objective=kto counts answers, each with its verdict; set data.packing=false"
    if data.over_length not in OVER_LENGTH_POLICIES_FOR_ANSWERS:
        yield (
            f"data.over_length={data.over_length.value}: would separate an answer from its prompt; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, data_format in formats_of(data).items():
        if data_format not in (DataFormat.auto, DataFormat.thumbs, DataFormat.preference):
            yield (
                f"{key}.format={data_format}: objective=kto reads answers with a verdict; set {key}.format=thumbs, or "
                f"{key}.format=preference"
            )


class RatedDataSpec(UnlabelledDataSpec):
    """Answers with a verdict: a row with a thumb is one sequence; a preference pair is two, its chosen answer desirable and
    its rejected one not. Only the last answer of a conversation is rated: earlier ones are context.
    """

    formats = (DataFormat.thumbs, DataFormat.preference)
    over_length = OVER_LENGTH_POLICIES_FOR_ANSWERS
    marks = {DESIRABLE: 1, REFERENCE: 0.0}  # noqa: RUF012 - never changed

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        if document.desirable is not None or (document.chosen and document.rejected):
            return weight_refusal(document)
        return WRONG_KIND_REASON, (
            "has no label that objective=kto can use; give rows with thumbs up or down (data.format=thumbs) or pairs "
            "(data.format=preference), or use objective=sft"
        )

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Turn documents into samples for KTO, one for each rated answer: marked 1 under `DESIRABLE` if rated good, else 0.

        A document has one rated answer (thumbs up or down), or two (a pair: the chosen, then the rejected). It has no sample if
        an answer is too long and `data.over_length` does not shorten it; `tally` then counts it as dropped.
        """
        for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
            batch = documents[start : start + DOCUMENTS_PER_BATCH]
            conversations_by_document = [_rated_conversations(document) for document in batch]
            # All answers of the batch are encoded together; `encoded_samples` gives them in the same order.
            documents_and_turns = []
            for document, conversations in zip(batch, conversations_by_document, strict=True):
                documents_and_turns += [(document, turns) for turns in conversations]
            encoded_samples = iter(encoder.encode_answers(documents_and_turns))
            for document, conversations in zip(batch, conversations_by_document, strict=True):
                samples = [next(encoded_samples) for _ in conversations]
                if len(samples) == 2:  # learn the same turns of both answers
                    chosen, rejected = samples
                    align_learned_answers(document, chosen=chosen, rejected=rejected)
                fitted_samples = fit_answers(encoder, document, samples, config, tally)  # none if one does not fit
                is_pair = len(fitted_samples) == 2  # the chosen answer, then the rejected one
                verdicts = (True, False) if is_pair else (bool(document.desirable),)
                for sample, is_desirable in zip(fitted_samples, verdicts, strict=False):  # there may be no sample
                    sample.marks[DESIRABLE] = int(is_desirable)
                yield document, fitted_samples

    def counts(self, sample: Sample) -> dict[str, float]:
        """An answer counts once, under its verdict too."""
        is_desirable = int(sample.marks[DESIRABLE])
        return {"loss": 1, DESIRABLE: is_desirable, UNDESIRABLE: 1 - is_desirable}

    def check(self, train: TokenDataset) -> None:
        """Raise DataError if all answers have the same verdict: nothing could be told apart, and a column may be read wrongly."""
        num_desirable = _num_answers_with_verdict(train, DESIRABLE)
        num_undesirable = _num_answers_with_verdict(train, UNDESIRABLE)
        if (num_desirable and num_undesirable) or not len(train):
            return
        only_verdict = UNDESIRABLE
        remedy = f"add {DESIRABLE} ones"
        if num_desirable:
            only_verdict = DESIRABLE
            remedy = f"add {UNDESIRABLE} ones, or learn these with objective=sft"
        raise DataError(
            f"data.path: all {num_desirable + num_undesirable} answers are {only_verdict}, and objective=kto tells both kinds "
            f"apart; {remedy}"
        )

    def look_ahead_sample(self, dataset: TokenDataset, index: int) -> Sample:  # type: ignore[override]
        """The prompt of a sequence with the answer of another: arbitrary answers, for the reference point."""
        return mismatched_sample(dataset, index)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return RatedCollator(layout, pad_token_id)

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        return f"verdict: {DESIRABLE if sample.marks[DESIRABLE] else UNDESIRABLE}"


def _num_answers_with_verdict(train: TokenDataset, verdict: str) -> int:
    """How many answers of a prepared split have the verdict, `desirable` or `undesirable`."""
    if verdict not in train.counts:
        return 0
    return int(train.counts[verdict].sum())


class RatedCollator(Collator):
    """Adds `desirable`, bool `[S]`."""

    axes = AXES | {DESIRABLE: Axis.sequence}

    def add_loss_inputs(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        if DESIRABLE in samples[0].marks:
            batch[DESIRABLE] = torch.tensor([bool(sample.marks[DESIRABLE]) for sample in samples])


def _rated_conversations(document: Document) -> list[list[Message] | None]:
    """The conversation that ends in each rated answer of a document.

    Only that answer is learned: turns before it are marked `train: False`.

    - a pair: two conversations, to the chosen and to the rejected answer.
    - prompt and completion: `[None]`. `Encoder.encode_answers` then takes these two texts of the document.
    - messages: one; its answer is all assistant turns behind the last turn of another role.
    """
    if document.chosen and document.rejected:
        prompt: list[Message] = [{**message, "train": False} for message in document.messages or []]
        return [prompt + document.chosen, prompt + document.rejected]
    if document.messages is None:
        return [None]
    turns = document.messages
    last_question = max((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), default=-1)
    context: list[Message] = [{**turn, "train": False} for turn in turns[: last_question + 1]]
    return [context + turns[last_question + 1 :]]


def partner_index(dataset: TokenDataset, index: int) -> int:
    """Choose the sequence whose answer is put after the prompt of sequence `index`: the nearest before it with another prompt.

    Before the first sequence comes the last. If none of the `MAX_PARTNER_DISTANCE` before it has another prompt, it is the one
    directly before. The partner depends on the data set alone: every rank knows it, for any batch, and its log-probability before
    training can be recorded.
    """
    prompt = _prompt_ids(dataset.sample(index))
    for distance in range(1, min(len(dataset), MAX_PARTNER_DISTANCE + 1)):
        candidate = (index - distance) % len(dataset)
        if not np.array_equal(prompt, _prompt_ids(dataset.sample(candidate))):
            return candidate
    return (index - 1) % len(dataset)


def mismatched_sample(dataset: TokenDataset, index: int) -> Sample:
    """Put the prompt of sequence `index` before the answer to another prompt, at most as long as the longest sequence.

    KTO compares answers with a reference point, KL(model, reference): how much likelier arbitrary answers have become. Such
    mismatched samples estimate it. If the log-probability under the reference model was recorded, it is a mark of the sample,
    that is a number beside its tokens.
    """
    prompt = _prompt_ids(dataset.sample(index))
    partner = dataset.sample(partner_index(dataset, index))
    answer_begin = len(_prompt_ids(partner))
    max_answer_tokens = max(1, int(dataset.lengths.max()) - len(prompt))
    answer = partner.input_ids[answer_begin:][:max_answer_tokens]
    answer_supervised = partner.supervised[answer_begin:][:max_answer_tokens]
    marks = {}
    recorded_logps = dataset.marks.get(MISMATCHED_REFERENCE)  # of mismatched samples, under the reference model
    if recorded_logps is not None:
        marks[REFERENCE] = recorded_logps[index].item()
    input_ids = np.concatenate([prompt, answer])
    supervised = np.concatenate([np.zeros(len(prompt), np.bool_), answer_supervised])
    return Sample(input_ids, supervised, marks)


def _prompt_ids(sample: Sample) -> np.ndarray:
    """The tokens before the answer."""
    return sample.input_ids[: int(sample.supervised.argmax())]


class Kto(Objective):
    """The KTO loss. Terms are summed so that the step's count of answers divides them:

    - `loss`, and `kl`, the reference point;
    - `desirable_reward` and `undesirable_reward`, means over the answers of their kind, and `margin` between the two;
    - `accuracy`, the share of answers whose reward is on their side of the reference point.

    A batch of mismatched answers (`is_look_ahead`) gives `kl` alone: the sum of their log-ratios.
    """

    metrics = ("kl", "desirable_reward", "undesirable_reward", "margin", "accuracy")
    uses_reference = True
    look_ahead_terms = ("kl",)

    def __init__(self, config: KtoConfig, reference: Reference | None = None) -> None:
        self.config = config
        self.reference = reference

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute KTO's loss and its metrics, by name. An answer without supervised tokens (a filler) adds nothing.

        In the pass before a step, on mismatched answers (`is_look_ahead` in the batch): only `kl`. The step's batches then have
        its mean over the step in `batch["step_means"]`, and the step's counts of answers in `batch["totals"]`: all under `loss`,
        and by verdict.
        """
        # How likely each answer was before training.
        reference = reference_logps(model, batch, self.reference)
        logps, num_tokens = sequence_logps(model, batch)
        # Ranks that share a row all compute its answers; one of them counts them.
        is_counted = (num_tokens > 0).float() * counted_here(batch)
        log_ratios = (logps - reference) * is_counted
        if "is_look_ahead" in batch:
            return {"kl": log_ratios.detach().sum()}
        # The mean log-ratio of mismatched answers estimates a KL divergence, which is never negative.
        reference_point = batch["step_means"]["kl"].clamp(min=0)
        config = self.config
        beta = config.beta
        is_desirable = batch["desirable"].float() * is_counted
        is_undesirable = is_counted - is_desirable
        # 1 - sigmoid(x) is sigmoid(-x), which does not cancel.
        losses = config.desirable_weight * is_desirable * torch.sigmoid(-beta * (log_ratios - reference_point))
        losses = losses + config.undesirable_weight * is_undesirable * torch.sigmoid(
            -beta * (reference_point - log_ratios)
        )
        # What is only logged.
        rewards = beta * log_ratios.detach()
        reward_threshold = beta * reference_point
        # The loop divides each term by the step's count of answers; these factors make it a mean over one kind instead.
        totals = batch["totals"]
        desirable_mean = (rewards * is_desirable).sum() * (totals["loss"] / max(1, totals[DESIRABLE]))
        undesirable_mean = (rewards * is_undesirable).sum() * (totals["loss"] / max(1, totals[UNDESIRABLE]))
        correct = is_desirable * (rewards > reward_threshold) + is_undesirable * (rewards < reward_threshold)
        return {
            "loss": losses.sum(),
            "kl": reference_point * is_counted.sum(),
            "desirable_reward": desirable_mean,
            "undesirable_reward": undesirable_mean,
            "margin": desirable_mean - undesirable_mean,
            "accuracy": correct.sum(),
        }


KTO = ObjectiveFamily(
    settings=KtoConfig,
    data_spec=lambda config: RatedDataSpec(),
    build=lambda config, references: Kto(config, references.reference),
    problems=kto_problems,
    better_when_larger=("accuracy", "margin", "desirable_reward"),
)
