"""Finds which characters of a rendered conversation are learned, by rendering it again with marks around the learned contents.

A way of marking counts only if the marked text without its marks is the plain text, character by character, and every learned
turn shows its marks once, in order.

Rendering everything twice is slow. So the text that a template puts around contents, its skeleton, is remembered for each shape
of conversation: the roles, which turns are learned, and the whitespace around each content. The spans of a later conversation
of the same shape are read off the skeleton, but only if skeleton and contents together are exactly its rendering.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from strategies.errors import DataError
from trainer.data.document import Message, RefusedDocument

RESERVED = "\U0010fb01\U0010fb02\U0010fb03\U0010fb04\U0010fb05"
"""Private-use characters of the last plane, which no font uses and no template looks for; data must not have them."""
BEGIN = RESERVED[0]
END = RESERVED[1]
"""Stand around the content of a turn."""
THOUGHT = RESERVED[2]
"""Stands where a thought begins."""
_MARKS = re.compile(f"([{BEGIN}{END}{THOUGHT}])")
_THOUGHT_AND_ANSWER = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)
_MAX_SHAPES = 4096
"""Shapes of conversations that are remembered; more are forgotten all at once, so that memory stays bounded."""
_MAX_MISSES = 8
"""After so many conversations that their shape's skeleton does not fit, the shape is always rendered twice."""
_SKELETON_AT_USE = 2
"""A skeleton is made when its shape comes for the second time: it costs a few renderings, which one use does not pay back."""

Apply = Callable[..., str]
"""Renders messages, with the header of the turn to come if `prompt`."""
Spans = list[tuple[int, int]]
"""[begin, end) of each learned turn, ascending."""
Shape = tuple[object, ...]
"""Roles, indices of learned turns, and the whitespace around each content."""
ContentWhitespace = dict[int, tuple[str, str]]
"""Whitespace (before, after) the content of each turn that has some, by the turn's index."""


@dataclass(slots=True)
class _MarkedTurn:
    """Positions in the text without marks: of a thought, if the template kept it, and of the content."""

    thought_begin: int | None
    begin: int
    end: int


