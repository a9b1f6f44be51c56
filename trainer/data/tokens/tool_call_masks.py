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

CALL, EDGE = RESERVED[3], RESERVED[4]
_MARKS = re.compile(f"([{RESERVED}])")
_TOOL_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_THOUGHT_OPENED_AT_END = re.compile(r"<think>\s*\Z")
_THOUGHT_CLOSED = re.compile(r"\s*</think>\s*")
_REMEDY = "give a template that does in model.chat_template, or leave it out with data.ignore_columns"


def template_refusal(where: str, message: str) -> RefusedDocument:
    """The error of a conversation that its template cannot render."""
    return RefusedDocument(where, "refused_by_template", message)


@dataclass(slots=True)
class ToolCallDialect:
    """What a template wants."""

    arguments_as_text: bool = False
    """Arguments as a JSON text instead of an object."""
    null_content: bool = False
    """null for the content of a turn that only calls, instead of an empty text."""
    wraps_results: bool = False
    """Whether it writes `<tool_response>` around results itself."""
    end_tokens: frozenset[str] = frozenset()
    """Tokens that close a turn with calls."""


def probe_dialect(apply: Apply, added: list[str]) -> ToolCallDialect:
    """The first way to give calls in which the template writes their name and their arguments as JSON or text."""
    name, argument, tool_result = f"{CALL}name", f"{EDGE}value", f"{EDGE}result"
    for arguments_as_text, null_content in ((False, False), (False, True), (True, False), (True, True)):
        arguments: Any = {"key": argument}
        arguments = json.dumps(arguments, ensure_ascii=False) if arguments_as_text else arguments
        calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}]
        turn = {"role": "assistant", "content": None if null_content else "", "tool_calls": calls}
        messages: list[Message] = [{"role": "user", "content": "q"}, turn]
        try:
            text = apply(messages)
        except Exception:  # noqa: BLE001 - the next way may do; if none does, the conversation itself says why
            continue
        if name not in text or argument not in text or f"{{'key': '{argument}" in text:
            continue
        after_arguments = text[text.rindex(argument) + len(argument) :]
        ends = [token for token in added if token in after_arguments]
        end = max(ends, key=lambda token: after_arguments.rindex(token) + len(token), default="")
        answer = {"role": "tool", "content": tool_result, "name": "name", "tool_call_id": "abcdefghi"}
        try:
            wraps_results = f"<tool_response>\n{tool_result}" in apply([*messages, answer])
        except Exception:  # noqa: BLE001 - as above
            wraps_results = False
        return ToolCallDialect(arguments_as_text, null_content, wraps_results, frozenset({end} - {""}))
    return ToolCallDialect()


def to_dialect(messages: list[Message], dialect: ToolCallDialect) -> Iterator[Message]:
    """The messages as the template wants them; calls without an id get one, and results answer calls in order."""
    waiting: list[str] = []
    for turn_index, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for call_index, call in enumerate(message["tool_calls"]):
                inner, arguments = call["function"], call["function"]["arguments"]
                if dialect.arguments_as_text and not isinstance(arguments, str):
                    arguments = json.dumps(arguments, ensure_ascii=False)
                seed = f"{turn_index} {call_index} {json.dumps(inner, ensure_ascii=False)}".encode()
                call_id = call.get("id") or hashlib.blake2b(seed, digest_size=8).hexdigest()[:9]
                calls.append({**call, "id": call_id, "function": {**inner, "arguments": arguments}})
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
            if dialect.null_content and not message["content"]:
                message["content"] = None
        elif message["role"] == "tool":
            answered_id = waiting.pop(0) if waiting else None
            if answered_id and "tool_call_id" not in message:
                message = {**message, "tool_call_id": answered_id}
            wrapped = _TOOL_RESPONSE.fullmatch(message["content"]) if dialect.wraps_results else None
            if wrapped and "<tool_response>" not in wrapped.group(1):
                message = {**message, "content": wrapped.group(1)}
        yield message


@dataclass(slots=True)
class Chat:
    """A conversation as its template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str
    apply: Callable[..., str]
    """Renders messages with the conversation's tools."""


