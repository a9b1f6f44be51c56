"""Likelihood of whole texts: no chat template, and the first token counts too."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.evaluation.tasks.model_interface import ModelInterface, Question


def whole_text_questions(model: ModelInterface, located_texts: Sequence[tuple[str, str]]) -> list[Question]:
    """Questions that ask for the likelihood of whole texts, the first token included, as benchmarks of sentence pairs need it.

    `located_texts`: (`file:line`, text) of each. The context is BOS, or EOS if the tokenizer has no BOS, as in
    lm-evaluation-harness. Raises ConfigError if it has neither.
    """
    start_id = model.encoder.bos_id
    if start_id is None:
        start_id = model.encoder.eos_id
    if start_id is None:
        raise ConfigError(
            "the tokenizer has neither bos_token nor eos_token, so that the first token has nothing before it"
        )
    documents = []
    for location, text in located_texts:
        file, line = split_location(location)
        documents.append(Document(file, line, text=text))
    questions = []
    for question in model.encode_questions(documents):
        # The encoder splits a text's tokens in a context, such as BOS, and an answer. Here all of them but BOS are scored.
        ids = [*question.context, *question.answer]
        scored_ids = ids[1:] if ids[0] == start_id else ids
        questions.append(Question(where=question.where, context=[start_id], answer=scored_ids))
    return questions


def continuation_questions(model: ModelInterface, located_pairs: Sequence[tuple[str, str, str]]) -> list[Question]:
    """Questions that ask for the likelihood of a text after a context, both plain texts without a chat template.

    `located_pairs`: (`file:line`, context, text) of each. Both are tokenised together, with a blank between them, since a
    tokenizer may join the last letters of the context with the first of the text. The tokens that the joined text shares with
    the context alone are the context of the question; at least one token is left as its answer.
    """
    joined_texts = [(location, f"{context} {text}") for location, context, text in located_pairs]
    contexts = [(location, context) for location, context, _ in located_pairs]
    joined_questions = whole_text_questions(model, joined_texts)
    context_questions = whole_text_questions(model, contexts)
    questions = []
    for joined, context_alone in zip(joined_questions, context_questions, strict=True):
        num_shared = common_prefix_length(joined.answer, context_alone.answer)
        num_shared = min(num_shared, len(joined.answer) - 1)
        context_ids = [*joined.context, *joined.answer[:num_shared]]
        questions.append(Question(where=joined.where, context=context_ids, answer=joined.answer[num_shared:]))
    return questions


def prompt_document(location: str, prompt: str) -> Document:
    """A document at `file:line` whose prompt alone is asked. Its answer is a stand-in: questions end before an answer."""
    file, line = split_location(location)
    return Document(file, line, prompt=prompt, completion="-", separator="\n")


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that both sequences begin with: [5, 6, 7] and [5, 6, 9] -> 2."""
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
