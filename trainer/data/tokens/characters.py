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
        try:
            copied = Tokenizer.from_str(json.dumps(made))
        except Exception as error:  # the library raises no other; merges may be made of such tokens
            raise _untold(self.names[0]) from error
        for name in self.names:
            if copied.token_to_id(MARK + name) != self._backend.token_to_id(name):
                raise _untold(name)
        return copied


def _untold(name: str) -> ConfigError:
    return ConfigError(
        f"data.control_tokens=text: {name!r} cannot be told from its spelling with this tokenizer; set "
        "data.control_tokens=refuse or keep"
    )
