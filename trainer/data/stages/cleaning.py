"""Cleaning of text: encoding damage, invisible characters, Unicode form, HTML, white space. Owns every change of wording.

Each kind is a switch of its own. Cleaning is idempotent: a text goes through the steps until none of them changes it any
more, and a text that does not come to rest is left exactly as it was.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec

from strategies.errors import ConfigError
from trainer.data.document import Document, Tally
from trainer.data.stages.tags import split_code, strip_html

ROUNDS = 8
"""Passes a text may take to come to rest; two are usual, the second being the proof."""


class UnicodeForm(StrEnum):
    """Normalisation forms of Unicode Standard Annex 15."""

    none = "none"
    NFC = "NFC"
    NFKC = "NFKC"


@dataclass(kw_only=True, slots=True)
class CleaningConfig:
    """What is cleaned in every text of a row. Everything is off until it is asked for."""

    fix_encoding: bool = False
    """Undo UTF-8 that was read as another encoding (`schÃ¶n` becomes `schön`), line by line, with ftfy."""
    html: bool = False
    """Remove HTML tags, comments, scripts and styles and decode entities; code in backticks or fences stays."""
    control_characters: bool = False
    """Remove control, zero-width and bidirectional characters, BOM and soft hyphens; joiners that scripts need stay."""
    unicode: UnicodeForm = UnicodeForm.none
    """Unicode form: `none`, `NFC` (one spelling a character) or `NFKC` (also turns `x²` into `x2`)."""
    whitespace: bool = False
    """One space for many, no spaces at line ends, at most two blank lines, LF line ends; code fences stay."""


def fix_encoding(text: str) -> str:
    """Repair mojibake as ftfy does (R. Speer, ftfy, 2019): line by line, so that one broken line is enough."""
    if text.isascii():
        return text
    from ftfy import fix_encoding as repair
    from ftfy.fixes import fix_c1_controls

    return "\n".join(line if line.isascii() else fix_c1_controls(repair(line)) for line in text.split("\n"))


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


def remove_controls(text: str) -> str:
    """Remove characters nobody sees, but not tabs, line ends, and joiners between emoji or in scripts that need them.

    Vertical tab, form feed and NEL become line ends. Carriage returns belong to `tidy_whitespace`.
    """
    if CANDIDATE.search(text) is None:
        return text
    return INVISIBLE.sub("", BREAKS.sub("\n", text))


def normalise(text: str, form: UnicodeForm) -> str:
    """`text` in a form of Unicode Standard Annex 15."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC" if form is UnicodeForm.NFC else "NFKC", text)


ENDS = re.compile("\r\n?|[\u2028\u2029]")
EXOTIC = "\u00a0\u1680\u2000-\u200a\u202f\u205f"
# An ideographic space at a line's start is the indentation of Chinese and Japanese paragraphs, and stays.
SPACES = re.compile(rf"(?<=\S)[ {EXOTIC}\u3000]*[{EXOTIC}\u3000][ {EXOTIC}\u3000]*|[{EXOTIC}]")
RUNS = re.compile(r"(?<=\S) {2,}(?=\S)|(?<=\S)[ \t]+(?=\n|\Z)|^[ \t\u3000]+$", re.MULTILINE)
BLANKS = re.compile(r"\n{4,}")


def tidy_whitespace(text: str, *, keep_start: bool = False, keep_end: bool = False) -> str:
    """Even out white space outside code fences, never the indentation of a line.

    `keep_start` and `keep_end` leave that end of the text alone, where another text is joined to it. Two spaces at a
    line's end, Markdown's hard line break, go with the others.
    """
    text = ENDS.sub("\n", text)
    core = text if keep_start else re.sub(r"\A(?:[^\S\n]*\n)+", "", text)
    head, core = ("", core) if not keep_start else _split_start(core)
    stripped = core.rstrip()
    tail, core = (core[len(stripped) :] if keep_end else ""), stripped
    parts = [part if code else _tidy_prose(part) for code, part in split_code(core)]
    return head + "".join(parts) + tail


def _split_start(text: str) -> tuple[str, str]:
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


def _tidy_prose(text: str) -> str:
    if not text.isascii():
        text = SPACES.sub(lambda run: " " * len(run[0]), text)
    return BLANKS.sub("\n\n\n", RUNS.sub(_one_or_none, text))


def _one_or_none(run: re.Match[str]) -> str:
    return " " if run.end() < len(run.string) and run.string[run.end()] != "\n" else ""


class Cleaner:
    """The cleaning stage: changes texts in place, notes each switch that changed a row, drops rows left without text.

    Raises ConfigError where a switch needs a package that is not installed.
    """

    name = "cleaning"

    def __init__(self, config: CleaningConfig) -> None:
        self.steps: list[tuple[str, Callable[[str], str]]] = []
        if config.fix_encoding:
            if find_spec("ftfy") is None:
                raise ConfigError(
                    "data.cleaning.fix_encoding needs the package ftfy, which is not installed: pip install ftfy"
                )
            self.steps.append(("fix_encoding", fix_encoding))
        if config.html:
            self.steps.append(("html", strip_html))
        if config.control_characters:
            self.steps.append(("control_characters", remove_controls))
        if config.unicode is not UnicodeForm.none:
            self.steps.append(("unicode", lambda text: normalise(text, config.unicode)))
        self.whitespace = config.whitespace

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        if not self.steps and not self.whitespace:
            return document
        changed: set[str] = set()
        emptied = False
        joined = document.prompt is not None and document.completion is not None

        def change(text: str, *, keep_start: bool = False, keep_end: bool = False) -> str:
            nonlocal emptied
            new, kinds = self.clean(text, keep_start=keep_start, keep_end=keep_end)
            changed.update(kinds)
            emptied |= bool(text) and not new.strip()
            return new

        for message in document.turns():
            message["content"] = change(message["content"])
        if document.prompt is not None:
            document.prompt = change(document.prompt, keep_end=joined)
        if document.completion is not None:
            document.completion = change(document.completion, keep_start=joined)
        if document.text is not None:
            document.text = change(document.text)
        if emptied:
            tally.drop(self.name, "empty_after_cleaning", document.where)
            return None
        for kind in sorted(changed):
            tally.note(self.name, kind, document.where)
        return document

    def clean(self, text: str, *, keep_start: bool = False, keep_end: bool = False) -> tuple[str, set[str]]:
        """The cleaned text and the switches that changed it; `unsettled` alone where it was left as it was."""
        kinds: set[str] = set()
        now = text
        for _ in range(ROUNDS):
            before = now
            for kind, step in self.steps:
                new = step(now)
                if new != now:
                    kinds.add(kind)
                    now = new
            if self.whitespace:
                new = tidy_whitespace(now, keep_start=keep_start, keep_end=keep_end)
                if new != now:
                    kinds.add("whitespace")
                    now = new
            if now == before:
                return now, kinds
        return text, {"unsettled"}
