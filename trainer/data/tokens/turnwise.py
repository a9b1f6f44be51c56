"""What is learned of conversations with calls of tools, their results, and thoughts: each learned turn marked by itself.

Templates write calls in a syntax of their own around names and arguments, and thoughts where they like. A learned turn is
therefore found by marks in all that it consists of, and reaches from where generation would have begun (what the template
writes after the turn before, with the header of the turn to come) to the token that closes it. As in `marking.py`, marks
count only if the text without them is the plain one. What the template leaves out of what a row has is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.data.config import Reasoning
from trainer.data.document import Message, Refused
from trainer.data.tokens.marking import BEGIN, END, THOUGHT, mark_thought, mark_thought_alone, mark_trimmed, mark_whole
from trainer.data.tokens.probing import CALL, EDGE, RESERVED, Apply, Dialect, in_dialect, probed
from trainer.data.tools import with_texts

_MARKS = re.compile(f"([{RESERVED}])")
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_OPENED = re.compile(r"<think>\s*\Z")
_SHUT = re.compile(r"\s*</think>\s*")
_REMEDY = "give a template that does in model.chat_template, or leave it out with data.ignore_columns"


def refused(where: str, message: str) -> Refused:
    """The error of a conversation that its template cannot render."""
    return Refused(where, "refused_by_template", message)


@dataclass(slots=True)
class Chat:
    """A conversation as its template gets it."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    where: str
    apply: Callable[..., str]
    """Renders messages with the conversation's tools."""


