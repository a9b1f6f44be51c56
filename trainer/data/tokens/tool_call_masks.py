"""Label masks of conversations with tool calls, their results, and thoughts: each learned turn is marked by itself.

Templates write calls in a syntax of their own around names and arguments, and thoughts wherever they like. So a learned turn
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
from trainer.data.document import THINK_BLOCK_REGEX, Message, RefusedDocument, map_argument_texts, thought_of
from trainer.data.tokens import marking
from trainer.data.tokens.marking import BEGIN, END, RESERVED, THOUGHT, Render
from trainer.data.tokens.tool_call_dialect import CALL, EDGE, ToolCallDialect, convert_to_dialect, probe_dialect

_MARK_REGEX = re.compile(f"([{RESERVED}])")
_EMPTY_THOUGHT_REGEX = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT_OPENED_AT_END_REGEX = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED_REGEX = re.compile(r"\s*</think>\s*")


def template_refusal(location: str, message: str) -> RefusedDocument:
    """The error of a conversation, at `location` (`file:line`), that its template cannot render."""
    return RefusedDocument(location, "refused_by_template", message)


@dataclass(frozen=True, slots=True)
class _TurnMarks:
    """Character positions of one turn's marks in the text without marks, in order."""

    marks_and_positions: list[tuple[str, int]]
    """(mark, position); marks are BEGIN and END of the content, THOUGHT, CALL, and EDGE of the turns before and after."""

    def positions_of(self, *marks: str) -> list[int]:
        """Positions of these marks, ascending."""
        return [position for mark, position in self.marks_and_positions if mark in marks]

    @property
    def content_edges(self) -> list[int]:
        """[begin, end] of the message's content; empty if the template did not write it."""
        return self.positions_of(BEGIN, END)

    @property
    def thought_edges(self) -> list[int]:
        """[begin, end] of the message's thought; empty if the template did not write it."""
        return self.positions_of(THOUGHT)

    @property
    def content_and_call_edges(self) -> list[int]:
        """Begins and ends of the content, and of the names, arguments and keys of calls, ascending."""
        return self.positions_of(BEGIN, END, CALL)

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
        """Whether the template wrote the message's content once, in one piece, or not at all."""
        content_marks = [mark for mark, _ in self.marks_and_positions if mark in (BEGIN, END)]
        return content_marks in ([], [BEGIN, END])

    def previous_turn_end(self) -> int | None:
        """Where the turn before this one ends; None if that was not marked."""
        return next((edge for edge in reversed(self.positions_of(EDGE)) if edge <= self.begin), None)

    def next_turn_begin(self) -> int | None:
        """Where the next turn begins; None if that was not marked."""
        return next((edge for edge in self.positions_of(EDGE) if edge > self.end), None)


class _TurnPosition(NamedTuple):
    """Where a supervised turn stands in a rendered conversation, in characters."""

    learning_begin: int
    """Where supervision begins."""
    end: int
    """Where its content or last call ends."""
    next_turn_begin: int
    """Before this, the token that closes the turn must come; the end of the text after the last turn."""


@dataclass(slots=True)
class TemplateConversation:
    """A conversation as its template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    location: str
    """`file:line` of the row."""
    render: Callable[..., str]
    """Renders messages with the conversation's tools."""


