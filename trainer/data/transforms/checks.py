"""Checks documents for what looks wrong, which is counted or put into quarantine; and cleans texts of what can be mended.

Checks look for turns out of order or said twice, trailing turns, empty texts, damaged encoding, control characters. Cleaning
(encoding damage, invisible characters, Unicode form) makes all changes of wording; each kind is a switch of its own. It is
idempotent: a text goes through the steps until none of them changes it any more, and one that does not come to rest is left
exactly as it was.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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
_CONTROL_CHARACTER_REGEX = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufdd0-\ufdef\ufffe\uffff]")
# The first and a further byte of a UTF-8 character, read in another encoding. Cyrillic has such pairs of its own.
_FIRST_BYTES = bytes(range(0xC2, 0xF5))
_FURTHER_BYTES = bytes(range(0x80, 0xC0))
_LATIN_FIRST = _FIRST_BYTES.decode("cp1252") + _FIRST_BYTES.decode("cp1250")
_LATIN_FURTHER = "".join(_FURTHER_BYTES.decode(encoding, "ignore") for encoding in ("latin-1", "cp1252", "cp1250"))
_CYRILLIC_FIRST = b"\xd0\xd1\xe2".decode("cp1251")
_CYRILLIC_FURTHER = _FURTHER_BYTES.decode("cp1251", "ignore")
_MOJIBAKE_REGEX = re.compile(
    f"[{_LATIN_FIRST}][{_LATIN_FURTHER}]|(?:[{_CYRILLIC_FIRST}][{_CYRILLIC_FURTHER}]){{2}}|\u0432\u0402"
)
"""What UTF-8 that was read in another encoding looks like; some right texts look so, too."""


class Problem(NamedTuple):
    """Something in a document that looks wrong."""

    kind: str
    """One of `CHECK_KINDS`, such as "system_late"."""
    position: str
    """Where it is, such as "turn 3 of chosen"."""


class Checks:
    """The stage of preparation that looks for what seems wrong in documents, counts it, and changes nothing in them."""

    name = "checks"

    def __init__(self, config: ChecksConfig) -> None:
        from ftfy.badness import is_bad

        self.config = config
        self._looks_like_mojibake: Callable[[str], bool] = is_bad

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Check a document: returns it, or None if it has a problem that `data.checks.quarantine` names and so is dropped.

        `tally` counts each kind of problem with its first position ("turn 2 of chosen"): as a drop if the document is dropped for
        it, else as a note for the report.
        """
        problems = self._first_problems(document)
        for kind, position in problems.items():
            if kind in self.config.quarantine:
                tally.drop(self.name, kind, f"{document.location} ({position})")
                return None
        for kind, position in problems.items():
            tally.note(self.name, kind, f"{document.location} ({position})")
        return document

    def _first_problems(self, document: Document) -> dict[str, str]:
        """Find the first position in a document of each kind of problem that it has, in the order of `CHECK_KINDS`.

        Example: {"system_late": "turn 3 of chosen"}, for a system turn that is not the first turn.
        """
        first_positions: dict[str, str] = {}
        for problem in self._all_problems(document):
            first_positions.setdefault(problem.kind, problem.position)
        if not first_positions:  # the usual case
            return first_positions
        return {kind: first_positions[kind] for kind in CHECK_KINDS if kind in first_positions}

    def _all_problems(self, document: Document) -> Iterator[Problem]:
        """Find all problems of a document, of its turns and then of its texts."""
        prompt = document.messages or []
        if document.chosen is not None or document.rejected is not None:
            # Of a preference pair, the prompt with each of its answers is a conversation of its own.
            yield from _turn_problems([*prompt, *(document.chosen or [])], " of chosen")
            yield from _turn_problems([*prompt, *(document.rejected or [])], " of rejected")
        elif document.messages is not None:
            yield from _turn_problems(prompt, "")
        for number, text in enumerate(document.texts(), 1):
            yield from self._text_problems(text, f"text {number}")

    def _text_problems(self, text: str, text_name: str) -> Iterator[Problem]:
        """Find the problems of one text: (kind, its position), such as ("encoding_damage", "text 2, U+FFFD at character 7").

        Kinds are those of `CHECK_KINDS`. `text_name`: what the position calls the text, such as "text 2".
        """
        if not text or text.isspace():
            yield Problem("empty_text", text_name)
        control = _CONTROL_CHARACTER_REGEX.search(text)
        if control:
            code_point = f"U+{ord(control.group()):04X}"
            yield Problem("control_characters", f"{text_name}, {code_point} at character {control.start() + 1}")
        # Damaged encoding always leaves characters beyond ASCII.
        if text.isascii():
            return
        # The replacement character stands where somebody failed to decode a text before.
        replacement = text.find("\ufffd")
        if replacement >= 0:
            yield Problem("encoding_damage", f"{text_name}, U+FFFD at character {replacement + 1}")
            return
        # The regular expression is a cheap first look: only what it finds is worth ftfy's own heuristic.
        mojibake = _MOJIBAKE_REGEX.search(text)
        if mojibake and self._looks_like_mojibake(text):
            yield Problem("encoding_damage", f"{text_name}, {mojibake.group()!r} at character {mojibake.start() + 1}")


