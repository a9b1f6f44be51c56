"""Classes of characters as a tokenizer's own engine has them, and its patterns in Python's notation.

Engines differ in what they call a letter, a number or a space, and in the version of Unicode they follow. So the
classes are asked of the engine, for the basic plane and a range of pictures; a text with any other character is not
for these patterns.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

import numpy as np

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
"""The one group of patterns that is searched without regard to case."""

_CLASS = re.compile(r"\[\^?[^\]]*\]|\\p\{\w+\}|\\[sS]")
_ONE = re.compile(r"\\p\{(\w+)\}|\\s")
_PICTURES = range(0x1F300, 0x1FB00)
# Scripts written without spaces, whose runs do not repeat: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF))
_FOLDED = {0x017F, 0x212A}  # long s and the Kelvin sign, which a search without regard to case takes for s and k


@cache
def members(name: str) -> frozenset[int]:
    """Code points of a class among those of the basic plane and of pictures, as the tokenizer's engine has them."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Digits, Split

    text = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000), *_PICTURES)))
    if name == "Digits":  # another engine than that of patterns; runs alternate, from what is none on
        runs = [run for run, _ in Digits(individual_digits=False).pre_tokenize_str("a" + text)]
        return frozenset(map(ord, "".join(runs[1::2])))
    rest = Split(Regex((r"\s" if name == "s" else rf"\p{{{name}}}") + "+"), "removed").pre_tokenize_str(text)
    return frozenset(map(ord, text)) - frozenset(map(ord, "".join(part for part, _ in rest)))


@cache
def handled(composes: bool) -> frozenset[int]:
    """Code points that need no second thought; with `composes`, of those that NFC never changes in any company."""
    found = {*range(0xD800), *range(0xE000, 0x10000), *_PICTURES} - _FOLDED - (members("N") ^ members("Digits"))
    for begin, end in _UNSPACED:
        found.difference_update(range(begin, end + 1))
    if not composes:
        return frozenset(found)
    # Unassigned ones are left out since later versions of Unicode may give them a composition; others are stable.
    seconds, stable = {*range(0x1160, 0x1200)}, set[int]()
    for code in range(0x10000):
        character = chr(code)
        parts = unicodedata.decomposition(character)
        if parts and parts[0] != "<":
            seconds.update(int(part, 16) for part in parts.split()[1:])
        if not (
            unicodedata.combining(character)
            or unicodedata.category(character) == "Cn"
            or (parts and unicodedata.normalize("NFC", character) != character)
        ):
            stable.add(code)
    return frozenset(found & (stable | {*_PICTURES}) - seconds)


@cache
def translate(pattern: str, within: frozenset[int]) -> str:
    """A pattern of the tokenizer's engine in Python's notation, for texts of the code points `within` alone."""

    def listed(match: re.Match[str]) -> str:
        return ranges(members(match[1] or "s") & within)

    def one(match: re.Match[str]) -> str:
        found = match[0]
        if found == r"\S":
            return f"[^{ranges(members('s') & within)}]"
        return _ONE.sub(listed, found) if found[0] == "[" else f"[{_ONE.sub(listed, found)}]"

    either = "'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    return _CLASS.sub(one, pattern.replace(CONTRACTIONS, f"(?:{either})"))


def ranges(codes: Iterable[int]) -> str:
    """The inside of a character class."""
    ordered = np.array(sorted(codes), dtype=np.int64)
    breaks = np.flatnonzero(np.diff(ordered) != 1)
    begins = ordered[np.concatenate([[0], breaks + 1])] if len(ordered) else ordered
    ends = ordered[np.concatenate([breaks, [len(ordered) - 1]])] if len(ordered) else ordered
    pairs = zip(begins.tolist(), ends.tolist(), strict=True)
    return "".join(f"\\U{begin:08x}-\\U{end:08x}" for begin, end in pairs)
