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
from typing import Any

from trainer.data.config import Reasoning
from trainer.data.document import THINK_BLOCK_REGEX, Message, RefusedDocument, map_argument_texts, thought_of
from trainer.data.tokens import marking
from trainer.data.tokens.marking import BEGIN, END, RESERVED, THOUGHT, Apply
from trainer.data.tokens.tool_call_dialect import CALL, EDGE, ToolCallDialect, probe_dialect, to_dialect

_MARKS = re.compile(f"([{RESERVED}])")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT_OPENED_AT_END = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED = re.compile(r"\s*</think>\s*")


def template_refusal(location: str, message: str) -> RefusedDocument:
    """The error of a conversation, at `location` (`file:line`), that its template cannot render."""
    return RefusedDocument(location, "refused_by_template", message)


@dataclass(frozen=True, slots=True)
class _TurnMarks:
    """Character positions of one turn's marks in the text without marks, in order."""

    marks: list[tuple[str, int]]
    """(kind, position); kinds are BEGIN and END of the content, THOUGHT, CALL, and EDGE of the turns before and after."""

    def of(self, *kinds: str) -> list[int]:
        """Positions of the marks of these kinds."""
        return [position for kind, position in self.marks if kind in kinds]

    @property
    def content(self) -> list[int]:
        """Begin and end of the message's content; empty if the template did not write it."""
        return self.of(BEGIN, END)

    @property
    def thoughts(self) -> list[int]:
        """Begin and end of the message's thought; empty if the template did not write it."""
        return self.of(THOUGHT)

    @property
    def content_and_calls(self) -> list[int]:
        """Begins and ends of the content, and of the names, arguments and keys of calls."""
        return self.of(BEGIN, END, CALL)

    @property
    def begin(self) -> int:
        """Where the turn's first thought, content or call begins."""
        return min([*self.thoughts, *self.content_and_calls])

    @property
    def end(self) -> int:
        """Where the turn's content or last call ends."""
        return self.content_and_calls[-1]

    @property
    def content_is_one_span(self) -> bool:
        """Whether the template wrote the message's content once, in one piece, or not at all."""
        return [kind for kind, _ in self.marks if kind in (BEGIN, END)] in ([], [BEGIN, END])

    def edge_before(self) -> int | None:
        """Where the turn before this one ends; None if that was not marked."""
        return next((edge for edge in reversed(self.of(EDGE)) if edge <= self.begin), None)

    def edge_after(self) -> int | None:
        """Where the next turn begins; None if that was not marked."""
        return next((edge for edge in self.of(EDGE) if edge > self.end), None)


@dataclass(slots=True)
class Chat:
    """A conversation as its template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    location: str
    """`file:line` of the row."""
    apply: Callable[..., str]
    """Renders messages with the conversation's tools."""


