"""What comparing texts rests on: their normal form, digests, and runs of words as 64-bit numbers.

Everything is a pure function of the text, the same in every process and for every division into blocks.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

LONGEST_WORD = 256
"""Bytes. A longer run without a separator (base64, sequences) counts as single bytes, so that an edit stays local."""

_PUNCTUATION = ".,;:!?\"'`()[]{}_#|"
# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han with its extensions.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


def _fixed_random(name: str, number: int) -> np.ndarray:
    """`number` odd 64-bit constants that never change."""
    raw = hashlib.shake_128(name.encode()).digest(8 * number)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64) | np.uint64(1)


_BYTE = _fixed_random("byte", 256)
_POWER = np.cumprod(np.full(LONGEST_WORD + 1, 0x9E3779B97F4A7C15, dtype=np.uint64), dtype=np.uint64)
_STEP = _fixed_random("step", 256)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit depends on every bit (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest64(data: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def group_digest(name: str | None) -> int:
    """64 bits that stand for a group; 0 for none."""
    return 0 if name is None else digest64(name.encode("utf-8", "surrogatepass")) or 1


@functools.cache
def _ascii_table() -> bytes:
    table = bytearray(range(256))
    for code in range(128):
        character = chr(code)
        plain = code >= 32 and code != 127 and character not in _PUNCTUATION
        table[code] = ord(character.lower()) if plain else 32
    return bytes(table)


@functools.cache
def _separators() -> re.Pattern[str]:
    """Runs of what separates words, other than the plain space: punctuation, control characters, other spaces."""
    found = [chr(code) for code in range(128) if _ascii_table()[code] == 32 and code != 32]
    for code in (*range(0x80, 0x3100), *range(0xA000, 0xB000), *range(0xFE00, 0x10000)):
        kind = unicodedata.category(chr(code))
        if (
            kind[0] == "Z"
            or kind == "Cc"
            or (kind[0] == "P" and kind != "Pd")
            or chr(code) in "\u2013\u2014\u200b\ufeff"
        ):
            found.append(chr(code))
    return re.compile("[" + re.escape("".join(found)) + "]+")


def normalize(text: str) -> bytes:
    """The words of a text in UTF-8, each between spaces (one or more).

    Case is folded; spaces, brackets, quotes, `_ # |` and sentence punctuation only separate words. Signs that carry
    meaning in formulas and code (`+ - * / % < > = & @ $ ^ ~` and symbols of any script) stay, and `!=` stays as `<>`.
    In scripts written without spaces (Han, kana, Thai, Lao, Khmer, Burmese) every character is a word, so that n-grams
    of words are there n-grams of characters.
    """
    if "!=" in text:
        text = text.replace("!=", "<>")
    if text.isascii():
        data = text.encode("ascii").translate(_ascii_table())
    else:
        text = _separators().sub(" ", unicodedata.normalize("NFC", text.casefold()))
        data = _UNSPACED.sub(lambda run: f" {' '.join(run[0])} ", text).encode("utf-8", "surrogatepass")
    return data.replace(b"**", b"  ") if b"**" in data else data


def normal_digest(normalized: bytes) -> int | None:
    """64 bits of the normal form, whatever stood between the words; None where no word is left."""
    words = normalized.split()
    return digest64(b" ".join(words)) if words else None


def word_hashes(normalized: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit hash of every word of some normalised texts: (uint64[words], int64[texts + 1] offsets into it).

    A polynomial over the bytes modulo 2**64 with random byte values, then `mix`; one pass over all texts at once.
    """
    joined = np.frombuffer(b" ".join((*normalized, b"")), dtype=np.uint8)
    if not len(joined):
        return np.empty(0, dtype=np.uint64), np.zeros(len(normalized) + 1, dtype=np.int64)
    inside = np.zeros(len(joined) + 1, dtype=np.int8)
    inside[1:] = joined != 32
    edges = np.diff(inside)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - starts > LONGEST_WORD
    if long.any():
        pieces = [np.arange(start, end) for start, end in zip(starts[long], ends[long], strict=True)]
        split = np.concatenate(pieces)
        starts, ends = np.concatenate([starts[~long], split]), np.concatenate([ends[~long], split + 1])
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
    begins = np.cumsum([0, *(len(data) + 1 for data in normalized)])
    offsets = np.searchsorted(starts, begins)
    if not len(starts):
        return np.empty(0, dtype=np.uint64), offsets
    lengths = ends - starts
    bytes_of_words = joined[inside[1:].view(bool)]
    first = np.cumsum(lengths) - lengths
    place = np.arange(len(bytes_of_words)) - np.repeat(first, lengths)
    return mix(np.add.reduceat(_BYTE[bytes_of_words] * _POWER[place], first)), offsets


def roll(words: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes of all runs of `ngram` words, given the words' hashes: uint64[max(0, words - ngram + 1)], not mixed."""
    number = len(words) - ngram + 1
    if number <= 0:
        return np.empty(0, dtype=np.uint64)
    total = words[:number] * _STEP[0]
    for step in range(1, ngram):
        total += words[step : step + number] * _STEP[step]
    return total


def ngrams(normalized: bytes, ngram: int, apart: int = 0) -> list[bytes]:
    """The runs of `ngram` words of a normalised text, in order; of fewer words, but at least one, a single run of all.

    Short texts are therefore similar only when their words are the same. Runs of texts with another `apart` are others.
    """
    words = normalized.split()
    if not words:
        return []
    lead = b"%d " % apart if apart else b""
    return [lead + b" ".join(words[start : start + ngram]) for start in range(max(1, len(words) - ngram + 1))]
