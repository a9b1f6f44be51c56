"""Byte-level BPE the short way: the ids of pre-tokens, the pieces merges never cross, are remembered once found.

Natural text repeats its pre-tokens, so that cutting it into pieces and looking these up costs a fraction of merging
anew. Only tokenizers of known kinds are taken, and every one proves itself on a set of probes first. Classes of
characters (letters, numbers, spaces) are asked of the tokenizer's own engine; a text with a character outside the
range that was asked for is left to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data.tokens import character_classes
from trainer.data.tokens.character_classes import CONTRACTIONS, ranges, translate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_REMEMBERED = 1 << 17
"""Pre-tokens remembered, about 200 bytes each; what comes later is merged anew each time."""
MAX_LENGTH = 64
"""Characters of the longest pre-token that is remembered; longer ones hardly come again."""

Spans = list[tuple[int, int]]
Learned = tuple[np.ndarray, np.ndarray]

_ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"%s|'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[^\s\p{L}\p{Digits}]+|\s+(?![^\s\p{Digits}])|\s+"
_SPLITS = frozenset(
    {
        _GPT2,
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_ENDING}",  # Llama 3, cl100k
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_ENDING}",  # Qwen2, Qwen3
        _CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SLASH,  # o200k
        _CASED % ("", "") + r"|\p{N}" + _SLASH,  # Mistral's Tekken
    }
)


class _Memory(dict[str, bytes]):
    """Pre-token -> its ids as int32. Fills itself through the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._tokenize = model.tokenize
        self._table = dict(enumerate(_alphabet()))

    def __missing__(self, piece: str) -> bytes:
        spelled = piece.encode("utf-8").decode("latin-1").translate(self._table)
        ids = array("i", [token.id for token in self._tokenize(spelled)]).tobytes()
        if len(self) < MAX_REMEMBERED and len(piece) <= MAX_LENGTH:
            self[piece] = ids
        return ids