class TurnSpanFinder:
    """Finds learned turns with one template. `added` are the tokenizer's added tokens, `ends` those that close turns, by role."""

    def __init__(self, apply: Apply, reasoning: Reasoning, added: list[str], ends: dict[str, set[str]]) -> None:
        self._apply, self._reasoning, self._added_tokens, self._end_tokens_by_role = apply, reasoning, added, ends
        self._dialect: ToolCallDialect | None = None

    def prepare_chat(self, messages: list[Message], tools: list[dict[str, Any]] | None, where: str) -> Chat:
        """The conversation in the template's dialect; calls without an id get one, and results answer them in order."""
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            dialect = self._dialect = self._dialect or probe_dialect(self._apply, self._added_tokens)
            messages = list(to_dialect(messages, dialect))
        return Chat(messages, tools, where, partial(self._apply, tools=tools))

    def render_checked(self, chat: Chat) -> str:
        """The text of a conversation. Raises RefusedDocument for tools, calls or results that the template leaves out."""
        text, marked_messages = chat.apply(chat.messages), list[Message]()
        if chat.tools:
            try:
                writes_tools = text != self._apply(chat.messages)
            except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
                writes_tools = True
            if not writes_tools:
                raise template_refusal(
                    chat.where, f"the chat template does not write the tools of the row; {_REMEDY}=[tools]"
                )
        marks: dict[str, list[str]] = {CALL: [], EDGE: []}

        def mark(text: str, kind: str) -> str:
            marks[kind].append(f"{kind}{len(marks[kind])}{kind}")
            return text + marks[kind][-1]

        for message in chat.messages:
            if message["role"] == "tool" and (message["content"] or "").strip():
                message = {**message, "content": mark(message["content"], EDGE)}
            inner = [call["function"] for call in message.get("tool_calls", ())]
            calls = [{**function, "name": mark(function["name"], CALL)} for function in inner]
            if calls:
                pairs = zip(message["tool_calls"], calls, strict=True)
                message = {**message, "tool_calls": [{**call, "function": function} for call, function in pairs]}
            marked_messages.append(message)
        marked_text = chat.apply(marked_messages) if marks[CALL] or marks[EDGE] else ""
        if any(label not in marked_text for label in marks[CALL]):
            message_text = f"the chat template leaves out calls of tools; {_REMEDY}=[tool_calls] where calls are a key"
            raise template_refusal(chat.where, message_text)
        if any(label not in marked_text for label in marks[EDGE]):
            message_text = (
                "the chat template leaves out the results of tools (role tool); give another in model.chat_template"
            )
            raise template_refusal(chat.where, message_text)
        return text

    def find_spans(self, chat: Chat, learned: list[int], text: str, eos: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, closed where the template does not close it, and the [begin, end) of each learned turn, ascending."""
        spans: list[tuple[int, int]] = []
        for index in learned:
            final = index == learned[-1]
            begin, last, bound = self._locate_turn(chat, index, text, final=final)
            called = "tool_calls" in chat.messages[index]
            ends = (
                {*self._added_tokens}
                if final and not called
                else self._end_tokens_by_role[chat.messages[index]["role"]]
            )
            ends = ends | self._dialect.end_tokens if called and self._dialect else ends
            pattern = re.compile(
                ("" if called else r"\s*") + f"({'|'.join(map(re.escape, sorted(ends, key=len)[::-1]))})"
            )
            match = pattern.search(text, last, bound) if called else pattern.match(text, last, bound)
            if match:
                last = match.end()
            elif final:
                text = text[:last] + text[last:].rstrip() + eos
                last = len(text)
            elif called:
                raise template_refusal(
                    chat.where, f"cannot tell where the call of turn {index + 1} ends in the chat template"
                )
            spans.append((begin, last))
        return text, spans

    def _locate_turn(self, chat: Chat, index: int, text: str, *, final: bool) -> tuple[int, int, int]:
        """Where a learned turn begins and where its last own text ends; and the end of what may close it."""
        message = chat.messages[index]
        for mark in (marking.mark_whole, marking.mark_trimmed, marking.mark_thought_alone, marking.mark_thought):
            for level in range(3 if "tool_calls" in message else 1):
                found = self._find_marks(chat, index, text, mark, level)
                if found is None or [kind for kind, _ in found if kind in (BEGIN, END)] not in ([], [BEGIN, END]):
                    continue
                own = [at for kind, at in found if kind in (BEGIN, END, CALL)]
                content = [at for kind, at in found if kind in (BEGIN, END)]
                thoughts = [at for kind, at in found if kind == THOUGHT]
                if THINK.sub("", message["content"] or "", count=1).strip() and not content:
                    raise template_refusal(
                        chat.where,
                        f"the chat template leaves out what turn {index + 1} says beside its calls; "
                        "remove it from the data or give another template in model.chat_template",
                    )
                if not own:
                    continue
                if final and not thoughts:
                    self.check_thought(chat, index, text)
                edges = [at for kind, at in found if kind == EDGE]
                bound = next((at for at in edges if at > own[-1]), len(text))
                before = next((at for at in reversed(edges) if at <= min([*thoughts, *own])), None)
                return self._learning_begin(chat, index, text, content, thoughts, own[0], before), own[-1], bound
        message_text = f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what is to be "
        more = "learned cannot be told; give a template with {% generation %} blocks in model.chat_template"
        raise template_refusal(chat.where, message_text + more)

    def _learning_begin(
        self, chat: Chat, index: int, text: str, content: list[int], thoughts: list[int], first: int, before: int | None
    ) -> int:
        """Where learning begins: at the content; with calls alone or a learned thought where generation would begin."""
        if self._reasoning is Reasoning.context:
            if thoughts:
                return content[0] if content else thought_end(chat, index, text, thoughts[0], first)
            if content:
                return thought_end(chat, index, text, content[0], content[-1])
        if content and not thoughts:
            return content[0]
        begin = self._header_end(chat, index, text, min([*thoughts, first]), before)
        empty = None if thoughts else _EMPTY_THOUGHT.match(text, begin, first)
        return empty.end() if empty else begin

    def _header_end(self, chat: Chat, index: int, text: str, first: int, before: int | None) -> int:
        """Where generation of a turn begins: after what the template writes behind the turn before, as in a prompt."""
        earlier = chat.messages[:index]
        if before is not None:
            earlier[-1] = {**earlier[-1], "content": _mark_end(earlier[-1]["content"])}
            prompt = chat.apply(earlier, prompt=True)
            tail = prompt[prompt.rindex(EDGE) + 1 :] if EDGE in prompt else None
            for header in () if tail is None else (tail, _THOUGHT_OPENED_AT_END.sub("", tail)):
                if text.startswith(header, before) and before + len(header) <= first:
                    return before + len(header)
        prompt = chat.apply(chat.messages[:index], prompt=True)
        for header in (
            prompt,
            _THOUGHT_OPENED_AT_END.sub("", prompt),
        ):  # a prompt may open a thought where the template writes none
            if text.startswith(header) and len(header) <= first:
                return len(header)
        raise template_refusal(chat.where, f"cannot tell where assistant turn {index + 1} begins in the chat template")

    def _find_marks(
        self, chat: Chat, index: int, text: str, mark: Callable[[str], str], level: int
    ) -> list[tuple[str, int]] | None:
        """Marks of one turn with their positions in `text`; at the end of the turn before and the start of the next EDGE."""
        messages = list(chat.messages)
        marked_turn = {**messages[index]}
        if (marked_turn["content"] or "").strip():
            marked_turn["content"] = mark(marked_turn["content"])
        if "reasoning_content" in marked_turn:
            marked_turn["reasoning_content"] = marking.mark_trimmed(marked_turn["reasoning_content"]).translate(
                {ord(BEGIN): THOUGHT, ord(END): THOUGHT}
            )
        if "tool_calls" in marked_turn:
            marked_turn["tool_calls"] = [_mark_call(call, level) for call in marked_turn["tool_calls"]]
        messages[index] = marked_turn
        if index and (messages[index - 1]["content"] or "").strip() and "tool_calls" not in messages[index - 1]:
            messages[index - 1] = {**messages[index - 1], "content": _mark_end(messages[index - 1]["content"])}
        if index + 1 < len(messages) and (next_content := messages[index + 1]["content"] or "").strip():
            core = next_content.lstrip()
            messages[index + 1] = {
                **messages[index + 1],
                "content": next_content[: len(next_content) - len(core)] + EDGE + core,
            }
        pieces = _MARKS.split(chat.apply(messages))
        if "".join(pieces[::2]) != text:
            return None
        marks, position, calls_left = [], 0, json.dumps(marked_turn.get("tool_calls"), ensure_ascii=False).count(CALL)
        for piece, kind in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            calls_left -= kind == CALL
            if (
                kind != CALL or calls_left >= 0
            ):  # a template may say the name of a call again in the header of its result
                marks.append((kind, position))
        return marks

    def check_thought(self, chat: Chat, index: int, text: str) -> None:
        """Raise RefusedDocument where the template has thrown away the thought of a turn, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise template_refusal(
                chat.where,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_end(chat: Chat, index: int, text: str, begin: int, end: int) -> int:
    """Where the thought of a turn ends in [begin, end) of the text, with what closes it; `begin` if none stands there."""
    thought = (thought_of(chat.messages[index]) or "").strip()
    at = text.find(thought, begin, end) if thought else -1
    if at < 0:
        return begin
    shut = _THOUGHT_CLOSED.match(text, at + len(thought), end)
    return shut.end() if shut else at + len(thought)


def _mark_call(call: dict[str, Any], level: int) -> dict[str, Any]:
    """Marks around the name of a call, below level 2 around the texts of its arguments, at level 0 around their keys too.

    Templates may look up keys, so that fewer and fewer marks are tried.
    """
    inner = {**call["function"], "name": _enclose(call["function"]["name"])}
    if level < 2:
        inner["arguments"] = with_texts(inner["arguments"], _enclose, *([_enclose] if level == 0 else []))
    return {**call, "function": inner}


def _enclose(text: str) -> str:
    return f"{CALL}{text}{CALL}"


def _mark_end(content: str) -> str:
    """A content with a mark at its end, before outer whitespace."""
    core = content.rstrip()
    return core + EDGE + content[len(core) :]
