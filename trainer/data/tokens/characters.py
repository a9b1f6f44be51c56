"""Characters and tokens: which tokens stand for which characters of a text, and control tokens that a text only spells.

A tokenizer that keeps offsets counts them character by character, which is a tenth of its time. Where the bytes of the tokens
put together are the text, they say as much; that is so of every tokenizer of bytes that leaves its text as it is. Others
are asked for their offsets.

A tokenizer takes `<|im_end|>` for the end of a turn wherever it stands. So what a text spells is set apart by a mark between
its characters before the template is rendered; what is left unbroken is meant. A copy of the tokenizer then knows control
tokens only with the mark before them: the meant ones get it, and what is spelled goes without as ordinary characters. Ids,
context and offsets are those of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from strategies.errors import ConfigError
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


_PROBE = "Say: “naïve” 日本, 🙂!\n\tx  = 1\n"
_NONE = b"\xff"
"""Of tokens that stand for no bytes of their own; no text has it."""
MANY = 4096
"""Texts after which the bytes of a whole vocabulary are worth reading."""


@dataclass(slots=True)
class ByBytes:
    """Tokens whose bytes are the text."""

    ids: np.ndarray
    """int32 [n]"""
    begins: np.ndarray
    """int64 [n]: the character with the first byte of each token."""
    ends: np.ndarray
    """int64 [n]: one past the character with its last byte."""

    def inside(self, begin: int, end: int) -> slice:
        """The tokens that have bytes of the characters [begin, end)."""
        if begin >= end:
            return slice(0)
        return slice(int(self.ends.searchsorted(begin, "right")), int(self.begins.searchsorted(end, "left")))

    def before(self, at: int) -> int:
        """How many tokens end at this character or before."""
        return int(self.ends.searchsorted(at, "right"))


class ByOffsets:
    """Tokens with the tokenizer's own offsets, between which there may be gaps and tokens without characters."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.ids = np.array(encoding.ids, dtype=np.int32)

    def inside(self, begin: int, end: int) -> slice:
        """The tokens of the characters [begin, end): by the first and the last of these, or by all offsets where one has none."""
        encoding = self._encoding
        first, last = (encoding.char_to_token(at) if begin < end else None for at in (begin, end - 1))
        if first is not None and last is not None:
            while (after := encoding.token_to_chars(last + 1)) is not None and after[0] < end <= after[1]:
                last += 1  # a character may be several tokens
            return slice(first, last + 1)
        begins, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        inside = np.flatnonzero((begins < ends) & (ends > begin) & (begins < end))
        return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)

    def before(self, at: int) -> int:
        """How many tokens end at this character or before."""
        return int(np.count_nonzero(np.array(self._encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1] <= at))


Placed = ByBytes | ByOffsets


class Places:
    """The tokens of texts, without special tokens, and where they are; by bytes where that can be, `after` so many texts."""

    def __init__(self, backend: Tokenizer, after: int = MANY) -> None:
        self.backend = backend
        self._until = after
        self._bytes: list[bytes] = []
        self._sizes = np.zeros(0, np.int64)

    def of(self, texts: list[str]) -> list[Placed]:
        """The tokens of each text."""
        if self._until <= 0 and not len(self._sizes):
            self._learn()
        self._until -= len(texts)
        if not self._bytes:
            return [ByOffsets(found) for found in self.backend.encode_batch(texts, add_special_tokens=False)]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._place(found.ids, text) for found, text in zip(encodings, texts, strict=True)]

    def _learn(self) -> None:
        """Read the bytes of all tokens, unless they do not make up even an ordinary text."""
        self._bytes = bytes_of(self.backend)
        self._sizes = np.array([len(piece) for piece in self._bytes], np.int64)
        if not isinstance(self._place(self.backend.encode(_PROBE, add_special_tokens=False).ids, _PROBE), ByBytes):
            self._bytes = []

    def _place(self, ids: list[int], text: str) -> Placed:
        """Tokens of a text by their bytes; by offsets where these are not the text."""
        pieces, data = self._bytes, text.encode()
        if b"".join([pieces[number] for number in ids]) != data:
            return ByOffsets(self.backend.encode(text, add_special_tokens=False))
        numbers = np.array(ids, np.int32)
        sizes = self._sizes[numbers]
        ends = sizes.cumsum()
        begins = ends - sizes
        if len(data) != len(text):
            character = (np.frombuffer(data, np.uint8) & 0xC0 != 0x80).cumsum() - 1
            begins, ends = character[begins], character[ends - 1] + 1
        return ByBytes(numbers, begins, ends)


def bytes_of(backend: Tokenizer) -> list[bytes]:
    """What each token of a vocabulary stands for, by its id: as the decoder of bytes, or of spaces and bytes, would say."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    alphabet = {ord(character): number for number, character in bytes_to_unicode().items()}
    by_bytes = "ByteLevel" in str(backend.decoder)
    pieces = [_NONE] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        piece = token if number in added or by_bytes else token.replace("▁", " ")
        if by_bytes and number not in added:
            pieces[number] = piece.translate(alphabet).encode("latin-1", "replace") or _NONE
        elif len(token) == 6 and token.startswith("<0x") and number not in added:
            pieces[number] = bytes([int(token[3:5], 16)])
        else:
            pieces[number] = piece.encode("utf-8", "surrogatepass") or _NONE
    return pieces


def learned_tokens(tokens: Placed, rendered: Rendered) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Ids of a text, which of its tokens are learned, and where spans have weights those of their tokens.

    A token that straddles an edge of a span belongs to it, since generation would make it; so do tokens without characters of
    their own between two that have some.
    """
    supervised = np.zeros(len(tokens.ids), dtype=np.bool_)
    weights = None if rendered.weights is None else np.zeros(len(tokens.ids), dtype=np.float32)
    for place, span in enumerate(rendered.spans if len(tokens.ids) else ()):
        inside = tokens.inside(*span)
        supervised[inside] = True
        if weights is not None and rendered.weights is not None:
            weights[inside] = rendered.weights[place]
    return tokens.ids, supervised, weights