class TurnSpanFinder:
    """Finds the character spans of learned turns one by one, in conversations with tools, calls or thoughts.

    `apply` renders messages. `added_tokens`: the tokenizer's added tokens. `end_tokens_by_role`: those that close a turn.
    """

    def __init__(
        self, apply: Apply, reasoning: Reasoning, added_tokens: list[str], end_tokens_by_role: dict[str, set[str]]
    ) -> None:
        self._apply = apply
        self._reasoning = reasoning
        self._added_tokens = added_tokens
        self._end_tokens_by_role = end_tokens_by_role
        self._dialect: ToolCallDialect | None = None
        """Found out with the first conversation that has calls."""

    def prepare_chat(self, messages: list[Message], tools: list[dict[str, Any]] | None, location: str) -> Chat:
        """The conversation in the template's dialect; calls without an id get one, and results answer them in order."""
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            if self._dialect is None:
                self._dialect = probe_dialect(self._apply, self._added_tokens)
            messages = list(to_dialect(messages, self._dialect))
        return Chat(messages, tools, location, partial(self._apply, tools=tools))

    def render_checked(self, chat: Chat) -> str:
        """A conversation with tools as its template writes it. Raises RefusedDocument if it leaves tools, calls or results out.

        A template may drop them without an error. To find out, it renders a second time, with a label of private-use characters
        behind each call's name and each result: all labels must come out.
        """
        text = chat.apply(chat.messages)
        if chat.tools and not self._writes_tools(chat, text):
            raise template_refusal(
                chat.location,
                "this chat template ignores the column tools; set model.chat_template to one that writes it, or drop "
                "the column with data.ignore_columns=[tools]",
            )
        # A label of its own behind the name of every call and behind every result: the template must print them all.
        call_labels: list[str] = []
        result_labels: list[str] = []
        labelled_messages: list[Message] = []
        for message in chat.messages:
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
        if not (call_labels or result_labels):
            return text

        labelled_text = chat.apply(labelled_messages)
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

    def _writes_tools(self, chat: Chat, text: str) -> bool:
        """Whether the template renders the conversation differently without its tools."""
        try:
            return text != self._apply(chat.messages)
        except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
            return True

    def find_spans(self, chat: Chat, learned: list[int], text: str, eos: str) -> tuple[str, list[tuple[int, int]]]:
        """Find the supervised characters of a conversation that is rendered as `text`: (text, [begin, end) of each turn in it).

        `learned`: indices of the supervised turns. A span reaches over content and calls to the token that closes the turn. `eos`
        is appended to the text if the template does not close the last turn.
        """
        spans: list[tuple[int, int]] = []
        for index in learned:
            is_final = index == learned[-1]
            has_calls = "tool_calls" in chat.messages[index]
            begin, end, limit = self._locate_turn(chat, index, text, is_final=is_final)
            end_token = self._match_end_token(text, end, limit, chat.messages[index], is_final=is_final)
            if end_token:
                end = end_token.end()
            elif is_final:
                text = text[:end] + text[end:].rstrip() + eos
                end = len(text)
            elif has_calls:
                raise template_refusal(
                    chat.location, f"cannot tell where the call of turn {index + 1} ends in the chat template"
                )
            spans.append((begin, end))
        return text, spans

    def _match_end_token(
        self, text: str, position: int, limit: int, message: Message, *, is_final: bool
    ) -> re.Match[str] | None:
        """The token that closes a turn whose content or last call ends at `position`; None if there is none before `limit`.

        After a content it must follow at once, after a call anywhere before `limit`, where the next turn begins. The last turn
        may be closed by any control token of the tokenizer.
        """
        has_calls = "tool_calls" in message
        if is_final and not has_calls:
            end_tokens = set(self._added_tokens)
        else:
            end_tokens = self._end_tokens_by_role[message["role"]]
        if has_calls and self._dialect:
            end_tokens = end_tokens | self._dialect.end_tokens
        longest_first = sorted(end_tokens, key=len)[::-1]
        alternatives = f"({'|'.join(map(re.escape, longest_first))})"
        if has_calls:  # the template's own syntax may stand between the last argument and the token
            return re.compile(alternatives).search(text, position, limit)
        return re.compile(r"\s*" + alternatives).match(text, position, limit)

    def _locate_turn(self, chat: Chat, index: int, text: str, *, is_final: bool) -> tuple[int, int, int]:
        """Find a supervised turn in `text`, in characters: (where supervision begins, where its content or last call ends, where
        the next turn begins, before which its closing token must come).

        It is rendered with marks around its parts, in several ways until one leaves the rest of the text as it is. Errors:
        RefusedDocument if no way of marking leaves the text unchanged, or if the template leaves something out.
        """
        message = chat.messages[index]
        for mark_content, call_level in self._marking_attempts(message):
            marks = self._find_marks(chat, index, text, mark_content, call_level)
            if marks is None or not marks.content_is_one_span:
                continue  # with these marks the template writes something else: try the next way
            content_beside_thought = THINK_BLOCK_REGEX.sub("", message["content"] or "", count=1)
            if content_beside_thought.strip() and not marks.content:
                raise template_refusal(
                    chat.location,
                    f"the chat template leaves out what turn {index + 1} says beside its calls; "
                    "remove it from the data or give another template in model.chat_template",
                )
            if not marks.content_and_calls:
                continue
            if is_final and not marks.thoughts:
                self.check_thought(chat, index, text)
            next_turn_begin = marks.edge_after()
            limit = len(text) if next_turn_begin is None else next_turn_begin
            return self._learning_begin(chat, index, text, marks), marks.end, limit
        raise template_refusal(
            chat.location,
            f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what is to be "
            "learned cannot be told; give a template with {% generation %} blocks in model.chat_template",
        )

    @staticmethod
    def _marking_attempts(message: Message) -> Iterator[tuple[Callable[[str], str], int]]:
        """Ways to put marks into a message: (function that marks its content, `_mark_call` level for its tool calls).

        From the most exact way to the most cautious: templates look into contents and calls, and marks may disturb that.
        """
        call_levels = range(3 if "tool_calls" in message else 1)
        for mark_content in (
            marking.mark_whole,
            marking.mark_trimmed,
            marking.mark_thought_alone,
            marking.mark_thought,
        ):
            for call_level in call_levels:
                yield mark_content, call_level

    def _learning_begin(self, chat: Chat, index: int, text: str, marks: _TurnMarks) -> int:
        """Where in `text` supervision of a turn begins; `marks`: where its content, thoughts and calls stand.

        If thoughts are shown and not learned (`Reasoning.context`):
        - a thought and a content: at the content;
        - a thought and calls: behind the thought;
        - a content: behind the thought within it, if it has one.
        Otherwise, and for calls alone:
        - a content without a thought: at the content;
        - a thought: where generation would begin, behind the header of the turn;
        - calls alone: there too, or behind the empty thought that the template writes there.
        """
        content = marks.content
        thoughts = marks.thoughts
        content_or_call_begin = marks.content_and_calls[0]
        if self._reasoning is Reasoning.context:  # thoughts are shown, not learned
            if thoughts and content:
                return content[0]
            if thoughts:
                return thought_end(chat, index, text, thoughts[0], content_or_call_begin)
            if content:
                return thought_end(chat, index, text, content[0], content[-1])
        if content and not thoughts:
            return content[0]
        begin = self._header_end(chat, index, text, marks)
        if thoughts:
            return begin
        # Some templates write an empty thought before a turn that has none. It is not learned.
        empty_thought = _EMPTY_THOUGHT.match(text, begin, content_or_call_begin)
        return empty_thought.end() if empty_thought else begin

    def _header_end(self, chat: Chat, index: int, text: str, marks: _TurnMarks) -> int:
        """Where in `text` generation of a turn would begin: behind its header, such as `<|im_start|>assistant\\n`.

        The header is what the template writes at the end of a prompt, which is made of the turns before. Raises RefusedDocument
        if the text has no such header before the turn.
        """
        previous_end = marks.edge_before()
        if previous_end is not None:
            # First way: look for the header right behind the turn before, whose end is marked in the prompt.
            # What the prompt has behind the turn before is the header, whatever the template does to earlier turns.
            earlier = chat.messages[:index]
            earlier[-1] = {**earlier[-1], "content": _mark_end(earlier[-1]["content"])}
            prompt = chat.apply(earlier, prompt=True)
            if EDGE in prompt:
                after_edge = prompt[prompt.rindex(EDGE) + 1 :]
                for header in _with_and_without_thought(after_edge):
                    if text.startswith(header, previous_end) and previous_end + len(header) <= marks.begin:
                        return previous_end + len(header)
        # Second way: the whole prompt stands at the beginning of the text.
        prompt = chat.apply(chat.messages[:index], prompt=True)
        for header in _with_and_without_thought(prompt):
            if text.startswith(header) and len(header) <= marks.begin:
                return len(header)
        raise template_refusal(
            chat.location, f"cannot tell where assistant turn {index + 1} begins in the chat template"
        )

    def _find_marks(
        self, chat: Chat, index: int, text: str, mark_content: Callable[[str], str], call_level: int
    ) -> _TurnMarks | None:
        """Render the conversation with marks in turn `index`, and EDGE at the end of the turn before and the start of the next.

        Returns the positions of the marks in `text`, the rendering without marks; None if the marks change the text.
        `mark_content`: puts BEGIN and END around the turn's content. `call_level`: see `_mark_call`.
        """
        # The turn itself: marks around its content, its thought, and the parts of its calls.
        messages = list(chat.messages)
        turn = {**messages[index]}
        if (turn["content"] or "").strip():
            turn["content"] = mark_content(turn["content"])
        if "reasoning_content" in turn:
            marked_thought = marking.mark_trimmed(turn["reasoning_content"])
            turn["reasoning_content"] = marked_thought.translate({ord(BEGIN): THOUGHT, ord(END): THOUGHT})
        if "tool_calls" in turn:
            turn["tool_calls"] = [_mark_call(call, call_level) for call in turn["tool_calls"]]
        messages[index] = turn

        # Its neighbours: one mark where the turn before ends, one where the next begins.
        if index > 0:
            previous = messages[index - 1]
            if (previous["content"] or "").strip() and "tool_calls" not in previous:
                messages[index - 1] = {**previous, "content": _mark_end(previous["content"])}
        if index + 1 < len(messages):
            following = messages[index + 1]
            content = following["content"] or ""
            trimmed = content.lstrip()
            if trimmed:  # the mark stands behind outer whitespace, which a template may trim
                whitespace = content[: len(content) - len(trimmed)]
                messages[index + 1] = {**following, "content": whitespace + EDGE + trimmed}

        # Read the positions off the rendering. Text and marks alternate: pieces[0::2] is text, pieces[1::2] are marks.
        pieces = _MARKS.split(chat.apply(messages))
        if "".join(pieces[::2]) != text:
            return None
        marks: list[tuple[str, int]] = []
        position = 0
        call_marks_left = json.dumps(turn.get("tool_calls"), ensure_ascii=False).count(CALL)
        for piece, kind in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            if kind == CALL:
                call_marks_left -= 1
                # A template may write the name of a call again in the header of its result.
                if call_marks_left < 0:
                    continue
            marks.append((kind, position))
        return _TurnMarks(marks)

    def check_thought(self, chat: Chat, index: int, text: str) -> None:
        """Raise RefusedDocument if the template threw away the thought of turn `index`, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise template_refusal(
                chat.location,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_end(chat: Chat, index: int, text: str, begin: int, end: int) -> int:
    """Where the thought of turn `index` ends in text[begin:end], its `</think>` included; `begin` if there is no thought."""
    thought = (thought_of(chat.messages[index]) or "").strip()
    if not thought:
        return begin
    thought_begin = text.find(thought, begin, end)
    if thought_begin < 0:
        return begin
    without_closing = thought_begin + len(thought)
    closing = _THOUGHT_CLOSED.match(text, without_closing, end)
    return closing.end() if closing else without_closing


def _with_and_without_thought(header: str) -> tuple[str, str]:
    """A turn's header, and the same without a `<think>` at its end: a prompt may open a thought that the text does not have."""
    return header, _THOUGHT_OPENED_AT_END.sub("", header)


def _mark_call(call: dict[str, Any], level: int) -> dict[str, Any]:
    """A tool call with CALL marks around parts of it. `level`, the fewer marks the higher it is:

    - 0: around its name, and the texts and keys of its arguments: |search|, {|query|: |weather|};
    - 1: around its name and the texts of its arguments: |search|, {query: |weather|};
    - 2: around its name alone: |search|, {query: weather}.

    Templates may look up keys, so that fewer and fewer marks are tried.
    """
    function = {**call["function"], "name": _enclose(call["function"]["name"])}
    if level == 0:
        function["arguments"] = map_argument_texts(function["arguments"], _enclose, _enclose)
    elif level == 1:
        function["arguments"] = map_argument_texts(function["arguments"], _enclose)
    return {**call, "function": function}


def _enclose(text: str) -> str:
    """A text between two CALL marks."""
    return f"{CALL}{text}{CALL}"


def _mark_end(content: str) -> str:
    """A message's content with EDGE at its end, before outer whitespace, which a template may trim."""
    trimmed = content.rstrip()
    return trimmed + EDGE + content[len(trimmed) :]