class RememberedPretokens:
    """Encodes texts as one tokenizer would, without special ids around them. May be used in forked processes."""

    def __init__(self, backend: Tokenizer, pattern: str, added: dict[str, int], *, composes: bool) -> None:
        """`pattern` cuts a text into pre-tokens; `composes`: the tokenizer brings texts into the form NFC first."""
        handled = character_classes.handled(composes)
        self._find_ascii = re.compile(translate(pattern, frozenset(range(128)))).findall
        self._find = re.compile(translate(pattern, handled)).findall
        self._foreign = re.compile(f"[^{ranges(handled)}]").search
        tokens = sorted(map(re.escape, added), key=len, reverse=True)  # the longest of those that match wins
        self._split: Callable[[str], list[str]] = re.compile(f"({'|'.join(tokens)})").split if tokens else _whole
        self._added = {token: array("i", [number]).tobytes() for token, number in added.items()}
        self._memory = _Memory(backend.model)
        vocab = backend.get_vocab(with_added_tokens=False)
        self._widths = np.zeros(max((*vocab.values(), *added.values())) + 1, dtype=np.int64)
        for token, number in vocab.items():
            self._widths[number] = len(token)
        for token, number in added.items():
            self._widths[number] = len(token.encode("utf-8"))

    @classmethod
    def of(cls, backend: Tokenizer) -> RememberedPretokens | None:
        """The short way of a tokenizer; None where it is of no kind for which that way is known to be exact.

        Taken are byte-level BPE (Radford et al. 2019) with the pre-tokenizers of GPT-2, StarCoder and SmolLM2,
        Llama 3, Qwen2, o200k and Tekken, without dropout, without a normaliser but NFC, and with added tokens that
        stand for nothing but their own characters.
        """
        pattern, composes = _pattern(backend), _normalizer(backend) == {"type": "NFC"}
        added = _added(backend, composes=composes)
        if pattern is None or added is None or not _plain_bpe(backend, added):
            return None
        if not composes and _normalizer(backend) is not None:
            return None
        made = cls(backend, pattern, added, composes=composes)
        return made if made.agrees(backend, [*PROBES, *_probes_with(list(added))]) else None

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text; None where only the tokenizer itself can tell."""
        packed = self._packed(text)
        return None if packed is None else np.frombuffer(packed, dtype=np.int32).tolist()

    def agrees(self, backend: Tokenizer, texts: Iterable[str]) -> bool:
        """Whether the tokenizer finds the same ids in all texts that the short way takes."""
        for text in texts:  # one by one: a batch would start threads, which do not survive a fork
            ids = self.encode(text)
            if ids is not None and ids != backend.encode(text, add_special_tokens=False).ids:
                return False
        return True

    def encode_all(self, texts: Sequence[str], spans: Sequence[Spans]) -> list[Learned | None]:
        """Ids int32[tokens] of texts and which tokens lie in its spans, bool[tokens]; None as in `encode`.

        `spans` are [begin, end) in characters. A token that straddles an edge belongs to the span. The bytes of all
        tokens of a text are its own, so that the place of a token is the sum of the lengths before it.
        """
        packed = [self._packed(text) for text in texts]
        taken = [number for number, ids in enumerate(packed) if ids is not None]
        ids = np.frombuffer(bytearray().join(filter(None, packed)), dtype=np.int32)
        ends = np.concatenate([[0], self._widths[ids].cumsum()])  # ends[i]: bytes before token i
        stops = np.cumsum([0, *(len(packed[number] or b"") // 4 for number in taken)])
        bases = ends[stops].tolist()
        edges: list[int] = []
        found: list[Learned | None] = [None] * len(texts)
        supervised = np.zeros(len(ids), dtype=np.bool_)
        bounds = stops.tolist()
        for place, number in enumerate(taken):
            inner = [edge for span in spans[number] if span[0] < span[1] for edge in span]
            length, inner = _in_bytes(texts[number], inner)
            base = bases[place]
            if bases[place + 1] - base != length:
                continue  # a character that no pre-token took
            edges += [base + edge for edge in inner]
            begin, end = bounds[place : place + 2]
            found[number] = (ids[begin:end], supervised[begin:end])
        pairs = np.array(edges, dtype=np.int64).reshape(-1, 2)
        firsts = ends[1:].searchsorted(pairs[:, 0], side="right").tolist()
        lasts = ends[1:].searchsorted(pairs[:, 1], side="left").tolist()
        for first, last in zip(firsts, lasts, strict=True):
            supervised[first : last + 1] = True
        return [None if pair is None else (pair[0].copy(), pair[1].copy()) for pair in found]

    def _packed(self, text: str) -> bytes | None:
        if text.isascii():
            find = self._find_ascii
        elif self._foreign(text):
            return None
        else:
            find = self._find
        recall, parts = self._memory.__getitem__, list[bytes]()
        for number, piece in enumerate(self._split(text)):
            if number & 1:
                parts.append(self._added[piece])
            elif piece:
                parts.extend(map(recall, find(piece)))
        return b"".join(parts)


def _whole(text: str) -> list[str]:
    return [text]


def _in_bytes(text: str, edges: list[int]) -> tuple[int, list[int]]:
    """Length of a text and places in it, in bytes of UTF-8 instead of characters."""
    if text.isascii():
        return len(text), edges
    before, done, found = 0, 0, {}
    for edge in sorted({*edges, len(text)}):
        before += len(text[done:edge].encode("utf-8"))
        done = edge
        found[edge] = before
    return before, [found[edge] for edge in edges]


@cache
def _alphabet() -> str:
    """The character that stands for each byte in byte-level vocabularies: itself where it is visible."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return "".join(chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256))


def _state(part: Any) -> Any:
    """A part of a tokenizer as it is saved; None where there is none."""
    return None if part is None else json.loads(part.__getstate__())


def _normalizer(backend: Tokenizer) -> Any:
    try:
        return _state(backend.normalizer)
    except Exception:  # noqa: BLE001 - a part written in Python cannot be saved, and is of no known kind
        return {"type": "custom"}


def _pattern(backend: Tokenizer) -> str | None:
    """What cuts texts into pre-tokens, in the notation of the engine; None where it is not known."""
    try:
        state = _state(backend.pre_tokenizer)
    except Exception:  # noqa: BLE001 - as in `_normalizer`
        return None
    steps = [] if state is None else state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    searches = steps[-1].get("use_regex", True)
    if len(steps) == 1:
        return _GPT2 if searches else None
    first = steps[0]
    if len(steps) != 2:
        return None
    if first["type"] == "Digits" and searches:
        return _GPT2_DIGITS % (r"[\p{Digits}]" if first["individual_digits"] else r"[\p{Digits}]+")
    whole = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    wanted = first["pattern"].get("Regex") if whole else None
    return wanted if wanted in _SPLITS and not searches else None


