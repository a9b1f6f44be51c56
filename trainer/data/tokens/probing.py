"""What probes tell of a chat template: the text that it puts around contents, and how it wants calls of tools and their results.

The dialect of calls and results is found once a template; what is written around contents, once for every shape of conversation.
The shape is the roles, which turns are learned, and the whitespace around each content. A conversation of
placeholders of that shape goes through the exact way of `trainer/data/tokens/template.py`; what stands between the
placeholders is the skeleton. A later conversation of the shape has its spans read off the skeleton only if skeleton and
contents put together are its own rendering, character by character; anything else goes the exact way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.data.document import Message

RESERVED = "\U0010fb01\U0010fb02\U0010fb03\U0010fb04\U0010fb05"
"""Private-use characters that mark texts on their way through a template; data must not have them."""
_OPEN, _SHUT = RESERVED[3], RESERVED[4]
_MAX_SHAPES = 4096
_MAX_MISSES = 8
_LEARN_AT = 2  # learning a shape costs a few renderings, which one that comes once does not pay back

Place = Callable[[list[Message], list[int]], tuple[str, str, list[tuple[int, int]]] | None]
Shape = tuple[object, ...]


@dataclass(slots=True)
class _Skeleton:
    """Text around n contents, and spans in it."""

    literals: list[str]
    """n + 1 of them: before the first content, between the contents, after the last."""
    ending: str
    """What the last literal becomes once the last turn is closed."""
    edges: list[tuple[int, int, int, int]]
    """Per span: contents before its begin, characters of literals before it; the same for its end."""

    def fit(self, cores: list[str], text: str) -> tuple[str, list[tuple[int, int]]] | None:
        """The closed text and its spans, if `text` is the skeleton with these contents."""
        pieces = [self.literals[0]]
        before = [0]
        total = 0
        for core, literal in zip(cores, self.literals[1:], strict=True):
            pieces.append(core)
            pieces.append(literal)
            total += len(core)
            before.append(total)
        if "".join(pieces) != text:
            return None
        last = self.literals[-1]
        if self.ending != last:
            text = text[: len(text) - len(last)] + self.ending
        return text, [(before[i] + begin, before[j] + end) for i, begin, j, end in self.edges]


class Skeletons:
    """Skeletons of one template. `added` are the tokenizer's added tokens."""

    def __init__(self, added: list[str]) -> None:
        self.added = added
        self._known: dict[Shape, _Skeleton | None] = {}
        self._seen: dict[Shape, int] = {}
        self._misses: dict[Shape, int] = {}

    def match(
        self, messages: list[Message], learned: list[int], text: str, place: Place
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The closed text and the spans of a conversation rendered as `text`; None where only the exact way tells."""
        roles, cores, spaces = [], [], []
        for number, message in enumerate(messages):
            content = message["content"]
            core = content.strip()
            # empty contents may be left out by a template, thoughts moved or hidden, other fields written as well
            if not core or "</think>" in core or len(message) > 2:
                return None
            if len(core) != len(content):
                at = content.index(core)
                spaces.append((number, content[:at], content[at + len(core) :]))
            roles.append(message["role"])
            cores.append(core)
        shape = (*roles, tuple(learned), *spaces)
        if shape in self._known:
            skeleton = self._known[shape]
        else:
            skeleton = self._learn(shape, roles, learned, spaces, place)
        if skeleton is None:
            return None
        found = skeleton.fit(cores, text)
        if found is None:
            self._miss(shape)
        return found

    def _miss(self, shape: Shape) -> None:
        """The template may write the time, and a skeleton learned anew fits; or it looks into contents, and none does."""
        self._misses[shape] = self._misses.get(shape, 0) + 1
        if self._misses[shape] < _MAX_MISSES:
            del self._known[shape]
        else:
            self._known[shape] = None

    def _learn(
        self, shape: Shape, roles: list[str], learned: list[int], spaces: list[tuple[int, str, str]], place: Place
    ) -> _Skeleton | None:
        self._seen[shape] = self._seen.get(shape, 0) + 1
        if self._seen[shape] < _LEARN_AT:
            if len(self._seen) > _MAX_SHAPES:
                self._seen.clear()
            return None
        if len(self._known) >= _MAX_SHAPES:
            self._known.clear()
        around = {number: (before, after) for number, before, after in spaces}
        marks = [f"{_OPEN}{number}{_SHUT}" for number in range(len(roles))]
        messages: list[Message] = []
        for number, (role, mark) in enumerate(zip(roles, marks, strict=True)):
            before, after = around.get(number, ("", ""))
            messages.append({"role": role, "content": f"{before}{mark}{after}"})
        placed = place(messages, learned)
        skeleton = None if placed is None else self._cut(marks, *placed)
        self._known[shape] = skeleton
        return skeleton

    def _cut(self, marks: list[str], text: str, closed: str, spans: list[tuple[int, int]]) -> _Skeleton | None:
        """Take the placeholders out of a text that has each of them once, in order."""
        literals, starts, position = [], [], 0
        for mark in marks:
            at = text.find(mark, position)
            if at < 0 or text.count(mark) != 1:
                return None
            literals.append(text[position:at])
            starts.append(at)
            position = at + len(mark)
        if closed[:position] != text[:position]:
            return None
        literals.append(text[position:])
        edges = []
        for begin, end in spans:
            first, last = self._edge(marks, starts, begin), self._edge(marks, starts, end)
            if first is None or last is None or not self._alone(literals, last[0]):
                return None
            edges.append((*first, *last))
        return _Skeleton(literals, closed[position:], edges)

    def _edge(self, marks: list[str], starts: list[int], at: int) -> tuple[int, int] | None:
        """A position as (placeholders before it, characters of literals before it); None inside a placeholder."""
        count = characters = 0
        for mark, start in zip(marks, starts, strict=True):
            if at <= start:
                break
            if at < start + len(mark):
                return None
            count += 1
            characters += len(mark)
        return count, at - characters

    def _alone(self, literals: list[str], number: int) -> bool:
        """Whether the end token of a turn is told by the literal after it, whatever content follows.

        A content that begins like a token could otherwise be taken into the token that closes the turn before it.
        """
        if number == len(literals) - 1:
            return True
        rest = literals[number].lstrip()
        return not any(len(token) > len(rest) and token.startswith(rest) for token in self.added)


CALL, EDGE = RESERVED[3], RESERVED[4]
_RESPONSE = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)


class Apply(Protocol):
    """Renders messages with tools, with the header of the turn to come if `prompt`."""

    def __call__(
        self, messages: list[Message], *, prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> str: ...


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
        turn = _call(name, json.dumps(given, ensure_ascii=False) if as_text else given, "abcdefghi")
        messages = [{"role": "user", "content": "q"}, {**turn, "content": None if null else ""}]
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


def _call(name: str, arguments: Any, identity: str) -> Message:
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
