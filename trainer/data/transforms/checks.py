"""What looks wrong in a document: counted, or put into quarantine where the settings say so; and what of it can be mended.

Looked for are turns out of order or said twice, trailing turns, empty texts, damaged encoding, control characters. Cleaning
(encoding damage, invisible characters, Unicode form) owns every change of wording; each kind is a switch of its own. It is
idempotent: a text goes through the steps until none of them changes it any more, and one that does not come to rest is left
exactly as it was.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from trainer.data.config import ChecksConfig, CleaningConfig, UnicodeForm
from trainer.data.document import Document, Message, Tally

CHECK_KINDS = {
    "system_late": "a system turn that is not the first turn",
    "assistant_before_user": "the assistant speaks before any user does",
    "same_role_twice": "two user turns, or two assistant turns, in a row",
    "trailing_turns": "the last turn is not the assistant's, and teaches nothing",
    "repeated_turn": "one role says the same text twice",
    "empty_text": "a text that is empty or only whitespace, as earlier stages may leave it",
    "encoding_damage": "replacement characters, or text that was decoded with the wrong encoding (mojibake)",
    "control_characters": "control characters other than tab and line ends, or characters that Unicode bars",
}
"""What documents are checked for, in the order of verdicts."""
MIN_REPEATED_CHARACTERS = 40
"""Shortest text in characters that counts as said twice; people do say yes twice."""
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
# The first and a further byte of a UTF-8 character, read in another encoding. Cyrillic has such pairs of its own.
_LEADS = bytes(range(0xC2, 0xF5))
_FOLLOWERS = bytes(range(0x80, 0xC0))
_LATIN_LEADS = _LEADS.decode("cp1252") + _LEADS.decode("cp1250")
_LATIN = "".join(_FOLLOWERS.decode(name, "ignore") for name in ("latin-1", "cp1252", "cp1250"))
_CYRILLIC_LEADS = b"\xd0\xd1\xe2".decode("cp1251")
_CYRILLIC = _FOLLOWERS.decode("cp1251", "ignore")
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
        first_places = self._first_places(document)
        for kind, place in first_places.items():
            if kind in self.config.quarantine:
                tally.drop(self.name, kind, f"{document.location} ({place})")
                return None
        for kind, place in first_places.items():
            tally.note(self.name, kind, f"{document.location} ({place})")
        return document

    def _first_places(self, document: Document) -> dict[str, str]:
        """Kinds of trouble, in the order of `CHECK_KINDS`, each with its first place in the document."""
        places: dict[str, str] = {}
        for kind, place in self._troubles(document):
            places.setdefault(kind, place)
        if not places:
            return places
        return {kind: places[kind] for kind in CHECK_KINDS if kind in places}

    def _troubles(self, document: Document) -> Iterator[tuple[str, str]]:
        """(kind of trouble, its place in the document)."""
        prompt = document.messages or []
        if document.chosen is not None or document.rejected is not None:
            yield from _turn_troubles([*prompt, *(document.chosen or [])], " of chosen")
            yield from _turn_troubles([*prompt, *(document.rejected or [])], " of rejected")
        elif document.messages is not None:
            yield from _turn_troubles(prompt, "")
        for number, text in enumerate(document.texts(), 1):
            yield from self._text_troubles(text, f"text {number}")

    def _text_troubles(self, text: str, place: str) -> Iterator[tuple[str, str]]:
        """What is wrong with one text."""
        if not text or text.isspace():
            yield "empty_text", place
        control = _CONTROL.search(text)
        if control:
            yield "control_characters", f"{place}, U+{ord(control.group()):04X} at character {control.start() + 1}"
        # Damaged encoding always leaves characters beyond ASCII.
        if text.isascii():
            return
        at = text.find("\ufffd")
        if at >= 0:
            yield "encoding_damage", f"{place}, U+FFFD at character {at + 1}"
            return
        # The expression is a cheap first look: only what it finds is worth ftfy's own heuristic.
        suspect = _SUSPECT.search(text)
        if suspect and self._is_bad(text):
            yield "encoding_damage", f"{place}, {suspect.group()!r} at character {suspect.start() + 1}"


def _turn_troubles(turns: list[Message], suffix: str) -> Iterator[tuple[str, str]]:
    """(kind of trouble, its place) in the order of the turns. `suffix` names the conversation, such as " of chosen"."""
    roles = [turn["role"] for turn in turns]
    previous_turns: set[tuple[str, str]] = set()
    for number, (turn, role) in enumerate(zip(turns, roles, strict=True), 1):
        location = f"turn {number}{suffix}"
        if role == "system" and number > 1:
            yield "system_late", location
        if role == "assistant" and "user" not in roles[: number - 1]:
            yield "assistant_before_user", location
        if number > 1 and role == roles[number - 2] and role not in ("system", "tool"):
            yield "same_role_twice", location
        if len(turn["content"]) >= MIN_REPEATED_CHARACTERS and (role, turn["content"]) in previous_turns:
            yield "repeated_turn", location
        previous_turns.add((role, turn["content"]))
    if roles and roles[-1] != "assistant":
        yield "trailing_turns", f"turn {len(turns)}{suffix}"


MAX_PASSES = 8
"""Passes a text may take to come to rest; two are usual, the second being the proof."""


FTFY_STEPS_OFF = (
    *("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes"),
    *("fix_line_breaks", "fix_surrogates", "remove_control_chars"),
)
"""What ftfy would do besides."""


def encoding_fixer() -> Callable[[str], str]:
    """ftfy (R. Speer, 2019) with nothing switched on but the repair of mojibake."""
    import ftfy

    config = ftfy.TextFixerConfig(normalization=None, **dict.fromkeys(FTFY_STEPS_OFF, False))  # type: ignore[arg-type]  # OFF names fields
    return lambda text: text if text.isascii() else ftfy.fix_text(text, config)


# Joiners shape words in Arabic, Syriac, N'Ko, Mongolian and the Indic scripts; a zero-width space parts words in Thai,
# Lao, Khmer, Myanmar and Tibetan, which write no other.
JOINED = "\u0600-\u08ff\ufb50-\ufdff\ufe70-\ufefc\u0900-\u0dff\u1000-\u109f\u1780-\u18af\u1b00-\u1b7f\ua840-\ua87f\ua8e0-\ua9df"
UNSPACED = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaa7f"
PICTURES = "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
BREAKS = re.compile("[\x0b\x0c\x85]")
ALWAYS = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
)
CANDIDATE = re.compile(f"[{ALWAYS}\x0b\x0c\x85\u180e\u200b-\u200d\U000e0000-\U000e01ef]")
INVISIBLE = re.compile(
    f"\x1b\\[[0-?]*[ -/]*[@-~]|[{ALWAYS}]"  # a terminal's colour code goes whole: without its escape it would be text
    f"|(?<![{UNSPACED}])\u200b|(?<![\u1800-\u18af])\u180e|(?<![{JOINED}])\u200c"
    f"|(?<![{JOINED}{PICTURES}\ufe0f])\u200d|(?<=[{PICTURES}\ufe0f])\u200d(?![{PICTURES}])"
    # Tags spell the flags of regions after a black flag, selectors choose a glyph of an ideograph; elsewhere both are
    # a known way to hide text.
    f"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+|(?<![{HAN}])[\U000e0100-\U000e01ef]+"
)


def remove_control_characters(text: str) -> str:
    """Remove characters nobody sees, but not tabs, line ends, and joiners between emoji or in scripts that need them.

    Vertical tab, form feed and NEL become line ends. Carriage returns stay.
    """
    if CANDIDATE.search(text) is None:
        return text
    return INVISIBLE.sub("", BREAKS.sub("\n", text))


class Cleaner:
    """The cleaning stage: changes texts in place, notes each switch that changed a row, drops rows left without text."""

    name = "cleaning"

    def __init__(self, config: CleaningConfig) -> None:
        self.steps: list[tuple[str, Callable[[str], str]]] = []
        if config.fix_encoding:
            self.steps.append(("fix_encoding", encoding_fixer()))
        if config.control_characters:
            self.steps.append(("control_characters", remove_control_characters))
        if config.unicode is not UnicodeForm.none:
            # Last, because the steps before may make characters that it joins.
            form: Any = config.unicode.value
            self.steps.append(("unicode", partial(unicodedata.normalize, form)))

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Clean every text of a document; drop a document of which a text is left empty."""
        switches: set[str] = set()
        emptied = False

        def clean_text(text: str) -> str:
            nonlocal emptied
            cleaned, switches_of_text = self.clean(text)
            switches.update(switches_of_text)
            if text and not cleaned.strip():
                emptied = True
            return cleaned

        document.map_texts(clean_text)
        if emptied:
            tally.drop(self.name, "empty_after_cleaning", document.location)
            return None
        for switch in sorted(switches):
            tally.note(self.name, switch, document.location)
        return document

    def clean(self, text: str) -> tuple[str, set[str]]:
        """(cleaned text, the switches that changed it); `unsettled` alone if the text was left as it was."""
        switches: set[str] = set()
        current = text
        for _ in range(MAX_PASSES):
            before_pass = current
            for switch, step in self.steps:
                changed = step(current)
                # A switch is counted if it ever changed the text, also if a later one undid it.
                if changed != current:
                    switches.add(switch)
                    current = changed
            if current == before_pass:
                return current, switches
        return text, {"unsettled"}
