"""Hashes by which documents are compared: of their texts and of the normal form of these, as columns.

Each is a pure function of the document: the same in every process and for every division into blocks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.config import ComparedText, DuplicatePolicy, DuplicatesConfig
from trainer.data.document import Document, Message, message_texts

_PUNCTUATION = ".,;:!?\"'`()[]{}_#|"
# Scripts written without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han with its extensions.
_UNSPACED_SCRIPTS_REGEX = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]+"
)


_RANGES_WITH_SEPARATORS = (range(0x80, 0x3100), range(0xA000, 0xB000), range(0xFE00, 0x10000))
"""Beyond ASCII, the blocks of Unicode with punctuation; the others have letters and ideographs alone, and take time."""
_FURTHER_SEPARATORS = "\u2013\u2014\u200b\ufeff"
"""En dash and em dash, which are `Pd` but stand between words; zero-width space and byte-order mark, which are `Cf`."""


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Hash uint64 numbers so that every bit of the result depends on every bit of the number. Different numbers stay different.

    This is the finaliser of splitmix64 (Steele et al. 2014).
    """
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def digest64(content_bytes: bytes) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(content_bytes, digest_size=8).digest(), "big")


NO_GROUP = 0
"""In place of the hash of a group."""


def group_digest(name: str | None) -> int:
    """64 bits that stand for a group (`data.group_by`); `NO_GROUP` for none."""
    if name is None:
        return NO_GROUP
    return digest64(name.encode("utf-8", "surrogatepass")) or 1  # 0 is taken


@functools.cache
def _ascii_translation_table() -> bytes:
    """A table for `bytes.translate` that lowers ASCII letters and makes spaces of punctuation and control characters.

    It is the fast way of `normalize` for ASCII texts.
    """
    space = ord(" ")
    table = bytearray(range(256))
    for code in range(128):
        character = chr(code)
        is_part_of_word = code >= 32 and code != 127 and character not in _PUNCTUATION
        table[code] = ord(character.lower()) if is_part_of_word else space
    return bytes(table)


@functools.cache
def _separator_regex() -> re.Pattern[str]:
    """A pattern for the characters that separate words in a text of any script, which `normalize` replaces by a space.

    These are punctuation, control characters, and spaces but the plain one. Made once: it takes a look at 17,000 characters.
    """
    space = ord(" ")
    # Of ASCII, what `_ascii_translation_table` makes spaces of.
    separators = [chr(code) for code in range(128) if _ascii_translation_table()[code] == space and code != space]
    for code in itertools.chain(*_RANGES_WITH_SEPARATORS):
        category = unicodedata.category(chr(code))
        is_space_or_control = category[0] == "Z" or category == "Cc"
        is_punctuation = category[0] == "P" and category != "Pd"  # hyphens are parts of words
        if is_space_or_control or is_punctuation or chr(code) in _FURTHER_SEPARATORS:
            separators.append(chr(code))
    return re.compile("[" + re.escape("".join(separators)) + "]+")


def normalize(text: str) -> bytes:
    """Bring a text into the form by which copies are found although case and punctuation differ: its words, in UTF-8.

    "Hello, World!" -> b"hello  world ": one space or more between words. Case is folded; spaces, brackets, quotes, `_ # |` and
    sentence punctuation only separate words. Signs that carry meaning in formulas and code (`+ - * / % < > = & @ $ ^ ~` and
    symbols of any script) stay, and `!=` stays as `<>`. In scripts written without spaces (Han, kana, Thai, Lao, Khmer, Burmese)
    every character is a word, so that n-grams of words are there n-grams of characters.
    """
    if "!=" in text:
        text = text.replace("!=", "<>")
    if text.isascii():
        words = text.encode("ascii").translate(_ascii_translation_table())
    else:
        text = _separator_regex().sub(" ", unicodedata.normalize("NFC", text.casefold()))
        text = _UNSPACED_SCRIPTS_REGEX.sub(lambda run: f" {' '.join(run[0])} ", text)
        words = text.encode("utf-8", "surrogatepass")
    # Bold text of Markdown; a single * is a sign of formulas.
    return words.replace(b"**", b"  ") if b"**" in words else words


def normal_digest(normalized: bytes) -> int | None:
    """64 bits of the normal form, whatever stood between the words; None if no word is left."""
    words = normalized.split()
    return digest64(b" ".join(words)) if words else None


_as_json = json.JSONEncoder(ensure_ascii=False).encode  # made once: `json.dumps` would make one each time


def content_json(document: Document) -> str:
    """Write a document's content as JSON: its hash finds exact copies, and lists of rejected rows quote it.

    It has everything but where the row stands (file and line), its source and its group.
    """
    content_fields: list[Any] = [
        document.messages,
        document.prompt,
        document.completion,
        document.text,
        document.label,
    ]
    # Left out if there are none, so that digests of other documents stay what they were before there were these.
    answers = [document.chosen, document.rejected, document.desirable]
    if answers != [None, None, None]:
        content_fields += answers
    if document.tools is not None:
        content_fields.append(document.tools)
    return _as_json(content_fields)