class TurnSpanFinder:
    """Finds the character spans of learned turns one by one, in conversations with tools, calls or thoughts.

    `render` renders messages. `added_tokens`: the tokenizer's added tokens. `end_tokens_by_role`: those that close a turn.
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

    def prepare_chat(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, location: str
    ) -> TemplateConversation:
        """The conversation in the template's dialect of tool calls, with an id for each call and each result.

        Finds the dialect out with the first conversation that has calls or results.
        """
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            if self._dialect is None:
                self._dialect = probe_dialect(self._render, self._added_tokens)
            messages = list(convert_to_dialect(messages, self._dialect))
        return TemplateConversation(messages, tools, location, render=partial(self._render, tools=tools))

    def render_checked(self, chat: TemplateConversation) -> str:
        """A conversation with tools as its template writes it. Raises RefusedDocument if it leaves tools, calls or results out.

        A template may drop them without an error. To find out, it renders a second time, with a label of private-use characters
        behind each call's name and each result: all labels must come out.
        """
        text = chat.render(chat.messages)
        if chat.tools and not self._writes_tools(chat, text):
            raise template_refusal(
                chat.location,
                "this chat template ignores the column tools; set model.chat_template to one that writes it, or drop "
                "the column with data.ignore_columns=[tools]",
            )
        labelled_messages, call_labels, result_labels = _label_calls_and_results(chat.messages)
        if not (call_labels or result_labels):
            return text
        labelled_text = chat.render(labelled_messages)
        if any(label not in labelled_text for label in call_labels):
            raise template_refusal(
                chat.location,
                "this chat template cannot write tool calls; set model.chat_template to one that can, or, if calls are a key, "
                "drop them with data.ignore_columns=[tool_calls]",
            )
        if any(label not in labelled_text for label in result_labels):
            raise template_refusal(
                chat.location,
                "the chat template leaves out the results of tools (role tool); give another in model.chat_template",
            )
        return text

    def _writes_tools(self, chat: TemplateConversation, text: str) -> bool:
        """Whether the template renders the conversation differently without its tools."""
        try:
            return text != self._render(chat.messages)
        except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
            return True

    def find_spans(
        self, chat: TemplateConversation, learned_indices: list[int], text: str, eos: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """Find the supervised characters of a conversation that is rendered as `text`: (closed text, [begin, end) of each turn).

        `learned_indices`: indices of the supervised turns. A span reaches over content and calls to the token that closes the
        turn. If the template does not close the last turn, `eos` is appended to the text. Raises RefusedDocument if a turn, or
        the end of its calls, cannot be found.
        """
        spans: list[tuple[int, int]] = []
        for index in learned_indices:
            message = chat.messages[index]
            is_final = index == learned_indices[-1]
            turn = self._locate_turn(chat, index, text, is_final=is_final)
            end = turn.end
            end_token = self._match_end_token(text, end, turn.next_turn_begin, message, is_final=is_final)
            if end_token:
                end = end_token.end()
            elif is_final:
                text = text[:end] + text[end:].rstrip() + eos
                end = len(text)
            elif "tool_calls" in message:
                raise template_refusal(
                    chat.location, f"cannot tell where the call of turn {index + 1} ends in the chat template"
                )
            spans.append((turn.learning_begin, end))
        return text, spans

    def _match_end_token(
        self, text: str, position: int, limit: int, message: Message, *, is_final: bool
    ) -> re.Match[str] | None:
        """The token that closes a turn whose content or last call ends at `position`; None if there is none before `limit`.

        After a content it must follow at once, after a call anywhere before `limit`, because the template's own syntax may stand
        between the last argument and the token. The last turn of a conversation, if it has no calls, may be closed by any control
        token of the tokenizer.
        """
        has_calls = "tool_calls" in message
        if is_final and not has_calls:
            end_tokens = set(self._added_tokens)
        else:
            end_tokens = self._end_tokens_by_role[message["role"]]
        if has_calls and self._dialect:
            end_tokens = end_tokens | self._dialect.end_tokens
        longest_first = sorted(end_tokens, key=len)[::-1]  # so that the pattern prefers them
        any_end_token = f"({'|'.join(map(re.escape, longest_first))})"
        if has_calls:
            return re.compile(any_end_token).search(text, position, limit)
        return re.compile(r"\s*" + any_end_token).match(text, position, limit)

    def _locate_turn(self, chat: TemplateConversation, index: int, text: str, *, is_final: bool) -> _TurnPosition:
        """Find a supervised turn in `text`, by rendering it with marks in several ways until one leaves the text as it is.

        Raises RefusedDocument if every way of marking changes the text, or if the template leaves a content out, or the
        thought of the last turn.
        """
        message = chat.messages[index]
        for mark_content, call_level in self._marking_attempts(message):
            marks = self._find_marks(chat, index, text, mark_content, call_level)
            if marks is None or not marks.content_is_one_span:
                continue  # with these marks the template writes something else: try the next way
            content_beside_thought = THINK_BLOCK_REGEX.sub("", message["content"] or "", count=1)
            if content_beside_thought.strip() and not marks.content_edges:
                raise template_refusal(
                    chat.location,
                    f"the chat template leaves out what turn {index + 1} says beside its calls; "
                    "remove it from the data or give another template in model.chat_template",
                )
            if not marks.content_and_call_edges:
                continue
            if is_final and not marks.thought_edges:
                self.check_thought_not_lost(chat, index, text)
            next_turn_begin = marks.next_turn_begin()
            return _TurnPosition(
                learning_begin=self._learning_begin(chat, index, text, marks),
                end=marks.end,
                next_turn_begin=len(text) if next_turn_begin is None else next_turn_begin,
            )
        raise template_refusal(
            chat.location,
            f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what is to be "
            "learned cannot be told; give a template with {% generation %} blocks in model.chat_template",
        )

    @staticmethod
    def _marking_attempts(message: Message) -> Iterator[tuple[marking.Marker, int]]:
        """Ways to put marks into a message: (function that marks its content, `_mark_call` level for its tool calls).

        From the most exact way to the most cautious: templates look into contents and calls, and marks may disturb that.
        """
        num_call_levels = 3 if "tool_calls" in message else 1
        for mark_content in (
            marking.mark_whole,
            marking.mark_trimmed,
            marking.mark_thought_alone,
            marking.mark_thought,
        ):
            for call_level in range(num_call_levels):
                yield mark_content, call_level

    def _learning_begin(self, chat: TemplateConversation, index: int, text: str, marks: _TurnMarks) -> int:
        """Where in `text` supervision of a turn begins. `marks`: where its content, thought and calls stand.

        If thoughts are shown and not learned (`Reasoning.context`):
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
            if thought_edges:
                return thought_end(chat, index, text, thought_edges[0], content_or_call_begin)
            if content_edges:
                return thought_end(chat, index, text, content_edges[0], content_edges[-1])
        if content_edges and not thought_edges:
            return content_edges[0]
        header_end = self._header_end(chat, index, text, marks)
        if thought_edges:
            return header_end
        empty_thought = _EMPTY_THOUGHT_REGEX.match(text, header_end, content_or_call_begin)
        return empty_thought.end() if empty_thought else header_end

    def _header_end(self, chat: TemplateConversation, index: int, text: str, marks: _TurnMarks) -> int:
        """Where in `text` generation of a turn would begin: behind its header, such as `<|im_start|>assistant\\n`.

        The header is what the template writes at the end of a prompt, which is made of the turns before. It is looked for
        - behind the turn before, if its end is marked: this holds whatever the template does to earlier turns;
        - else behind the whole prompt, if the text begins with it.
        Raises RefusedDocument if the header is at neither place.
        """
        previous_turn_end = marks.previous_turn_end()
        if previous_turn_end is not None:
            earlier_turns = chat.messages[:index]
            earlier_turns[-1] = {**earlier_turns[-1], "content": _mark_end(earlier_turns[-1]["content"])}
            marked_prompt = chat.render(earlier_turns, prompt=True)
            if EDGE in marked_prompt:
                after_edge = marked_prompt[marked_prompt.rindex(EDGE) + 1 :]
                for header in _with_and_without_thought(after_edge):
                    header_end = previous_turn_end + len(header)
                    if text.startswith(header, previous_turn_end) and header_end <= marks.begin:
                        return header_end
        prompt = chat.render(chat.messages[:index], prompt=True)
        for text_before_turn in _with_and_without_thought(prompt):
            if text.startswith(text_before_turn) and len(text_before_turn) <= marks.begin:
                return len(text_before_turn)
        raise template_refusal(
            chat.location, f"cannot tell where assistant turn {index + 1} begins in the chat template"
        )

    def _find_marks(
        self, chat: TemplateConversation, index: int, text: str, mark_content: marking.Marker, call_level: int
    ) -> _TurnMarks | None:
        """Render the conversation with marks in turn `index`, and EDGE at the end of the turn before and the start of the next.

        Returns the positions of the marks in `text`, the rendering without marks; None if the marks change the text.
        `mark_content`: puts BEGIN and END around the turn's content. `call_level`: see `_mark_call`.
        """
        messages = list(chat.messages)
        turn = messages[index] = _mark_turn(messages[index], mark_content, call_level)
        if index > 0:
            previous_turn = messages[index - 1]
            if (previous_turn["content"] or "").strip() and "tool_calls" not in previous_turn:
                messages[index - 1] = {**previous_turn, "content": _mark_end(previous_turn["content"])}
        if index + 1 < len(messages):
            next_turn = messages[index + 1]
            if (next_turn["content"] or "").strip():
                messages[index + 1] = {**next_turn, "content": _mark_begin(next_turn["content"])}

        marked_text = chat.render(messages)
        if _MARK_REGEX.sub("", marked_text) != text:
            return None
        marks_and_positions: list[tuple[str, int]] = []
        # A template may write the name of a call again in the header of its result. Only the first marks are the turn's own.
        num_call_marks_left = json.dumps(turn.get("tool_calls"), ensure_ascii=False).count(CALL)
        for num_marks_before, match in enumerate(_MARK_REGEX.finditer(marked_text)):
            mark = match.group()
            if mark == CALL:
                num_call_marks_left -= 1
                if num_call_marks_left < 0:
                    continue
            # A mark is one character, which the text without marks does not have.
            marks_and_positions.append((mark, match.start() - num_marks_before))
        return _TurnMarks(marks_and_positions)

    def check_thought_not_lost(self, chat: TemplateConversation, index: int, text: str) -> None:
        """Raise RefusedDocument if the template threw away the thought of turn `index`, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise template_refusal(
                chat.location,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_end(chat: TemplateConversation, index: int, text: str, begin: int, end: int) -> int:
    """Where the thought of turn `index` ends in text[begin:end], its `</think>` included; `begin` if there is no thought."""
    thought = (thought_of(chat.messages[index]) or "").strip()
    if not thought:
        return begin
    thought_begin = text.find(thought, begin, end)
    if thought_begin < 0:
        return begin
    text_end = thought_begin + len(thought)
    closing_tag = _THOUGHT_CLOSED_REGEX.match(text, text_end, end)
    return closing_tag.end() if closing_tag else text_end


def _with_and_without_thought(header: str) -> tuple[str, str]:
    """A turn's header, and the same without a `<think>` at its end: a prompt may open a thought that the text does not have."""
    return header, _THOUGHT_OPENED_AT_END_REGEX.sub("", header)


