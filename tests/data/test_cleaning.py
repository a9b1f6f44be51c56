import unicodedata
from html.parser import HTMLParser

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError
from trainer.data.document import Document, Tally
from trainer.data.stages import cleaning
from trainer.data.stages.cleaning import (
    Cleaner,
    CleaningConfig,
    UnicodeForm,
    fix_encoding,
    normalise,
    remove_controls,
    tidy_whitespace,
)
from trainer.data.stages.tags import split_code, strip_html

EVERYTHING = CleaningConfig(
    fix_encoding=True, html=True, control_characters=True, unicode=UnicodeForm.NFC, whitespace=True
)
ZWJ, ZWNJ = "\u200d", "\u200c"

HTML = [
    ("<p>Hello <b>world</b></p><p>again</p>", "Hello world\nagain"),
    ("<div class='a'><i>one</i></b></i><p>two</div>", "one</b>\ntwo"),
    ("x<br>y<br/>z", "x\ny\nz"),
    ("Tom &amp; Jerry&nbsp;&eacute;&#8364;", "Tom & Jerry\xa0é€"),
    ("<script>var a = '<p>';</script>Hi<style>p{}</style>", "Hi"),
    ("<!DOCTYPE html><html><body>Hi<!-- note --></body></html>", "Hi"),
    ('<a href="https://x.org/?a=1&amp;b=2">link</a>.', "link (https://x.org/?a=1&b=2)."),
    ('<a href="https://x.org">https://x.org</a>', "https://x.org"),
    ('<img src="a.png" alt="b > c">after', "after"),
    ("<table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table>", "1 2\n3"),
    ('<input type="text" disabled>field', "field"),
]
NOT_HTML = [
    "a < b and c > d",
    "if a<b and c>d then",
    "std::vector<i> x; Map<String, Integer> y; List<a>",
    "I <3 you, <john@x.com>, <https://x.org/?a=1&copy=2>",
    "<think>why</think> <input>y</input> <s>z</s> <|im_start|>",
    "Write `<b>x</b>` and ``<p>`` and `&nbsp;`.",
    "```html\n<p>Hi &amp; bye</p>\n```",
    "~~~~\n<p>x</p>\n~~~\n<p>still code</p>\n~~~~",
    "&lt;b&gt; makes &lt;b&gt;bold&lt;/b&gt;",
    "&amp;lt; is written &amp;amp;lt;",
    "R&D &unknown; AT&T &copy",
    "<script>never closed <b",
    "<!-- never closed",
]


@pytest.mark.parametrize(("text", "expected"), HTML)
def test_html_becomes_text(text, expected):
    assert strip_html(text) == expected


@pytest.mark.parametrize("text", NOT_HTML)
def test_what_is_not_html_stays(text):
    assert strip_html(text) == text


class Oracle(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words = []

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attrs):
        if tag in ("p", "li", "div", "br"):
            self.words.append(" ")

    handle_endtag = lambda self, tag: self.handle_starttag(tag, [])  # noqa: E731


@st.composite
def fragments(draw, depth=2):
    word = draw(st.text("abcxyzé ,.", min_size=1, max_size=8))
    if depth == 0:
        return draw(st.sampled_from([word, word + "&amp;", "5 &gt; 4 ", "<br>"]))
    tag = draw(st.sampled_from(["p", "b", "i", "div", "li", "span"]))
    attribute = draw(st.sampled_from(["", ' class="x y"', " id=a", " hidden"]))
    return f"<{tag}{attribute}>{''.join(draw(st.lists(fragments(depth=depth - 1), max_size=3)))}</{tag}>"


@settings(max_examples=60, deadline=None)
@given(fragments())
def test_html_has_the_words_that_the_standard_parser_finds(text):
    oracle = Oracle()
    oracle.feed(text)
    oracle.close()
    assert strip_html(text).split() == "".join(oracle.words).split()


@pytest.mark.parametrize("text", ["schön — “ok”", "日本語", "naïve café", "Привет, мир", "emoji 👩 here"])
def test_mojibake_is_undone_as_ftfy_does(text):
    broken = text.encode("utf-8").decode("latin-1")
    assert fix_encoding(broken) == ftfy.fix_encoding(broken) == text
    assert fix_encoding(text) == text


def test_one_broken_line_among_good_ones_is_mended():
    assert fix_encoding("日本語\nschÃ¶n\n") == "日本語\nschön\n"
    assert fix_encoding("\x93quoted\x94 é") == "“quoted” é"


REMOVED = "\ufeff\u200b\u00ad\u202e\u2066\u061c\u200e\u2060\x00\x07\x7f\x9b\ufffe"
KEPT = [
    f"👩{ZWJ}💻 👨{ZWJ}👩{ZWJ}👧 ❤\ufe0f{ZWJ}🔥",
    f"می{ZWNJ}خواهم",
    f"क्{ZWJ}ष क्{ZWNJ}ष",
    "ភាសា\u200bខ្មែរ",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "葛\U000e0100",
    "tab\tand\nline\r\nend\xa0",
]


@pytest.mark.parametrize("character", REMOVED)
def test_invisible_characters_go(character):
    assert remove_controls(f"a{character}b\n{character}") == "ab\n"


@pytest.mark.parametrize("text", KEPT)
def test_joiners_that_scripts_and_emoji_need_stay(text):
    assert remove_controls(text) == text


def test_other_joiners_hidden_tags_and_colour_codes_go():
    assert remove_controls(f"a{ZWJ}b{ZWNJ}c 👩{ZWJ} x") == "abc 👩 x"
    assert remove_controls("a\U000e0041\U000e0042b c\U000e0101") == "ab c"
    assert remove_controls("\x1b[1;31mred\x1b[0m") == "red"
    assert remove_controls("page\x0cpage\x85x\ud800") == "page\npage\nx"


