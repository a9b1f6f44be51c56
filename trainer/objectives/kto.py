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
from trainer.data.config import DataConfig, DataFormat, Layout
from trainer.data.document import WRONG_KIND, Document, Message, Tally
from trainer.data.store.sequences import REFERENCE, Sample, TokenDataset
from trainer.data.tokens.encode import BATCH, Encoder, share_prompt
from trainer.data.tokens.truncation import fitted_answers
from trainer.objectives.base import (
    Around,
    Family,
    Objective,
    ObjectiveConfig,
    Reference,
    UnlabelledReading,
    formats_of,
)
from trainer.objectives.causal import reference_logps, sequence_logps
from trainer.objectives.pairs import WHOLE, weight_refusal
from trainer.objectives.reference import REFERENCE_AHEAD

DESIRABLE, UNDESIRABLE = "desirable", "undesirable"
"""Counts of answers by their verdict; the first is also the mark that says it, 1 or 0."""
FURTHEST = 64
"""How many sequences back another prompt is looked for."""


@dataclass(kw_only=True, slots=True)
class KtoConfig(ObjectiveConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306): answers with a verdict each, no pairs."""

    name: str = "kto"
    beta: float = number(0.1, above=0, advice="0.1 for dpo, kto and orpo, 2 for simpo")
    """How closely the model stays with the reference: larger is closer."""
    desirable_weight: float = number(1.0, above=0, advice="1 as a rule; raise that of the rarer verdict")
    """Weight of desirable answers; the denominator stays the number of answers."""
    undesirable_weight: float = number(1.0, above=0, advice="1 as a rule; raise that of the rarer verdict")
    """Weight of undesirable ones; keep weight times number of both kinds within 1:1 and 4:3, the desirable ones heavier."""


def problems(config: KtoConfig, around: Around) -> Iterator[str]:
    """What answers with a verdict ask of the data."""
    data = around.data
    if data.packing:
        yield "data.packing=true: objective=kto counts answers, each with its verdict; set data.packing=false"
    if data.over_length not in WHOLE:
        yield (
            f"data.over_length={data.over_length.value}: would part an answer from its prompt; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, chosen in formats_of(data).items():
        if chosen not in (DataFormat.auto, DataFormat.thumbs, DataFormat.preference):
            yield (
                f"{key}.format={chosen}: objective=kto reads answers with a verdict; set {key}.format=thumbs, or "
                f"{key}.format=preference"
            )


class RatedReading(UnlabelledReading):
    """Answers with a verdict: a row with a thumb is one sequence; a preference pair is two, its chosen answer desirable and
    its rejected one not. Only the last answer of a conversation is rated: earlier ones are context.
    """

    formats = (DataFormat.thumbs, DataFormat.preference)
    over_length = WHOLE
    marks = {DESIRABLE: 1, REFERENCE: 0.0}  # noqa: RUF012 - never changed

    def refuses(self, document: Document) -> tuple[str, str] | None:
        if document.desirable is not None or (document.chosen and document.rejected):
            return weight_refusal(document)
        return WRONG_KIND, (
            "has no verdict, which objective=kto learns from; give rows with thumbs up or down (data.format=thumbs) or pairs "
            "(data.format=preference), or use objective=sft"
        )

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        for start in range(0, len(documents), BATCH):
            batch = documents[start : start + BATCH]
            answers = [(document, turns) for document in batch for turns in _answers(document)]
            made = iter(encoder.encode_answers(answers))
            for document in batch:
                samples = [next(made) for _ in _answers(document)]
                if len(samples) == 2:
                    share_prompt(document, *samples)
                fitted = fitted_answers(encoder, document, samples, config, tally)
                verdicts = (True, False) if len(fitted) == 2 else (document.desirable,)
                for sample, verdict in zip(fitted, verdicts, strict=False):
                    sample.marks[DESIRABLE] = int(bool(verdict))
                yield document, fitted

    def counts(self, sample: Sample) -> dict[str, float]:
        """An answer counts once, under its verdict too."""
        good = int(sample.marks[DESIRABLE])
        return {"loss": 1, DESIRABLE: good, UNDESIRABLE: 1 - good}

    def check(self, train: TokenDataset) -> None:
        """Raise DataError where all answers have the same verdict, as a column read the wrong way gives them."""
        good, bad = (int(train.counts[term].sum()) if term in train.counts else 0 for term in (DESIRABLE, UNDESIRABLE))
        if (good and bad) or not len(train):
            return
        verdict, other = (DESIRABLE, UNDESIRABLE) if good else (UNDESIRABLE, DESIRABLE)
        remedy = f"add {other} ones" + (", or learn these with objective=sft" if good else "")
        raise DataError(
            f"data.path: all {good + bad} answers are {verdict}, and objective=kto tells both kinds apart; {remedy}"
        )

    def ahead(self, dataset: TokenDataset, index: int) -> Sample:  # type: ignore[override]
        """The prompt of a sequence with the answer of another: arbitrary answers, for the reference point."""
        return mismatched(dataset, index)

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return RatedCollator(layout, pad_token_id)

    def note(self, sample: Sample, label_names: list[str] | None) -> str:
        return f"verdict: {DESIRABLE if sample.marks[DESIRABLE] else UNDESIRABLE}"


class RatedCollator(Collator):
    """Adds `desirable`, bool `[S]`."""

    def add(self, batch: dict[str, Any], samples: Sequence[Sample]) -> None:
        if DESIRABLE in samples[0].marks:
            batch[DESIRABLE] = torch.tensor([bool(sample.marks[DESIRABLE]) for sample in samples])


def _answers(document: Document) -> list[list[Message] | None]:
    """The conversations that end in each answer of a document; None: its own prompt and completion."""
    if document.chosen and document.rejected:
        prompt: list[Message] = [{**message, "train": False} for message in document.messages or []]
        return [prompt + document.chosen, prompt + document.rejected]
    if document.messages is None:
        return [None]
    turns = document.messages
    asked = max((number for number, turn in enumerate(turns) if turn["role"] != "assistant"), default=-1)
    return [[{**turn, "train": False} if number <= asked else turn for number, turn in enumerate(turns)]]


def partner(dataset: TokenDataset, index: int) -> int:
    """Whose answer the prompt of sequence `index` is shown with: the nearest one before it that has another prompt.

    A function of the data set alone, the first sequence following the last; so every rank knows it, for any batch, and
    what the model said of it before training can be recorded. Where none of the last `FURTHEST` has another prompt,
    the one before.
    """
    prompt = _prompt(dataset.sample(index))
    for back in range(1, min(len(dataset), FURTHEST + 1)):
        other = (index - back) % len(dataset)
        if not np.array_equal(prompt, _prompt(dataset.sample(other))):
            return other
    return (index - 1) % len(dataset)


def mismatched(dataset: TokenDataset, index: int) -> Sample:
    """The prompt of sequence `index` with the answer of its partner, no longer than the longest sequence of the data."""
    prompt = _prompt(dataset.sample(index))
    other = dataset.sample(partner(dataset, index))
    begin = len(_prompt(other))
    room = max(1, int(dataset.lengths.max()) - len(prompt))
    answer, learned = other.input_ids[begin:][:room], other.supervised[begin:][:room]
    marks = {}
    if (before := dataset.marks.get(REFERENCE_AHEAD)) is not None:
        marks[REFERENCE] = before[index].item()
    return Sample(np.concatenate([prompt, answer]), np.concatenate([np.zeros(len(prompt), np.bool_), learned]), marks)


def _prompt(sample: Sample) -> np.ndarray:
    """The tokens before the answer."""
    return sample.input_ids[: int(sample.supervised.argmax())]


class Kto(Objective):
    """Terms, summed so that the count of answers divides them: `loss`; `kl`, the reference point; `desirable_reward`
    and `undesirable_reward`, means over the answers of their kind; `margin` between these; and `accuracy`, the answers
    whose reward is on their side of the reference point. Of mismatched answers, `kl` alone: the sum of log-ratios.
    """

    metrics = ("kl", "desirable_reward", "undesirable_reward", "margin", "accuracy")
    uses_reference = True
    ahead = ("kl",)

    def __init__(self, config: KtoConfig, reference: Reference | None = None) -> None:
        self.config, self.reference = config, reference

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """An answer without supervised tokens (a filler) counts nothing."""
        before = reference_logps(model, batch, self.reference)
        logps, tokens = sequence_logps(model, batch)
        counted = (tokens > 0).float()
        ratios = (logps - before) * counted
        if "ahead_of" in batch:
            return {"kl": ratios.detach().sum()}
        point = batch["ahead"]["kl"].clamp(min=0)
        config, beta = self.config, self.config.beta
        good = batch["desirable"].float() * counted
        bad = counted - good
        # 1 - sigmoid(x) is sigmoid(-x), which does not cancel.
        losses = config.desirable_weight * good * torch.sigmoid(-beta * (ratios - point))
        losses = losses + config.undesirable_weight * bad * torch.sigmoid(-beta * (point - ratios))
        rewards, limit = beta * ratios.detach(), beta * point
        totals = batch["totals"]
        good_mean = (rewards * good).sum() * (totals["loss"] / max(1, totals[DESIRABLE]))
        bad_mean = (rewards * bad).sum() * (totals["loss"] / max(1, totals[UNDESIRABLE]))
        right = good * (rewards > limit) + bad * (rewards < limit)
        return {
            "loss": losses.sum(),
            "kl": point * counted.sum(),
            "desirable_reward": good_mean,
            "undesirable_reward": bad_mean,
            "margin": good_mean - bad_mean,
            "accuracy": right.sum(),
        }


KTO = Family(
    settings=KtoConfig,
    reading=lambda config: RatedReading(),
    build=lambda config, beside: Kto(config, beside.reference),
    problems=problems,
    better_when_larger=("accuracy", "margin", "desirable_reward"),
)
