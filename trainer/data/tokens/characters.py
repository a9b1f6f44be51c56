"""From characters to tokens: which tokens learned characters become, and control tokens that a text only spells.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands. So what a text spells is set apart by a mark between
its characters before the template is rendered; what is left unbroken is meant. A copy of the tokenizer then knows control
tokens only with the mark before them: the meant ones get it, and what is spelled goes without as ordinary characters. Ids,
context and offsets are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import ConfigError
from trainer.data.document import Message, Refused
from trainer.data.tokens.template import Rendered

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

MARK = "\U0010fb06"
"""A private-use character; a text that spells a control token must not have it."""


class Control:
    """The control tokens of a tokenizer: its special tokens, and those in `ends`, which close turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, backend: Tokenizer, ends: Iterable[str | None]) -> None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # One of a single character could not be broken.
        self.names = sorted({name for name in (*special, *ends) if name and len(name) > 1}, key=len, reverse=True)
        self._backend = backend
        pattern = "|".join(map(re.escape, self.names))
        self._any = re.compile(pattern) if pattern else None
        self._marked = re.compile(f"{MARK}|{pattern}")

    def spelled(self, text: str) -> bool:
        """Whether a text spells one of them."""
        return self._any is not None and self._any.search(text) is not None

    def broken(self, text: str) -> str:
        """The text with marks between the characters of each control token that it spells."""
        while self._any is not None and self._any.search(text):  # breaking one may uncover another
            text = self._any.sub(lambda match: MARK.join(match.group()), text)
        return text

    def told(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """What `backend` encodes of a rendered text with broken tokens, and where its spans are in it."""
        found = [(match.start(), -1 if match.group() == MARK else 1) for match in self._marked.finditer(text)]
        moved = [
            (begin + sum(by for at, by in found if at < begin), end + sum(by for at, by in found if at < end))
            for begin, end in spans
        ]
        return self._marked.sub(lambda match: "" if match.group() == MARK else MARK + match.group(), text), moved

    @cached_property
    def backend(self) -> Tokenizer:
        """The copy of the tokenizer, made when a first text needs it."""
        from tokenizers import Tokenizer

        made = json.loads(self._backend.to_str())
        names, model = {name: MARK + name for name in self.names}, made["model"]
        for token in made["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        # The model itself may hold them too, and would find them by their spelling (a Unigram model does).
        if isinstance(vocab := model.get("vocab"), dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocab.items()}
        elif vocab is not None:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        copied = Tokenizer.from_str(json.dumps(made))
        for name in self.names:
            if copied.token_to_id(MARK + name) != self._backend.token_to_id(name):
                raise ConfigError(
                    f"data.control_tokens=text: {name!r} cannot be told from its spelling with this tokenizer; set "
                    "data.control_tokens=refuse or keep"
                )
        return copied


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
