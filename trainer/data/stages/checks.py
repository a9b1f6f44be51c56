"""What is wrong with the values of a row, which refuses it, and what looks wrong in a document, which a policy decides.

Refused always: what is no text or teaches nothing. Counted, or put into quarantine where the settings say so: turns out
of order or said twice, trailing turns, empty texts, damaged encoding, control characters, texts beyond a length.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from trainer.data.document import Document, Message, Tally

_VERDICTS = {"up": True, "true": True, "1": True, "down": False, "false": False, "0": False}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 3, 8, 4


class Refusal(Exception):
    """Why a row is no document: a reason code to count by, and a message with the value and the constraint."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def shown(value: Any) -> str:
    """A value as messages show it, shortened."""
    return _SHORT.repr(value)


def is_nothing(value: Any) -> bool:
    """Whether a value is one of those by which tables and files say that there is none."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict | list):
        return all(is_nothing(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None


def is_texts(value: Any) -> bool:
    """Whether a value is a list of texts, as some tables keep the one text that there is."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def text_of(fields: dict[str, Any], key: str, name: str | None = None) -> str:
    """The text in a column, or the one in its list. Raises Refusal: not_text, empty_text, surrogate."""
    value: Any = fields.get(key)
    choice = "" if name else f", or choose one with data.columns, as in data.columns.{key}={key}.0"
    name = name or f'"{key}"'
    if is_texts(value):
        if len(value) > 1:
            what = f"{name} is a list of {len(value)} texts, {shown(value)}"
            raise Refusal("not_text", f"{what}, and one is meant: join them{choice}")
        value = value[0]
    if not isinstance(value, str):
        raise Refusal("not_text", f"{name} is {shown(value) if key in fields else 'missing'}; it must be a text")
    if not value or value.isspace():
        raise Refusal("empty_text", f"{name} is an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (character {error.start + 1})"
        raise Refusal("surrogate", f"{name} holds {half}, which is no character") from None
    return value


def label_of(value: Any) -> str:
    """The class label as text: a name, a whole number, or true/false. Raises Refusal: bad_label."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.strip():
        return text_of({"label": value}, "label").strip()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    raise Refusal("bad_label", f'"label" is {shown(value)}; it must be a name, a whole number or true/false')


def verdict_of(value: Any) -> bool | None:
    """Thumbs up (True) or down (False) of true/false, 1/0, up/down; None for anything else."""
    if isinstance(value, bool | str | int):
        return _VERDICTS.get(str(int(value)) if isinstance(value, bool) else str(value).strip().lower())
    return None


class Policy(StrEnum):
    """What happens to a document in which something looks wrong."""

    keep = "keep"
    quarantine = "quarantine"


@dataclass(kw_only=True, slots=True)
class ChecksConfig:
    """What is looked for in documents, and what happens to those in which it is found."""

    system_late: Policy = Policy.keep
    """Conversations with a system turn that is not the first turn."""
    assistant_before_user: Policy = Policy.keep
    """Conversations in which the assistant speaks before any user does."""
    same_role_twice: Policy = Policy.keep
    """Conversations with two user turns, or two assistant turns, in a row."""
    trailing_turns: Policy = Policy.keep
    """Conversations that end with another turn than the assistant's, which teaches nothing."""
    repeated_turn: Policy = Policy.keep
    """Conversations in which one role says the same text twice."""
    empty_text: Policy = Policy.keep
    """Documents with a text that is empty or only whitespace, as earlier stages may leave it."""
    encoding_damage: Policy = Policy.keep
    """Documents with replacement characters, or with text that was decoded with the wrong encoding (mojibake)."""
    control_characters: Policy = Policy.keep
    """Documents with control characters other than tab and line ends, or with characters that Unicode bars."""
    over_long: Policy = Policy.keep
    """Documents with a text of more than `max_chars` characters."""
    max_chars: int | None = 1_000_000
    """Longest text in characters for `over_long`; null sets no limit."""
    repeat_chars: int = 40
    """Shortest text in characters that counts for `repeated_turn`; people do say yes twice."""


KINDS = tuple(field.name for field in fields(ChecksConfig) if field.name not in ("max_chars", "repeat_chars"))
"""What documents are checked for, in the order of verdicts."""
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
# The first and a further byte of a UTF-8 character, read in another encoding. Cyrillic has such pairs of its own.
_LEADS, _FOLLOWERS = bytes(range(0xC2, 0xF5)), bytes(range(0x80, 0xC0))
_LATIN_LEADS = _LEADS.decode("cp1252") + _LEADS.decode("cp1250")
_LATIN = "".join(_FOLLOWERS.decode(name, "ignore") for name in ("latin-1", "cp1252", "cp1250"))
_CYRILLIC_LEADS, _CYRILLIC = b"\xd0\xd1\xe2".decode("cp1251"), _FOLLOWERS.decode("cp1251", "ignore")
_SUSPECT = re.compile(f"[{_LATIN_LEADS}][{_LATIN}]|(?:[{_CYRILLIC_LEADS}][{_CYRILLIC}]){{2}}|\u0432\u0402")


class Checks:
    """The stage that looks at documents and changes nothing in them."""

    name = "checks"

    def __init__(self, config: ChecksConfig) -> None:
        from ftfy.badness import is_bad

        self.config = config
        self._is_bad: Callable[[str], bool] = is_bad

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """The document, each trouble noted; None, under its first trouble, where one of them means quarantine."""
        found = self._found(document)
        for kind, place in found.items():
            if getattr(self.config, kind) == Policy.quarantine:
                tally.drop(self.name, kind, f"{document.where} ({place})")
                return None
        for kind, place in found.items():
            tally.note(self.name, kind, f"{document.where} ({place})")
        return document

    def verdicts(self, document: Document) -> list[str]:
        """The kinds of trouble in a document, in the order of `KINDS`; a pure function of it and the limits."""
        return list(self._found(document))

    def _found(self, document: Document) -> dict[str, str]:
        """Kinds of trouble, in the order of `KINDS`, each with its first place in the document."""
        places: dict[str, str] = {}
        for kind, place in self._troubles(document):
            places.setdefault(kind, place)
        return {kind: places[kind] for kind in KINDS if kind in places} if places else places

    def _troubles(self, document: Document) -> Iterator[tuple[str, str]]:
        prompt = document.messages or []
        if document.chosen is not None or document.rejected is not None:
            for name in ("chosen", "rejected"):
                yield from _order([*prompt, *(getattr(document, name) or [])], f" of {name}", self.config.repeat_chars)
        elif document.messages is not None:
            yield from _order(prompt, "", self.config.repeat_chars)
        for number, text in enumerate(document.texts(), 1):
            yield from self._text(text, f"text {number}")

    def _text(self, text: str, name: str) -> Iterator[tuple[str, str]]:
        if not text or text.isspace():
            yield "empty_text", name
        if self.config.max_chars is not None and len(text) > self.config.max_chars:
            yield "over_long", f"{name}, {len(text)} characters"
        if match := _CONTROL.search(text):
            yield "control_characters", f"{name}, U+{ord(match.group()):04X} at character {match.start() + 1}"
        if text.isascii():
            return
        at = text.find("\ufffd")
        if at >= 0:
            yield "encoding_damage", f"{name}, U+FFFD at character {at + 1}"
        elif (match := _SUSPECT.search(text)) and self._is_bad(text):
            yield "encoding_damage", f"{name}, {match.group()!r} at character {match.start() + 1}"


def _order(turns: list[Message], suffix: str, repeat_chars: int) -> Iterator[tuple[str, str]]:
    roles = [turn["role"] for turn in turns]
    said: set[tuple[str, str]] = set()
    for number, (turn, role) in enumerate(zip(turns, roles, strict=True), 1):
        where = f"turn {number}{suffix}"
        if role == "system" and number > 1:
            yield "system_late", where
        if role == "assistant" and "user" not in roles[: number - 1]:
            yield "assistant_before_user", where
        if number > 1 and role == roles[number - 2] != "system":
            yield "same_role_twice", where
        if len(turn["content"]) >= repeat_chars and (role, turn["content"]) in said:
            yield "repeated_turn", where
        said.add((role, turn["content"]))
    if roles and roles[-1] != "assistant":
        yield "trailing_turns", f"turn {len(turns)}{suffix}"