def _added(backend: Tokenizer, *, composes: bool) -> dict[str, int] | None:
    """Added tokens and their ids; None where one takes more than its own characters or may not be found in order."""
    tokens = {token.content: (number, token) for number, token in backend.get_added_tokens_decoder().items()}
    if backend.encode_special_tokens or any(t.lstrip or t.rstrip or t.single_word for _, t in tokens.values()):
        return None
    late = [content for content, (_, token) in tokens.items() if token.normalized and content]
    early = [content for content, (_, token) in tokens.items() if not token.normalized and content]
    # Those that may be normalised are looked for after the others, which matters only where two could overlap.
    if (late and composes) or len(late) * len(early) > 1 << 14 or any(_overlap(a, b) for a in late for b in early):
        return None
    return {content: number for content, (number, _) in tokens.items() if content}


def _overlap(one: str, other: str) -> bool:
    """Whether a text can spell both with a character in common."""
    if one in other or other in one:
        return True
    shorter = min(len(one), len(other))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in range(1, shorter))


def _plain_bpe(backend: Tokenizer, added: dict[str, int]) -> bool:
    """Whether the model does nothing but merge, and every token stands for as many bytes as it has characters."""
    from tokenizers.models import BPE

    model = backend.model
    if type(model) is not BPE or model.dropout or model.byte_fallback:
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    alphabet, vocab = set(_alphabet()), backend.get_vocab(with_added_tokens=False)
    spelled = (token for token in added if token in vocab and not token.isascii())
    return alphabet <= vocab.keys() and not any(alphabet.issuperset(token) for token in spelled)


def _probes_with(added: list[str]) -> list[str]:
    """Texts with added tokens, whole, broken and next to each other."""
    few = added[:8] + added[-8:]
    return [
        text
        for token in few
        for text in (token, f" {token} ", f"a{token}b", f"1 {token}\n{token}2", token[:-1] + " x", token + few[0])
    ]


PROBES = (
    "¦ ¦  ¦\n¦\t¦\r\n¦ \n ¦a¦ a¦a ¦  a  b   c    ¦a\n\n\nb¦a \n b\t\tc\r\n\r\nd ¦'¦''s¦' s¦o'clock¦\u2019s it\u2019ll"
    "¦it's I'll we'RE they'Ve I'M he'D 'S'T don't¦x'\u017f y'\u017ft '\u212a¦CamelCase ABCdef aBC XMLHttp 'sA'Sa"
    "¦0¦12¦123¦1234567890¦ 1 22  333¦a1b22c333¦3.14e-10¦1,000,000¦x2 y 2z¦½ ² Ⅻ ٣٤٥ १२¦5\n6 ¦!?.,;:¦...!!!???¦ -- "
    '¦a--b¦(x)[y]{z}¦$%^&*~`|\\/@#+=<>_¦/path/to\n/x/\n¦"q"\n\n"r"¦\\n\n/\n¦\x00\x01\x02¦a\x1cb\x1dc\x1ed\x1fe'
    "¦\x1c\x1c \x1f¦\x0b\x0c a\x0b¦\x7f \x80¦a\x85b \x85 c¦\xa0a\xa0 b¦\u2003x\u2028y\u2029 z\u3000w¦\xadsoft\u2060"
    "¦\u200ba\u200cb\u200d\ufeffc¦\u180ea\u1680b¦café naïve Ärger ÑANDÚ¦cafe\u0301 a\u0308\u0323 \u0301¦Ǆǅǆ İıẞß"
    "¦\u0344\u0958 \u1161\u11a8 \u1100\u1161¦漢字かなカナ¦中文 123 abc。¦한국어 텍스트¦ไทย ลาว¦العربية ١٢٣¦हिन्दी में¦نִקּוּד"
    "¦Ελληνικά Кириллица¦😀¦a😀b 😀😀¦👩\u200d👩\u200d👧 🇩🇪 👍🏽¦☃\ufe0f ★¦\U0001d518\U0001d52b 𠀀 🄀¦\ue000\uf8ff\ufffd\uffff"
    "¦\U0010ffff¦for i in range(10):\n    x[i] = i  # n\n\treturn\n¦http://a.b/c?d=e&f#g¦" + "a" * 70
).split("¦")
"""Texts on which the short way must find what the tokenizer finds, or leave them to it."""