def _label_calls_and_results(messages: list[Message]) -> tuple[list[Message], list[str], list[str]]:
    """(messages with labels, labels of the calls, labels of the results), to see which of them a template writes.

    A label is a number between private-use characters. It stands behind the name of each call, and behind each result that is
    not blank.
    """
    call_labels: list[str] = []
    result_labels: list[str] = []
    labelled_messages: list[Message] = []
    for message in messages:
        if message["role"] == "tool" and (message["content"] or "").strip():
            label = f"{EDGE}{len(result_labels)}{EDGE}"
            result_labels.append(label)
            message = {**message, "content": message["content"] + label}
        calls = []
        for call in message.get("tool_calls", ()):
            label = f"{CALL}{len(call_labels)}{CALL}"
            call_labels.append(label)
            function = call["function"]
            calls.append({**call, "function": {**function, "name": function["name"] + label}})
        if calls:
            message = {**message, "tool_calls": calls}
        labelled_messages.append(message)
    return labelled_messages, call_labels, result_labels


def _mark_turn(message: Message, mark_content: marking.Marker, call_level: int) -> Message:
    """A message with marks in its content (by `mark_content`), around its thought (THOUGHT) and in its tool calls (CALL)."""
    turn = {**message}
    if (turn["content"] or "").strip():
        turn["content"] = mark_content(turn["content"])
    if "reasoning_content" in turn:
        marked_thought = marking.mark_trimmed(turn["reasoning_content"])
        turn["reasoning_content"] = marked_thought.translate({ord(BEGIN): THOUGHT, ord(END): THOUGHT})
    if "tool_calls" in turn:
        turn["tool_calls"] = [_mark_call(call, call_level) for call in turn["tool_calls"]]
    return turn