@dataclass(slots=True)
class _Skeleton:
    """What a template writes around the n contents of a conversation, and where the learned spans lie in it."""

    literals: list[str]
    """n + 1 of them: before the first content, between the contents, after the last."""
    ending: str
    """What the last literal becomes once the last turn is closed."""
    edges: list[tuple[int, int, int, int]]
    """Per span: how many contents are before its begin, how many characters of literals; the same two for its end."""

    def fit(self, contents: list[str], text: str) -> tuple[str, Spans] | None:
        """The supervised spans of a conversation, computed from this skeleton: (closed text, spans).

        A skeleton is what the template writes around the contents of conversations with the same roles. `contents`: the messages'
        texts without outer whitespace. `text`: the conversation as the template wrote it; if it isn't the skeleton filled with
        `contents`, None. The closed text ends with an end-of-turn token even if the template writes none.
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
        for contents_before_begin, begin, contents_before_end, end in self.edges:
            spans.append((lengths_before[contents_before_begin] + begin, lengths_before[contents_before_end] + end))
        return text, spans


class SpanFinder:
    """Finds the character spans of learned turns with one chat template, closing tokens included.

    `added_tokens`: the tokenizer's added tokens; any of them closes the last turn if it follows. `end_patterns`: what closes
    a turn, by role. `eos` is put after the last turn if the template does not close it.
    """

    def __init__(
        self, apply: Apply, added_tokens: list[str], end_patterns: dict[str, re.Pattern[str]], eos: str
    ) -> None:
        self._apply = apply
        self._added_tokens = added_tokens
        self._end_patterns = end_patterns
        self._eos = eos
        self._any_token = leading_token_pattern(added_tokens)
        self._skeletons: dict[Shape, _Skeleton | None] = {}
        """None for a shape that has no skeleton: its conversations are always rendered twice."""
        self._times_seen: dict[Shape, int] = {}
        """How often a shape without a skeleton came."""
        self._misses: dict[Shape, int] = {}
        """How often the skeleton of a shape did not fit."""

    def find_spans(
        self, messages: list[Message], learned: list[int], text: str, location: str, *, fast: bool = True
    ) -> tuple[str, Spans]:
        """Find the characters of the supervised turns in a rendered conversation: (closed text, one span a turn).

        `learned`: indices of the supervised turns. `text`: the conversation as the template rendered it; the closed text has an
        end-of-turn token at its end, too. The fast way knows what the template writes around contents; `fast=False` renders the
        conversation a second time, with marks, in any case. Errors: DataError, RefusedDocument.
        """
        text_and_spans = self._spans_by_skeleton(messages, learned, text) if fast else None
        if text_and_spans is None:
            return self._spans_by_marking(messages, learned, text, location)
        return text_and_spans

    def _spans_by_skeleton(self, messages: list[Message], learned: list[int], text: str) -> tuple[str, Spans] | None:
        """(closed text, spans) without rendering again; None if the conversation must be rendered with marks.

        Conversations of one shape (roles, supervised turns, outer whitespace) share a skeleton: what the template writes around
        their contents. It is kept and fitted to the contents.
        """
        # Take the conversation apart into its shape and its contents.
        roles: list[str] = []
        contents: list[str] = []
        whitespace: ContentWhitespace = {}
        for index, message in enumerate(messages):
            content = message["content"]
            trimmed = content.strip()
            # empty contents may be left out by a template, thoughts moved or hidden, other fields written as well
            if not trimmed or "</think>" in trimmed or len(message) > 2:
                return None
            if len(trimmed) != len(content):
                before, _, after = content.partition(trimmed)
                whitespace[index] = (before, after)
            roles.append(message["role"])
            contents.append(trimmed)
        shape = (*roles, tuple(learned), *whitespace.items())
        # The skeleton of this shape: kept, or made now.
        if shape in self._skeletons:
            skeleton = self._skeletons[shape]
        else:
            skeleton = self._learn_skeleton(shape, roles, learned, whitespace)
        if skeleton is None:
            return None
        text_and_spans = skeleton.fit(contents, text)
        if text_and_spans is not None:
            return text_and_spans
        # Either the template writes the time, and a skeleton learned anew will fit; or it looks into contents, and none
        # ever does. After `_MAX_MISSES` we assume the latter.
        self._misses[shape] = self._misses.get(shape, 0) + 1
        if self._misses[shape] < _MAX_MISSES:
            del self._skeletons[shape]
        else:
            self._skeletons[shape] = None
        return None

    def _learn_skeleton(
        self, shape: Shape, roles: list[str], learned: list[int], whitespace: ContentWhitespace
    ) -> _Skeleton | None:
        """Make the skeleton of a shape of conversation (see `_spans_by_skeleton`), by rendering placeholders as contents.

        Only a shape that has come `_SKELETON_AT_USE` times is worth it. None for a newer one, and if the template writes
        something else than placeholders with a fixed text around them.
        """
        self._times_seen[shape] = self._times_seen.get(shape, 0) + 1
        if self._times_seen[shape] < _SKELETON_AT_USE:
            if len(self._times_seen) > _MAX_SHAPES:
                self._times_seen.clear()
            return None
        if len(self._skeletons) >= _MAX_SHAPES:
            self._skeletons.clear()
        placeholders: list[str] = []
        messages: list[Message] = []
        for index, role in enumerate(roles):
            placeholder = f"{RESERVED[3]}{index}{RESERVED[4]}"
            before, after = whitespace.get(index, ("", ""))
            placeholders.append(placeholder)
            messages.append({"role": role, "content": before + placeholder + after})
        self._skeletons[shape] = None
        try:
            text = self._apply(messages)
            closed_text, spans = self._spans_by_marking(messages, learned, text, "")
            self._skeletons[shape] = self._cut_skeleton(placeholders, text, closed_text, spans)
        except Exception:  # noqa: BLE001 - a template that dislikes placeholders is asked about each conversation
            return None
        return self._skeletons[shape]

    def _spans_by_marking(
        self, messages: list[Message], learned: list[int], text: str, location: str
    ) -> tuple[str, Spans]:
        """(closed text, spans) by rendering the conversation a second time, with marks around the supervised contents.

        Marks are private-use characters: where they come out in the rendered text, the contents begin and end.
        """
        try:
            spans = self._content_spans(messages, learned, text, location)
        except DataError:
            fresh_text = self._apply(messages)
            if fresh_text == text:
                raise
            text = fresh_text  # the template writes the date, and a day ended between the two renderings
            spans = self._content_spans(messages, learned, text, location)
        return self.close_turns(text, spans, [messages[i]["role"] for i in learned])

    def _content_spans(self, messages: list[Message], learned: list[int], text: str, location: str) -> Spans:
        """Spans of the supervised contents in `text`, by the first way of marking that leaves the rest of the text unchanged.

        Errors: DataError if none does; RefusedDocument if a thought is lost.
        """
        for mark_content in (mark_whole, mark_trimmed, mark_thought):
            turns = render_marked(self._apply, messages, learned, text, [mark_content] * len(messages))
            if turns is None:
                continue
            if mark_content is mark_trimmed:
                self._include_kept_whitespace(messages, learned, text, turns)
            spans = []
            for number, turn in enumerate(turns):
                begin = self._learning_begin(messages, learned, text, number, turn, location)
                spans.append((begin, turn.end))
            return spans
        role = messages[learned[-1]]["role"]
        raise DataError(
            f"{location}: the chat template changes the text of {'an' if role == 'assistant' else 'a'} {role} turn (more than "
            "trimming it), so that what is to be learned cannot be told; give a template with {% generation %} blocks in "
            "model.chat_template"
        )

    def _include_kept_whitespace(
        self, messages: list[Message], learned: list[int], text: str, turns: list[_MarkedTurn]
    ) -> None:
        """Widen the span of each supervised turn, in place, by the outer whitespace of its content that the template keeps.

        `turns`: the marked positions of the turns `learned`. A template may trim some turns only, or line ends only.
        """
        for number, index in enumerate(learned):
            content = messages[index]["content"]
            trimmed_begin = len(content) - len(content.lstrip())
            trimmed_end = trimmed_begin + len(content.strip())

            def try_marks(begin: int, end: int, number: int = number, index: int = index) -> bool:
                """Whether marks around content[begin:end] leave the text unchanged; if so, the turn takes this span."""
                markers: list[Callable[[str], str]] = [mark_trimmed] * len(messages)
                markers[index] = partial(mark_between, begin=begin, end=end)
                wider_turns = render_marked(self._apply, messages, learned, text, markers)
                if wider_turns is not None:
                    turns[number] = wider_turns[number]
                return wider_turns is not None

            if content == content.strip() or try_marks(0, len(content)):
                continue
            # A template trims a beginning or an end of the whitespace. A mark inside that part would keep it from being
            # trimmed, and the text would differ. So the outermost mark that works is found by bisection.
            begin = bisect_left(range(trimmed_begin), True, key=lambda position: try_marks(position, trimmed_end))
            # The second search is for what `try_marks` does to the turn: the position that it finds is not needed.
            length = len(content)
            bisect_left(
                range(length - trimmed_end), True, key=lambda num_trimmed: try_marks(begin, length - num_trimmed)
            )

    def _learning_begin(
        self, messages: list[Message], learned: list[int], text: str, number: int, turn: _MarkedTurn, location: str
    ) -> int:
        """Where supervision of the turn `learned[number]` begins in `text`: at its content, or, with a `<think>` part, where
        generation would begin, since the template may write the opening tag itself.

        Errors: RefusedDocument if the template throws the thought of the last turn away, or has no such place.
        """
        has_thought = "</think>" in messages[learned[number]]["content"]
        is_last = number == len(learned) - 1
        if turn.thought_begin is None:
            # Templates drop thoughts of earlier turns on purpose; without that of the last one there is nothing to learn.
            if has_thought and is_last and "</think>" not in text[turn.begin : turn.end]:
                raise RefusedDocument(
                    location,
                    "thought_lost",
                    "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                    "or give another template in model.chat_template",
                )
            return turn.begin
        prompt = self._apply(messages[: learned[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought_begin:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise RefusedDocument(location, "thought_lost", message)
        return len(prompt)

    def close_turns(
        self, text: str, spans: Spans, roles: list[str], already_closed: tuple[str, ...] = ()
    ) -> tuple[str, Spans]:
        """Widen supervised spans by the end-of-turn tokens that follow them, so that the model learns to stop: (text, spans).

        `roles`: of the turns that the spans belong to. A span that ends with one of the tokens `already_closed` stays as it is.
        EOS is appended to the text if nothing closes the last turn.
        """
        closed_spans = []
        for number, ((begin, end), role) in enumerate(zip(spans, roles, strict=True)):
            is_final = number == len(spans) - 1
            if not (already_closed and text[begin:end].rstrip().endswith(already_closed)):
                pattern = self._any_token if is_final else self._end_patterns[role]
                match = pattern.match(text, end)
                if match:
                    end = match.end()
                elif is_final:  # only words or whitespace follow: what words the template adds are learned, then eos
                    text = text[:end] + text[end:].rstrip() + self._eos
                    end = len(text)
            closed_spans.append((begin, end))
        return text, closed_spans

    def _cut_skeleton(self, placeholders: list[str], text: str, closed_text: str, spans: Spans) -> _Skeleton | None:
        """Make a skeleton from a conversation whose contents are `placeholders`: the texts between them, and where spans lie.

        `text`: as rendered. `spans`: supervised spans in `closed_text`, which ends with an end-of-turn token. Each edge of a span
        is kept as (contents before it, characters of template text before it), which holds for contents of any length. None
        unless the text has each placeholder once, in order.

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

        def split_position(position: int) -> tuple[int, int] | None:
            """(placeholders before a position, characters of literals before it); None inside a placeholder."""
            num_before = bisect_left(placeholder_begins, position)
            if num_before:
                last = num_before - 1
                if position < placeholder_begins[last] + len(placeholders[last]):
                    return None
            return num_before, position - sum(map(len, placeholders[:num_before]))

        # The edges of the spans.
        edges = []
        for begin, end in spans:
            begin_edge = split_position(begin)
            end_edge = split_position(end)
            if begin_edge is None or end_edge is None:
                return None
            # A content that begins like a token must not be taken into the token that closes the turn before it.
            contents_before_end = end_edge[0]
            if contents_before_end < len(placeholders):
                literal = literals[contents_before_end].lstrip()
                if any(len(token) > len(literal) and token.startswith(literal) for token in self._added_tokens):
                    return None
            edges.append((*begin_edge, *end_edge))
        return _Skeleton(literals, closed_text[position:], edges)


