"""What is learned of conversations with calls of tools, their results, and thoughts: each learned turn marked by itself.

Templates write calls in a syntax of their own around names and arguments, and thoughts where they like. A learned turn is
therefore found by marks in all that it consists of, and reaches from where generation would have begun (what the template
writes after the turn before, with the header of the turn to come) to the token that closes it. As in `marking.py`, marks
count only if the text without them is the plain one. What the template leaves out of what a row has is an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.data.config import Reasoning
from trainer.data.document import THINK, Message, RefusedDocument, thought_of, with_texts
from trainer.data.tokens import marking
from trainer.data.tokens.marking import BEGIN, END, RESERVED, THOUGHT, Apply

CALL = RESERVED[3]
"""Stands before and after the name, the arguments and the keys of a call."""
EDGE = RESERVED[4]
"""Stands where one turn ends or the next begins."""
_MARKS = re.compile(f"([{RESERVED}])")
_TOOL_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT_OPENED_AT_END = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED = re.compile(r"\s*</think>\s*")


def template_refusal(location: str, message: str) -> RefusedDocument:
    """The error of a conversation that its template cannot render."""
    return RefusedDocument(location, "refused_by_template", message)


@dataclass(slots=True)
class ToolCallDialect:
    """How a chat template wants calls of tools and their results."""

    arguments_as_text: bool = False
    """Arguments as a JSON text instead of an object."""
    null_content: bool = False
    """null for the content of a turn that only calls, instead of an empty text."""
    wraps_results: bool = False
    """Whether it writes `<tool_response>` around results itself."""
    end_tokens: frozenset[str] = frozenset()
    """Tokens that close a turn with calls."""


@dataclass(frozen=True, slots=True)
class _TurnMarks:
    """Character positions of one turn's marks in the text without marks, in order."""

    marks: list[tuple[str, int]]
    """(kind, position)"""

    def of(self, *kinds: str) -> list[int]:
        """Positions of the marks of these kinds."""
        return [position for kind, position in self.marks if kind in kinds]

    @property
    def content(self) -> list[int]:
        """Begin and end of the message's own text; empty if the template did not write it."""
        return self.of(BEGIN, END)

    @property
    def content_is_one_span(self) -> bool:
        """Whether the template wrote the message's text once, in one piece, or not at all."""
        return [kind for kind, _ in self.marks if kind in (BEGIN, END)] in ([], [BEGIN, END])


def probe_dialect(apply: Apply, added_tokens: list[str]) -> ToolCallDialect:
    """The first way to give calls in which the template writes their name and their arguments as JSON or text."""
    name = f"{CALL}name"
    argument = f"{EDGE}value"
    for arguments_as_text, null_content in ((False, False), (False, True), (True, False), (True, True)):
        arguments: Any = {"key": argument}
        if arguments_as_text:
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}]
        turn = {"role": "assistant", "content": None if null_content else "", "tool_calls": calls}
        messages: list[Message] = [{"role": "user", "content": "q"}, turn]
        try:
            text = apply(messages)
        except Exception:  # noqa: BLE001 - the next way may do; if none does, the conversation itself says why
            continue
        # Python's notation of a dictionary instead of JSON: the template printed an object it expected as text.
        if name not in text or argument not in text or f"{{'key': '{argument}" in text:
            continue
        after_arguments = text[text.rindex(argument) + len(argument) :]
        candidates = [token for token in added_tokens if token in after_arguments]
        end_token = max(candidates, key=lambda token: after_arguments.rindex(token) + len(token), default="")
        wraps_results = _wraps_tool_results(apply, messages)
        return ToolCallDialect(arguments_as_text, null_content, wraps_results, frozenset({end_token} - {""}))
    return ToolCallDialect()


def _wraps_tool_results(apply: Apply, messages: list[Message]) -> bool:
    """Whether the template writes `<tool_response>` around the answer to the call at the end of `messages`."""
    content = f"{EDGE}result"
    answer = {"role": "tool", "content": content, "name": "name", "tool_call_id": "abcdefghi"}
    try:
        return f"<tool_response>\n{content}" in apply([*messages, answer])
    except Exception:  # noqa: BLE001 - a template that refuses results says so when a conversation has one
        return False


