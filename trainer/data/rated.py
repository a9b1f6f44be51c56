"""Rated answers: documents with a verdict become sequences that know it, and prompts meet the answers of others.

A row with a thumb is one sequence; a preference pair is two, its chosen answer desirable and its rejected one not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from strategies.errors import DataError
from trainer.data.config import DataConfig
from trainer.data.document import Document, Message, Tally
from trainer.data.store.sequences import DESIRABLE, UNDESIRABLE, Sample, TokenDataset
from trainer.data.tokens.cut import fit, fit_pair
from trainer.data.tokens.encode import BATCH, Encoder, share_prompt

FURTHEST = 64
"""How many sequences back another prompt is looked for."""


def rated_sequences(
    encoder: Encoder, documents: list[Document], config: DataConfig, tally: Tally
) -> Iterator[tuple[Document, list[Sample]]]:
    """Each document with its rated sequences, one or two; none, with a reason counted, where nothing is left.

    Only the last answer of a conversation is rated: earlier ones are context. Raises DataError for a document that has
    no verdict.
    """
    for document in documents:
        if document.desirable is None and (not document.chosen or not document.rejected):
            raise DataError(
                f"{document.where}: has no verdict, which objective=kto learns from; give rows with thumbs up or down "
                "(data.format=thumbs) or pairs (data.format=preference), or use objective=sft"
            )
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        answers = [(document, turns) for document in batch for turns in _answers(document)]
        made = iter(encoder.encode_answers(answers))
        for document in batch:
            samples = [next(made) for _ in _answers(document)]
            if len(samples) == 2:
                share_prompt(document, *samples)
            yield document, _fitted(encoder, document, samples, config, tally)


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


def _fitted(
    encoder: Encoder, document: Document, samples: list[Sample], config: DataConfig, tally: Tally
) -> list[Sample]:
    limit, policy = config.max_length, config.over_length
    if len(samples) == 2:
        made = fit_pair(document, samples[0], samples[1], limit, policy)
    else:
        made = fit(encoder, document, samples[0], limit, policy)
    if not made:
        tally.drop("tokenise", "too_long", document.where)
        return []
    if not all(sample.supervised.any() for sample in made):
        tally.drop("tokenise", "nothing_to_learn", document.where)
        return []
    if len(made) == 2 and np.array_equal(made[0].input_ids, made[1].input_ids):
        tally.drop("tokenise", "same_answers", document.where)
        return []
    if any(len(sample.input_ids) > limit for sample in samples):
        tally.note("tokenise", "truncated", document.where)
    else:
        for code in encoder.audit(document, samples[0]):
            tally.note("tokenise", code, document.where)
    for sample, verdict in zip(made, (True, False) if len(made) == 2 else (document.desirable,), strict=True):
        sample.desirable = verdict
    return made


def check_verdicts(dataset: TokenDataset) -> None:
    """Raise DataError where all answers have the same verdict, as a column read the wrong way gives them."""
    good, bad = (int(dataset.counts[term].sum()) if term in dataset.counts else 0 for term in (DESIRABLE, UNDESIRABLE))
    if (good and bad) or not len(dataset):
        return
    verdict, other = (DESIRABLE, UNDESIRABLE) if good else (UNDESIRABLE, DESIRABLE)
    remedy = f"add {other} ones" + (", or learn these with objective=sft" if good else "")
    raise DataError(
        f"data.path: all {good + bad} answers are {verdict}, and objective=kto tells both kinds apart; {remedy}"
    )


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
    return Sample(
        np.concatenate([prompt, answer]),
        np.concatenate([np.zeros(len(prompt), np.bool_), learned]),
        reference=None if dataset.reference_mismatched is None else float(dataset.reference_mismatched[index]),
    )


def _prompt(sample: Sample) -> np.ndarray:
    """The tokens before the answer."""
    return sample.input_ids[: int(sample.supervised.argmax())]