def render_marked(
    apply: Apply, messages: list[Message], learned: list[int], text: str, markers: list[Callable[[str], str]]
) -> list[_MarkedTurn] | None:
    """Render a conversation with marks in the learned contents, and return where they stand in `text`, one a learned turn.

    `text`: the rendering without marks. `markers[index]` puts the marks into the content of message `index`. None unless every
    learned turn shows its marks once, in order, and the text is otherwise the same.
    """
    marked_messages = list(messages)
    for index in learned:
        message = messages[index]
        marked_messages[index] = {**message, "content": markers[index](message["content"])}
    # Text and marks alternate: pieces[0::2] is text, pieces[1::2] are marks.
    pieces = _MARKS.split(apply(marked_messages))
    if "".join(pieces[::2]) != text:
        return None
    turns: list[_MarkedTurn] = []
    position = 0
    thought_begin = None
    content_begin = None
    for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        position += len(piece)
        if mark == THOUGHT and thought_begin is None and content_begin is None:
            thought_begin = position
        elif mark == BEGIN and content_begin is None:
            content_begin = position
        elif mark == END and content_begin is not None:
            turns.append(_MarkedTurn(thought_begin, content_begin, position))
            thought_begin = None
            content_begin = None
        elif mark:  # out of order, or twice
            return None
    is_complete = content_begin is None and thought_begin is None and len(turns) == len(learned)
    return turns if is_complete else None


