"""Finds which characters of a rendered conversation are learned, by rendering it again with marks around the learned contents.

A way of marking counts only if the marked text without its marks is the plain text, character by character, and every learned
turn shows its marks once, in order.

Rendering everything twice is slow. So the text that a template puts around contents, its skeleton, is remembered for each shape
of conversation: the roles, which turns are learned, and the whitespace around each content. The spans of a later conversation
of the same shape are read off the skeleton, but only if skeleton and contents together are exactly its rendering
(`trainer/data/tokens/skeleton.py`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from strategies.errors import DataError
from trainer.data.document import Message, RefusedDocument
from trainer.data.tokens.skeleton import Skeleton, Spans, cut_skeleton

RESERVED = "\U0010fb01\U0010fb02\U0010fb03\U0010fb04\U0010fb05"
"""Private-use characters of the last plane, which no font uses and no template looks for; data must not have them."""
BEGIN = RESERVED[0]
END = RESERVED[1]
"""Stand around the content of a turn."""
THOUGHT = RESERVED[2]
"""Stands where a thought begins."""
_MARK_REGEX = re.compile(f"[{BEGIN}{END}{THOUGHT}]")
_THOUGHT_AND_ANSWER_REGEX = re.compile(r"(\s*<think>\s*)?(.*</think>\s*)(.*)", re.DOTALL)
_MAX_SHAPES = 4096
"""Shapes of conversations that are remembered; more are forgotten all at once, so that memory stays bounded."""
_MAX_MISSES = 8
"""After so many conversations that their shape's skeleton does not fit, the shape is always rendered twice."""
_SKELETON_AT_USE = 2
"""A skeleton is made when its shape comes for the second time: it costs a few renderings, which one use does not pay back."""

Render = Callable[..., str]
"""Renders messages as the chat template writes them; with `prompt=True`, with the header of the turn to come."""
Marker = Callable[[str], str]
"""Puts marks into the content of a message."""
Shape = tuple[object, ...]
"""Roles, indices of learned turns, and the whitespace around each content."""
ContentWhitespace = dict[int, tuple[str, str]]
"""Whitespace (before, after) the content of each turn that has some, by the turn's index."""


@dataclass(slots=True)
class _MarkedTurn:
    """Positions in the text without marks: of a thought, if the template kept it, and of the content."""

    thought_begin: int | None
    content_begin: int
    content_end: int


