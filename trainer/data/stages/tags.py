"""Markup inside text: code between Markdown fences, and HTML, which is told apart from angle brackets that mean something else.

The tags are recognised by name and strict attribute syntax rather than by `html.parser`, which takes `a<b and c>d` for a
tag and swallows the text behind an unfinished one.
"""

from __future__ import annotations

import html
import re
from html.entities import html5

FENCE = re.compile(r"^ {0,3}(`{3,}(?=[^`\n]*$)|~{3,})", re.MULTILINE)


def split_code(text: str) -> list[tuple[bool, str]]:
    """(is code, part) in order; the parts joined are `text`. Code is what stands between Markdown fences.

    Fences follow CommonMark 0.31, section 4.5: three or more backticks or tildes, closed by at least as many of the
    same; one that is never closed reaches to the end.
    """
    if "```" not in text and "~~~" not in text:
        return [(False, text)]
    parts, start = [], 0
    while opening := FENCE.search(text, start):
        mark = opening[1]
        closing = re.compile(rf"^ {{0,3}}{mark[0]}{{{len(mark)},}}[ \t\r]*$", re.MULTILINE).search(text, opening.end())
        end = closing.end() if closing else len(text)
        parts += [(False, text[start : opening.start()]), (True, text[opening.start() : end])]
        start = end
    return [part for part in [*parts, (False, text[start:])] if part[1]]


VOID = frozenset(["br", "dd", "dt", "hr", "li", "p", "td", "th", "tr", "wbr"])
"""Tags that are HTML with or without an end tag."""
# fmt: off
PAIRED = frozenset([
    "a", "abbr", "address", "article", "aside", "audio", "b", "bdi", "bdo", "blockquote", "body", "button", "canvas",
    "caption", "center", "cite", "code", "col", "colgroup", "del", "details", "dfn", "div", "dl", "em", "fieldset",
    "figcaption", "figure", "font", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "html", "i",
    "iframe", "img", "ins", "kbd", "label", "link", "main", "mark", "meta", "nav", "noscript", "ol", "option", "pre",
    "q", "samp", "script", "section", "select", "small", "span", "strike", "strong", "style", "sub", "sup", "svg",
    "table", "tbody", "textarea", "tfoot", "thead", "time", "tt", "u", "ul", "video",
])
"""Tags that are HTML where an end tag of the name or an attribute stands in the text; `vector<i>` has neither."""
ATTRIBUTED = frozenset([
    "base", "data", "input", "object", "output", "param", "picture", "progress", "s", "source", "summary", "template",
    "title", "var",
])
"""Tags that are HTML only with an attribute: bare, they are what prompts and models use as markers of their own."""
BLOCKS = frozenset([
    "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr",
    "html", "li", "main", "nav", "ol", "option", "p", "pre", "section", "table", "tbody", "tfoot", "thead", "tr", "ul",
])
# fmt: on
FLAGS = (
    "allowfullscreen|async|autoplay|checked|compact|controls|default|defer|disabled|hidden|itemscope|loop|multiple|muted"
    "|noshade|novalidate|nowrap|open|readonly|required|reversed|selected"
)
CODE = r"``[^\n]{1,400}?``|`[^`\n]+`"
TAG = re.compile(
    rf"{CODE}|<!--|<!doctype\b[^<>]{{0,500}}>|<\?xml\b[^<>]{{0,500}}>"
    r"|<(?P<end>/?)(?P<name>[a-z][a-z0-9]{0,11})(?P<attributes>"
    rf"""(?:\s++(?:[a-z_:@][-\w:.@]*+\s*+=\s*+(?:"[^"]*+"|'[^']*+'|[^\s"'=<>`]++)|(?:{FLAGS})\b))*+)\s*+/?>""",
    re.IGNORECASE,
)
ENTITY = re.compile(rf"{CODE}|&(?:#[0-9]{{1,7}}|#x[0-9a-f]{{1,6}}|[a-z][a-z0-9]{{1,31}});", re.IGNORECASE)
ENTITY_TAIL = re.compile(r"#[0-9]+;|#x[0-9a-f]+;|[a-z][a-z0-9]*;", re.IGNORECASE)
HREF = re.compile(r"""\shref\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+))""", re.IGNORECASE)
TARGET = re.compile(r"https?://[^\s<>`]+")