def to_dialect(messages: list[Message], dialect: ToolCallDialect) -> Iterator[Message]:
    """The messages as the template wants them; calls without an id get one, and results answer calls in order."""
    unanswered_ids: list[str] = []
    for turn_index, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for call_index, call in enumerate(message["tool_calls"]):
                calls.append(_call_in_dialect(call, dialect, turn_index, call_index))
            unanswered_ids = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
            if dialect.null_content and not message["content"]:
                message["content"] = None
        elif message["role"] == "tool":
            answered_id = unanswered_ids.pop(0) if unanswered_ids else None
            if answered_id and "tool_call_id" not in message:
                message = {**message, "tool_call_id": answered_id}
            # The template would wrap a result once more.
            wrapped = _TOOL_RESPONSE.fullmatch(message["content"]) if dialect.wraps_results else None
            if wrapped and "<tool_response>" not in wrapped.group(1):
                message = {**message, "content": wrapped.group(1)}
        yield message


def _call_in_dialect(
    call: dict[str, Any], dialect: ToolCallDialect, turn_index: int, call_index: int
) -> dict[str, Any]:
    """A call with an id; one that is missing is made from its content and place, so that it is the same in every run."""
    function = call["function"]
    arguments = function["arguments"]
    if dialect.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    seed = f"{turn_index} {call_index} {json.dumps(function, ensure_ascii=False)}".encode()
    # Nine characters, because Mistral's templates refuse ids of another length.
    call_id = call.get("id") or hashlib.blake2b(seed, digest_size=8).hexdigest()[:9]
    return {**call, "id": call_id, "function": {**function, "arguments": arguments}}


@dataclass(slots=True)
class Chat:
    """A conversation as its template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    location: str
    apply: Callable[..., str]
    """Renders messages with the conversation's tools."""