def compared_text(document: Document, compared_part: ComparedText) -> str:
    """Find the text of a document by which copies are found, as `data.duplicates.text` (`compared_part`) asks.

    - `prompt` or `completion`: that text, unless it is missing or blank;
    - else the texts of the whole document in reading order. The words of a rejected answer are marked with ~, because two
      preference pairs with the answers the other way round teach opposite things.
    """
    requested_text = None
    if compared_part is ComparedText.prompt:
        requested_text = prompt_text(document)
    elif compared_part is ComparedText.completion:
        _, answer = _split_answer(document)
        requested_text = "\n".join(_texts_of_turns(answer))
    if requested_text is not None and requested_text.strip():
        return requested_text

    texts = document.texts()
    rejected_texts = _texts_of_turns(document.rejected or [])  # these are the last of `texts`
    marked_texts = []
    for text in rejected_texts:
        marked_texts.append(" ".join("~" + word for word in text.split()))
    num_unmarked = len(texts) - len(rejected_texts)
    return "\n".join([*texts[:num_unmarked], *marked_texts])


def prompt_text(document: Document) -> str | None:
    """Find the text that an answer is given to: the turns before the last answer without system turns, or a labelled text.

    By it training documents are found that ask what held-out ones ask. None for a text without a label.
    """
    if document.text is not None:
        return document.text if document.label is not None else None
    turns_before_answer, _ = _split_answer(document)
    without_system = [turn for turn in turns_before_answer if turn["role"] != "system"]
    return "\n".join(_texts_of_turns(without_system))


def _split_answer(document: Document) -> tuple[list[Message], list[Message]]:
    """Divide the turns of a document at its answer: (the turns before it, the answer).

    The answer is the preferred one of a pair, else the last turn of the assistant; empty if there is none.
    """
    if document.chosen is not None:
        return document.messages or [], document.chosen
    turns = document.conversation()
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    last = answers[-1] if answers else len(turns)
    return turns[:last], turns[last : last + 1]


def _texts_of_turns(turns: list[Message]) -> list[str]:
    """The texts of turns, in reading order."""
    texts: list[str] = []
    for turn in turns:
        texts += message_texts(turn)
    return texts


def _prompt_digest(document: Document) -> int:
    """64 bits of the words of a document's prompt; 0 without a prompt, or if it has no words."""
    prompt = prompt_text(document)
    return 0 if prompt is None else normal_digest(normalize(prompt)) or 0


def _label_digest(document: Document) -> int:
    """64 bits of a document's label and of whether its answer is desirable; 0 if it has neither."""
    label_and_desirable = (document.label, document.desirable)
    return 0 if label_and_desirable == (None, None) else digest64(json.dumps(label_and_desirable).encode())


@dataclass(frozen=True, slots=True)
class DocumentHasher:
    """Makes the columns of hashes by which documents are compared. Pure: the same for every block."""

    config: DuplicatesConfig
    finds_near_leaks: bool = False
    """Whether near leaks are looked for, too."""
    has_held_out: bool = True
    """Whether there may be held-out data to compare with. Without, "prompt" is 0 for all, and if only exact copies are looked
    for, "normal" is "digest"."""

    def hash_documents(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """Hash documents, so that copies are found later without their texts: uint64 [n] each, equal where documents are copies.

        - "digest": of the text itself, or of the whole document, by `data.duplicates.text`;
        - "normal": of the text's words after `normalize`; of documents with different labels it differs, if whole documents are
          compared;
        - "prompt": of the words of the prompt; 0 without a prompt or without held-out data;
        - "verdict", only if near copies are looked for: of the label, or whether the answer is desirable; 0 without either, or
          unless whole documents are compared.
        """
        digests: list[int] = []
        words_digests: list[int] = []
        prompt_digests: list[int] = []
        label_digests: list[int] = []
        compares_whole = self.config.text is ComparedText.document
        looks_for_near = self.finds_near_leaks or self.config.near is not DuplicatePolicy.none
        needs_words = self.has_held_out or looks_for_near or self.config.normalized is not DuplicatePolicy.none
        for document in documents:
            text = ""  # making it takes time, and is left out if nobody looks
            if needs_words or not compares_whole:
                text = compared_text(document, self.config.text)
            identity = content_json(document) if compares_whole else text
            digest = digest64(identity.encode("utf-8", "surrogatepass"))
            digests.append(digest)
            # A text without a word is compared as it is.
            words_digest = normal_digest(normalize(text)) if needs_words else None
            words_digests.append(digest if words_digest is None else words_digest)
            prompt_digests.append(_prompt_digest(document) if self.has_held_out else 0)
            # Equal texts with different labels are no copies of each other.
            label_digests.append(_label_digest(document) if compares_whole else 0)
        label_hashes = np.array(label_digests, dtype=np.uint64)
        columns = {
            "digest": np.array(digests, dtype=np.uint64),
            "normal": np.array(words_digests, dtype=np.uint64) ^ label_hashes,
            "prompt": np.array(prompt_digests, dtype=np.uint64),
        }
        if looks_for_near:
            columns["verdict"] = label_hashes
        return columns