@given(st.text())
def test_no_control_is_left_and_nothing_else_is_lost(text):
    new = remove_controls(text)
    assert not [c for c in new if unicodedata.category(c) == "Cc" and c not in "\n\t\r"]
    visible = [c for c in text if unicodedata.category(c)[0] in "LNPSZ" or c in "\t\r"]
    if "\x1b[" not in text:
        assert [c for c in new if unicodedata.category(c)[0] in "LNPSZ" or c in "\t\r"] == visible


@given(st.text())
def test_unicode_forms(text):
    for form in (UnicodeForm.NFC, UnicodeForm.NFKC):
        assert normalise(text, form) == unicodedata.normalize(form.value, text)


WHITESPACE = [
    ("a  b   c", "a b c"),
    ("a \t\nb  ", "a\nb"),
    ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
    ("a\n\n\n\n\n\nb", "a\n\n\nb"),
    ("a\n\n\nb", "a\n\n\nb"),
    ("def f():\n    return  1\n\tx", "def f():\n    return 1\n\tx"),
    ("a\xa0b\u2009\u3000c", "a b c"),
    ("\u3000段落\u3000です", "\u3000段落 です"),
    ("a  b\n```\nx   y  \n\n\n\n\nz\n```\nc  d", "a b\n```\nx   y  \n\n\n\n\nz\n```\nc d"),
    ("```\nopen   fence", "```\nopen   fence"),
    ("\n \n  indented\n\n", "  indented"),
    ("a\tb\t\tc", "a\tb\t\tc"),
]


@pytest.mark.parametrize(("text", "expected"), WHITESPACE)
def test_whitespace(text, expected):
    assert tidy_whitespace(text) == expected


def test_code_parts_are_the_text():
    text = "a\n```py\nb\n```\nc\n   ~~~\nd"
    assert [part for code, part in split_code(text) if code] == ["```py\nb\n```", "   ~~~\nd"]
    assert "".join(part for _, part in split_code(text)) == text


PIECES = [
    "<b>", "</b>", "<p>", "<", ">", "&lt;", "&amp;", "amp;", "lt;", "&#38;", "```", "~~~", "`", "\n", " ", "  ", "\t",
    "\u3000", "\xa0", "\u200b", ZWJ, "\r", "Ã", "¶", "â€", "™", "é", "e\u0301", "👩", "x", "<!--", "-->", "<a href='https://x'>",
    "</a>", "<script>", "</script>", "\uff1c", "\ufeff", "\x85", "#38;",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(), st.booleans(), st.booleans())
def test_cleaning_is_idempotent(text, start, end):
    cleaner = Cleaner(EVERYTHING)
    once, kinds = cleaner.clean(text, keep_start=start, keep_end=end)
    assert cleaner.clean(once, keep_start=start, keep_end=end)[0] == once
    assert (once != text) <= bool(kinds - {"unsettled"})


def test_text_that_does_not_come_to_rest_is_left_alone_and_noted():
    text = "<" * 30 + "wbr>" * 30
    new, kinds = Cleaner(EVERYTHING).clean(text)
    assert (new, kinds) == (text, {"unsettled"})
    assert Cleaner(EVERYTHING).clean("<" * 5 + "wbr>" * 5) == ("", {"html"})


def test_a_switch_does_its_own_work_only_and_the_default_does_nothing():
    text = "<b>x</b>  schÃ¶n\u200b e\u0301 "
    tally = Tally()
    assert Cleaner(CleaningConfig())(Document("f", 1, text=text), tally).text == text
    assert not tally.noted
    for config, expected, name in (
        (CleaningConfig(html=True), "x  schÃ¶n\u200b e\u0301 ", "html"),
        (CleaningConfig(fix_encoding=True), "<b>x</b>  schön\u200b e\u0301 ", "fix_encoding"),
        (CleaningConfig(control_characters=True), "<b>x</b>  schÃ¶n e\u0301 ", "control_characters"),
        (CleaningConfig(unicode=UnicodeForm.NFC), "<b>x</b>  schÃ¶n\u200b é ", "unicode"),
        (CleaningConfig(whitespace=True), "<b>x</b> schÃ¶n\u200b e\u0301", "whitespace"),
    ):
        tally = Tally()
        assert Cleaner(config)(Document("f", 7, text=text), tally).text == expected
        assert tally.noted == {"cleaning": {name: 1}}
        assert tally.examples == {f"cleaning/{name}": ["f:7"]}


def test_the_seam_of_prompt_and_completion_stays():
    document = Document("f", 1, prompt="Q:  x\nA: ", completion="\n  yes  ")
    Cleaner(EVERYTHING)(document, Tally())
    assert (document.prompt, document.completion) == ("Q: x\nA: ", "\n  yes")
    document = Document("f", 1, prompt="<p>Q</p><b>A:</b>\n", completion="\n<p>yes</p>")
    Cleaner(EVERYTHING)(document, Tally())
    assert (document.prompt, document.completion) == ("Q\nA:\n", "\nyes")


def test_every_turn_is_cleaned_and_a_row_left_empty_is_dropped():
    turns = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "<p>c</p>"}]
    document = Document("f", 1, messages=turns, chosen=[{"role": "assistant", "content": "d "}])
    tally = Tally()
    assert Cleaner(EVERYTHING)(document, tally).texts() == ["a b", "c", "d"]
    assert tally.noted["cleaning"] == {"html": 1, "whitespace": 1}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<p>\u200b</p>"}]
    assert Cleaner(EVERYTHING)(Document("f", 2, messages=turns), tally) is None
    assert tally.dropped == {"cleaning": {"empty_after_cleaning": 1}}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(cleaning, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install ftfy"):
        Cleaner(EVERYTHING)