def strip_html(text: str) -> str:
    """Text of an HTML fragment; what is not HTML, and code in backticks or fences, stays as it is.

    Block elements begin a new line; the target of a link follows its text in brackets; script and style go with their
    content. Entities that would read as tags or entities once decoded (`&lt;b&gt;`) stay encoded, so that text about
    HTML is not taken for HTML later.
    """
    if "<" not in text and "&" not in text:
        return text
    return "".join(part if code else _strip_part(part) for code, part in split_code(text))


def _strip_part(text: str) -> str:
    stripped = _Stripper(text).text() if "<" in text else text
    return _decode(stripped) if "&" in stripped else stripped


class _Stripper:
    """One pass over a text without fences."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.out: list[str] = []
        self.last = ""
        """The last character written; empty at the start."""
        self.began_line = False
        """Whether the last thing written is the line end before a block."""
        self.target = ""
        """Address of the link that is open."""
        self.unclosed: set[str] = set()
        """What was looked for behind some tag and found missing: it is missing behind the later ones too."""

    def text(self) -> str:
        tags = [tag for tag in TAG.finditer(self.source) if tag[0][0] == "<"]
        active, position = _active(tags), 0
        for tag in tags:
            name = (tag["name"] or "").lower()
            if tag.start() < position or (name and name not in active) or (end := self._end(tag, name)) < 0:
                continue
            self._write(self.source[position : tag.start()])
            self._mark(tag, name)
            position = end
        if not position:
            return self.source
        tail = self.source[position:]
        if self.began_line and not tail.strip():
            self.out.pop()  # nothing follows the block, so no line begins
        self.out.append(tail)
        return "".join(self.out)

    def _write(self, text: str) -> None:
        if text:
            self.out.append(text)
            self.last, self.began_line = text[-1], False

    def _mark(self, tag: re.Match[str], name: str) -> None:
        if name in BLOCKS:
            if self.last not in ("", "\n"):
                self._write("\n")
                self.began_line = True
        elif name in ("td", "th") and not tag["end"]:
            if self.last and not self.last.isspace():
                self._write(" ")
        elif name == "a" and not tag["end"]:
            found = HREF.search(tag["attributes"])
            target = html.unescape(next(filter(None, found.groups()), "")) if found else ""
            self.target = target if TARGET.fullmatch(target) else ""
        elif name == "a" and self.target:
            if self.out and self.target not in self.out[-1]:
                self._write(f" ({self.target})")
            self.target = ""

    def _end(self, tag: re.Match[str], name: str) -> int:
        """Where what `tag` removes ends; -1 where it is a comment, script or style that is never closed."""
        if tag[0] == "<!--":
            pattern = "-->"
        elif name in ("script", "style") and not tag["end"]:
            pattern = rf"</{name}\s*>"
        else:
            return tag.end()
        if pattern in self.unclosed:
            return -1
        closing = re.compile(pattern, re.IGNORECASE).search(self.source, tag.end())
        if closing is None:
            self.unclosed.add(pattern)
        return closing.end() if closing else -1


def _active(tags: list[re.Match[str]]) -> set[str]:
    """Names that are HTML in this text."""
    starts: set[str] = set()
    ends: set[str] = set()
    attributed: set[str] = set()
    for tag in tags:
        name = (tag["name"] or "").lower()
        (ends if tag["end"] else starts).add(name)
        if tag["attributes"]:
            attributed.add(name)
    return ((starts | ends) & VOID) | (starts & ends & PAIRED) | (attributed & (PAIRED | ATTRIBUTED))


def _decode(text: str) -> str:
    plain = ENTITY.sub(lambda match: _decoded(match, brackets=True), text)
    if any(tag[0][0] == "<" for tag in TAG.finditer(plain)):
        return ENTITY.sub(lambda match: _decoded(match, brackets=False), text)
    return plain


def _decoded(match: re.Match[str], *, brackets: bool) -> str:
    written = match[0]
    if written[0] == "`" or not (written[1] == "#" or written[1:] in html5):
        return written
    plain = html.unescape(written)
    if plain == "&":
        return written if ENTITY_TAIL.match(match.string, match.end()) else plain
    return written if plain in "`~" or (plain in "<>" and not brackets) else plain