def leading_token_pattern(tokens: list[str]) -> re.Pattern[str]:
    """A pattern that matches one of the tokens, the longest that fits, after any whitespace."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(r"\s*(" + "|".join(map(re.escape, longest_first)) + ")")


def mark_whole(content: str) -> str:
    """A message's content with marks around all of it."""
    return f"{BEGIN}{content}{END}"


def mark_between(content: str, begin: int, end: int) -> str:
    """A message's content with marks around content[begin:end]."""
    return f"{content[:begin]}{BEGIN}{content[begin:end]}{END}{content[end:]}"


def mark_trimmed(content: str) -> str:
    """A message's content with marks inside its outer whitespace, so that a template that trims still does."""
    begin = len(content) - len(content.lstrip())
    return mark_between(content, begin, begin + len(content.strip()))


def mark_thought(content: str) -> str:
    """A message's content with marks for templates that take a <think> part out and put it elsewhere, or nowhere."""
    match = _THOUGHT_AND_ANSWER.fullmatch(content)
    if match is None:
        return mark_trimmed(content)
    opening, thought, answer = match.groups()
    return f"{opening or ''}{THOUGHT}{thought}{mark_trimmed(answer)}"


def mark_thought_alone(content: str) -> str:
    """As `mark_thought`, but a blank answer gets no marks: templates may test for an empty content beside calls."""
    return mark_thought(content).removesuffix(BEGIN + END)
