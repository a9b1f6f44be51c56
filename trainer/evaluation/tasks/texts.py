"""Likelihood of whole texts: no chat template, and the first token counts too."""

from __future__ import annotations

from collections.abc import Sequence

from strategies.errors import ConfigError
from trainer.data.document import Document
from trainer.evaluation.tasks.model_interface import ModelInterface, Question


def whole_texts(model: ModelInterface, texts: Sequence[tuple[str, str]]) -> list[Question]:
    """Every token of each text, of (`file:line`, text); before them stands BOS, or EOS where the tokenizer has no BOS.

    So lm-evaluation-harness judges a text without a context. Raises ConfigError where the tokenizer has neither.
    """
    start = model.encoder.bos_id if model.encoder.bos_id is not None else model.encoder.eos_id
    if start is None:
        raise ConfigError(
            "the tokenizer has neither bos_token nor eos_token, so that the first token has nothing before it"
        )
    found = []
    for question in model.encode_questions([Document(*split_location(where), text=text) for where, text in texts]):
        ids = [*question.context, *question.answer]
        found.append(Question(question.where, [start], ids[1:] if ids[0] == start else ids))
    return found


def texts_after(model: ModelInterface, pairs: Sequence[tuple[str, str, str]]) -> list[Question]:
    """The tokens of texts that follow others in the same writing, of (`file:line`, context, text), a blank between them."""
    whole = whole_texts(model, [(where, f"{context} {text}") for where, context, text in pairs])
    alone = whole_texts(model, [(where, context) for where, context, _ in pairs])
    found = []
    for one, before in zip(whole, alone, strict=True):
        both = zip(one.answer, before.answer, strict=False)
        same = next((n for n, (mine, other) in enumerate(both) if mine != other), len(before.answer))
        same = min(same, len(one.answer) - 1)
        found.append(Question(one.where, [*one.context, *one.answer[:same]], one.answer[same:]))
    return found


def split_location(where: str) -> tuple[str, int]:
    """File and line of `file:line`."""
    file, _, line = where.rpartition(":")
    return file, int(line)
