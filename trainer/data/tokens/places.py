"""Which tokens stand for which characters of a text.

A tokenizer that keeps offsets counts them character by character, which is a tenth of its time. Where the bytes of the tokens
put together are the text, they say as much; that is so of every tokenizer of bytes that leaves its text as it is. Others
are asked for their offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

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
