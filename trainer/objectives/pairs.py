"""Pairs of a chosen and a rejected answer to one prompt: how they are read, for every objective that compares them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trainer.data.batches.collate import Collator
from trainer.data.config import DataConfig, DataFormat, Layout, OverLength
from trainer.data.document import WRONG_KIND_REASON, Document, Tally
from trainer.data.store.sequences import REFERENCE, Sample
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.truncation import fit_answers
from trainer.objectives.base import ObjectiveConfig, OtherSettings, UnlabelledDataSpec, formats_of

OVER_LENGTH_POLICIES_FOR_ANSWERS = (OverLength.truncate, OverLength.drop, OverLength.fail)
"""The values of `data.over_length` under which a prompt and its answer stay together."""
REJECTED = "rejected"
"""Mark of a sequence: 1 for the answer that was not preferred."""


class PairDataSpec(UnlabelledDataSpec):
    """Each document is two sequences, its chosen answer and then its rejected one."""

    formats = (DataFormat.preference,)
    sequences_per_document = 2
    over_length = OVER_LENGTH_POLICIES_FOR_ANSWERS

    def __init__(self, *, uses_reference: bool = False, collator: type[Collator] = Collator) -> None:
        """`collator`: the class that makes micro-batches of the pairs."""
        self.collator_class = collator
        self.marks: dict[str, float] = {REJECTED: 0}
        if uses_reference:
            self.marks[REFERENCE] = 0.0

    def reason_to_reject(self, document: Document) -> tuple[str, str] | None:
        if document.chosen and document.rejected:
            return weight_refusal(document)
        return WRONG_KIND_REASON, (
            "has no preferred and rejected answer, which this objective compares; give rows of prompt, chosen and rejected "
            "(data.format=preference), or use objective=sft"
        )

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        """Turn documents into pairs: the chosen answer, then the rejected one, marked 0 and 1 under `REJECTED`.

        A document has none if an answer is dropped, such as for its length; `tally` counts it.
        """
        for document, chosen, rejected in encoder.encode_pairs(documents):
            samples = fit_answers(encoder, document, [chosen, rejected], config, tally)
            for number, sample in enumerate(samples):
                sample.marks[REJECTED] = number
            yield document, samples

    def collator(self, layout: Layout, pad_token_id: int, decoder_start: int | None = None) -> Collator:
        return self.collator_class(layout, pad_token_id)

    def counts(self, sample: Sample) -> dict[str, float]:
        """A pair counts once, with its chosen answer."""
        return {"loss": 0 if sample.marks[REJECTED] else 1}

    def headings(self) -> list[str]:
        return ["chosen:\n", "rejected:\n"]


def weight_refusal(document: Document) -> tuple[str, str] | None:
    """(reason, message) if a turn has a weight, which a loss over whole answers cannot use; else None."""
    weight = next((turn["weight"] for turn in document.turns() if "weight" in turn), None)
    if weight is None:
        return None
    problem = f"a turn has the weight {weight:g}, and this objective compares whole answers, whose tokens weigh alike"
    return "bad_weight", f"{problem}; name weight in data.ignore_columns to train without it, or use objective=sft"


def pair_problems(config: ObjectiveConfig, other_settings: OtherSettings) -> Iterator[str]:
    """What is wrong with the data settings of an objective that compares two answers to a prompt, one line each."""
    data = other_settings.data
    if data.packing:
        yield "data.packing=true: the two answers of a pair stay together and fill no rows; set data.packing=false"
    if data.over_length not in OVER_LENGTH_POLICIES_FOR_ANSWERS:
        yield (
            f"data.over_length={data.over_length.value}: would cut the two answers of a pair differently; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, data_format in formats_of(data).items():
        if data_format not in (DataFormat.auto, DataFormat.preference):
            yield f"{key}.format={data_format}: objective={config.name} reads pairs; set {key}.format=preference"


def pair_terms(losses: Tensor, chosen: Tensor, rejected: Tensor, is_counted: Tensor) -> dict[str, Tensor]:
    """Sum the losses of pairs, and the metrics that every objective over pairs logs.

    All arguments are `[pairs]`: the loss, the rewards of both answers, and `is_counted`, 1.0 for each pair that counts and 0.0
    for a filler.
    """
    chosen = chosen.detach()
    rejected = rejected.detach()
    return {
        "loss": (losses * is_counted).sum(),
        "margin": ((chosen - rejected) * is_counted).sum(),
        "accuracy": ((chosen > rejected).float() * is_counted).sum(),
        "chosen_reward": (chosen * is_counted).sum(),
        "rejected_reward": (rejected * is_counted).sum(),
    }
