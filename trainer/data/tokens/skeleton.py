"""What a chat template writes around the contents of a conversation, and where learned spans lie in it.

The spans of a conversation are read off the skeleton of its shape, but only if skeleton and contents together are exactly its
rendering.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

Spans = list[tuple[int, int]]
"""[begin, end) of each learned turn, ascending."""


class _SpanEdges(NamedTuple):
    """Where a span begins and ends in a conversation of any contents: how much text is before it.

    In the rendered conversation, the begin is at `characters_before_begin` plus the lengths of the first
    `contents_before_begin` contents; the end likewise.
    """

    contents_before_begin: int
    characters_before_begin: int
    """Characters of the template's own text."""
    contents_before_end: int
    characters_before_end: int


@dataclass(slots=True)
class Skeleton:
    """What a template writes around the n contents of a conversation, and where the learned spans lie in it."""

    literals: list[str]
    """n + 1 of them: before the first content, between the contents, after the last."""
    ending: str
    """What the last literal becomes once the last turn is closed."""
    edges: list[_SpanEdges]
    """Of each learned span."""

    def fit(self, contents: list[str], text: str) -> tuple[str, Spans] | None:
        """(closed text, supervised spans in it) of a conversation; None if `text` isn't the skeleton filled with `contents`.

        `contents`: the messages' texts without outer whitespace. `text`: the conversation as the template wrote it. The
        closed text is the same with an end-of-turn token after the last turn, even if the template writes none.
        """
        pieces = [self.literals[0]]
        # lengths_before[n]: how many characters the first n contents have together.
        lengths_before = [0]
        for content, literal in zip(contents, self.literals[1:], strict=True):
            pieces += (content, literal)
            lengths_before.append(lengths_before[-1] + len(content))
        if "".join(pieces) != text:
            return None
        last_literal = self.literals[-1]
        if self.ending != last_literal:
            text = text[: len(text) - len(last_literal)] + self.ending
        spans = []
        for edges in self.edges:
            begin = lengths_before[edges.contents_before_begin] + edges.characters_before_begin
            end = lengths_before[edges.contents_before_end] + edges.characters_before_end
            spans.append((begin, end))
        return text, spans


def cut_skeleton(
    placeholders: list[str], text: str, closed_text: str, spans: Spans, added_tokens: list[str]
) -> Skeleton | None:
    """The skeleton of a conversation whose contents are `placeholders`; None unless the text has each of them once, in order.

    `text`: as rendered. `spans`: supervised spans in `closed_text`, which ends with an end-of-turn token. `added_tokens`: those
    of the tokenizer.

    Example, with <0> and <1> as placeholders: "U:<0>|A:<1>$" with the span "<1>$" gives the literals "U:", "|A:" and "$", and
    the edges (1, 5, 2, 6): one content and 5 characters before its begin, two contents and 6 characters before its end.
    """
    # The literals: what stands between the placeholders.
    literals: list[str] = []
    placeholder_begins: list[int] = []
    position = 0
    for placeholder in placeholders:
        begin = text.find(placeholder, position)
        if begin < 0 or text.count(placeholder) != 1:
            return None
        literals.append(text[position:begin])
        placeholder_begins.append(begin)
        position = begin + len(placeholder)
    if closed_text[:position] != text[:position]:
        return None
    literals.append(text[position:])

    edges = []
    for begin, end in spans:
        before_begin = _text_before(begin, placeholders, placeholder_begins)
        before_end = _text_before(end, placeholders, placeholder_begins)
        if before_begin is None or before_end is None:
            return None
        contents_before_end, _ = before_end
        if contents_before_end < len(placeholders) and _may_become_token(literals[contents_before_end], added_tokens):
            return None
        edges.append(_SpanEdges(*before_begin, *before_end))
    return Skeleton(literals, closed_text[position:], edges)


def _may_become_token(literal: str, added_tokens: list[str]) -> bool:
    """Whether a literal is the beginning of an added token, which a content right behind it may complete.

    Such a token would close the turn before it in one conversation and not in another, so that no skeleton holds for all.
    """
    trimmed = literal.lstrip()
    return any(len(token) > len(trimmed) and token.startswith(trimmed) for token in added_tokens)


def _text_before(position: int, placeholders: list[str], placeholder_begins: list[int]) -> tuple[int, int] | None:
    """(number of placeholders before a position, characters of literals before it); None for a position inside a placeholder.

    `placeholder_begins`: where each placeholder begins in the text, ascending.
    """
    num_before = bisect_left(placeholder_begins, position)
    if num_before:
        last = num_before - 1
        if position < placeholder_begins[last] + len(placeholders[last]):
            return None
    return num_before, position - sum(map(len, placeholders[:num_before]))