class SpanFinder:
    """Finds the character spans of learned turns with one chat template, closing tokens included.

    `added_tokens`: the tokenizer's added tokens; any of them closes the last turn if it follows. `end_patterns`: what closes
    a turn, by role. `eos` is put after the last turn if the template does not close it.
    """

    def __init__(
        self, render: Render, added_tokens: list[str], end_patterns: dict[str, re.Pattern[str]], eos: str
    ) -> None:
        self._render = render
        self._added_tokens = added_tokens
        self._end_patterns = end_patterns
        self._eos = eos
        self._any_token = leading_token_pattern(added_tokens)
        self._skeletons: dict[Shape, Skeleton | None] = {}
        """None for a shape that has no skeleton: its conversations are always rendered twice."""
        self._times_seen: dict[Shape, int] = {}
        """How often a shape without a skeleton came."""
        self._misses: dict[Shape, int] = {}
        """How often the skeleton of a shape did not fit."""

    def find_spans(
        self, messages: list[Message], learned_indices: list[int], text: str, location: str, *, fast: bool = True
    ) -> tuple[str, Spans]:
        """Find the characters of the supervised turns in a rendered conversation: (closed text, one span a turn).

        `learned_indices`: indices of the supervised turns. `text`: the conversation as the template rendered it; the closed text
        has an end-of-turn token at its end, too. `location`: `file:line` of the row. The fast way knows what the template writes
        around contents; `fast=False` renders the conversation a second time, with marks, in any case. Raises DataError if the
        spans cannot be told, RefusedDocument if the thought of the last turn is lost.
        """
        text_and_spans = self._spans_by_skeleton(messages, learned_indices, text) if fast else None
        if text_and_spans is None:
            return self._spans_by_marking(messages, learned_indices, text, location)
        return text_and_spans

    def _spans_by_skeleton(
        self, messages: list[Message], learned_indices: list[int], text: str
    ) -> tuple[str, Spans] | None:
        """(closed text, spans) without rendering again; None if the conversation must be rendered with marks.

        Conversations of one shape (roles, supervised turns, outer whitespace) share a skeleton: what the template writes around
        their contents. It is remembered, and fitted to the contents.
        """
        roles: list[str] = []
        contents: list[str] = []
        whitespace: ContentWhitespace = {}
        for index, message in enumerate(messages):
            content = message["content"]
            trimmed = content.strip()
            # A template may leave empty contents out, move or hide thoughts, and write other fields as well.
            has_fixed_surroundings = trimmed and "</think>" not in trimmed and len(message) == 2
            if not has_fixed_surroundings:
                return None
            if len(trimmed) != len(content):
                before, _, after = content.partition(trimmed)
                whitespace[index] = (before, after)
            roles.append(message["role"])
            contents.append(trimmed)
        shape = (*roles, tuple(learned_indices), *whitespace.items())
        if shape in self._skeletons:
            skeleton = self._skeletons[shape]
        else:
            skeleton = self._learn_skeleton(shape, roles, learned_indices, whitespace)
        if skeleton is None:
            return None
        text_and_spans = skeleton.fit(contents, text)
        if text_and_spans is None:
            self._forget_misfit(shape)
        return text_and_spans

    def _forget_misfit(self, shape: Shape) -> None:
        """Forget the skeleton of a shape, which did not fit a conversation; after `_MAX_MISSES` times, for good.

        Either the template writes the time, and a skeleton that is learned anew will fit; or the template looks into
        contents, and none ever does. After `_MAX_MISSES` we assume the latter.
        """
        self._misses[shape] = self._misses.get(shape, 0) + 1
        if self._misses[shape] < _MAX_MISSES:
            del self._skeletons[shape]
        else:
            self._skeletons[shape] = None

    def _learn_skeleton(
        self, shape: Shape, roles: list[str], learned_indices: list[int], whitespace: ContentWhitespace
    ) -> Skeleton | None:
        """Learn the skeleton of a shape of conversation (see `_spans_by_skeleton`) by rendering placeholders as contents.

        Remembers the skeleton, and returns it. None for a shape that has not come `_SKELETON_AT_USE` times yet, and if the
        template writes something else than placeholders with a fixed text around them.
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
            text = self._render(messages)
            closed_text, spans = self._spans_by_marking(messages, learned_indices, text, "")
            self._skeletons[shape] = cut_skeleton(placeholders, text, closed_text, spans, self._added_tokens)
        except Exception:  # noqa: BLE001 - a template that dislikes placeholders is asked about each conversation
            return None
        return self._skeletons[shape]

    def _spans_by_marking(
        self, messages: list[Message], learned_indices: list[int], text: str, location: str
    ) -> tuple[str, Spans]:
        """(closed text, spans) by rendering the conversation a second time, with marks around the supervised contents.

        Marks are private-use characters: where they come out in the rendered text, the contents begin and end. Raises
        DataError and RefusedDocument as described at `find_spans`.
        """
        try:
            spans = self._content_spans(messages, learned_indices, text, location)
        except DataError:
            # The template may write the time, so that `text` differs from a rendering of now.
            text_now = self._render(messages)
            if text_now == text:
                raise
            text = text_now
            spans = self._content_spans(messages, learned_indices, text, location)
        return self.close_turns(text, spans, [messages[index]["role"] for index in learned_indices])

    def _content_spans(self, messages: list[Message], learned_indices: list[int], text: str, location: str) -> Spans:
        """Spans of the supervised contents in `text`, by the first way of marking that leaves the rest of the text unchanged.

        Raises DataError if none does, RefusedDocument if the thought of the last turn is lost.
        """
        for mark_content in (mark_whole, mark_trimmed, mark_thought):
            turns = render_marked(
                self._render, messages, learned_indices, text, dict.fromkeys(learned_indices, mark_content)
            )
            if turns is None:
                continue
            if mark_content is mark_trimmed:
                turns = self._with_kept_whitespace(messages, learned_indices, text, turns)
            spans = []
            for number, turn in enumerate(turns):
                begin = self._learning_begin(messages, learned_indices, text, number, turn, location)
                spans.append((begin, turn.content_end))
            return spans
        role = messages[learned_indices[-1]]["role"]
        article = "an" if role == "assistant" else "a"
        raise DataError(
            f"{location}: the chat template changes the text of {article} {role} turn (more than "
            "trimming it), so that what is to be learned cannot be told; give a template with {% generation %} blocks in "
            "model.chat_template"
        )

    def _with_kept_whitespace(
        self, messages: list[Message], learned_indices: list[int], text: str, turns: list[_MarkedTurn]
    ) -> list[_MarkedTurn]:
        """The turns, each widened by the outer whitespace of its content that the template keeps.

        `turns`: the positions of the turns `learned_indices`, found with trimmed contents. A template may trim some turns only,
        or line ends only.
        """
        widened_turns = []
        for number, index in enumerate(learned_indices):
            content = messages[index]["content"]
            turn = turns[number]
            if content != content.strip():
                find_turn = partial(self._find_turn_with_marks, messages, learned_indices, text, number)
                turn = _widest_turn(content, cache(find_turn)) or turn
            widened_turns.append(turn)
        return widened_turns

    def _find_turn_with_marks(
        self, messages: list[Message], learned_indices: list[int], text: str, number: int, begin: int, end: int
    ) -> _MarkedTurn | None:
        """The turn `learned[number]`, found with marks around content[begin:end]; None if these marks change the text."""
        markers: dict[int, Marker] = dict.fromkeys(learned_indices, mark_trimmed)
        markers[learned_indices[number]] = partial(mark_between, begin=begin, end=end)
        turns = render_marked(self._render, messages, learned_indices, text, markers)
        return None if turns is None else turns[number]

    def _learning_begin(
        self,
        messages: list[Message],
        learned_indices: list[int],
        text: str,
        number: int,
        turn: _MarkedTurn,
        location: str,
    ) -> int:
        """Where supervision of the turn `learned[number]` begins in `text`.

        - No mark of a thought came out: at the content. RefusedDocument if the last turn has a thought that the template
          threw away.
        - The turn has a `<think>` part: where generation would begin, since the template may write the opening tag itself.
          RefusedDocument if there is no such place.
        """
        if turn.thought_begin is None:
            has_thought = "</think>" in messages[learned_indices[number]]["content"]
            is_last = number == len(learned_indices) - 1
            # Templates drop thoughts of earlier turns on purpose; without that of the last one there is nothing to learn.
            if has_thought and is_last and "</think>" not in text[turn.content_begin : turn.content_end]:
                raise RefusedDocument(
                    location,
                    "thought_lost",
                    "the chat template throws away the <think> part of the last assistant turn; remove it from the data "
                    "or give another template in model.chat_template",
                )
            return turn.content_begin
        prompt = self._render(messages[: learned_indices[number]], prompt=True)
        if not text.startswith(prompt) or len(prompt) > turn.thought_begin:
            message = f"cannot tell where assistant turn {number + 1} begins, with its <think> part"
            raise RefusedDocument(location, "thought_lost", message)
        return len(prompt)

    def close_turns(
        self, text: str, spans: Spans, roles: list[str], already_closed: tuple[str, ...] = ()
    ) -> tuple[str, Spans]:
        """Widen supervised spans by the end-of-turn tokens that follow them, so that the model learns to stop:

        (closed text, spans).

        `roles`: of the turns that the spans belong to. For each span:
        - it ends with one of the tokens `already_closed`: it stays as it is;
        - an end-of-turn token follows (after the last turn: any token of the tokenizer): the span is widened by that;
        - nothing closes the last turn: the rest of the text and EOS, which is appended to the text, join the span.
        """
        closed_spans = []
        for number, ((begin, end), role) in enumerate(zip(spans, roles, strict=True)):
            is_final = number == len(spans) - 1
            is_closed = bool(already_closed) and text[begin:end].rstrip().endswith(already_closed)
            if not is_closed:
                end_pattern = self._any_token if is_final else self._end_patterns[role]
                end_token = end_pattern.match(text, end)
                if end_token:
                    end = end_token.end()
                elif is_final:
                    text = text[:end] + text[end:].rstrip() + self._eos
                    end = len(text)
            closed_spans.append((begin, end))
        return text, closed_spans


def _widest_turn(content: str, find_turn: Callable[[int, int], _MarkedTurn | None]) -> _MarkedTurn | None:
    """The position of a turn with as much outer whitespace of its content as the template keeps; None if it keeps none.

    `find_turn(begin, end)` finds the turn with marks around content[begin:end]; None if these marks change the text.

    A template trims whitespace from the outside up to some character. A mark inside the trimmed part keeps it from being trimmed,
    and changes the text. So the outermost marks that work are found by bisection.
    """
    length = len(content)
    whole_turn = find_turn(0, length)
    if whole_turn is not None:
        return whole_turn
    trimmed_begin = length - len(content.lstrip())
    trimmed_end = trimmed_begin + len(content.strip())
    # Each search ends at the first candidate that works; if none works, behind the last one, which cuts all whitespace.
    begin = bisect_left(range(trimmed_begin), True, key=lambda position: find_turn(position, trimmed_end) is not None)
    num_cut = bisect_left(
        range(length - trimmed_end), True, key=lambda num_cut: find_turn(begin, length - num_cut) is not None
    )
    end = length - num_cut
    if (begin, end) == (trimmed_begin, trimmed_end):
        return None
    return find_turn(begin, end)


def render_marked(
    render: Render, messages: list[Message], learned_indices: list[int], text: str, markers: dict[int, Marker]
) -> list[_MarkedTurn] | None:
    """Render a conversation with marks in the learned contents, and return where they stand in `text`, one a learned turn.

    `text`: the rendering without marks. `markers[index]` puts the marks into the content of message `index`. None unless every
    learned turn shows its marks once, in order, and the text is otherwise the same.
    """
    marked_messages = list(messages)
    for index in learned_indices:
        message = messages[index]
        marked_messages[index] = {**message, "content": markers[index](message["content"])}
    marked_text = render(marked_messages)
    if _MARK_REGEX.sub("", marked_text) != text:
        return None
    turns: list[_MarkedTurn] = []
    thought_begin = None
    content_begin = None
    for num_marks_before, match in enumerate(_MARK_REGEX.finditer(marked_text)):
        mark = match.group()
        position = match.start() - num_marks_before  # in `text`, which lacks the marks of one character each
        if mark == THOUGHT and thought_begin is None and content_begin is None:
            thought_begin = position
        elif mark == BEGIN and content_begin is None:
            content_begin = position
        elif mark == END and content_begin is not None:
            turns.append(_MarkedTurn(thought_begin, content_begin, position))
            thought_begin = None
            content_begin = None
        else:  # out of order, or twice
            return None
    is_complete = content_begin is None and thought_begin is None and len(turns) == len(learned_indices)
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
    """A message's content with marks for templates that take a <think> part out and put it elsewhere, or nowhere.

    With ^ for THOUGHT, [ for BEGIN and ] for END: "<think>hm</think>yes" -> "<think>^hm</think>[yes]".
    """
    match = _THOUGHT_AND_ANSWER_REGEX.fullmatch(content)
    if match is None:
        return mark_trimmed(content)
    opening, thought, answer = match.groups()
    return f"{opening or ''}{THOUGHT}{thought}{mark_trimmed(answer)}"


def mark_thought_alone(content: str) -> str:
    """The marks of `mark_thought`, but none around a blank answer: templates may test for an empty content beside calls."""
    return mark_thought(content).removesuffix(BEGIN + END)
