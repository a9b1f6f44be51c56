"""Control tokens, and those that a text only spells.

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

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

ESCAPE = "\U0010fb06"
"""A private-use character; a text that spells a control token must not have it."""


class ControlTokenEscaper:
    """The control tokens of a tokenizer: its special tokens, and those in `ends`, which close turns."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, backend: Tokenizer, ends: Iterable[str | None]) -> None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        # One of a single character could not be broken.
        self.tokens = sorted({name for name in (*special, *ends) if name and len(name) > 1}, key=len, reverse=True)
        self._backend = backend
        pattern = "|".join(map(re.escape, self.tokens))
        self._token_pattern = re.compile(pattern) if pattern else None
        self._escape_or_token = re.compile(f"{ESCAPE}|{pattern}")

    def spelled_in(self, text: str) -> bool:
        """Whether a text spells one of them."""
        return self._token_pattern is not None and self._token_pattern.search(text) is not None

    def escape(self, text: str) -> str:
        """The text with marks between the characters of each control token that it spells."""
        while self._token_pattern is not None and self._token_pattern.search(text):  # breaking one may uncover another
            text = self._token_pattern.sub(lambda match: ESCAPE.join(match.group()), text)
        return text

    def to_backend(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """What `backend` encodes of a rendered text with broken tokens, and where its spans are in it."""
        shifts = [
            (match.start(), -1 if match.group() == ESCAPE else 1) for match in self._escape_or_token.finditer(text)
        ]
        backend_spans = [
            (begin + sum(by for at, by in shifts if at < begin), end + sum(by for at, by in shifts if at < end))
            for begin, end in spans
        ]
        return self._escape_or_token.sub(
            lambda match: "" if match.group() == ESCAPE else ESCAPE + match.group(), text
        ), backend_spans

    @cached_property
    def backend(self) -> Tokenizer:
        """The copy of the tokenizer, made when a first text needs it."""
        from tokenizers import Tokenizer

        settings = json.loads(self._backend.to_str())
        escaped, model = {name: ESCAPE + name for name in self.tokens}, settings["model"]
        for token in settings["added_tokens"]:
            token["content"] = escaped.get(token["content"], token["content"])
        # The model itself may hold them too, and would find them by their spelling (a Unigram model does).
        if isinstance(vocab := model.get("vocab"), dict):
            model["vocab"] = {escaped.get(piece, piece): number for piece, number in vocab.items()}
        elif vocab is not None:
            model["vocab"] = [[escaped.get(piece, piece), score] for piece, score in vocab]
        if model.get("unk_token") in escaped:
            model["unk_token"] = escaped[model["unk_token"]]
        try:
            backend = Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library raises no other; merges may be made of such tokens
            raise _not_distinguishable(self.tokens[0]) from error
        for name in self.tokens:
            if backend.token_to_id(ESCAPE + name) != self._backend.token_to_id(name):
                raise _not_distinguishable(name)
        return backend


def _not_distinguishable(name: str) -> ConfigError:
    return ConfigError(
        f"data.control_tokens=text: {name!r} cannot be told from its spelling with this tokenizer; set "
        "data.control_tokens=refuse or keep"
    )