class TurnSpanFinder:
    """Finds the spans of learned turns one by one, in conversations with tools, calls or thoughts.

    `added_tokens`: the tokenizer's added tokens. `end_tokens_by_role`: the tokens that close a turn.
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
        """The text of a conversation. Raises RefusedDocument for tools, calls or results that the template leaves out."""
        text = chat.apply(chat.messages)
        if chat.tools and not self._writes_tools(chat, text):
            raise template_refusal(
                chat.location,
                "this chat template ignores the column tools; set model.chat_template to one that writes it, or drop "
                "the column with data.ignore_columns=[tools]",
            )
        # A label of its own behind the name of every call and behind every result: the template must print them all.
        labels: dict[str, list[str]] = {CALL: [], EDGE: []}

        def add_label(text: str, kind: str) -> str:
            labels[kind].append(f"{kind}{len(labels[kind])}{kind}")
            return text + labels[kind][-1]

        labelled_messages: list[Message] = []
        for message in chat.messages:
            if message["role"] == "tool" and (message["content"] or "").strip():
                message = {**message, "content": add_label(message["content"], EDGE)}
            calls = []
            for call in message.get("tool_calls", ()):
                function = call["function"]
                calls.append({**call, "function": {**function, "name": add_label(function["name"], CALL)}})
            if calls:
                message = {**message, "tool_calls": calls}
            labelled_messages.append(message)
        if not (labels[CALL] or labels[EDGE]):
            return text
        labelled_text = chat.apply(labelled_messages)
        if any(label not in labelled_text for label in labels[CALL]):
            raise template_refusal(
                chat.location,
                "this chat template cannot write tool calls; set model.chat_template to one that can, or, if calls are a key, "
                "drop them with data.ignore_columns=[tool_calls]",
            )
        if any(label not in labelled_text for label in labels[EDGE]):
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
        """The text, closed where the template does not close it, and the [begin, end) of each learned turn, ascending."""
        spans: list[tuple[int, int]] = []
        for index in learned:
            is_final = index == learned[-1]
            has_calls = "tool_calls" in chat.messages[index]
            begin, end, bound = self._locate_turn(chat, index, text, final=is_final)
            match = self._match_end(text, end, bound, chat.messages[index], is_final=is_final)
            if match:
                end = match.end()
            elif is_final:
                text = text[:end] + text[end:].rstrip() + eos
                end = len(text)
            elif has_calls:
                raise template_refusal(
                    chat.location, f"cannot tell where the call of turn {index + 1} ends in the chat template"
                )
            spans.append((begin, end))
        return text, spans

    def _match_end(
        self, text: str, position: int, bound: int, message: Message, *, is_final: bool
    ) -> re.Match[str] | None:
        """The token that closes a turn whose own text ends at `position`, before `bound`."""
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
            return re.compile(alternatives).search(text, position, bound)
        return re.compile(r"\s*" + alternatives).match(text, position, bound)

    def _locate_turn(self, chat: Chat, index: int, text: str, *, final: bool) -> tuple[int, int, int]:
        """(begin of a learned turn, end of its own text, limit for its closing token), as positions in `text`."""
        message = chat.messages[index]
        for mark, level in self._marking_attempts(message):
            marks = self._find_marks(chat, index, text, mark, level)
            if marks is None or not marks.content_is_one_span:
                continue  # with these marks the template writes something else: try the next way
            if THINK.sub("", message["content"] or "", count=1).strip() and not marks.content:
                raise template_refusal(
                    chat.location,
                    f"the chat template leaves out what turn {index + 1} says beside its calls; "
                    "remove it from the data or give another template in model.chat_template",
                )
            own_text = marks.of(BEGIN, END, CALL)
            thoughts = marks.of(THOUGHT)
            edges = marks.of(EDGE)
            if not own_text:
                continue
            if final and not thoughts:
                self.check_thought(chat, index, text)
            turn_begin = min([*thoughts, *own_text])
            turn_end = own_text[-1]
            bound = next((edge for edge in edges if edge > turn_end), len(text))
            edge_before = next((edge for edge in reversed(edges) if edge <= turn_begin), None)
            begin = self._learning_begin(chat, index, text, marks.content, thoughts, own_text[0], edge_before)
            return begin, turn_end, bound
        raise template_refusal(
            chat.location,
            f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what is to be "
            "learned cannot be told; give a template with {% generation %} blocks in model.chat_template",
        )

    @staticmethod
    def _marking_attempts(message: Message) -> Iterator[tuple[Callable[[str], str], int]]:
        """(how to mark the content, how little of the calls to mark), from the most exact way to the most cautious."""
        levels = range(3 if "tool_calls" in message else 1)
        for mark in (marking.mark_whole, marking.mark_trimmed, marking.mark_thought_alone, marking.mark_thought):
            for level in levels:
                yield mark, level

    def _learning_begin(
        self,
        chat: Chat,
        index: int,
        text: str,
        content: list[int],
        thoughts: list[int],
        own_begin: int,
        edge_before: int | None,
    ) -> int:
        """Where learning begins: at the content; with calls alone or a learned thought where generation would begin.

        `own_begin`: where the turn's content or its first call begins. `edge_before`: where the turn before it ends.
        """
        if self._reasoning is Reasoning.context:
            if thoughts:
                return content[0] if content else thought_end(chat, index, text, thoughts[0], own_begin)
            if content:
                return thought_end(chat, index, text, content[0], content[-1])
        if content and not thoughts:
            return content[0]
        begin = self._header_end(chat, index, text, min([*thoughts, own_begin]), edge_before)
        if thoughts:
            return begin
        # Some templates write an empty thought before a turn that has none. It is not learned.
        empty_thought = _EMPTY_THOUGHT.match(text, begin, own_begin)
        return empty_thought.end() if empty_thought else begin

    def _header_end(self, chat: Chat, index: int, text: str, own_begin: int, edge_before: int | None) -> int:
        """Where generation of a turn begins: behind the header that the template also writes at the end of a prompt."""
        earlier = chat.messages[:index]
        if edge_before is not None:
            earlier[-1] = {**earlier[-1], "content": _mark_end(earlier[-1]["content"])}
            prompt = chat.apply(earlier, prompt=True)
            if EDGE in prompt:
                tail = prompt[prompt.rindex(EDGE) + 1 :]
                for header in _with_and_without_thought(tail):
                    if text.startswith(header, edge_before) and edge_before + len(header) <= own_begin:
                        return edge_before + len(header)
        prompt = chat.apply(chat.messages[:index], prompt=True)
        for header in _with_and_without_thought(prompt):
            if text.startswith(header) and len(header) <= own_begin:
                return len(header)
        raise template_refusal(
            chat.location, f"cannot tell where assistant turn {index + 1} begins in the chat template"
        )

    def _find_marks(
        self, chat: Chat, index: int, text: str, mark: Callable[[str], str], level: int
    ) -> _TurnMarks | None:
        """Render with marks in one turn, and EDGE at the end of the turn before and at the start of the next.

        None if the marks change the text. `level`: see `_mark_call`.
        """
        messages = list(chat.messages)
        turn = {**messages[index]}
        if (turn["content"] or "").strip():
            turn["content"] = mark(turn["content"])
        if "reasoning_content" in turn:
            marked_thought = marking.mark_trimmed(turn["reasoning_content"])
            turn["reasoning_content"] = marked_thought.translate({ord(BEGIN): THOUGHT, ord(END): THOUGHT})
        if "tool_calls" in turn:
            turn["tool_calls"] = [_mark_call(call, level) for call in turn["tool_calls"]]
        messages[index] = turn
        if index > 0:
            before = messages[index - 1]
            if (before["content"] or "").strip() and "tool_calls" not in before:
                messages[index - 1] = {**before, "content": _mark_end(before["content"])}
        if index + 1 < len(messages):
            after = messages[index + 1]
            content = after["content"] or ""
            core = content.lstrip()
            if core:
                messages[index + 1] = {**after, "content": content[: len(content) - len(core)] + EDGE + core}
        # Text and marks alternate: pieces[0::2] is text, pieces[1::2] are marks.
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
        """Raise RefusedDocument where the template has thrown away the thought of a turn, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise template_refusal(
                chat.location,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_end(chat: Chat, index: int, text: str, begin: int, end: int) -> int:
    """Where the thought of a turn ends in text[begin:end], its `</think>` included; `begin` if there is no thought."""
    thought = (thought_of(chat.messages[index]) or "").strip()
    if not thought:
        return begin
    at = text.find(thought, begin, end)
    if at < 0:
        return begin
    closing = _THOUGHT_CLOSED.match(text, at + len(thought), end)
    return closing.end() if closing else at + len(thought)


def _with_and_without_thought(header: str) -> tuple[str, str]:
    """A header, and the same without the `<think>` at its end: a prompt may open a thought that the text does not have."""
    return header, _THOUGHT_OPENED_AT_END.sub("", header)


def _mark_call(call: dict[str, Any], level: int) -> dict[str, Any]:
    """A call with marks around its name; below level 2 around the texts of its arguments; at level 0 around their keys.

    Templates may look up keys, so that fewer and fewer marks are tried.
    """
    function = {**call["function"], "name": _enclose(call["function"]["name"])}
    if level == 0:
        function["arguments"] = with_texts(function["arguments"], _enclose, _enclose)
    elif level == 1:
        function["arguments"] = with_texts(function["arguments"], _enclose)
    return {**call, "function": function}


def _enclose(text: str) -> str:
    """A text between two CALL marks."""
    return f"{CALL}{text}{CALL}"


def _mark_end(content: str) -> str:
    """A content with a mark at its end, before outer whitespace."""
    core = content.rstrip()
    return core + EDGE + content[len(core) :]