def _turn_problems(turns: list[Message], suffix: str) -> Iterator[Problem]:
    """Find the problems in the order of a conversation's turns: (kind, position), such as ("system_late", "turn 3 of chosen").

    Kinds are those of `CHECK_KINDS`. `suffix` names the conversation in the position, such as " of chosen".
    """
    roles = [turn["role"] for turn in turns]
    earlier_turns: set[tuple[str, str]] = set()
    for index, (turn, role) in enumerate(zip(turns, roles, strict=True)):
        position = f"turn {index + 1}{suffix}"
        content = turn["content"]
        if role == "system" and index > 0:
            yield Problem("system_late", position)
        if role == "assistant" and "user" not in roles[:index]:
            yield Problem("assistant_before_user", position)
        if index > 0 and role == roles[index - 1] and role not in ("system", "tool"):
            yield Problem("same_role_twice", position)
        if len(content) >= MIN_REPEATED_CHARACTERS and (role, content) in earlier_turns:
            yield Problem("repeated_turn", position)
        earlier_turns.add((role, content))
    if roles and roles[-1] != "assistant":
        yield Problem("trailing_turns", f"turn {len(turns)}{suffix}")


MAX_PASSES = 8
"""Passes a text may take to come to rest; two are usual, the second being the proof."""


FTFY_STEPS_OFF = (
    "fix_character_width",
    "fix_latin_ligatures",
    "fix_line_breaks",
    "fix_surrogates",
    "remove_control_chars",
    "remove_terminal_escapes",
    "uncurl_quotes",
    "unescape_html",
)
"""What ftfy would do besides the repair of encodings."""


def encoding_fixer() -> Callable[[str], str]:
    """Make a function that repairs mojibake in a text (`schÃ¶n` -> `schön`) by ftfy (R. Speer, 2019), and does nothing else."""
    import ftfy

    config = ftfy.TextFixerConfig(normalization=None, **dict.fromkeys(FTFY_STEPS_OFF, False))  # type: ignore[arg-type]  # OFF names fields

    def fix_encoding(text: str) -> str:
        # Damaged encoding always leaves characters beyond ASCII.
        return text if text.isascii() else ftfy.fix_text(text, config)

    return fix_encoding


