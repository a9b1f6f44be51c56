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
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_EMPTY = re.compile(r"\s*<think>\s*</think>\s*")
_OPENED = re.compile(r"<think>\s*\Z")
_SHUT = re.compile(r"\s*</think>\s*")
_REMEDY = "give a template that does in model.chat_template, or leave it out with data.ignore_columns"


def refused(where: str, message: str) -> RefusedDocument:
    """The error of a conversation that its template cannot render."""
    return RefusedDocument(where, "refused_by_template", message)


@dataclass(slots=True)
class Dialect:
    """What a template wants."""

    as_text: bool = False
    """Arguments as a JSON text instead of an object."""
    null: bool = False
    """null for the content of a turn that only calls, instead of an empty text."""
    wraps: bool = False
    """Whether it writes `<tool_response>` around results itself."""
    ends: frozenset[str] = frozenset()
    """Tokens that close a turn with calls."""


def probed(apply: Apply, added: list[str]) -> Dialect:
    """The first way to give calls in which the template writes their name and their arguments as JSON or text."""
    name, value, result = f"{CALL}name", f"{EDGE}value", f"{EDGE}result"
    for as_text, null in ((False, False), (False, True), (True, False), (True, True)):
        given: Any = {"key": value}
        given = json.dumps(given, ensure_ascii=False) if as_text else given
        calls = [{"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": given}}]
        turn = {"role": "assistant", "content": None if null else "", "tool_calls": calls}
        messages: list[Message] = [{"role": "user", "content": "q"}, turn]
        try:
            text = apply(messages)
        except Exception:  # noqa: BLE001 - the next way may do; if none does, the conversation itself says why
            continue
        if name not in text or value not in text or f"{{'key': '{value}" in text:
            continue
        tail = text[text.rindex(value) + len(value) :]
        ends = [token for token in added if token in tail]
        end = max(ends, key=lambda token: tail.rindex(token) + len(token), default="")
        answer = {"role": "tool", "content": result, "name": "name", "tool_call_id": "abcdefghi"}
        try:
            wraps = f"<tool_response>\n{result}" in apply([*messages, answer])
        except Exception:  # noqa: BLE001 - as above
            wraps = False
        return Dialect(as_text, null, wraps, frozenset({end} - {""}))
    return Dialect()


def in_dialect(messages: list[Message], dialect: Dialect) -> Iterator[Message]:
    """The messages as the template wants them; calls without an id get one, and results answer calls in order."""
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = []
            for place, call in enumerate(message["tool_calls"]):
                inner, given = call["function"], call["function"]["arguments"]
                if dialect.as_text and not isinstance(given, str):
                    given = json.dumps(given, ensure_ascii=False)
                seed = f"{number} {place} {json.dumps(inner, ensure_ascii=False)}".encode()
                own = call.get("id") or hashlib.blake2b(seed, digest_size=8).hexdigest()[:9]
                calls.append({**call, "id": own, "function": {**inner, "arguments": given}})
            waiting = [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
            if dialect.null and not message["content"]:
                message["content"] = None
        elif message["role"] == "tool":
            answers = waiting.pop(0) if waiting else None
            if answers and "tool_call_id" not in message:
                message = {**message, "tool_call_id": answers}
            wrapped = _RESPONSE.fullmatch(message["content"]) if dialect.wraps else None
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
        """The text of a conversation. Raises RefusedDocument for tools, calls or results that the template leaves out."""
        text, marked = chat.apply(chat.messages), list[Message]()
        if chat.tools:
            try:
                told = text != self._apply(chat.messages)
            except Exception:  # noqa: BLE001 - a template that refuses calls without tools reads the tools
                told = True
            if not told:
                raise refused(chat.where, f"the chat template does not write the tools of the row; {_REMEDY}=[tools]")
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
                named = zip(message["tool_calls"], calls, strict=True)
                message = {**message, "tool_calls": [{**call, "function": function} for call, function in named]}
            marked.append(message)
        shown = chat.apply(marked) if marks[CALL] or marks[EDGE] else ""
        if any(one not in shown for one in marks[CALL]):
            said = f"the chat template leaves out calls of tools; {_REMEDY}=[tool_calls] where calls are a key"
            raise refused(chat.where, said)
        if any(one not in shown for one in marks[EDGE]):
            said = "the chat template leaves out the results of tools (role tool); give another in model.chat_template"
            raise refused(chat.where, said)
        return text

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
                raise refused(chat.where, f"cannot tell where the call of turn {index + 1} ends in the chat template")
            spans.append((begin, last))
        return text, spans

    def _turn(self, chat: Chat, index: int, text: str, *, final: bool) -> tuple[int, int, int]:
        """Where a learned turn begins and where its last own text ends; and the end of what may close it."""
        message = chat.messages[index]
        for mark in (marking.mark_whole, marking.mark_trimmed, marking.mark_thought_alone, marking.mark_thought):
            for level in range(3 if "tool_calls" in message else 1):
                found = self._marks(chat, index, text, mark, level)
                if found is None or [kind for kind, _ in found if kind in (BEGIN, END)] not in ([], [BEGIN, END]):
                    continue
                own = [at for kind, at in found if kind in (BEGIN, END, CALL)]
                content = [at for kind, at in found if kind in (BEGIN, END)]
                thoughts = [at for kind, at in found if kind == THOUGHT]
                if THINK.sub("", message["content"] or "", count=1).strip() and not content:
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
        said = f"the chat template changes the text of turn {index + 1} (more than trimming it), so that what is to be learned "
        more = "cannot be told; give a template with {% generation %} blocks in model.chat_template"
        raise refused(chat.where, said + more)

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
        raise refused(chat.where, f"cannot tell where assistant turn {index + 1} begins in the chat template")

    def _marks(
        self, chat: Chat, index: int, text: str, mark: Callable[[str], str], level: int
    ) -> list[tuple[str, int]] | None:
        """Marks of one turn with their positions in `text`; at the end of the turn before and the start of the next EDGE."""
        messages = list(chat.messages)
        own = {**messages[index]}
        if (own["content"] or "").strip():
            own["content"] = mark(own["content"])
        if "reasoning_content" in own:
            own["reasoning_content"] = marking.mark_trimmed(own["reasoning_content"]).translate(
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
        """Raise RefusedDocument where the template has thrown away the thought of a turn, the last one."""
        thought = thought_of(chat.messages[index])
        if thought and thought.strip() not in text:
            raise refused(
                chat.where,
                "the chat template throws away the thought (<think> or reasoning_content) of the last "
                "assistant turn; set data.learn.reasoning=drop or give another template in model.chat_template",
            )


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
