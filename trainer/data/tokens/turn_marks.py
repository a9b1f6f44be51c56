"""Marks in one turn of a conversation with tool calls or thoughts, and where they came out in the rendered text.

Marks are private-use characters. They show where the template writes a content, a thought, or the parts of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from trainer.data.document import Message, map_argument_texts
from trainer.data.tokens.marking import CONTENT_BEGIN_MARK, CONTENT_END_MARK, THOUGHT_MARK, Marker, mark_trimmed
from trainer.data.tokens.tool_call_dialect import CALL_MARK, TURN_EDGE_MARK


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """Where the marks of one turn came out in the rendered conversation: positions in the text without marks, ascending."""

    marks_and_positions: list[tuple[str, int]]
    """(mark, position). The marks: content begin and end, thought, call, and the edges of the turns before and after."""

    def positions_of(self, *marks: str) -> list[int]:
        """Positions of these marks, ascending."""
        return [position for mark, position in self.marks_and_positions if mark in marks]

    @property
    def content_edges(self) -> list[int]:
        """Where the message's content begins and ends; empty if the template did not write it."""
        return self.positions_of(CONTENT_BEGIN_MARK, CONTENT_END_MARK)

    @property
    def thought_edges(self) -> list[int]:
        """Where the message's thought begins and ends; empty if the template did not write it, or if it was not marked."""
        return self.positions_of(THOUGHT_MARK)

    @property
    def content_and_call_edges(self) -> list[int]:
        """Begins and ends of the content, and of the names, arguments and keys of calls, ascending."""
        return self.positions_of(CONTENT_BEGIN_MARK, CONTENT_END_MARK, CALL_MARK)

    @property
    def begin(self) -> int:
        """Where the turn's first thought, content or call begins."""
        return min([*self.thought_edges, *self.content_and_call_edges])

    @property
    def end(self) -> int:
        """Where the turn's content or last call ends."""
        return self.content_and_call_edges[-1]

    @property
    def content_is_one_span(self) -> bool:
        """Whether the template wrote the message's content once, in one piece, or not at all.

        Some templates split a content, for example at `</think>`: what the marks enclose is then not the content.
        """
        content_marks = [mark for mark, _ in self.marks_and_positions if mark in (CONTENT_BEGIN_MARK, CONTENT_END_MARK)]
        return content_marks in ([], [CONTENT_BEGIN_MARK, CONTENT_END_MARK])

    def previous_turn_end(self) -> int | None:
        """Where the turn before this one ends; None if that was not marked."""
        return next((edge for edge in reversed(self.positions_of(TURN_EDGE_MARK)) if edge <= self.begin), None)

    def next_turn_begin(self) -> int | None:
        """Where the next turn begins; None if that was not marked."""
        return next((edge for edge in self.positions_of(TURN_EDGE_MARK) if edge > self.end), None)


class MarkedCallParts(Enum):
    """Which parts of a tool call are put between marks. Templates may look up keys, so that fewer and fewer marks are tried."""

    names_texts_keys = auto()
    """Its name, and the texts and keys of its arguments; with | for a mark: |search|, {|query|: |weather|}."""
    names_texts = auto()
    """|search|, {query: |weather|}."""
    names = auto()
    """|search|, {query: weather}."""


def mark_neighbours(messages: list[Message], index: int) -> list[Message]:
    """Mark the edges of the turns beside turn `index`: the end of the turn before, and the beginning of the one after it.

    Where `TURN_EDGE_MARK` comes out in the rendered text, the template's text between the turns begins and ends. A neighbour
    without a content is not marked, nor a turn before with calls, whose end is behind its content.
    """
    marked_messages = list(messages)
    if index > 0:
        previous_turn = messages[index - 1]
        if (previous_turn["content"] or "").strip() and "tool_calls" not in previous_turn:
            marked_messages[index - 1] = {**previous_turn, "content": mark_end(previous_turn["content"])}
    if index + 1 < len(messages):
        next_turn = messages[index + 1]
        if (next_turn["content"] or "").strip():
            marked_messages[index + 1] = {**next_turn, "content": _mark_begin(next_turn["content"])}
    return marked_messages


def mark_turn(message: Message, mark_content: Marker, call_parts: MarkedCallParts) -> Message:
    """Put marks into a turn: in its content (by `mark_content`), around its thought, and around parts of its tool calls.

    Marks are private-use characters. Where they come out in the rendered text, these parts begin and end.
    """
    turn = {**message}
    if (turn["content"] or "").strip():
        turn["content"] = mark_content(turn["content"])
    if "reasoning_content" in turn:
        marked_thought = mark_trimmed(turn["reasoning_content"])
        turn["reasoning_content"] = marked_thought.translate(
            {ord(CONTENT_BEGIN_MARK): THOUGHT_MARK, ord(CONTENT_END_MARK): THOUGHT_MARK}
        )
    if "tool_calls" in turn:
        turn["tool_calls"] = [_mark_call(call, call_parts) for call in turn["tool_calls"]]
    return turn


def _mark_call(call: dict[str, Any], call_parts: MarkedCallParts) -> dict[str, Any]:
    """Put marks around the name of a tool call, and around the texts and keys of its arguments, as `call_parts` says."""
    function = {**call["function"], "name": _enclose_in_call_marks(call["function"]["name"])}
    if call_parts is MarkedCallParts.names_texts_keys:
        function["arguments"] = map_argument_texts(
            function["arguments"], _enclose_in_call_marks, _enclose_in_call_marks
        )
    elif call_parts is MarkedCallParts.names_texts:
        function["arguments"] = map_argument_texts(function["arguments"], _enclose_in_call_marks)
    return {**call, "function": function}


def _enclose_in_call_marks(text: str) -> str:
    """A text between two marks of calls."""
    return f"{CALL_MARK}{text}{CALL_MARK}"


def mark_end(content: str) -> str:
    """A message's content with `TURN_EDGE_MARK` at its end, before outer whitespace, which a template may trim."""
    trimmed = content.rstrip()
    return trimmed + TURN_EDGE_MARK + content[len(trimmed) :]


def _mark_begin(content: str) -> str:
    """A message's content with `TURN_EDGE_MARK` at its beginning, behind outer whitespace, which a template may trim."""
    trimmed = content.lstrip()
    return content[: len(content) - len(trimmed)] + TURN_EDGE_MARK + trimmed