class Turnwise:
    """Finds learned turns with one template. `added` are the tokenizer's added tokens, `ends` those that close turns, by role."""

    def __init__(self, apply: Apply, reasoning: Reasoning, added: list[str], ends: dict[str, set[str]]) -> None:
        self._apply, self._reasoning, self._added, self._ends = apply, reasoning, added, ends
        self._dialect: Dialect | None = None

    def chat(self, messages: list[Message], tools: list[dict[str, Any]] | None, where: str) -> Chat:
        """The conversation in the template's dialect; calls without an id get one, and results answer them in order."""
        if any("tool_calls" in message or message["role"] == "tool" for message in messages):
            dialect = self._dialect = self._dialect or probed(self._apply, self._added)
            messages = list(in_dialect(messages, dialect))
        return Chat(messages, tools, where, partial(self._apply, tools=tools))

    def checked(self, chat: Chat) -> str:
        """The text of a conversation. Raises Refused for tools, calls or results that the template leaves out."""
        text = chat.apply(chat.messages)
        if chat.tools and self._same(text, self._apply, chat.messages):
            raise refused(
                chat.where,
                f"the chat template does not write the tools of the row; {_REMEDY}=[tools]",
            )
        marked: list[Message] = []
        calls: list[str] = []
        results: list[str] = []
        for message in chat.messages:
            if message["role"] == "tool" and (message["content"] or "").strip():
                results.append(f"{EDGE}{len(results)}{EDGE}")
                message = {**message, "content": message["content"] + results[-1]}
            for number, call in enumerate(message.get("tool_calls", ())):
                calls.append(f"{CALL}{len(calls)}{CALL}")
                named = {**call, "function": {**call["function"], "name": call["function"]["name"] + calls[-1]}}
                others = message["tool_calls"]
                message = {**message, "tool_calls": [*others[:number], named, *others[number + 1 :]]}
            marked.append(message)
        shown = chat.apply(marked) if calls or results else ""
        if any(mark not in shown for mark in calls):
            what = "leaves out calls of tools"
            raise refused(
                chat.where,
                f"the chat template {what}; {_REMEDY}=[tool_calls] where calls are a key",
            )
        if any(mark not in shown for mark in results):
            what = "leaves out the results of tools"
            raise refused(
                chat.where,
                f"the chat template {what} (role tool); give another in model.chat_template",
            )
        return text

    def _same(self, text: str, apply: Callable[..., str], messages: list[Message]) -> bool:
        try:
            return text == apply(messages)
        except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
            return False

    def spans(self, chat: Chat, learned: list[int], text: str, eos: str) -> tuple[str, list[tuple[int, int]]]:
        """The text, closed where the template does not close it, and the [begin, end) of each learned turn, ascending."""
        spans: list[tuple[int, int]] = []
        for index in learned:
            final = index == learned[-1]
            begin, last, bound = self._turn(chat, index, text, final=final)
            called = "tool_calls" in chat.messages[index]
            ends = {*self._added} if final and not called else self._ends[chat.messages[index]["role"]]
            ends = ends | self._dialect.ends if called and self._dialect else ends
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
                raise refused(
                    chat.where,
                    f"cannot tell where the call of turn {index + 1} ends in the chat template",
                )
            spans.append((begin, last))
        return text, spans

    def _turn(self, chat: Chat, index: int, text: str, *, final: bool) -> tuple[int, int, int]:
        """Where a learned turn begins and where its last own text ends; and the end of what may close it."""
        message = chat.messages[index]
        for mark in (mark_whole, mark_trimmed, mark_thought_alone, mark_thought):
            for level in range(3 if "tool_calls" in message else 1):
                found = self._marks(chat, index, text, mark, level)
                if found is None or [kind for kind, _ in found if kind in (BEGIN, END)] not in ([], [BEGIN, END]):
                    continue
                own = [at for kind, at in found if kind in (BEGIN, END, CALL)]
                content = [at for kind, at in found if kind in (BEGIN, END)]
                thoughts = [at for kind, at in found if kind == THOUGHT]
                if _THINK.sub("", message["content"] or "", count=1).strip() and not content:
                    raise refused(
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
                return self._begin(chat, index, text, content, thoughts, own[0], before), own[-1], bound
        raise refused(
            chat.where,
            f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what "
            "is to be learned cannot be told; give a template with {% generation %} blocks in model.chat_template",
        )

    def _begin(
        self, chat: Chat, index: int, text: str, content: list[int], thoughts: list[int], first: int, before: int | None
    ) -> int:
        """Where learning begins: at the content; with calls alone or a learned thought where generation would begin."""
        if self._reasoning is Reasoning.context:
            if thoughts:
                return content[0] if content else after_thought(chat, index, text, thoughts[0], first)
            if content:
                return after_thought(chat, index, text, content[0], content[-1])
        if content and not thoughts:
            return content[0]
        begin = self._header(chat, index, text, min([*thoughts, first]), before)
        empty = None if thoughts else _EMPTY.match(text, begin, first)
        return empty.end() if empty else begin

    def _header(self, chat: Chat, index: int, text: str, first: int, before: int | None) -> int:
        """Where generation of a turn begins: after what the template writes behind the turn before, as in a prompt."""
        earlier = chat.messages[:index]
        if before is not None:
            earlier[-1] = {**earlier[-1], "content": _ended(earlier[-1]["content"])}
            prompt = chat.apply(earlier, prompt=True)
            tail = prompt[prompt.rindex(EDGE) + 1 :] if EDGE in prompt else None
            for header in () if tail is None else (tail, _OPENED.sub("", tail)):
                if text.startswith(header, before) and before + len(header) <= first:
                    return before + len(header)
        prompt = chat.apply(chat.messages[:index], prompt=True)
        for header in (prompt, _OPENED.sub("", prompt)):  # a prompt may open a thought where the template writes none
            if text.startswith(header) and len(header) <= first:
                return len(header)
        raise refused(
            chat.where,
            f"cannot tell where assistant turn {index + 1} begins in the chat template",
        )

    def _marks(
        self, chat: Chat, index: int, text: str, mark: Callable[[str], str], level: int
    ) -> list[tuple[str, int]] | None:
        """Marks of one turn with their positions in `text`; at the end of the turn before and the start of the next EDGE."""
        messages = list(chat.messages)
        own = {**messages[index]}
        if (own["content"] or "").strip():
            own["content"] = mark(own["content"])
        if "reasoning_content" in own:
            own["reasoning_content"] = mark_trimmed(own["reasoning_content"]).translate(
                {ord(BEGIN): THOUGHT, ord(END): THOUGHT}
            )
        if "tool_calls" in own:
            own["tool_calls"] = [_marked(call, level) for call in own["tool_calls"]]
        messages[index] = own
        if index and (messages[index - 1]["content"] or "").strip() and "tool_calls" not in messages[index - 1]:
            messages[index - 1] = {**messages[index - 1], "content": _ended(messages[index - 1]["content"])}
        if index + 1 < len(messages) and (said := messages[index + 1]["content"] or "").strip():
            core = said.lstrip()
            messages[index + 1] = {**messages[index + 1], "content": said[: len(said) - len(core)] + EDGE + core}
        pieces = _MARKS.split(chat.apply(messages))
        if "".join(pieces[::2]) != text:
            return None
        found, position, given = [], 0, json.dumps(own.get("tool_calls"), ensure_ascii=False).count(CALL)
        for piece, kind in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            given -= kind == CALL
            if kind != CALL or given >= 0:  # a template may say the name of a call again in the header of its result
                found.append((kind, position))
        return found

    def check_thought(self, chat: Chat, index: int, text: str) -> None:
        """Raise Refused where the template has thrown away the thought of a turn, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise refused(
                chat.where,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


def thought_of(message: Message) -> str | None:
    """The thought of a turn: its own field, or <think>...</think> at the start of its content."""
    match = _THINK.match(message["content"] or "")
    return message.get("reasoning_content") or (match.group(1) if match else None)


def without_thought(message: Message, where: str) -> Message:
    """An assistant turn without its thought. Raises Refused where nothing is left."""
    if message["role"] != "assistant" or thought_of(message) is None:
        return message
    content = _THINK.sub("", message["content"], count=1) if _THINK.match(message["content"]) else message["content"]
    if not content.strip() and "tool_calls" not in message:
        raise refused(
            where,
            "an assistant turn is a thought alone, and data.learn.reasoning=drop leaves nothing",
        )
    return {**{key: value for key, value in message.items() if key != "reasoning_content"}, "content": content}


def after_thought(chat: Chat, index: int, text: str, begin: int, end: int) -> int:
    """Where the thought of a turn ends in [begin, end) of the text, with what closes it; `begin` if none stands there."""
    thought = (thought_of(chat.messages[index]) or "").strip()
    at = text.find(thought, begin, end) if thought else -1
    if at < 0:
        return begin
    shut = _SHUT.match(text, at + len(thought), end)
    return shut.end() if shut else at + len(thought)


def _marked(call: dict[str, Any], level: int) -> dict[str, Any]:
    """Marks around the name of a call, below level 2 around the texts of its arguments, at level 0 around their keys too.

    Templates may look up keys, so that fewer and fewer marks are tried.
    """
    inner = {**call["function"], "name": _around(call["function"]["name"])}
    if level < 2:
        inner["arguments"] = with_texts(inner["arguments"], _around, *([_around] if level == 0 else []))
    return {**call, "function": inner}


def _around(text: str) -> str:
    return f"{CALL}{text}{CALL}"


def _ended(content: str) -> str:
    """A content with a mark at its end, before outer whitespace."""
    core = content.rstrip()
    return core + EDGE + content[len(core) :]
