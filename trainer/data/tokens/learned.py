"""From learned characters to learned tokens, by the offsets of the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainer.data.document import Message, Refused
from trainer.data.tokens.template import Rendered

if TYPE_CHECKING:
    from tokenizers import Encoding


def learned_tokens(
    encoding: Encoding, rendered: Rendered, *, fast: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids of a text, which of its tokens are learned, and where spans have weights those of their tokens."""
    input_ids = np.array(encoding.ids, dtype=np.int32)
    supervised = np.zeros(len(input_ids), dtype=np.bool_)
    weights = None if rendered.weights is None else np.zeros(len(input_ids), dtype=np.float32)
    if rendered.spans and len(input_ids):
        for first, last in _found(encoding, rendered, rendered.spans, fast=fast):
            supervised[first : last + 1] = True
        for span, weight in zip(rendered.spans, rendered.weights or (), strict=False):
            assert weights is not None
            for first, last in _found(encoding, rendered, [span], fast=fast):
                weights[first : last + 1] = weight
    return input_ids, supervised, weights


def span_weights(learned: list[int], messages: list[Message], rendered: Rendered, where: str) -> list[float] | None:
    """The weight of each span of a rendered conversation, whose turns `learned` are learned; None where each is 1."""
    weights = [messages[number].get("weight", 1.0) for number in learned]
    if all(weight == 1 for weight in weights):
        return None
    if len(rendered.spans) != len(weights):
        said = (
            f"the chat template has {len(rendered.spans)} {{% generation %}} blocks for {len(weights)} turns with weights "
            "of their own; give another in model.chat_template, or leave the weights out with data.ignore_columns=[weight]"
        )
        raise Refused(where, "refused_by_template", said)
    return weights


def _found(
    encoding: Encoding, rendered: Rendered, spans: list[tuple[int, int]], *, fast: bool
) -> list[tuple[int, int]]:
    runs = _runs(encoding, spans, len(rendered.text)) if fast else None
    return _runs_by_offsets(encoding, spans) if runs is None else runs


def _runs_by_offsets(encoding: Encoding, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and last token of each span that has any, by the offsets of all tokens.

    A token that straddles an edge belongs to the span, since generation would make it; so do tokens without characters
    of their own between two that have some.
    """
    begins, ends = np.array(encoding.offsets, dtype=np.int64).T
    runs = []
    for begin, end in spans:
        inside = np.flatnonzero((begins < ends) & (ends > begin) & (begins < end))
        if len(inside):
            runs.append((int(inside[0]), int(inside[-1])))
    return runs


def _runs(encoding: Encoding, spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]] | None:
    """The same from the edges of the spans alone; None where a character at an edge has no token.

    `char_to_token` gives the first token of a character; one such as an emoji may have several.
    """
    runs = []
    for begin, end in spans:
        if begin >= end:
            continue
        first, last = encoding.char_to_token(begin), encoding.char_to_token(end - 1)
        after = encoding.char_to_token(end) if end < length else len(encoding)
        if first is None or last is None or after is None:
            return None
        if after > last:  # no straddling: all tokens up to the next character's first
            last = after - 1
            where = encoding.token_to_chars(last)
            if where is None or where[0] >= where[1]:
                return None
        else:
            while last + 1 < len(encoding):
                where = encoding.token_to_chars(last + 1)
                if where is None or where[0] >= where[1]:
                    return None
                if where[0] >= end:
                    break
                last += 1
        runs.append((first, last))
    return runs
