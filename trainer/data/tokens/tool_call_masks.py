"""Finds the supervised characters of conversations with tool calls, their results, and thoughts: each turn is marked by itself.

Templates write calls in a syntax of their own around names and arguments, and thoughts wherever they like. So a supervised turn
is found by marks in its content, its thought and its calls. It reaches from the point where generation would have begun (behind
the header of the turn) to the token that closes it. As in `marking.py`, marks count only if the text without them is the plain
one. It is an error if the template leaves out something that the row has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from trainer.data.config import Reasoning
from trainer.data.document import THINK_BLOCK_REGEX, Message, RefusedDocument, thought_of
from trainer.data.tokens import marking
from trainer.data.tokens.marking import RESERVED_CHARACTERS, Render
from trainer.data.tokens.skeleton import ClosedText
from trainer.data.tokens.tool_call_dialect import (
    CALL_MARK,
    TURN_EDGE_MARK,
    ToolCallDialect,
    convert_to_dialect,
    find_dialect_by_trial,
    label_calls_and_results,
)
from trainer.data.tokens.turn_marks import MarkedCallParts, TurnMarks, mark_end, mark_neighbours, mark_turn

_MARK_REGEX = re.compile(f"([{RESERVED_CHARACTERS}])")
_EMPTY_THOUGHT_REGEX = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT_OPENED_AT_END_REGEX = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED_REGEX = re.compile(r"\s*</think>\s*")


def template_refusal(location: str, message: str) -> RefusedDocument:
    """The error of a conversation, at `location` (`file:line`), that its template cannot render."""
    return RefusedDocument(location, "refused_by_template", message)


class _TurnPosition(NamedTuple):
    """Where a supervised turn stands in a rendered conversation, in characters."""

    supervision_begin: int
    """Where supervision begins."""
    end: int
    """Where its content or last call ends."""
    next_turn_begin: int
    """Before this, the token that closes the turn must come; the end of the text after the last turn."""


@dataclass(slots=True)
class TemplateConversation:
    """A conversation with tools, tool calls or thoughts, in the form in which its chat template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    location: str
    """`file:line` of the row."""
    render: Callable[..., str]
    """Renders messages with the conversation's tools."""


@dataclass(frozen=True, slots=True)
class _RenderedTurn:
    """A supervised turn of a conversation that its template has rendered."""

    conversation: TemplateConversation
    index: int
    """Of the turn in the conversation's messages."""
    text: str
    """The whole conversation as the template wrote it, without marks."""

    @property
    def message(self) -> Message:
        """The turn's message."""
        return self.conversation.messages[self.index]

    @property
    def location(self) -> str:
        """`file:line` of the row, for errors."""
        return self.conversation.location


