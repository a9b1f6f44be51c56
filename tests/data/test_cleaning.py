import unicodedata

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.covering import examples
from trainer.data.config import CleaningConfig, UnicodeForm
from trainer.data.document import Document, Tally
from trainer.data.transforms.checks import Cleaner, encoding_fixer, remove_control_characters

EVERYTHING = CleaningConfig(fix_encoding=True, control_characters=True, unicode=UnicodeForm.NFC)
fix_encoding = encoding_fixer()
ZWJ, ZWNJ = "\u200d", "\u200c"


@pytest.mark.parametrize("text", ["schön — “ok”", "日本語", "naïve café", "Привет, мир", "emoji 👩 here"])
def test_mojibake_is_undone_as_ftfy_does(text):
    broken = text.encode("utf-8").decode("latin-1")
    assert fix_encoding(broken) == ftfy.fix_encoding(broken) == text
    assert fix_encoding(text) == text


def test_cleaning_mends_one_broken_line_among_good_ones():
    assert fix_encoding("日本語\nschÃ¶n\n") == "日本語\nschön\n"
    assert fix_encoding("\x93quoted\x94 é") == "“quoted” é"


SUCCESSOR_BY_REMOVED_KEY = "\ufeff\u200b\u00ad\u202e\u2066\u061c\u200e\u2060\x00\x07\x7f\x9b\ufffe"
KEPT = [
    f"👩{ZWJ}💻 👨{ZWJ}👩{ZWJ}👧 ❤\ufe0f{ZWJ}🔥",
    f"می{ZWNJ}خواهم",
    f"क्{ZWJ}ष क्{ZWNJ}ष",
    "ភាសា\u200bខ្មែរ",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "葛\U000e0100",
    "tab\tand\nline\r\nend\xa0",
]


@pytest.mark.parametrize("character", SUCCESSOR_BY_REMOVED_KEY)
def test_cleaning_removes_invisible_characters(character):
    assert remove_control_characters(f"a{character}b\n{character}") == "ab\n"


@pytest.mark.parametrize("text", KEPT)
def test_cleaning_keeps_joiners_that_scripts_and_emoji_need(text):
    assert remove_control_characters(text) == text


def test_cleaning_removes_other_joiners_hidden_tags_and_colour_codes():
    assert remove_control_characters(f"a{ZWJ}b{ZWNJ}c 👩{ZWJ} x") == "abc 👩 x"
    assert remove_control_characters("a\U000e0041\U000e0042b c\U000e0101") == "ab c"
    assert remove_control_characters("\x1b[1;31mred\x1b[0m") == "red"
    assert remove_control_characters("page\x0cpage\x85x\ud800") == "page\npage\nx"


@given(st.text())
def test_cleaning_leaves_no_control_character_and_loses_nothing_else(text):
    new = remove_control_characters(text)
    assert not [c for c in new if unicodedata.category(c) == "Cc" and c not in "\n\t\r"]
    visible = [c for c in text if unicodedata.category(c)[0] in "LNPSZ" or c in "\t\r"]
    if "\x1b[" not in text:
        assert [c for c in new if unicodedata.category(c)[0] in "LNPSZ" or c in "\t\r"] == visible


@given(st.text())
def test_cleaning_normalises_to_the_unicode_form(text):
    for form in (UnicodeForm.NFC, UnicodeForm.NFKC):
        assert Cleaner(CleaningConfig(unicode=form)).clean(text)[0] == unicodedata.normalize(form.value, text)


PIECES = [
    "\n", " ", "\xa0", "\u200b", ZWJ, "\r", "Ã", "¶", "â€", "™", "é", "e\u0301", "👩", "x", "\uff1c", "\ufeff", "\x85",
    "\x1b[", "\x9f", "\x00",
]  # fmt: skip


@settings(max_examples=examples(400), deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text())
def test_cleaning_is_idempotent(text):
    cleaner = Cleaner(EVERYTHING)
    once, kinds = cleaner.clean(text)
    assert cleaner.clean(once)[0] == once
    assert (once != text) <= bool(kinds - {"unsettled"})


def test_cleaning_leaves_text_that_never_settles_alone_and_notes_it():
    cleaner = Cleaner(CleaningConfig())
    cleaner.steps = [("grow", lambda text: text + "x")]
    assert cleaner.clean("a") == ("a", {"unsettled"})


def test_cleaning_switch_does_its_own_work_only_and_the_default_does_nothing():
    text = "&amp; “ﬁ”  schÃ¶n\u200b e\u0301\r\n"
    tally = Tally()
    assert Cleaner(CleaningConfig())(Document("f", 1, text=text), tally).text == text
    assert not tally.noted
    for config, expected, name in (
        (CleaningConfig(fix_encoding=True), "&amp; “ﬁ”  schön\u200b e\u0301\r\n", "fix_encoding"),
        (CleaningConfig(control_characters=True), "&amp; “ﬁ”  schÃ¶n e\u0301\r\n", "control_characters"),
        (CleaningConfig(unicode=UnicodeForm.NFC), "&amp; “ﬁ”  schÃ¶n\u200b é\r\n", "unicode"),
    ):
        tally = Tally()
        assert Cleaner(config)(Document("f", 7, text=text), tally).text == expected
        assert tally.noted == {"cleaning": {name: 1}}
        assert tally.examples == {f"cleaning/{name}": ["f:7"]}


def test_cleaning_covers_every_text_and_drops_a_row_left_empty():
    turns = [{"role": "user", "content": "a\u00adb"}, {"role": "assistant", "content": "e\u0301"}]
    document = Document("f", 1, messages=turns, chosen=[{"role": "assistant", "content": "d\ufeff"}], prompt="\x00p")
    tally = Tally()
    assert Cleaner(EVERYTHING)(document, tally).texts() == ["ab", "é", "d", "p"]
    assert tally.noted["cleaning"] == {"control_characters": 1, "unicode": 1}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \u200b"}]
    assert Cleaner(EVERYTHING)(Document("f", 2, messages=turns), tally) is None
    assert tally.dropped == {"cleaning": {"empty_after_cleaning": 1}}
