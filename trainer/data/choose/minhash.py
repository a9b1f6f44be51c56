"""What comparing texts rests on: their normal form, word n-grams as 64-bit numbers, true Jaccard, MinHash bands.

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
MIN_RECALL = 0.97
"""Share of the pairs exactly at the threshold that the chosen bands must find, in theory."""
SEED = 1
BATCH_BYTES = 1 << 18
"""Text hashed in one go; the working arrays take about 40 bytes for each of these, and stay in the cache."""
CALL_TEXTS, CALL_HASHES = 32, 16384
"""Most texts and n-grams handed to `rensa` at once: with more it starts threads, and a process forked after that hangs."""

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


def ngram_hashes(normalized: Sequence[bytes], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Word n-grams of some normalised texts: (uint64 hashes with repeats, int64[texts + 1] offsets into them).

    A text of fewer than `ngram` words, but at least one, has a single n-gram: all of it. Such texts are therefore
    similar only when their words are the same.
    """
    words, offsets = word_hashes(normalized)
    counts = np.diff(offsets)
    numbers = np.where(counts >= ngram, counts - ngram + 1, np.minimum(counts, 1))
    ends = np.cumsum(numbers)
    whole = roll(words, ngram)
    place = np.repeat(offsets[:-1] - (ends - numbers), numbers) + np.arange(ends[-1] if len(ends) else 0)
    hashes = np.zeros(len(place), dtype=np.uint64)
    short = np.flatnonzero((counts > 0) & (counts < ngram))
    full = np.ones(len(place), dtype=bool)
    full[(ends - numbers)[short]] = False
    hashes[full] = whole[place[full]]
    for text in short:
        own = words[offsets[text] : offsets[text + 1]]
        hashes[ends[text] - 1] = (own * _STEP[: len(own)]).sum(dtype=np.uint64) + np.uint64(ngram - len(own))
    return mix(hashes), np.concatenate([[0], ends])


def ngram_set(text: str, ngram: int) -> np.ndarray:
    """The distinct n-grams of one text, sorted: uint64[k]."""
    hashes, _ = ngram_hashes([normalize(text)], ngram)
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Shared n-grams over all n-grams of two sorted sets; 0 where both are empty."""
    both = np.concatenate([first, second])
    if not len(both):
        return 0.0
    both.sort(kind="stable")
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def recall(similarity: float, bands: int, rows: int) -> float:
    """Probability that two texts of this Jaccard similarity share at least one band: 1 - (1 - s**rows)**bands."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows of a band) with the most rows, so the fewest useless candidates, that still find enough.

    A MinHash value agrees with probability equal to the Jaccard similarity s (Broder 1997); a pair becomes a candidate
    with probability 1 - (1 - s**r)**b (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4). The
    rows are the largest number for which that is at least 0.97 at s = threshold. For 128 values and a threshold of 0.8:
    18 bands of 7 rows, which find 0.985 of the pairs at 0.8, 0.999 at 0.85, 0.79 at 0.7, 0.40 at 0.6, 0.13 at 0.5 and
    0.03 at 0.4; candidates below the threshold are then refused by their true similarity.
    """
    for rows in range(num_perm, 0, -1):
        if recall(threshold, num_perm // rows, rows) >= MIN_RECALL:
            return num_perm // rows, rows
    return num_perm, 1


def min_hashes(hashes: np.ndarray, offsets: np.ndarray, num_perm: int) -> np.ndarray:
    """MinHash values of sets of 64-bit hashes (uint64 with repeats, int64[texts + 1] offsets): uint32[texts, num_perm].

    The full-set R-MinHash of the `rensa` library (after Dahlgaard, Knudsen and Thorup, Fast Similarity Sketching, 2017).
    """
    from rensa import RMinHash

    hashes = np.ascontiguousarray(hashes, dtype=np.uint64)
    result = np.empty((len(offsets) - 1, num_perm), dtype=np.uint32)
    begin = 0
    while begin < len(result):
        fitting = int(np.searchsorted(offsets, offsets[begin] + CALL_HASHES, side="right")) - 1
        end = min(max(fitting, begin + 1), begin + CALL_TEXTS, len(result))
        part = hashes[offsets[begin] : offsets[end]]
        places = (offsets[begin : end + 1] - offsets[begin]).astype(np.uint64)
        result[begin:end] = RMinHash.digest_matrix_from_flat_token_hashes(part, places, num_perm, SEED).to_rows()
        begin = end
    return result


def band_hashes(values: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit hash a band from MinHash values uint32[texts, num_perm]: uint64[texts, bands]."""
    parts = mix(values[:, : bands * rows].astype(np.uint64).reshape(len(values), bands, rows) + np.uint64(1))
    weights = _fixed_random("rows", rows)
    return mix((parts * weights).sum(axis=2, dtype=np.uint64) + np.arange(bands, dtype=np.uint64))


def signatures(normalized: Sequence[bytes], *, ngram: int, bands: int, rows: int) -> np.ndarray:
    """Band hashes of normalised texts: uint64[texts, bands]. A text without words gets the same ones as any other such."""
    result = np.empty((len(normalized), bands), dtype=np.uint64)
    begin = size = 0
    for number, data in enumerate(normalized):
        size += len(data) + 1
        if size < BATCH_BYTES and number + 1 < len(normalized):
            continue
        hashes, offsets = ngram_hashes(normalized[begin : number + 1], ngram)
        result[begin : number + 1] = band_hashes(min_hashes(hashes, offsets, bands * rows), bands, rows)
        begin, size = number + 1, 0
    return result