class TurnSpanFinder:
    """Finds the character spans of supervised turns one by one, in conversations with tools, calls or thoughts.

    `render` renders messages. `reasoning`: whether thoughts are learned, only shown, or dropped (`data.learn.reasoning`).
    `added_tokens`: the tokenizer's added tokens. `end_tokens_by_role`: those that close a turn.
    """

    def __init__(
        self, render: Render, reasoning: Reasoning, added_tokens: list[str], end_tokens_by_role: dict[str, set[str]]
    ) -> None:
        self._render = render
        self._reasoning = reasoning
        self._added_tokens = added_tokens
        self._end_tokens_by_role = end_tokens_by_role
        self._dialect: ToolCallDialect | None = None
        """Found out with the first conversation that has calls."""

    def convert_conversation(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, location: str
    ) -> TemplateConversation:
        """Put a conversation into the form in which the template wants tool calls, with an id for each call and each result.

        Some templates want arguments as objects, others as JSON texts, and so on: the template's dialect. It is found out by
        trial with the first conversation that has calls or results, and kept, because it depends on the template alone.

        `location`: `file:line` of the row. `tools`: what it may call, as JSON schemas; None for none.
        """
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            if self._dialect is None:
                self._dialect = find_dialect_by_trial(self._render, self._added_tokens)
            messages = list(convert_to_dialect(messages, self._dialect))
        return TemplateConversation(messages, tools, location, render=partial(self._render, tools=tools))

    def render_and_check_complete(self, conversation: TemplateConversation) -> str:
        """Render a conversation with tools. Raises RefusedDocument if the template leaves out its tools, calls or results.

        A template may drop them without an error. To find out, it renders a second time, with a label of private-use characters
        behind each call's name and each result: all labels must come out. Results that are blank are not checked.
        """
        text = conversation.render(conversation.messages)
        if conversation.tools and not self._writes_tools(conversation, text):
            raise template_refusal(
                conversation.location,
                "this chat template ignores the column tools; set model.chat_template to one that writes it, or drop "
                "the column with data.ignore_columns=[tools]",
            )
        labelled = label_calls_and_results(conversation.messages)
        if not (labelled.call_labels or labelled.result_labels):
            return text
        labelled_text = conversation.render(labelled.messages)
        if any(label not in labelled_text for label in labelled.call_labels):
            raise template_refusal(
                conversation.location,
                "this chat template cannot write tool calls; set model.chat_template to one that can, or, if calls are a key, "
                "drop them with data.ignore_columns=[tool_calls]",
            )
        if any(label not in labelled_text for label in labelled.result_labels):
            raise template_refusal(
                conversation.location,
                "the chat template leaves out the results of tools (role tool); give another in model.chat_template",
            )
        return text

    def _writes_tools(self, conversation: TemplateConversation, text: str) -> bool:
        """Whether the template writes the tools of a conversation: without them it gives another text than `text`, or fails."""
        try:
            return text != self._render(conversation.messages)
        except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
            return True

    def find_spans(
        self, conversation: TemplateConversation, supervised_indices: list[int], text: str, eos: str
    ) -> ClosedText:
        """Find the supervised characters of a conversation that the template rendered as `text`: one span [begin, end) a turn.

        A span reaches from where the model begins to write, over thought, content and calls, to the token that closes the turn.

        `supervised_indices`: indices of the supervised turns. `eos`: the tokenizer's EOS. Returns the text with the spans; EOS is
        appended if the template does not close the last turn. Raises RefusedDocument if a turn, or the end of its calls, cannot
        be found.
        """
        spans: list[tuple[int, int]] = []
        for index in supervised_indices:
            message = conversation.messages[index]
            is_final = index == supervised_indices[-1]
            position = self._locate_turn(_RenderedTurn(conversation, index, text), is_final=is_final)
            end = position.end
            end_token = self._match_end_token(text, end, position.next_turn_begin, message, is_final=is_final)
            if end_token:
                end = end_token.end()
            elif is_final:
                text = text[:end] + text[end:].rstrip() + eos
                end = len(text)
            # A content may end without a token, and then the span does too; of calls, the syntax behind them would be lost.
            elif "tool_calls" in message:
                raise template_refusal(
                    conversation.location, f"cannot tell where the call of turn {index + 1} ends in the chat template"
                )
            spans.append((position.supervision_begin, end))
        return ClosedText(text, spans)

    def _match_end_token(
        self, text: str, position: int, limit: int, message: Message, *, is_final: bool
    ) -> re.Match[str] | None:
        """Find the token that closes a turn whose content or last call ends at `position`; None if there is none before `limit`.

        After a content it must follow at once, but for whitespace. After a call it may stand anywhere before `limit`, because the
        template's own syntax may stand between the last argument and the token.

        `is_final`: whether the turn is the last of the conversation. Then, if it has no calls, any added token of the tokenizer
        closes it.
        """
        has_calls = "tool_calls" in message
        if is_final and not has_calls:
            end_tokens = set(self._added_tokens)
        else:
            end_tokens = self._end_tokens_by_role[message["role"]]
        if has_calls and self._dialect:
            # Some templates close calls with a token of their own.
            end_tokens = end_tokens | self._dialect.end_tokens
        longest_first = sorted(end_tokens, key=len)[::-1]  # so that the pattern prefers them
        any_end_token = f"({'|'.join(map(re.escape, longest_first))})"
        if has_calls:
            return re.compile(any_end_token).search(text, position, limit)
        return re.compile(r"\s*" + any_end_token).match(text, position, limit)

    def _locate_turn(self, turn: _RenderedTurn, *, is_final: bool) -> _TurnPosition:
        """Find where a supervised turn stands in its conversation's text, by rendering that again with marks in the turn.

        `is_final`: whether it is the last supervised turn. Raises RefusedDocument if the turn cannot be found, if the template
        leaves its content out, or leaves out the thought of the last turn.
        """
        marks = self._find_marks_by_trial(turn)
        # Without marks of a thought, the turn has none, or it is within the content, or the template dropped it, as it may in
        # earlier turns.
        if is_final and not marks.thought_edges:
            self.check_thought_not_lost(turn.conversation, turn.index, turn.text)
        next_turn_begin = marks.next_turn_begin()
        return _TurnPosition(
            supervision_begin=self._supervision_begin(turn, marks),
            end=marks.end,
            next_turn_begin=len(turn.text) if next_turn_begin is None else next_turn_begin,
        )

    def _find_marks_by_trial(self, turn: _RenderedTurn) -> TurnMarks:
        """Find where the parts of a turn come out in the text: try ways of marking until one leaves the text as it is.

        With [ and ] for the marks of a content, and | for those of a call: "[It is warm.]" and "|search|(|weather|)". Raises
        RefusedDocument if every way changes the text, or if the template leaves the content out.
        """
        for mark_content, call_parts in self._marking_attempts(turn.message):
            marks = self._find_marks(turn, mark_content, call_parts)
            if marks is None or not marks.content_is_one_span:
                continue  # with these marks the template writes something else: try the next way
            content_beside_thought = THINK_BLOCK_REGEX.sub("", turn.message["content"] or "", count=1)
            if content_beside_thought.strip() and not marks.content_edges:
                raise template_refusal(
                    turn.location,
                    f"the chat template leaves out what turn {turn.index + 1} says beside its calls; "
                    "remove it from the data or give another template in model.chat_template",
                )
            if marks.content_and_call_edges:
                return marks
        raise template_refusal(
            turn.location,
            f"the chat template changes the text of turn {turn.index + 1} (more than trimming it), so that what is to be "
            "learned cannot be told; give a template with {% generation %} blocks in model.chat_template",
        )

    @staticmethod
    def _marking_attempts(message: Message) -> Iterator[tuple[marking.Marker, MarkedCallParts]]:
        """Ways to put marks into a turn: (function that marks its content, which parts of its tool calls are marked).

        From the most exact way to the most cautious. Templates look into contents and calls, for example for `</think>` or for a
        key of the arguments, and marks may disturb that.
        """
        # Without calls, the parts make no difference.
        ways_for_calls = list(MarkedCallParts) if "tool_calls" in message else [MarkedCallParts.names]
        for mark_content in (
            marking.mark_whole,
            marking.mark_trimmed,
            marking.mark_thought_alone,
            marking.mark_thought,
        ):
            for call_parts in ways_for_calls:
                yield mark_content, call_parts

    def _supervision_begin(self, turn: _RenderedTurn, marks: TurnMarks) -> int:
        """Find where supervision of a turn begins in the text: where the model would begin to write, or behind its thought.

        `marks`: where content, thought and calls of the turn begin and end. If thoughts are shown and not learned
        (`Reasoning.context`):
        - a thought and a content: at the content;
        - a thought and calls: behind the thought;
        - a content: behind the thought within it, if it has one.
        Otherwise, and for calls alone:
        - a content without a thought: at the content;
        - a thought: where generation would begin, behind the header of the turn;
        - calls alone: there too, or behind the empty thought that some templates write before a turn that has none.
        """
        content_edges = marks.content_edges
        thought_edges = marks.thought_edges
        content_or_call_begin = marks.content_and_call_edges[0]
        if self._reasoning is Reasoning.context:
            if thought_edges and content_edges:
                return content_edges[0]
            thought = thought_of(turn.message)
            if thought_edges:
                return thought_end(thought, turn.text, thought_edges[0], content_or_call_begin)
            if content_edges:
                return thought_end(thought, turn.text, content_edges[0], content_edges[-1])
        if content_edges and not thought_edges:
            return content_edges[0]
        header_end = self._header_end(turn, marks)
        if thought_edges:
            return header_end
        empty_thought = _EMPTY_THOUGHT_REGEX.match(turn.text, header_end, content_or_call_begin)
        return empty_thought.end() if empty_thought else header_end

    def _header_end(self, turn: _RenderedTurn, marks: TurnMarks) -> int:
        r"""Find where generation of a turn would begin in the text: behind its header, such as `<|im_start|>assistant\n`.

        The header is what the template writes at the end of a prompt, which is made of the turns before. It is looked for
        - behind the turn before, if its end is marked: this holds whatever the template does to earlier turns;
        - else behind the whole prompt, if the text begins with it.
        Raises RefusedDocument if the header is at neither place.
        """
        conversation = turn.conversation
        previous_turn_end = marks.previous_turn_end()
        if previous_turn_end is not None:
            earlier_turns = conversation.messages[: turn.index]
            earlier_turns[-1] = {**earlier_turns[-1], "content": mark_end(earlier_turns[-1]["content"])}
            # With # for the mark: "...<|im_start|>user\nHi#<|im_end|>\n<|im_start|>assistant\n".
            marked_prompt = conversation.render(earlier_turns, prompt=True)
            if TURN_EDGE_MARK in marked_prompt:
                after_previous_turn = marked_prompt[marked_prompt.rindex(TURN_EDGE_MARK) + 1 :]
                for header in _with_and_without_thought(after_previous_turn):
                    header_end = previous_turn_end + len(header)
                    if turn.text.startswith(header, previous_turn_end) and header_end <= marks.begin:
                        return header_end
        prompt = conversation.render(conversation.messages[: turn.index], prompt=True)
        for text_before_turn in _with_and_without_thought(prompt):
            if turn.text.startswith(text_before_turn) and len(text_before_turn) <= marks.begin:
                return len(text_before_turn)
        raise template_refusal(
            turn.location, f"cannot tell where assistant turn {turn.index + 1} begins in the chat template"
        )

    def _find_marks(
        self, turn: _RenderedTurn, mark_content: marking.Marker, call_parts: MarkedCallParts
    ) -> TurnMarks | None:
        """Render the conversation with marks in the turn, at the end of the turn before and at the start of the next.

        Returns where the marks stand in the rendering without marks; None if the marks change the text. `mark_content`:
        puts marks around the turn's content. `call_parts`: which parts of its calls get marks.
        """
        marked_message = mark_turn(turn.message, mark_content, call_parts)
        marked_messages = mark_neighbours(turn.conversation.messages, turn.index)
        marked_messages[turn.index] = marked_message
        marked_text = turn.conversation.render(marked_messages)
        if _MARK_REGEX.sub("", marked_text) != turn.text:
            return None
        marks_and_positions: list[tuple[str, int]] = []
        # A template may write the name of a call again in the header of its result. Only the first marks are the turn's own.
        num_call_marks_left = json.dumps(marked_message.get("tool_calls"), ensure_ascii=False).count(CALL_MARK)
        for num_marks_before, match in enumerate(_MARK_REGEX.finditer(marked_text)):
            mark = match.group()
            if mark == CALL_MARK:
                num_call_marks_left -= 1
                if num_call_marks_left < 0:
                    continue
            # A mark is one character, which the text without marks does not have.
            marks_and_positions.append((mark, match.start() - num_marks_before))
        return TurnMarks(marks_and_positions)

    def check_thought_not_lost(self, conversation: TemplateConversation, index: int, text: str) -> None:
        """Raise RefusedDocument if the template threw away the thought of turn `index`, the last supervised one.

        A model that is to learn thoughts would learn there to answer without one.
        """
        thought = thought_of(conversation.messages[index])
        if thought and thought.strip() not in text:
            raise template_refusal(
                conversation.location,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_end(thought: str | None, text: str, begin: int, end: int) -> int:
    """Find where a turn's thought ends in text[begin:end], behind its `</think>`; `begin` if it is not there, or blank."""
    thought = (thought or "").strip()
    if not thought:
        return begin
    thought_begin = text.find(thought, begin, end)
    if thought_begin < 0:
        return begin
    text_end = thought_begin + len(thought)
    closing_tag = _THOUGHT_CLOSED_REGEX.match(text, text_end, end)
    return closing_tag.end() if closing_tag else text_end


def _with_and_without_thought(header: str) -> tuple[str, str]:
    """The header of an assistant turn, and the same without a `<think>` at its end.

    A prompt may open a thought that the text of the turn does not have.
    """
    return header, _THOUGHT_OPENED_AT_END_REGEX.sub("", header)
