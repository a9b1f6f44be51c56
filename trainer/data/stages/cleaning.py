"""Cleaning of text: encoding damage, invisible characters, Unicode form. Owns every change of wording.

Each kind is a switch of its own. Cleaning is idempotent: a text goes through the steps until none of them changes it any
more, and a text that does not come to rest is left exactly as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from trainer.data.config import CleaningConfig, UnicodeForm
from trainer.data.document import Document, Tally

ROUNDS = 8
"""Passes a text may take to come to rest; two are usual, the second being the proof."""


def fixer(*, encoding: bool = False, form: UnicodeForm = UnicodeForm.none) -> Callable[[str], str]:
    """ftfy (R. Speer, 2019) with nothing switched on but the repair of mojibake, or a normalisation form."""
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_encoding=encoding,
        fix_c1_controls=encoding,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None if form is UnicodeForm.none else form.value,  # type: ignore[arg-type]  # one of its literals
    )
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


def remove_controls(text: str) -> str:
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
            self.steps.append(("fix_encoding", fixer(encoding=True)))
        if config.control_characters:
            self.steps.append(("control_characters", remove_controls))
        if config.unicode is not UnicodeForm.none:
            self.steps.append(("unicode", fixer(form=config.unicode)))

    def __call__(self, document: Document, tally: Tally) -> Document | None:
        changed: set[str] = set()
        emptied = False

        def change(text: str) -> str:
            nonlocal emptied
            new, kinds = self.clean(text)
            changed.update(kinds)
            emptied |= bool(text) and not new.strip()
            return new

        document.map_texts(change)
        if emptied:
            tally.drop(self.name, "empty_after_cleaning", document.where)
            return None
        for kind in sorted(changed):
            tally.note(self.name, kind, document.where)
        return document

    def clean(self, text: str) -> tuple[str, set[str]]:
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
            if now == before:
                return now, kinds
        return text, {"unsettled"}
