"""Likelihood of whole texts: no chat template, and the first token counts too."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.evaluation.tasks.model_interface import ModelInterface, Question


def whole_texts(model: ModelInterface, texts: Sequence[tuple[str, str]]) -> list[Question]:
    """Questions that ask for the likelihood of every token of each text, given as (`file:line`, text).

    The context is BOS, or EOS if the tokenizer has no BOS, as in lm-evaluation-harness. Raises ConfigError if it has neither.
    """
    start_id = model.encoder.bos_id
    if start_id is None:
        start_id = model.encoder.eos_id
    if start_id is None:
        raise ConfigError(
            "the tokenizer has neither bos_token nor eos_token, so that the first token has nothing before it"
        )
    documents = []
    for location, text in texts:
        file, line = split_location(location)
        documents.append(Document(file, line, text=text))
    questions = []
    for question in model.encode_questions(documents):
        ids = [*question.context, *question.answer]
        scored_ids = ids[1:] if ids[0] == start_id else ids
        questions.append(Question(question.where, [start_id], scored_ids))
    return questions


def texts_after(model: ModelInterface, pairs: Sequence[tuple[str, str, str]]) -> list[Question]:
    """Questions that ask for the likelihood of a text after a context, given as (`file:line`, context, text).

    Context and text are tokenised together with a blank between them, since a tokenizer may join the last letters of the one
    with the first of the other. What counts as context are the tokens that the joined text shares with the context alone.
    """
    joined_questions = whole_texts(model, [(location, f"{context} {text}") for location, context, text in pairs])
    context_questions = whole_texts(model, [(location, context) for location, context, _ in pairs])
    questions = []
    for joined, alone in zip(joined_questions, context_questions, strict=True):
        num_shared = common_prefix_length(joined.answer, alone.answer)
        num_shared = min(num_shared, len(joined.answer) - 1)  # at least one token is left to score
        context_ids = [*joined.context, *joined.answer[:num_shared]]
        questions.append(Question(joined.where, context_ids, joined.answer[num_shared:]))
    return questions


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both texts begin with."""
    length = 0
    for first_token, second_token in zip(first, second, strict=False):
        if first_token != second_token:
            break
        length += 1
    return length


def split_location(location: str) -> tuple[str, int]:
    """The file and the line number of `file:line`."""
    file, _, line = location.rpartition(":")
    return file, int(line)
