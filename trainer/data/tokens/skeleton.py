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


class ClosedText(NamedTuple):
    """A rendered conversation with an end-of-turn token after its last turn, even if the template writes none."""

    text: str
    spans: Spans
    """Characters of the supervised turns, each with the end-of-turn token behind it."""


class _SpanPosition(NamedTuple):
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
    span_positions: list[_SpanPosition]
    """Of each learned span."""

    def fit(self, contents: list[str], text: str) -> ClosedText | None:
        """Find the supervised spans of a conversation by this skeleton (what the template writes around contents).

        `contents`: the messages' texts without outer whitespace. `text`: the conversation as the template wrote it.

        Returns the text with its last turn closed by an end-of-turn token, and its spans. None if `text` is not exactly this
        skeleton filled with `contents`: then the skeleton says nothing about it.
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
            # `ending` is the last literal with the end-of-turn token that the template itself did not write.
            text = text[: len(text) - len(last_literal)] + self.ending
        spans = []
        for position in self.span_positions:
            begin = lengths_before[position.contents_before_begin] + position.characters_before_begin
            end = lengths_before[position.contents_before_end] + position.characters_before_end
            spans.append((begin, end))
        return ClosedText(text, spans)


def cut_skeleton(placeholders: list[str], text: str, closed: ClosedText, added_tokens: list[str]) -> Skeleton | None:
    """Make a skeleton, what a template writes around contents, of a rendered conversation whose contents are `placeholders`.

    `text`: as rendered. `closed`: the same with an end-of-turn token at its end, and its supervised spans. `added_tokens`:
    those of the tokenizer.

    None unless the text has each placeholder once, in order, and no span depends on what the contents are.

    Example, with <0> and <1> as placeholders: "U:<0>|A:<1>$" with the span "<1>$" gives the literals "U:", "|A:" and "$". The
    span's position is (1, 5, 2, 6): one content and 5 characters before its begin, two contents and 6 characters before its
    end.
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
    # To close the last turn may only have changed what is behind the last content.
    if closed.text[:position] != text[:position]:
        return None
    literals.append(text[position:])

    span_positions = []
    for begin, end in closed.spans:
        before_begin = _contents_and_characters_before(begin, placeholders, placeholder_begins)
        before_end = _contents_and_characters_before(end, placeholders, placeholder_begins)
        if before_begin is None or before_end is None:
            return None
        contents_before_end, _ = before_end
        # The literal behind the span: with the beginning of the next content it may close the turn, or not.
        if contents_before_end < len(placeholders) and _may_become_token(literals[contents_before_end], added_tokens):
            return None
        span_positions.append(_SpanPosition(*before_begin, *before_end))
    return Skeleton(literals, closed.text[position:], span_positions)


def _may_become_token(literal: str, added_tokens: list[str]) -> bool:
    """Whether a literal, a text of the template between two contents, could form an added token with the next content.

    It could if it is empty or the beginning of such a token. The token would close the turn before it in one conversation and
    not in another, so that no skeleton holds for all.
    """
    trimmed = literal.lstrip()
    return any(len(token) > len(trimmed) and token.startswith(trimmed) for token in added_tokens)


def _contents_and_characters_before(
    position: int, placeholders: list[str], placeholder_begins: list[int]
) -> tuple[int, int] | None:
    """Describe a position in a rendered text as (placeholders before it, characters of the template's own text before it).

    So the position can be found again when the placeholders are replaced by contents of any length. Position 7 of "U:<0>|A:<1>"
    is (1, 4). None for a position inside a placeholder.

    `placeholder_begins`: where each placeholder begins in the text, ascending.
    """
    num_before = bisect_left(placeholder_begins, position)
    if num_before:
        last = num_before - 1
        if position < placeholder_begins[last] + len(placeholders[last]):
            return None
    return num_before, position - sum(map(len, placeholders[:num_before]))
