"""What looks wrong in a document, which a policy decides: counted, or put into quarantine where the settings say so.

Turns out of order or said twice, trailing turns, empty texts, damaged encoding, control characters, texts beyond a length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from trainer.data.config import ChecksConfig
from trainer.data.document import Document, Message, Tally

KINDS = {
    "system_late": "a system turn that is not the first turn",
    "assistant_before_user": "the assistant speaks before any user does",
    "same_role_twice": "two user turns, or two assistant turns, in a row",
    "trailing_turns": "the last turn is not the assistant's, and teaches nothing",
    "repeated_turn": "one role says the same text twice",
    "empty_text": "a text that is empty or only whitespace, as earlier stages may leave it",
    "encoding_damage": "replacement characters, or text that was decoded with the wrong encoding (mojibake)",
    "control_characters": "control characters other than tab and line ends, or characters that Unicode bars",
    "over_long": "a text of more than `max_chars` characters",
}
"""What documents are checked for, in the order of verdicts."""
REPEATED = 40
"""Shortest text in characters that counts as said twice; people do say yes twice."""
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
# The first and a further byte of a UTF-8 character, read in another encoding. Cyrillic has such pairs of its own.
_LEADS, _FOLLOWERS = bytes(range(0xC2, 0xF5)), bytes(range(0x80, 0xC0))
_LATIN_LEADS = _LEADS.decode("cp1252") + _LEADS.decode("cp1250")
_LATIN = "".join(_FOLLOWERS.decode(name, "ignore") for name in ("latin-1", "cp1252", "cp1250"))
_CYRILLIC_LEADS, _CYRILLIC = b"\xd0\xd1\xe2".decode("cp1251"), _FOLLOWERS.decode("cp1251", "ignore")
_SUSPECT = re.compile(f"[{_LATIN_LEADS}][{_LATIN}]|(?:[{_CYRILLIC_LEADS}][{_CYRILLIC}]){{2}}|\u0432\u0402")


def problems(config: ChecksConfig) -> list[str]:
    """One line for each name in `quarantine` that is no kind of trouble."""
    known = ", ".join(KINDS)
    return [
        f"data.checks.quarantine: {name!r} is not looked for; known are {known}"
        for name in config.quarantine
        if name not in KINDS
    ]


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
            if kind in self.config.quarantine:
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
                yield from _order([*prompt, *(getattr(document, name) or [])], f" of {name}")
        elif document.messages is not None:
            yield from _order(prompt, "")
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


def _order(turns: list[Message], suffix: str) -> Iterator[tuple[str, str]]:
    roles = [turn["role"] for turn in turns]
    said: set[tuple[str, str]] = set()
    for number, (turn, role) in enumerate(zip(turns, roles, strict=True), 1):
        where = f"turn {number}{suffix}"
        if role == "system" and number > 1:
            yield "system_late", where
        if role == "assistant" and "user" not in roles[: number - 1]:
            yield "assistant_before_user", where
        if number > 1 and role == roles[number - 2] and role not in ("system", "tool"):
            yield "same_role_twice", where
        if len(turn["content"]) >= REPEATED and (role, turn["content"]) in said:
            yield "repeated_turn", where
        said.add((role, turn["content"]))
    if roles and roles[-1] != "assistant":
        yield "trailing_turns", f"turn {len(turns)}{suffix}"