def _mark_call(call: dict[str, Any], level: int) -> dict[str, Any]:
    """A tool call with CALL marks around parts of it. `level`, the fewer marks the higher it is:

    - 0: around its name, and the texts and keys of its arguments: |search|, {|query|: |weather|};
    - 1: around its name and the texts of its arguments: |search|, {query: |weather|};
    - 2: around its name alone: |search|, {query: weather}.

    Templates may look up keys, so that fewer and fewer marks are tried.
    """
    function = {**call["function"], "name": _enclose_in_marks(call["function"]["name"])}
    if level == 0:
        function["arguments"] = map_argument_texts(function["arguments"], _enclose_in_marks, _enclose_in_marks)
    elif level == 1:
        function["arguments"] = map_argument_texts(function["arguments"], _enclose_in_marks)
    return {**call, "function": function}


def _enclose_in_marks(text: str) -> str:
    """A text between two CALL marks."""
    return f"{CALL}{text}{CALL}"


def _mark_end(content: str) -> str:
    """A message's content with EDGE at its end, before outer whitespace, which a template may trim."""
    trimmed = content.rstrip()
    return trimmed + EDGE + content[len(trimmed) :]


def _mark_begin(content: str) -> str:
    """A message's content with EDGE at its beginning, behind outer whitespace, which a template may trim."""
    trimmed = content.lstrip()
    return content[: len(content) - len(trimmed)] + EDGE + trimmed