# Joiners shape words in Arabic, Syriac, N'Ko, Mongolian and the Indic scripts; a zero-width space parts words in Thai,
# Lao, Khmer, Myanmar and Tibetan, which write no other.
JOINING_SCRIPTS = (
    "\u0600-\u08ff\ufb50-\ufdff\ufe70-\ufefc\u0900-\u0dff\u1000-\u109f\u1780-\u18af\u1b00-\u1b7f"
    "\ua840-\ua87f\ua8e0-\ua9df"
)
UNSPACED_SCRIPTS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaa7f"
PICTURES = "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
HAN = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
ODD_LINE_BREAK_REGEX = re.compile("[\x0b\x0c\x85]")
"""Vertical tab, form feed and NEL."""
ALWAYS_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\ud800-\udfff"
)
MAYBE_INVISIBLE_REGEX = re.compile(f"[{ALWAYS_INVISIBLE}\x0b\x0c\x85\u180e\u200b-\u200d\U000e0000-\U000e01ef]")
INVISIBLE_REGEX = re.compile(
    f"\x1b\\[[0-?]*[ -/]*[@-~]|[{ALWAYS_INVISIBLE}]"  # a terminal's colour code goes whole: without its escape it would be text
    f"|(?<![{UNSPACED_SCRIPTS}])\u200b|(?<![\u1800-\u18af])\u180e|(?<![{JOINING_SCRIPTS}])\u200c"
    f"|(?<![{JOINING_SCRIPTS}{PICTURES}\ufe0f])\u200d|(?<=[{PICTURES}\ufe0f])\u200d(?![{PICTURES}])"
    # Tags spell the flags of regions after a black flag, selectors choose a glyph of an ideograph; elsewhere both are
    # a known way to hide text.
    f"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+|(?<![{HAN}])[\U000e0100-\U000e01ef]+"
)


def remove_control_characters(text: str) -> str:
    """Remove characters nobody sees, but not tabs, line ends, and joiners between emoji or in scripts that need them.

    Vertical tab, form feed and NEL become line ends. Carriage returns stay.
    """
    if MAYBE_INVISIBLE_REGEX.search(text) is None:
        return text
    return INVISIBLE_REGEX.sub("", ODD_LINE_BREAK_REGEX.sub("\n", text))


class Cleaner:
    """The stage of preparation that cleans texts in place, as `data.cleaning` says, and drops documents left without text."""

    name = "cleaning"

    def __init__(self, config: CleaningConfig) -> None:
        """Choose the steps of cleaning that `data.cleaning` asks for, in the order in which they are taken."""
        self.steps: list[tuple[str, Callable[[str], str]]] = []
        if config.fix_encoding:
            self.steps.append(("fix_encoding", encoding_fixer()))
        if config.control_characters:
            self.steps.append(("control_characters", remove_control_characters))
        if config.unicode is not UnicodeForm.none:
            # Last, because the steps before may make characters that it joins.
            unicode_form: Any = config.unicode.value
            self.steps.append(("unicode", partial(unicodedata.normalize, unicode_form)))

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        """Clean every text of a document in place; None, counted in `tally`, if a text is blank afterwards.

        `tally` also counts, for the data report, the switches of `data.cleaning` that changed a text of the document.
        """
        switches: set[str] = set()
        has_emptied_text = False

        def clean_text(text: str) -> str:
            nonlocal has_emptied_text
            cleaned, switches_of_text = self.clean(text)
            switches.update(switches_of_text)
            if text and not cleaned.strip():
                has_emptied_text = True
            return cleaned

        document.map_texts(clean_text)
        if has_emptied_text:
            tally.drop(self.name, "empty_after_cleaning", document.location)
            return None
        for switch in sorted(switches):
            tally.note(self.name, switch, document.location)
        return document

    def clean(self, text: str) -> tuple[str, set[str]]:
        """Clean one text: (cleaned text, switches of `data.cleaning` that changed it), such as ("a b", {"control_characters"}).

        All steps are repeated until a pass changes nothing, so that cleaning a second time changes nothing. If that takes more
        than `MAX_PASSES`, the text stays as it was, with {"unsettled"}. A switch counts if its step ever changed the text, also
        if a later step undid it.
        """
        switches: set[str] = set()
        cleaned = text
        for _ in range(MAX_PASSES):
            before_pass = cleaned
            for switch, step in self.steps:
                changed = step(cleaned)
                if changed != cleaned:
                    switches.add(switch)
                    cleaned = changed
            if cleaned == before_pass:
                return cleaned, switches
        return text, {"unsettled"}
