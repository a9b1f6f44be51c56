"""Pairs of a chosen and a rejected answer to one prompt: how they are read, for every objective that compares them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from trainer.data.config import DataConfig, DataFormat, OverLength
from trainer.data.document import WRONG_KIND, Document, Tally
from trainer.data.store.sequences import REFERENCE, Sample
from trainer.data.tokens.encode import Encoder
from trainer.data.tokens.truncation import fitted_answers
from trainer.objectives.base import Around, ObjectiveConfig, UnlabelledReading, formats_of

WHOLE = (OverLength.truncate, OverLength.drop, OverLength.fail)
"""What may become of answers that are too long where prompt and answer must not be parted."""
REJECTED = "rejected"
"""Mark of a sequence: 1 for the answer that was not preferred."""


class PairReading(UnlabelledReading):
    """Each document is two sequences, its chosen answer and then its rejected one."""

    formats = (DataFormat.preference,)
    sequences_per_document = 2
    over_length = WHOLE

    def __init__(self, *, uses_reference: bool = False) -> None:
        self.marks = {REJECTED: 0, **({REFERENCE: 0.0} if uses_reference else {})}

    def refuses(self, document: Document) -> tuple[str, str] | None:
        if document.chosen and document.rejected:
            return weight_refusal(document)
        return WRONG_KIND, (
            "has no preferred and rejected answer, which this objective compares; give rows of prompt, chosen and rejected "
            "(data.format=preference), or use objective=sft"
        )

    def sequences(
        self, encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
    ) -> Iterator[tuple[Document, list[Sample]]]:
        for document, chosen, rejected in encoder.encode_pairs(documents):
            made = fitted_answers(encoder, document, [chosen, rejected], config, tally)
            for number, sample in enumerate(made):
                sample.marks[REJECTED] = number
            yield document, made

    def counts(self, sample: Sample) -> dict[str, float]:
        """A pair counts once, with its chosen answer."""
        return {"loss": 0 if sample.marks[REJECTED] else 1}

    def headings(self) -> list[str]:
        return ["chosen:\n", "rejected:\n"]


def weight_refusal(document: Document) -> tuple[str, str] | None:
    """(reason, message) where a turn has a weight, which no loss over whole answers knows."""
    weight = next((turn["weight"] for turn in document.turns() if "weight" in turn), None)
    if weight is None:
        return None
    said = f"a turn has the weight {weight:g}, and this objective compares whole answers, whose tokens weigh alike"
    return "bad_weight", f"{said}; name weight in data.ignore_columns to train without it, or use objective=sft"


def pair_problems(config: ObjectiveConfig, around: Around) -> Iterator[str]:
    """What pairs of answers ask of the data, one line each."""
    data = around.data
    if data.packing:
        yield "data.packing=true: the two answers of a pair stay together and fill no rows; set data.packing=false"
    if data.over_length not in WHOLE:
        yield (
            f"data.over_length={data.over_length.value}: would cut the two answers of a pair differently; set "
            "data.over_length=truncate or data.over_length=drop"
        )
    for key, chosen in formats_of(data).items():
        if chosen not in (DataFormat.auto, DataFormat.preference):
            yield f"{key}.format={chosen}: objective={config.name} reads pairs; set {key}.format=preference"


def pair_terms(losses: Tensor, chosen: Tensor, rejected: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Sums over pairs, of the loss and of what is logged beside it.

    All `[pairs]`: the loss, the rewards of the preferred and of the other answer, and 1.0 for each pair that counts (a filler
    does not).
    """
    chosen = chosen.detach()
    rejected = rejected.detach()
    return {
        "loss": (losses * counted).sum(),
        "margin": ((chosen - rejected) * counted).sum(),
        "accuracy": ((chosen > rejected).float() * counted).sum(),
        "chosen_reward": (chosen * counted).sum(),
        "rejected_reward": (rejected * counted).sum(),
    }
